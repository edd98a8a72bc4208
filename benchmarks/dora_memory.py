"""Memory of a training step: frozen model, PEFT LoRA, PEFT DoRA and this project.

    python benchmarks/dora_memory.py --rank 16 128 --dropout 0 0.05 --json benchmarks/results.jsonl

Model and step are those of `dora_step.py`. Two measurements of every contender, in bytes, each without gradient
checkpointing and with both kinds of it, as `gradient_checkpointing_enable` switches them on:

- alive: all that the forward pass made and that is still there when it ends, so what the backward pass needs.
- peak: the most there is within forward, backward and AdamW beyond what is there between steps (weights, the
  optimizer's state). Gradients are in it: this project trains in float32 over a half-precision model, PEFT, as it
  runs here, in half precision.

On a CUDA machine the allocator's own peak is added.
"""

from __future__ import annotations

import argparse
import gc
import weakref
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.contenders import DEVICE, contender, finish, optimizer_of
from benchmarks.dora_step import TRAINED, Tokens, add_options, base_model, loss_of
from benchmarks.report import table, write_json

CHECKPOINTING: dict[str, bool | None] = {"stored": None, "non_reentrant": False, "reentrant": True}
"""Maps a way to keep activations to `use_reentrant` of its checkpoints; None means no checkpointing."""


class LiveBytes(TorchDispatchMode):
    """Follows every storage that an operation makes: `now` bytes are alive, `peak` at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ReferenceType[torch.UntypedStorage]] = {}

    def restart_peak(self) -> int:
        """Lets the peak begin at what is alive now, and returns that; garbage in cycles is collected before."""
        gc.collect()
        self.peak = self.now
        return self.now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        unknown = [storage for storage in storages_of(tree_leaves(result)) if id(storage) not in self._alive]
        if unknown:
            inputs = {id(storage) for storage in storages_of(tree_leaves((args, kwargs)))}
            for storage in unknown:
                if id(storage) not in inputs:  # else a view of something older than this count, or it changed in place
                    self._follow(storage)
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def died(_: object) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, died)
        self.now += size
        self.peak = max(self.peak, self.now)


def storages_of(values: Iterable[object]) -> list[torch.UntypedStorage]:
    """Returns the storages of the tensors among some values."""
    return [value.untyped_storage() for value in values if isinstance(value, Tensor)]


@dataclass(frozen=True)
class Step:
    """Bytes that one training step takes beyond what stays allocated between steps."""

    alive: int
    peak: int
    cuda_peak: int | None


@dataclass(frozen=True)
class Memory:
    """One contender: its gradients, and its step with each way to keep activations."""

    gradients: int
    """Gradients in the dtype that trains. They are part of the peak where activations do not outweigh them."""
    steps: dict[str, Step]


def main() -> None:
    """Measures every setting, prints the tables and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    options = parser.parse_args()
    base = base_model(options)
    tokens = Tokens.random(base.config.vocab_size, options)
    rows = []
    for rank, dropout in product(options.rank, options.dropout):
        measured = {name: memory_of(contender(name, base, rank=rank, dropout=dropout), tokens) for name in TRAINED}
        print(f"\nrank {rank}, dropout {dropout}, {options.dtype}, MiB\n{shown(measured)}")
        sizes = {name: asdict(memory) for name, memory in measured.items()}
        rows.append({"rank": rank, "dropout": dropout, "bytes": sizes})
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    write_json(options.json, {"options": settings, "settings": rows})


def memory_of(model: Any, tokens: Tokens) -> Memory:
    """Measures one contender; gradient checkpointing is left on."""
    model.train()
    optimizer, forward = optimizer_of(model), partial(loss_of, model, tokens)
    steps = {}
    for name, reentrant in CHECKPOINTING.items():
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        steps[name] = step_of(forward, optimizer)
    return Memory(sum(weight.nbytes for weight in model.parameters() if weight.requires_grad), steps)


def step_of(forward: Callable[[], Tensor], optimizer: torch.optim.Optimizer | None) -> Step:
    """Measures the second of two steps; the first fills caches and creates the optimizer's state."""
    with LiveBytes() as live:
        finish(forward(), optimizer)
        between = live.restart_peak()
        loss = forward()
        alive = live.now - between
        finish(loss, optimizer)
        return Step(alive, live.peak - between, cuda_peak(forward, optimizer))


def cuda_peak(forward: Callable[[], Tensor], optimizer: torch.optim.Optimizer | None) -> int | None:
    """Returns the CUDA allocator's peak within a step, weights and optimizer state included."""
    if DEVICE != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    finish(forward(), optimizer)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def shown(measured: dict[str, Memory]) -> str:
    """Formats the table of one setting."""
    lora = measured["peft_lora"]
    heads = ["contender", "gradients"]
    for way in CHECKPOINTING:
        heads += [f"alive {way}", "x peft_lora", f"peak {way}", "x peft_lora"]
    if DEVICE == "cuda":
        heads += [f"CUDA peak {way}" for way in CHECKPOINTING]
    rows: list[list[str]] = []
    for name, memory in measured.items():
        row = [name, mebibytes(memory.gradients)]
        for way, step in memory.steps.items():
            for size, reference in ((step.alive, lora.steps[way].alive), (step.peak, lora.steps[way].peak)):
                row += [mebibytes(size), f"{size / reference:.3f}"]
        rows.append(row + [mebibytes(step.cuda_peak) for step in memory.steps.values() if step.cuda_peak is not None])
    return table(heads, rows)


def mebibytes(size: int) -> str:
    """Formats bytes as MiB with one decimal."""
    return f"{size / 2**20:.1f}"


if __name__ == "__main__":
    main()
