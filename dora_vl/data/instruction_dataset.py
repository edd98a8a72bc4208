"""Rows of instructions as samples; what cannot be used comes back named, not raised."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dora_vl.data.dataset import IGNORED_LABEL, Encoded, Rows, Sample, Skipped
from dora_vl.data.instructions import Instruction, read_instruction
from dora_vl.errors import BadSample


class InstructionDataset(torch.utils.data.Dataset["Sample | Skipped"]):
    """Reads and encodes one row at a time.

    Args:
        rows: the records, as `instructions.load_instructions` gives them.
        encode: tokens and labels of an instruction.
    """

    def __init__(self, rows: Rows, *, encode: Callable[[Instruction], Encoded]) -> None:
        self._rows = rows
        self._encode = encode

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample | Skipped:
        sample_id = str(index)
        try:
            row = self._rows[index]
            sample_id = str(row.get("id", index))
            encoded = self._encode(read_instruction(row))
        except BadSample as error:
            return Skipped(index, sample_id, error.reason)
        # The first position has nothing before it to be predicted from, so its label cannot train.
        if not bool((encoded.labels[1:] != IGNORED_LABEL).any()):
            return Skipped(index, sample_id, f"nothing is left to train on in its {len(encoded.labels)} tokens")
        return Sample(
            index=index,
            id=sample_id,
            input_ids=encoded.input_ids,
            labels=encoded.labels,
            cut_tokens=encoded.cut_tokens,
        )
