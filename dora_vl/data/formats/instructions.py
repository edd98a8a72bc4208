"""Instructions: `instruction`, `input`, `output` (Alpaca, LLaMA-Factory)."""

from __future__ import annotations

from dataclasses import replace

from dora_vl.data.column_names import Row
from dora_vl.data.conversation import as_text
from dora_vl.data.example import Answer, Example
from dora_vl.data.formats.conversations import earlier_rounds
from dora_vl.data.formats.row_format import Resolved, RowFormat
from dora_vl.data.turns import Turn, Unusable
from dora_vl.errors import EMPTY_ANSWER


def instruction_output(row: Row) -> list[object]:
    """Reads an instruction, whose input comes below it, and its output."""
    instruction, added, output = (as_text(row.get(name), name) for name in ("instruction", "input", "output"))
    if not output.strip():
        raise Unusable("'output' is empty", EMPTY_ANSWER)
    question = f"{instruction}\n{added}" if instruction and added else instruction or added
    return [*earlier_rounds(row), Turn("user", question, len(added)), Turn("assistant", output)]


def _with_scored(example: Example, resolved: Resolved) -> Example:
    """Adds the answer that is scored, which LLM-Adapters' sets have beside the output."""
    scored = resolved.fields.get("scored")
    return replace(example, answers=(Answer(text=scored),)) if isinstance(scored, str) and scored else example


INSTRUCTIONS = (
    RowFormat(
        "instructions",
        ("instruction", "output"),
        instruction_output,
        ("input", "history", "scored"),
        complete=_with_scored,
    ),
)
