"""Parameter groups: one for each trained part and weight decay, from the one list of what trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dora_vl.core import TrainedPart
from dora_vl.errors import UserError
from dora_vl.run.recipe import Decayed


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


def with_decay(parts: Sequence[TrainedPart], decayed: Decayed) -> tuple[TrainedPart, ...]:
    """What trains, with the tensors that decay chosen anew.

    Args:
        decayed: `matrices`: as the list says. `all_but_biases`: every tensor that is not called bias, as VL-T5's
            optimizer leaves out names with "bias" or "LayerNorm.weight", the second of which BART's names never have.
    """
    if decayed == "matrices":
        return tuple(parts)
    return tuple(
        TrainedPart(part.name, chosen, weight_decay=not biases)
        for part in parts
        for biases in (False, True)
        if (chosen := {name: one for name, one in part.parameters.items() if _is_bias(name) == biases})
    )


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2] == "bias"


def parameter_groups(
    parts: Sequence[TrainedPart], rates: LearningRates, *, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer. Vectors (magnitudes, norms, biases) do not decay, unless `with_decay` says so.

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
