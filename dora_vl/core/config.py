"""What an adapter is: one frozen dataclass, shared by every backbone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from dora_vl.errors import UserError

Method = Literal["dora", "lora", "full", "magnitude"]
DropoutMode = Literal["low_rank", "whole_change"]
RankScaling = Literal["linear", "sqrt"]


@dataclass(frozen=True, kw_only=True)
class DoRAConfig:
    """How a model is adapted; comparisons between methods differ in `method` alone."""

    targets: tuple[str, ...]
    """Full-name globs of the modules to adapt, e.g. `*language_model*.q_proj`; each must hit at least one."""
    method: Method = "dora"
    """`dora`: A, B and magnitude; `lora`: A and B; `magnitude`: magnitude alone; `full`: the targets' own weights."""
    rank: int = 16
    """Rows of A; the change of a weight has at most this rank before normalisation."""
    alpha: float = 32.0
    """Numerator of the scale s that multiplies B A; see `rank_scaling`."""
    dropout: float = 0.05
    """Probability of dropping an element of the input of the path named by `dropout_mode`, in training."""
    dropout_mode: DropoutMode = "low_rank"
    """`low_rank`: dropout on B A x alone, one frozen product; `whole_change`: as PEFT and the reference, two."""
    detach_norm: bool = True
    """No gradient through the norm (paper section 4.3, 12-24 % less memory); False is the full equation."""
    rank_scaling: RankScaling = "linear"
    """`linear`: s = alpha / rank; `sqrt`: s = alpha / sqrt(rank) (rsLoRA)."""
    also_train: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Further trained parts: name -> full-name globs of parameters, each hitting at least one."""
    also_keep: tuple[str, ...] = ()
    """Full-name globs of frozen tensors that the result depends on, carried by the adapter folder as well."""

    def __post_init__(self) -> None:
        problems = [
            message
            for wrong, message in (
                (not self.targets, "targets is empty; name at least one module, e.g. '*.q_proj'"),
                (self.rank < 1, f"rank is {self.rank}; it must be 1 or more"),
                (not math.isfinite(self.alpha) or self.alpha <= 0, f"alpha is {self.alpha}; it must be above 0"),
                (not 0 <= self.dropout < 1, f"dropout is {self.dropout}; it must be at least 0 and below 1"),
            )
            if wrong
        ]
        if problems:
            raise UserError("adapter: " + "; ".join(problems))

    @property
    def scale(self) -> float:
        """s, the factor of B A."""
        return self.alpha / (self.rank if self.rank_scaling == "linear" else math.sqrt(self.rank))
