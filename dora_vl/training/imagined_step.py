"""A training step that computes nothing: the model's own code on the meta device, its memory and products counted.

Numbers that a model decides by are whole (ids, masks, grids), and few: they stay real, on the CPU. Weights, activations
and gradients have shapes and number types alone, so a 32B takes seconds and no memory, whatever the architecture.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from dora_vl.training.memory import Phase

Storage = torch.UntypedStorage
aten = torch.ops.aten
META = torch.device("meta")
RANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor)
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_PRODUCTS = {ATTENTION: 4, aten._scaled_dot_product_flash_attention_for_cpu_backward: 10}
"""FLOP for each query, key and number of a head: two products forward, five backward (the scores are made again)."""


class LiveBytes(TorchDispatchMode):
    """Follows every storage that an operation makes: `now` bytes are alive, `peak` at most; `made` counts them."""

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
        result = self.run(func, args, kwargs or {})
        unknown = [storage for storage in storages_of(tree_leaves(result)) if id(storage) not in self._alive]
        if unknown:
            inputs = {id(storage) for storage in storages_of(tree_leaves((args, kwargs)))}
            for storage in unknown:
                if id(storage) not in inputs:  # else a view of something older than this count, or it changed in place
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
        tensors = [value for value in gc.get_objects() if issubclass(type(value), Tensor) and not value.is_meta]
        for storage in storages_of(tensors):
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
    return [value.untyped_storage() for value in values if isinstance(value, Tensor)]


class ImaginedOperations(LiveBytes):
    """Operations on the meta device run on shapes alone; their memory and products (`flop`) are counted.

    Whether a weight is sound and the like is answered as in a healthy run: all is true, nothing is found.
    """

    flop = 0

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operation on shapes; on whole numbers it is the real one."""
        on_cpu = {**kwargs, "device": torch.device("cpu")}
        if func is aten._to_copy.default and (device := kwargs.get("device")) is not None:
            if args[0].is_meta and device.type == "cpu":
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            if not args[0].is_meta and device == META and not args[0].is_floating_point():
                return func(*args, **on_cpu)
        if func is aten.nonzero.default and args[0].is_meta:
            return torch.empty((0, args[0].dim()), dtype=torch.int64)
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 1
        if func in RANGES and kwargs.get("device") == META and kwargs.get("dtype") in (None, torch.int64):
            return func(*args, **on_cpu)
        are_meta = [value.is_meta for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        imagined = any(are_meta)
        if imagined and not all(are_meta):
            if func in INDEXED:
                args = (args[0], _positions(args[1]), *args[2:])
            args, kwargs = tree_map(_without_values, (args, kwargs))
        result = func(*args, **kwargs)
        if imagined:
            self.flop += _flop(func, args, kwargs, result)
        return result


def _positions(indices: Any) -> list[Any]:
    """Indices with each real mask as the positions that it chooses, so that the result's shape is known."""
    positions: list[Any] = []
    for index in indices:
        is_mask = isinstance(index, Tensor) and index.dtype == torch.bool and not index.is_meta
        positions += index.nonzero(as_tuple=True) if is_mask else [index]
    return positions


def _without_values(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.is_meta:
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=META)


def _flop(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    packet = func.overloadpacket
    if packet in ATTENTION_PRODUCTS:
        query, key = (args[1], args[2]) if packet is not ATTENTION else (args[0], args[1])
        return ATTENTION_PRODUCTS[packet] * query.numel() * key.shape[-2]
    counted = flop_registry.get(packet)
    return 0 if counted is None else counted(*args, **kwargs, out_val=result)


def _attention(  # noqa: PLR0913 - torch's own signature
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As the kernels of GPUs and CPUs do it: no matrix of scores is kept; on meta torch would take the plain one."""
    if enable_gqa:
        key, value = (heads.repeat_interleave(query.shape[-3] // heads.shape[-3], -3) for heads in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = query.new_empty(attn_mask.shape)
    return ATTENTION(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


@contextlib.contextmanager
def _meta_device_understood() -> Iterator[None]:
    """torch has no autocast of the meta device, where asking raises, and no fused attention there."""
    enabled, autocast = torch.is_autocast_enabled, torch.autocast

    def imagined_autocast(kind: str, *options: Any, **named: Any) -> Any:
        return contextlib.nullcontext() if kind == "meta" else autocast(kind, *options, **named)

    replaced: list[tuple[Any, str, Any]] = [
        (torch, "is_autocast_enabled", lambda *kind: kind != ("meta",) and enabled(*kind)),
        (torch, "autocast", imagined_autocast),
        (functional, "scaled_dot_product_attention", _attention),
    ]
    with contextlib.ExitStack() as stack:
        for module, name, function in replaced:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, function)
        yield


@dataclass(frozen=True)
class StepBytes:
    """Bytes of one micro-batch, what was there before it not counted, and its products.

    Attributes:
        kept: what the layers keep for the backward pass.
        logits: logits and what the loss keeps of them.
        phases: the forward pass with the loss, and then gradient by gradient.
        flop: of forward and backward, a recomputation among them.
    """

    kept: int
    logits: int
    phases: tuple[Phase, ...]
    flop: int

    @property
    def working(self) -> int:
        """What the passes need beside what they keep."""
        return max(0, max(phase.most for phase in self.phases) - self.kept - self.logits)


def imagine_step(loss: nn.Module, head: nn.Module, batch: Mapping[str, Tensor]) -> StepBytes:
    """The second of two micro-batches through a model on the meta device; the first one fills caches.

    `loss` is in training mode; at its output layer `head` the logits begin. In `batch` whole numbers are real.
    """
    forward: Callable[..., Mapping[str, Tensor]] = loss
    at_head: list[int] = []
    phases: list[Phase] = []
    came = before = 0

    def gradient_came(parameter: Tensor) -> None:
        nonlocal came
        phases.append(Phase(came, live.peak - before))
        came += parameter.numel() * parameter.element_size()
        parameter.grad = None
        live.peak = live.now

    with contextlib.ExitStack() as stack:
        stack.enter_context(_meta_device_understood())
        live = stack.enter_context(ImaginedOperations())
        stack.callback(head.register_forward_pre_hook(lambda *_: at_head.append(live.made)).remove)
        for parameter in loss.parameters():
            if parameter.requires_grad:
                stack.callback(parameter.register_post_accumulate_grad_hook(gradient_came).remove)
        forward(**batch)["loss"].backward()
        before, flop = live.restart_peak(), live.flop
        at_head.clear()
        phases.clear()
        came = 0
        result = forward(**batch)["loss"]
        logits = live.alive_since(at_head[0])
        kept = live.now - before - logits
        result.backward()
        phases.append(Phase(came, live.peak - before))
        return StepBytes(kept, logits, tuple(phases), live.flop - flop)
