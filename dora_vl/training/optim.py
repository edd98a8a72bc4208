"""Parameter groups: one for each trained part and weight decay, from the one list of what trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from dora_vl.core import TrainedPart
from dora_vl.errors import UserError
from dora_vl.run.recipe import Decayed, OptimConfig


@dataclass(frozen=True)
class LearningRates:
    """Peak learning rate by part."""

    default: float
    by_part: Mapping[str, float]
    """Rate of a part (`dora`, `vision`, `projector`), of a factor in every part (`magnitude`), or of one factor in one
    part (`vision.magnitude`)."""
    b_ratio: float = 1.0
    """B's rate as a multiple of its part's (LoRA+)."""

    def of(self, part: TrainedPart) -> float:
        """The rate of a part: by its whole name, by its part, by its factor, or the default, in this order."""
        if part.name in self.by_part:
            return self.by_part[part.name]
        keys = (key for key in (part.part, part.factor) if key is not None and key in self.by_part)
        rate = next((self.by_part[key] for key in keys), self.default)
        follows = part.factor == "B" and "B" not in self.by_part
        return rate * self.b_ratio if follows else rate


def learning_rates(
    default: float,
    *,
    projector: float | None = None,
    magnitude: float | None = None,
    b_ratio: float = 1.0,
    by_part: Mapping[str, float] | None = None,
) -> LearningRates:
    """Rates from a run's settings: B trains at `b_ratio` times its part's rate (LoRA+), magnitudes never with it.

    Raises:
        UserError: a rate that is said twice.
    """
    short = {name: rate for name, rate in (("projector", projector), ("magnitude", magnitude)) if rate is not None}
    if twice := sorted(set(short) & set(by_part or {})):
        raise UserError(f"optim.rates.{twice[0]} and optim.{twice[0]}_learning_rate say the same; leave one out")
    return LearningRates(default, {**short, **(by_part or {})}, b_ratio)


def rates_of(optim: OptimConfig, default: float) -> LearningRates:
    """The rates that a run's `optim:` section says, `training.learning_rate` being the default."""
    return learning_rates(
        default,
        projector=optim.projector_learning_rate,
        magnitude=optim.magnitude_learning_rate,
        b_ratio=optim.b_learning_rate_ratio,
        by_part=optim.rates,
    )


def refuse_unknown_parts(parts: Sequence[TrainedPart], rates: LearningRates) -> None:
    """Raises a `UserError` where a learning rate is for a part that this run does not train; it names the nearest."""
    trained = {name for part in parts for name in (part.name, part.part, part.factor) if name is not None}
    for unknown in sorted(set(rates.by_part) - trained):
        close = get_close_matches(unknown, trained, n=1, cutoff=0.5)
        names = ", ".join(dict.fromkeys(part.part for part in parts))
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"a learning rate is set for {unknown}, but what trains is {names}{hint}")


def with_decay(parts: Sequence[TrainedPart], decayed: Decayed) -> tuple[TrainedPart, ...]:
    """What trains, with the tensors that decay chosen anew.

    Args:
        decayed: `matrices`: as the list says. `all_but_biases`: every tensor that is not called bias, as VL-T5's
            optimizer leaves out names with "bias" or "LayerNorm.weight", the second of which BART's names never have.
    """
    if decayed == "matrices":
        return tuple(parts)
    return tuple(
        replace(part, parameters=chosen, weight_decay=not biases)
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
    refuse_unknown_parts(parts, rates)
    return [
        {
            "name": part.name,
            "params": list(part.parameters.values()),
            "lr": rates.of(part),
            "weight_decay": weight_decay if part.weight_decay else 0.0,
        }
        for part in parts
        if part.parameters
    ]
