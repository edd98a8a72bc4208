"""What a run will hold in memory on each rank, before the first step."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel, TrainingArguments

from dora_vl.core.quantised import is_quantised

ADAM_STATES = 2
FLOAT32_BYTES = 4
# Vectors of hidden width that a layer keeps for each token: norm inputs, q, k, v and attention output, and four of the
# gated MLP at about 2.7 times the width.
VECTORS_PER_LAYER = 17
GIB = 2**30


@dataclass(frozen=True)
class Table:
    """What is told before the first step: for the log as text, for the run's folder as it is."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        """Lines in columns, the first one's words at the left, numbers at the right."""
        lines = [self.header, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank; activations are rough, the rest is arithmetic."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    on_host: int

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Activations:
    """What the activations' size depends on."""

    tokens: int
    layers: int
    hidden_width: int
    element_bytes: int
    recomputed: bool

    @property
    def bytes(self) -> int:
        """Kept between forward and backward; with recomputation one vector a layer, and one layer whole."""
        vector = self.tokens * self.hidden_width * self.element_bytes
        if self.recomputed:
            return vector * (self.layers + VECTORS_PER_LAYER)
        return vector * self.layers * VECTORS_PER_LAYER


def decoder_activations(model: PreTrainedModel, arguments: TrainingArguments, *, longest_tokens: int) -> Activations:
    """Those of a model's decoder, at the longest sequence."""
    text: Any = model.config.get_text_config()
    return Activations(
        tokens=arguments.per_device_train_batch_size * longest_tokens,
        layers=text.num_hidden_layers,
        hidden_width=text.hidden_size,
        element_bytes=model.dtype.itemsize,
        recomputed=bool(arguments.gradient_checkpointing),
    )


def parameter_count(parameter: nn.Parameter) -> int:
    """Numbers in a parameter; under ZeRO-3 the whole, not this rank's shard."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def weight_count(model: nn.Module) -> int:
    """Numbers in all of a model's parameters; a quantised layer's weight counts as what it stands for, unpacked."""
    unpacked = unpacked_sizes(model)
    return sum(unpacked.get(id(one), parameter_count(one)) for one in model.parameters())


def unpacked_sizes(model: nn.Module) -> dict[int, int]:
    """Identity of each quantised weight -> the numbers that it stands for."""
    unpacked: dict[int, int] = {}
    for module in model.modules():
        if is_quantised(module):
            layer: Any = module
            unpacked[id(next(layer.parameters()))] = layer.in_features * layer.out_features
    return unpacked


def estimate_memory(
    model: nn.Module,
    activations: Activations,
    *,
    zero: Mapping[str, Any] | None,
    world_size: int,
) -> MemoryEstimate:
    """Memory of one rank under a DeepSpeed `zero_optimization` block (None: plain data parallel), with Adam.

    Stage 1 shards the optimizer's state, 2 the gradients too, 3 the weights too. DeepSpeed keeps a float32 copy of
    what trains at every stage from 1 on.
    """
    stage = int((zero or {}).get("stage", 0))
    frozen = sum(parameter_count(one) * one.element_size() for one in model.parameters() if not one.requires_grad)
    trained = [one for one in model.parameters() if one.requires_grad]
    weights = frozen + sum(parameter_count(one) * one.element_size() for one in trained)
    gradients = sum(parameter_count(one) * one.element_size() for one in trained)
    copies = ADAM_STATES + (1 if stage >= 1 else 0)
    optimizer = sum(map(parameter_count, trained)) * FLOAT32_BYTES * copies
    weights //= world_size if stage >= 3 else 1
    gradients //= world_size if stage >= 2 else 1
    optimizer //= world_size if stage >= 1 else 1
    on_host = 0
    if _offloads(zero, "offload_optimizer"):
        on_host, optimizer = on_host + optimizer, 0
    if _offloads(zero, "offload_param"):
        on_host, weights = on_host + weights, 0
    return MemoryEstimate(weights, gradients, optimizer, activations.bytes, on_host)


def _offloads(zero: Mapping[str, Any] | None, what: str) -> bool:
    return (zero or {}).get(what, {}).get("device", "none") != "none"


def memory_table(estimate: MemoryEstimate, *, world_size: int, stage: int) -> Table:
    """The estimate in GiB for one rank."""
    named = {
        "weights": estimate.weights,
        "gradients": estimate.gradients,
        "optimizer": estimate.optimizer,
        "activations (rough)": estimate.activations,
        "total": estimate.total,
    }
    if estimate.on_host:
        named["on the host"] = estimate.on_host
    title = f"memory a rank ({world_size} ranks, ZeRO-{stage})"
    return Table((title, "GiB"), tuple((name, f"{size / GIB:.2f}") for name, size in named.items()))


# Bytes of tensors that are alive at any moment, as seen from the operations that make them.


Storage = torch.UntypedStorage


class LiveBytes(TorchDispatchMode):
    """While it is on, follows every storage that an operation makes: `now` is alive, `peak` the most there was.

    `made` counts the storages.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.made = 0
        self._alive: dict[int, tuple[weakref.ReferenceType[Storage], int, int]] = {}

    def restart_peak(self) -> int:
        """Lets the peak begin at what is alive now, and returns that; garbage in cycles is collected before."""
        gc.collect()
        self.peak = self.now
        return self.now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the operation; what it returns in a storage of its own is new."""
        result = self.run(func, args, kwargs or {})
        unknown = [one for one in storages_of(tree_leaves(result)) if id(one) not in self._alive]
        if unknown:
            given = {id(one) for one in storages_of(tree_leaves((args, kwargs)))}
            for storage in unknown:
                if id(storage) not in given:  # else a view of something older than this count, or it changed in place
                    self._follow(storage)
        return result

    def alive_since(self, made: int) -> int:
        """Bytes of what was made after the first so many storages and is alive."""
        return sum(size for _, size, number in self._alive.values() if number > made)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operation itself."""
        return func(*args, **kwargs)

    def follow_existing(self) -> None:
        """Counts what is there already: every tensor that Python holds, those on the meta device aside."""
        gc.collect()
        for one in gc.get_objects():
            if issubclass(type(one), Tensor) and not one.is_meta:
                for storage in storages_of([one]):
                    if id(storage) not in self._alive:
                        self._follow(storage)

    def _follow(self, storage: Storage) -> None:
        key, size = id(storage), storage.nbytes()

        def died(_: object) -> None:
            del self._alive[key]
            self.now -= size

        self.made += 1
        self._alive[key] = (weakref.ref(storage, died), size, self.made)
        self.now += size
        self.peak = max(self.peak, self.now)


def storages_of(values: Iterable[object]) -> list[Storage]:
    """The storages of the tensors among them."""
    return [one.untyped_storage() for one in values if isinstance(one, Tensor)]


# What a run holds in memory, for its log.


def memory_gib(device: torch.device) -> float:
    """GiB of the rank that holds most; every rank must call it.

    On a GPU the most that torch had allocated since the last call, on a CPU what the process holds now.
    """
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        used = psutil.Process().memory_info().rss
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        most = torch.tensor(used, device=device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        used = int(most)
    return used / GIB
