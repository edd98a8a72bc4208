"""Parameter groups: one for each trained part and weight decay, from the one list of what trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dora_vl.core import TrainedPart
from dora_vl.errors import UserError


@dataclass(frozen=True)
class LearningRates:
    """Peak learning rate by part."""

    default: float
    by_part: Mapping[str, float]

    def of(self, part: str) -> float:
        """The rate of a part; the default where it has none of its own."""
        return self.by_part.get(part, self.default)


def learning_rates(
    default: float,
    *,
    projector: float | None = None,
    magnitude: float | None = None,
    b_ratio: float = 1.0,
) -> LearningRates:
    """Rates from a run's settings: B trains at `b_ratio` times the default (LoRA+), magnitudes never with it."""
    chosen = {"projector": projector, "dora.magnitude": magnitude}
    if b_ratio != 1.0:
        chosen["dora.B"] = default * b_ratio
    return LearningRates(default, {part: rate for part, rate in chosen.items() if rate is not None})


def parameter_groups(
    parts: Sequence[TrainedPart], rates: LearningRates, *, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer. Vectors (magnitudes, norms, biases) never decay, whatever `weight_decay` is.

    Raises:
        UserError: a learning rate for a part that this run does not train.
    """
    trained = {part.name for part in parts}
    if unknown := sorted(set(rates.by_part) - trained):
        raise UserError(
            f"a learning rate is set for {', '.join(unknown)}, but what trains is {', '.join(sorted(trained))}"
        )
    return [
        {
            "name": part.name,
            "params": list(part.parameters.values()),
            "lr": rates.of(part.name),
            "weight_decay": weight_decay if part.weight_decay else 0.0,
        }
        for part in parts
        if part.parameters
    ]
