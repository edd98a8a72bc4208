"""Tells whether a value that a layer has cached, such as its gain, is still valid for its tensors.

A gain is computed once per optimizer step and read in every pass. It becomes invalid after an optimizer step, after any
edit, and when a tensor is replaced. Two signals are needed, since neither sees everything. A parameter's `_version` and
`data_ptr` stay the same under DeepSpeed ZeRO 0-3 when the engine updates it (measured); torch's optimizer post-hook
fires at every step of every optimizer, DeepSpeed's included (checked under ZeRO 1, 2, 3), and needs no Trainer.
Everything else is an edit, which torch counts in the tensor's version, or another tensor. Torch does not count what
goes through a parameter's `.data`: `CountedParameter` does, which every parameter becomes that a value is cached from.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


class OptimizerSteps:
    """Optimizer steps of this process, counted from the call of `watch_optimizers` on."""

    count = 0


@cache
def watch_optimizers() -> None:
    """Starts counting; called by the first adapted layer, so that importing changes nothing."""

    def advance(*_: object) -> None:
        OptimizerSteps.count += 1

    register_optimizer_step_post_hook(advance)


SHARD_MARKS = frozenset({"ds_status", "_fsdp_flattened"})
"""DeepSpeed ZeRO-3 and FSDP1 replace `.data` of parameters with these attributes at every pass, values unchanged."""


class CountedParameter(nn.Parameter):
    """A parameter whose edits through `.data` count; a plain one becomes it, and stays the object that others hold.

    A momentum teacher is kept by `p.data.mul_().add_()`, averaged weights are swapped in by `p.data.copy_`, weights are
    synchronised and loaded by it, hand-written optimizers step by `p.data.add_`, and `vector_to_parameters` assigns
    `p.data`. No torch counter moves for any of them.
    """

    data_replaced = 0
    """Counts how often `.data` was assigned."""

    @property
    def data(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Returns the values, without a graph and with this parameter's count of edits."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        torch.Tensor.data.__set__(self, value)  # pyright: ignore[reportAttributeAccessIssue]
        self.data_replaced += 1


def count_edits(tensors: Iterable[Tensor | None], *, counted: bool = True) -> None:
    """Counts edits through `.data` of the plain parameters among some tensors from now on, or no longer."""
    before, after = (nn.Parameter, CountedParameter) if counted else (CountedParameter, nn.Parameter)
    for tensor in tensors:
        if type(tensor) is before:
            tensor.__class__ = after  # pyright: ignore[reportAttributeAccessIssue] - one is a kind of the other


def edits_of(tensor: Tensor) -> tuple[int, int]:
    """Returns what an edit changes: the count of in-place edits, a shard's too, and what `p.data = ...` replaces.

    Tensors made under `inference_mode` count none.
    """
    if tensor.is_inference():
        return -1, 0
    local = getattr(tensor, "_local_tensor", None)  # what `dcp.load` and `to_local()` write to under a `DTensor`
    if local is not None:
        return tensor._version + local._version, 0
    if isinstance(tensor, CountedParameter) and SHARD_MARKS.isdisjoint(vars(tensor)):
        return tensor._version, tensor.data_replaced
    return tensor._version, 0


class Snapshot:
    """The state of the tensors, and whatever else, that a value was computed from.

    The tensors are held weakly and compared as objects: an address or an `id` may come again, and another tensor may
    have the same version.
    """

    __slots__ = ("_also", "_edits", "_tensors")

    def __init__(self, tensors: Iterable[Tensor | None], *also: object) -> None:
        present = [tensor for tensor in tensors if tensor is not None]
        count_edits(present)
        self._tensors = [weakref.ref(tensor) for tensor in present]
        self._edits = [edits_of(tensor) for tensor in present]
        self._also = also

    def holds(self, tensors: Iterable[Tensor | None], *also: object) -> bool:
        """Tells whether these are the same tensors, unchanged, and the rest is equal."""
        if self._also != also:
            return False
        present = [tensor for tensor in tensors if tensor is not None]
        return (
            len(present) == len(self._tensors)
            and all(ref() is tensor for ref, tensor in zip(self._tensors, present, strict=True))
            and self._edits == [edits_of(tensor) for tensor in present]
        )
