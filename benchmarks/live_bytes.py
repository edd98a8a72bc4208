"""What a training step holds in memory: bytes kept for the backward pass, and bytes alive at any moment of the step.

Two counts that know nothing of each other, so that one can be held against the other:

`saved_for_backward` asks autograd. It sees every tensor that a node saves (`saved_tensors_hooks`) and every tensor that
a node written in Python keeps as an attribute, which the hooks never see: such a node's attributes are followed
through whatever objects they are, down to the tensors.

`LiveBytes` (`dora_vl/training/live_bytes.py`) asks nobody. It sees the result of every operation and is told when its
storage dies, so it counts what the two questions above could forget: closures of a checkpoint, caches, gradients, what
an operation needs for a moment.
What a kernel allocates and frees inside itself is not seen.
"""

from __future__ import annotations

import gc
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node, saved_tensors_hooks

from dora_vl.training.imagined_step import LiveBytes, storages_of

Storage = torch.UntypedStorage
__all__ = ["LiveBytes", "Saved", "saved_for_backward"]
NOT_FOLLOWED = (Node, nn.Module, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)
"""A node's neighbours in the graph are visited as nodes; modules and code lead to the whole model and interpreter."""


@dataclass(frozen=True)
class Saved:
    """Bytes that a graph keeps for its backward pass, the model's own tensors not counted, each storage once."""

    total: int
    outside_hooks: int
    """The part of it that stands in attributes of nodes written in Python alone."""


def saved_for_backward(forward: Callable[[], Tensor], model: nn.Module) -> tuple[Tensor, Saved]:
    """The result of `forward`, on which the caller must run the backward pass, with what its graph keeps."""
    hooked: list[weakref.ReferenceType[Storage]] = []

    def pack(tensor: Tensor) -> Tensor:
        hooked.append(weakref.ref(tensor.untyped_storage()))
        return tensor  # itself: another object would end sharing by weak reference

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    gc.collect()
    seen = {id(one) for one in storages_of([*model.parameters(), *model.buffers()])}
    by_hooks = _bytes_not_in(seen, [storage for one in hooked if (storage := one()) is not None])
    outside = _bytes_not_in(seen, storages_of(attribute_tensors(result)))
    return result, Saved(by_hooks + outside, outside)


def attribute_tensors(result: Tensor) -> Iterator[Tensor]:
    """Tensors that the graph's nodes hold as Python attributes, in objects of any kind."""
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
        for one in gc.get_referents(waiting.pop()):
            if isinstance(one, Tensor):
                yield one
            elif id(one) not in seen and not isinstance(one, NOT_FOLLOWED):
                seen.add(id(one))
                waiting.append(one)


def _bytes_not_in(seen: set[int], storages: Iterable[Storage]) -> int:
    """Bytes of the storages not seen so far, which are seen from then on."""
    total = 0
    for storage in storages:
        if id(storage) not in seen:
            seen.add(id(storage))
            total += storage.nbytes()
    return total
