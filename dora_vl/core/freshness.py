"""What makes a value computed from tensors untrue: optimizer steps, edits of any kind, other tensors in their place.

Two sources of truth, since neither sees all. A parameter's `_version` and `data_ptr` stay the same under DeepSpeed ZeRO
0-3 when the engine updates it (measured); torch's optimizer post-hook fires at every step of every optimizer,
DeepSpeed's included (checked under ZeRO 1, 2, 3), and needs no Trainer. Everything else is an edit, which torch counts
in the tensor's version, or another tensor. Torch does not count what goes through `.data`: `WatchedParameter` does.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


class OptimizerSteps:
    """Counts optimizer steps of this process once `watch` was called."""

    def __init__(self) -> None:
        self.count = 0
        self._watching = False

    def watch(self) -> None:
        """Starts counting; called by the first adapted layer, so that importing changes nothing."""
        if not self._watching:
            register_optimizer_step_post_hook(self._advance)
            self._watching = True

    def _advance(self, optimizer: Optimizer, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.count += 1


OPTIMIZER_STEPS = OptimizerSteps()

SHARD_MARKS = frozenset({"ds_status", "_fsdp_flattened"})
"""Attributes of parameters whose `.data` DeepSpeed ZeRO-3 and FSDP1 replace at every pass, without a new value."""


class WatchedParameter(nn.Parameter):
    """An `nn.Parameter` whose `.data` leaves a trace: what is written through it counts as an edit.

    Averaged weights are swapped in by `p.data.copy_`, hand-written optimizers step by `p.data.add_`, and
    `vector_to_parameters` assigns `p.data`. No torch counter moves for any of them.
    """

    data_replaced = 0
    """How often `.data` was assigned."""

    @property
    def data(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The values, without a graph and with this parameter's count of edits."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        torch.Tensor.data.__set__(self, value)  # pyright: ignore[reportAttributeAccessIssue]
        if SHARD_MARKS.isdisjoint(vars(self)):
            self.data_replaced += 1


def watch(tensor: Tensor) -> None:
    """Turns a plain parameter, in place, into one whose `.data` leaves a trace; other tensors stay what they are."""
    if type(tensor) is nn.Parameter:
        tensor.__class__ = WatchedParameter


def unwatch(tensor: Tensor) -> None:
    """Undoes `watch`."""
    if type(tensor) is WatchedParameter:
        tensor.__class__ = nn.Parameter  # pyright: ignore[reportAttributeAccessIssue]


def is_plain_parameter(tensor: object) -> bool:
    """Whether it is an ordinary parameter, watched or not, and none of a quantising or sharding library."""
    return type(tensor) in (nn.Parameter, WatchedParameter)


def version_of(tensor: Tensor) -> int:
    """The count of edits in place, which tensors made under `torch.inference_mode` do not keep."""
    return -1 if tensor.is_inference() else tensor._version


class Snapshot:
    """Some tensors as they are now, and whatever else a value was computed from.

    The tensors are held weakly and compared as objects: an address or an `id` may come again, and another tensor may
    have the same version.
    """

    __slots__ = ("_also", "_tensors", "_versions")

    def __init__(self, tensors: Iterable[Tensor | None], *also: object) -> None:
        present = [tensor for tensor in tensors if tensor is not None]
        for tensor in present:
            watch(tensor)
        self._tensors = [weakref.ref(tensor) for tensor in present]
        self._versions = [_edits(tensor) for tensor in present]
        self._also = also

    def holds(self, tensors: Iterable[Tensor | None], *also: object) -> bool:
        """Whether these are the same tensors, unchanged, and the rest is equal."""
        present = [tensor for tensor in tensors if tensor is not None]
        return (
            len(present) == len(self._tensors)
            and all(ref() is tensor for ref, tensor in zip(self._tensors, present, strict=True))
            and self._versions == [_edits(tensor) for tensor in present]
            and self._also == also
        )

    def __deepcopy__(self, memo: dict[int, object]) -> Snapshot:
        """A copy is of other tensors, so it holds for none."""
        return Snapshot((), object())

    def __reduce__(self) -> tuple[type[Snapshot], tuple[object, ...]]:
        return Snapshot, ((), object)


def _edits(tensor: Tensor) -> int | tuple[int, int]:
    if type(tensor) is WatchedParameter:
        return tensor._version, tensor.data_replaced
    return version_of(tensor)


class EditsInPlace:
    """Whether a tensor was edited in place since, asked without holding its memory."""

    __slots__ = ("_probe", "_version")

    def __init__(self, tensor: Tensor) -> None:
        self._probe = tensor.detach()  # shares the count of edits, and goes on sharing it with another storage
        self._probe.data = tensor.new_empty(0)
        self._version = tensor._version

    def happened(self) -> bool:
        """Whether the count moved."""
        return self._probe._version != self._version
