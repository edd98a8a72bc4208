"""The text that an encoder-decoder is asked with; imports nothing that takes time, as task files need it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The encoder's text. `subtitles` may be cut at their end so that the whole fits; `text` follows them."""

    subtitles_before: str = ""
    subtitles: str = ""
    text: str
