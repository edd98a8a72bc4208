"""A second model over the weights of the first: its structure copied, its tensors the same objects."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from torch import Tensor, nn

from dora_vl.adapters.folder import own_name, read_weights
from dora_vl.core.opaque import loose_tensors
from dora_vl.core.trainable import split_rows


def replaced_by(adapter: Path) -> frozenset[str]:
    """Names of the model's tensors that an adapter folder holds values of its own for, such as a projector's."""
    return frozenset(split_rows(own_name(key))[0] for key in read_weights(adapter))


def shared_tensors(model: nn.Module, replaced: Collection[str] = ()) -> dict[int, Tensor]:
    """What `copy.deepcopy` takes as its memo, so that a copy has these tensors themselves: all but the `replaced`."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    shared = {id(tensor): tensor for name, tensor in tensors if name not in replaced}
    return shared | {id(tensor): tensor for tensor in loose_tensors(model)}
