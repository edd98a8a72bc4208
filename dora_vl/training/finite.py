"""Whether weights are numbers: the base's before the first step, what trains before it is saved.

A weight that is NaN or infinite makes every later loss NaN, and an adapter of NaN looks like any other folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from dora_vl.core import TrainedPart
from dora_vl.errors import UserError, shown_names
from dora_vl.run.launch import rank_and_ranks

NAMED_WEIGHTS, LONGEST_WEIGHT = 2, 90
"""How many weights a message names, and how long a module's full name may be in it."""


def check_base_weights(model: nn.Module, base: str) -> None:
    """Reads every weight of a loaded base once; every rank must call it (under ZeRO-3 each reads its own shards).

    Buffers are left out: masks of minus infinity are among them.

    Raises:
        UserError: on every rank, where one holds a weight that is NaN or infinite.
    """
    broken = _on_any_rank(_not_finite(model.named_parameters()))
    if broken:
        raise UserError(
            f"{base}: {len(broken)} of its weights hold NaN or infinity: {_named(broken)}; every loss would be "
            "NaN. Fetch or compose the base again, or set model.dtype: bfloat16 where float16 is too narrow for it"
        )


def check_trained_weights(parts: Sequence[TrainedPart], *, step: int, kept: str | None) -> None:
    """Reads what trains before it is written; every rank must call it.

    Args:
        parts: what trains.
        step: optimizer steps taken, for the message.
        kept: name of the last whole checkpoint; None: there is none.

    Raises:
        UserError: on every rank, where a trained weight is NaN or infinite.
    """
    named = ((name, parameter) for part in parts for name, parameter in part.parameters.items())
    broken = _on_any_rank(_not_finite(named))
    if broken:
        left = f"{kept} is the last whole checkpoint" if kept else "there is no checkpoint before it"
        raise UserError(
            f"step {step}: {len(broken)} trained weights are NaN or infinite ({_named(broken)}), so nothing is "
            f"saved; {left}. Lower training.learning_rate or the part's own in optim.rates, or set "
            "training.max_grad_norm"
        )


def _named(weights: Sequence[str]) -> str:
    return shown_names(weights, NAMED_WEIGHTS, LONGEST_WEIGHT)


def _not_finite(named: Iterable[tuple[str, nn.Parameter]]) -> list[str]:
    """Names of floating weights whose sum is no number; of a sharded one, this rank's share is read."""
    return [name for name, parameter in named if not _is_finite(_held(parameter))]


def _held(parameter: nn.Parameter) -> Tensor:
    return vars(parameter).get("ds_tensor", parameter).detach()  # DeepSpeed's name for this rank's share


def _is_finite(weights: Tensor) -> bool:
    # One pass without a mask as large as the weights; finite half-precision weights cannot overflow a float32 sum.
    if weights.is_meta or not weights.is_floating_point():
        return True
    if weights.dtype == torch.float64:
        return bool(weights.isfinite().all())
    return bool(weights.sum(dtype=torch.float32).isfinite()) or bool(weights.isfinite().all())


def _on_any_rank(names: list[str]) -> list[str]:
    _, ranks = rank_and_ranks()
    if ranks == 1:
        return names
    found: list[list[str]] = [[] for _ in range(ranks)]
    torch.distributed.all_gather_object(found, names)
    return sorted({name for one in found for name in one})
