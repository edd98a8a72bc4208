"""The formats that a row can have, in the order in which they are tried."""

from __future__ import annotations

from dora_vl.data.formats.conversations import CONVERSATIONS
from dora_vl.data.formats.grounded import GROUNDED
from dora_vl.data.formats.instructions import INSTRUCTIONS
from dora_vl.data.formats.preferences import PREFERENCES
from dora_vl.data.formats.questions import CAPTIONS, QUESTIONS
from dora_vl.data.formats.records import RECORDS

FORMATS = (*PREFERENCES, *CONVERSATIONS, *RECORDS, *QUESTIONS, *INSTRUCTIONS, *CAPTIONS, *GROUNDED)
"""A row has the first of these formats that fits it."""
