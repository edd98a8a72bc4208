"""Memory of a training step: frozen model, PEFT LoRA, PEFT DoRA and this project.

    python benchmarks/dora_memory.py --rank 16 128 --dropout 0 0.05 --json benchmarks/results.jsonl

Model and step are those of `dora_step.py`. Three measurements of every contender, in bytes:

- saved: what the graph keeps for the backward pass, each storage once, the model's own tensors not counted. What
  autograd's hooks do not see is followed too: attributes of nodes written in Python, such as this project's gains and
  dropped positions.
- alive: all that the forward pass made and that is still there when it ends. Without gradient checkpointing this is
  `saved` and a few tensors that nobody saves, found independently. With checkpointing, whose closures no hook can see,
  it is the figure; both kinds of checkpointing, as `gradient_checkpointing_enable` switches them on.
- peak: the most there is within forward, backward and AdamW beyond what stands between steps (weights, the
  optimizer's state). Gradients are in it: this project trains in float32 over a half-precision model, PEFT, as it
  runs here, in half precision.

On a CUDA machine the allocator's own peak is added.
"""

from __future__ import annotations

import argparse
import gc
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.contenders import DEVICE, contender
from benchmarks.dora_step import TRAINED, Tokens, add_options, base_model, loss_of, tokens_of
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
    """Returns the storages of the tensors among them."""
    return [value.untyped_storage() for value in values if isinstance(value, Tensor)]


@dataclass(frozen=True)
class Step:
    """Bytes that one training step takes beyond what stays allocated between steps."""

    alive: int
    peak: int
    cuda_peak: int | None


@dataclass(frozen=True)
class Memory:
    """One contender: what its graph saves, and its step with each way to keep activations."""

    saved: Saved
    gradients: int
    """Gradients in the dtype that trains. They are part of the peak where activations do not outweigh them."""
    steps: dict[str, Step]


def main() -> None:
    """Measures every setting, prints the tables and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    options = parser.parse_args()
    base = base_model(options)
    tokens = tokens_of(options, base.config.vocab_size)
    rows = []
    for rank, dropout in product(options.rank, options.dropout):
        measured = {name: memory_of(contender(name, base, rank=rank, dropout=dropout), tokens) for name in TRAINED}
        print(f"\nrank {rank}, dropout {dropout}, {options.dtype}, MiB\n{shown(measured)}")
        rows.append({"rank": rank, "dropout": dropout, **figures(measured)})
    if options.json is not None:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        write_json(options.json, {"options": settings, "settings": rows})


def memory_of(model: Any, tokens: Tokens) -> Memory:
    """Measures one contender; gradient checkpointing is left on."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True) if trained else None
    forward = partial(loss_of, model, tokens)
    loss, saved = saved_for_backward(forward, model)
    finish(loss, optimizer)
    steps = {}
    for name, reentrant in CHECKPOINTING.items():
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        steps[name] = step_of(forward, optimizer)
    return Memory(saved, sum(parameter.nbytes for parameter in trained), steps)


def step_of(forward: Callable[[], Tensor], optimizer: torch.optim.Optimizer | None) -> Step:
    """Measures the second of two steps; the first fills caches and creates the optimizer's state."""
    with LiveBytes() as live:
        finish(forward(), optimizer)
        between = live.restart_peak()
        loss = forward()
        alive = live.now - between
        finish(loss, optimizer)
        return Step(alive, live.peak - between, cuda_peak(forward, optimizer))


def finish(loss: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    """Runs backward and AdamW."""
    loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()


def cuda_peak(forward: Callable[[], Tensor], optimizer: torch.optim.Optimizer | None) -> int | None:
    """Returns the CUDA allocator's peak within a step, weights and optimizer state included."""
    if DEVICE != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    finish(forward(), optimizer)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def figures(measured: dict[str, Memory]) -> dict[str, Any]:
    """Builds one row of the JSON; its ratio is that of the worse kind of checkpointing."""

    def ratio(read: Callable[[Memory], int], to: str) -> float:
        return round(read(measured["ours"]) / read(measured[to]), 4)

    def checkpointed(read: Callable[[Step], int]) -> float:
        ways = [way for way, reentrant in CHECKPOINTING.items() if reentrant is not None]
        return max(ratio(lambda memory, way=way: read(memory.steps[way]), "peft_lora") for way in ways)

    return {
        "saved_bytes_vs_peft_lora": ratio(lambda memory: memory.saved.total, "peft_lora"),
        "saved_bytes_vs_peft_dora": ratio(lambda memory: memory.saved.total, "peft_dora"),
        "saved_bytes_vs_peft_lora_checkpointed": checkpointed(lambda step: step.alive),
        "peak_bytes_vs_peft_lora": ratio(lambda memory: memory.steps["stored"].peak, "peft_lora"),
        "peak_bytes_vs_peft_dora": ratio(lambda memory: memory.steps["stored"].peak, "peft_dora"),
        "peak_bytes_vs_peft_lora_checkpointed": checkpointed(lambda step: step.peak),
        "bytes": {name: asdict(memory) for name, memory in measured.items()},
    }


def shown(measured: dict[str, Memory]) -> str:
    """Formats the table of one setting."""
    lora = measured["peft_lora"]
    heads = ["contender", "saved", "x peft_lora", "outside hooks", "gradients"]
    for way in CHECKPOINTING:
        heads += [f"alive {way}", "x peft_lora", f"peak {way}", "x peft_lora"]
    if DEVICE == "cuda":
        heads += [f"CUDA peak {way}" for way in CHECKPOINTING]
    return table(heads, [cells(name, memory, lora) for name, memory in measured.items()])


def cells(name: str, memory: Memory, lora: Memory) -> list[object]:
    """Formats one row of the table."""

    def beside(size: int, reference: int) -> tuple[str, str]:
        return mebibytes(size), f"{size / reference:.3f}"

    row: list[object] = [name, *beside(memory.saved.total, lora.saved.total)]
    row += [mebibytes(memory.saved.outside_hooks), mebibytes(memory.gradients)]
    for way, step in memory.steps.items():
        row += [*beside(step.alive, lora.steps[way].alive), *beside(step.peak, lora.steps[way].peak)]
    return row + [mebibytes(step.cuda_peak) for step in memory.steps.values() if step.cuda_peak is not None]


def mebibytes(size: int) -> str:
    """Formats bytes as MiB with one decimal."""
    return f"{size / 2**20:.1f}"


Storage = torch.UntypedStorage
NOT_FOLLOWED = (Node, nn.Module, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)
"""The search does not follow these: graph nodes are visited anyway, modules and code lead to the whole interpreter."""


@dataclass(frozen=True)
class Saved:
    """Bytes that a graph keeps for its backward pass; each storage counts once, the model's own tensors do not."""

    total: int
    outside_hooks: int
    """Bytes found only in attributes of nodes written in Python, which autograd's hooks do not see."""


def saved_for_backward(forward: Callable[[], Tensor], model: nn.Module) -> tuple[Tensor, Saved]:
    """Runs `forward` and measures what its graph saves; the caller must run the backward pass."""
    hooked: list[weakref.ReferenceType[Storage]] = []

    def pack(tensor: Tensor) -> Tensor:
        hooked.append(weakref.ref(tensor.untyped_storage()))
        return tensor  # itself: another object would end sharing by weak reference

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    gc.collect()
    seen = {id(storage) for storage in storages_of([*model.parameters(), *model.buffers()])}
    by_hooks = _bytes_not_in(seen, [storage for reference in hooked if (storage := reference()) is not None])
    outside = _bytes_not_in(seen, storages_of(attribute_tensors(result)))
    return result, Saved(by_hooks + outside, outside)


def attribute_tensors(result: Tensor) -> Iterator[Tensor]:
    """Finds tensors that the graph's nodes hold as Python attributes, in objects of any kind."""
    assert result.grad_fn is not None
    nodes, seen = [result.grad_fn], {result.grad_fn}
    while nodes:
        node = nodes.pop()
        if isinstance(node, BackwardCFunction):
            yield from _tensors_within(vars(node))
        fresh = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= fresh
        nodes.extend(fresh)


def _tensors_within(root: object) -> Iterator[Tensor]:
    waiting, seen = [root], {id(root)}
    while waiting:
        for referent in gc.get_referents(waiting.pop()):
            if isinstance(referent, Tensor):
                yield referent
            elif id(referent) not in seen and not isinstance(referent, NOT_FOLLOWED):
                seen.add(id(referent))
                waiting.append(referent)


def _bytes_not_in(seen: set[int], storages: Iterable[Storage]) -> int:
    """Sums the storages not seen so far and marks them as seen."""
    total = 0
    for storage in storages:
        if id(storage) not in seen:
            seen.add(id(storage))
            total += storage.nbytes()
    return total


if __name__ == "__main__":
    main()
