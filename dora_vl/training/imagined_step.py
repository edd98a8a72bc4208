"""A training step that computes nothing: the model's own code on the meta device, its memory and products counted.

Numbers that a model decides by are whole (ids, masks, grids, places), and there are few of them: they stay real, on the
CPU. Weights, activations and gradients have shapes and number types alone. So the model's forward, the loss, autograd
and a checkpoint's recomputation run as they are, whatever the architecture, and a 32B takes seconds and no memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from dora_vl.training.live_bytes import LiveBytes

aten = torch.ops.aten
META = torch.device("meta")
RANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor)
TAKES = {aten.nonzero.default, aten._local_scalar_dense.default, aten._to_copy.default}
"""What asks a tensor for its values."""
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_PRODUCTS = {ATTENTION: 4, aten._scaled_dot_product_flash_attention_for_cpu_backward: 10}
"""FLOP for each query, key and number of a head: two products forward, five backward (the scores are made again)."""


class ImaginedOperations(LiveBytes):
    """While it is on, operations on the meta device take place in thought; their memory and products are counted.

    Whether a weight is sound and the like is answered as it is in a healthy run: all is true, nothing is found.

    Attributes:
        flop: floating-point operations of the matrix products so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flop = 0

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operation on shapes; on whole numbers it is the real one."""
        if func in TAKES and isinstance(args[0], Tensor) and (answer := _answered(func, args[0], kwargs)) is not None:
            return answer
        if func in RANGES and kwargs.get("device") == META and kwargs.get("dtype") in (None, torch.int64):
            return func(*args, **{**kwargs, "device": torch.device("cpu")})
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        imagined = any(one.is_meta for one in tensors)
        if imagined and not all(one.is_meta for one in tensors):
            if func in INDEXED:
                args = (args[0], _places(args[1]), *args[2:])
            args, kwargs = tree_map(_without_values, (args, kwargs))
        result = func(*args, **kwargs)
        if imagined:
            self.flop += _flop(func, args, kwargs, result)
        return result


def _answered(func: Any, tensor: Tensor, kwargs: Mapping[str, Any]) -> Any:
    """What a healthy run's values would say; None: the operation needs no answer."""
    if func is aten._to_copy.default:
        device = kwargs.get("device")
        if tensor.is_meta and device is not None and device.type == "cpu":
            return torch.ones(tensor.shape, dtype=kwargs.get("dtype") or tensor.dtype)
        if not tensor.is_meta and device == META and not tensor.is_floating_point():
            return func(tensor, **{**kwargs, "device": torch.device("cpu")})
        return None
    if not tensor.is_meta:
        return None
    if func is aten.nonzero.default:
        return torch.empty((0, tensor.dim()), dtype=torch.int64)
    return True if tensor.dtype == torch.bool else 1


def _places(indices: Any) -> list[Any]:
    """Indices with each real mask as the places that it chooses, so that the result's shape is known."""
    found: list[Any] = []
    for one in indices:
        is_mask = isinstance(one, Tensor) and one.dtype == torch.bool and not one.is_meta
        found += one.nonzero(as_tuple=True) if is_mask else [one]
    return found


def _without_values(one: Any) -> Any:
    if not isinstance(one, Tensor) or one.is_meta:
        return one
    return torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device=META)


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
        key, value = (one.repeat_interleave(query.shape[-3] // one.shape[-3], -3) for one in (key, value))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = query.new_empty(attn_mask.shape)
    return ATTENTION(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


@contextlib.contextmanager
def meta_device_understood() -> Iterator[None]:
    """torch has no autocast of the meta device, and asking raises."""
    asked, entered = torch.is_autocast_enabled, torch.autocast

    def enabled(*kind: Any) -> bool:
        return False if kind == ("meta",) else asked(*kind)

    def autocast(device_type: str, *options: Any, **named: Any) -> Any:
        return nullcontext() if device_type == "meta" else entered(device_type, *options, **named)

    with (
        mock.patch.object(torch, "is_autocast_enabled", enabled),
        mock.patch.object(torch, "autocast", autocast),
        mock.patch.object(functional, "scaled_dot_product_attention", _attention),
    ):
        yield


@dataclass(frozen=True)
class Phase:
    """A micro-batch from one gradient of what trains to the next.

    Attributes:
        came: bytes of gradients that came before; an engine keeps them or takes them away.
        most: bytes at the fullest moment, those gradients not counted.
    """

    came: int
    most: int


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
        return max(0, max(one.most for one in self.phases) - self.kept - self.logits)


def imagine_step(loss: nn.Module, head: nn.Module, batch: Mapping[str, Tensor]) -> StepBytes:
    """The second of two micro-batches through a model on the meta device; the first one fills caches.

    Args:
        loss: the module that is trained (`LossModel`), in training mode.
        head: its output layer, before which the logits begin.
        batch: whole numbers real, pictures on the meta device.
    """
    at_head: list[int] = []
    phases: list[Phase] = []
    came = before = 0

    def gradient_came(parameter: Tensor) -> None:
        nonlocal came
        phases.append(Phase(came, live.peak - before))
        came += parameter.numel() * parameter.element_size()
        parameter.grad = None
        live.peak = live.now

    with meta_device_understood(), ImaginedOperations() as live:
        hooks = [head.register_forward_pre_hook(lambda *_: at_head.append(live.made))]
        trained = [one for one in loss.parameters() if one.requires_grad]
        hooks += [one.register_post_accumulate_grad_hook(gradient_came) for one in trained]
        try:
            _forward(loss, batch).backward()
            before, flop = live.restart_peak(), live.flop
            at_head.clear()
            phases.clear()
            came = 0
            result = _forward(loss, batch)
            logits = live.alive_since(at_head[0])
            kept = live.now - before - logits
            result.backward()
            phases.append(Phase(came, live.peak - before))
            found = StepBytes(kept, logits, tuple(phases), live.flop - flop)
        finally:
            for hook in hooks:
                hook.remove()
    return found


def _forward(loss: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    call: Callable[..., Mapping[str, Tensor]] = loss
    return call(**batch)["loss"]
