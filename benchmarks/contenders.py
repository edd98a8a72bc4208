"""Adapted copies of one model that `dora_step.py` and `dora_memory.py` measure in turns.

PEFT runs with `autocast_adapter_dtype=False`, its faster setting. B and the magnitudes are moved from their initial
values, so that nobody is timed on a change that is zero.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import median, table
from dora_vl import DoRAConfig, apply_dora, merge_dora

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def contender(name: str, base: Any, *, rank: int, dropout: float) -> Any:
    """Copies the base and adapts the copy by a name in the tables; alpha is twice the rank, as in the paper."""
    torch.manual_seed(1)
    model = copy.deepcopy(base)
    if name == "frozen":
        return model.requires_grad_(False)
    if name.startswith("ours"):
        targets = tuple(f"*{projection}" for projection in PROJECTIONS)
        apply_dora(model, DoRAConfig(rank=rank, alpha=2.0 * rank, dropout=dropout, targets=targets))
    else:
        from peft import LoraConfig, get_peft_model  # it takes seconds, and says things where there is no GPU

        places = {"target_modules": list(PROJECTIONS), "use_dora": name != "peft_lora"}
        config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, **places)
        model = get_peft_model(model, config, autocast_adapter_dtype=False).get_base_model()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                scale = 1e-3 if parameter.ndim > 1 else 1e-2 * float(parameter.float().mean())
                parameter.add_(torch.randn_like(parameter) * scale)
    if name == "ours_merged":
        merge_dora(model, keep_base=False)
    if name == "peft_dora_accelerated":
        from dora_vl.adapters.peft_model import accelerate_peft

        accelerate_peft(model)
    return model


def optimizer_of(model: Any) -> torch.optim.Optimizer | None:
    """Returns an AdamW of what trains; None where nothing does."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-6, fused=True) if trained else None


def finish(loss: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    """Runs backward and AdamW."""
    loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()


def train_step(model: Any, loss: Callable[[Any], Tensor]) -> Callable[[], None]:
    """Makes a step of forward, backward and AdamW; AdamW makes the norms due every time."""
    optimizer = optimizer_of(model)

    def step() -> None:
        model.train()
        finish(loss(model), optimizer)

    return step


class Turns:
    """Seconds that each contender took in each round."""

    def __init__(self, rounds: Sequence[Mapping[str, float]]) -> None:
        self.rounds = rounds

    @property
    def milliseconds(self) -> dict[str, float]:
        """Returns the median over rounds."""
        return {name: round(1e3 * median([each[name] for each in self.rounds]), 3) for name in self.rounds[0]}

    def ratio(self, name: str, to: str) -> float:
        """Returns the median over rounds of the ratio to another contender in the same round."""
        return round(median([each[name] / each[to] for each in self.rounds]), 4)

    def shown(self, reference: str) -> str:
        """Formats the table."""
        rows = [(name, ms, self.ratio(name, reference)) for name, ms in self.milliseconds.items()]
        return table(("contender", "ms (median)", f"x {reference}"), rows)


def take_turns(
    steps: Mapping[str, Callable[[], None]], *, rounds: int, repeats: int, clock: str = "wall", warm_up: int = 2
) -> Turns:
    """Times everybody in rounds of a few steps each, after a warm-up; a round counts by its median."""
    for step in steps.values():
        for _ in range(warm_up):
            step()
    return Turns(
        [
            {name: median([seconds(step, clock) for _ in range(repeats)]) for name, step in steps.items()}
            for _ in range(rounds)
        ]
    )


def seconds(step: Callable[[], None], clock: str = "wall") -> float:
    """Measures one step in seconds and waits for the GPU to finish."""
    now = CLOCKS[clock]
    started = now()
    step()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return now() - started
