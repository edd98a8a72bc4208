"""Weights in shards over the ranks, by DeepSpeed's ZeRO-3 or by FSDP2: whole where something reads or writes them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from transformers import TrainingArguments


def is_sharded(tensor: Tensor) -> bool:
    """Tells whether a rank holds only a part of the tensor."""
    return "ds_id" in vars(tensor) or isinstance(tensor, DTensor)  # DeepSpeed's mark, and FSDP2's type


@contextlib.contextmanager
def _gathered(tensors: Iterable[Tensor], *, write: bool) -> Iterator[list[Tensor]]:
    tensors = list(tensors)
    sharded = [tensor for tensor in tensors if "ds_id" in vars(tensor)]  # DeepSpeed's mark
    if sharded:
        import deepspeed

        with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if write else None):
            yield tensors
        return
    full = [tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    yield full
    for tensor, values in zip(tensors, full, strict=True):
        if write and isinstance(tensor, DTensor):
            with torch.no_grad():
                tensor.copy_(as_shards(values, tensor))


gather_to_read = partial(_gathered, write=False)
"""Gives sharded tensors whole on every rank; what is written to them is lost."""
gather_to_write = partial(_gathered, write=True)
"""Gives sharded tensors whole on every rank; what the first rank writes becomes part of the shards."""


def as_shards(full: Tensor, like: DTensor) -> DTensor:
    """Spreads the first rank's tensor in shards like another's; every rank must call it."""
    return distribute_tensor(full.to(like.device, like.dtype), like.device_mesh, like.placements)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Lists the layers that FSDP2 gathers one at a time."""
    names = getattr(model, "_no_split_modules", None) or ()
    return [module for module in model.modules() if type(module).__name__ in names]


def shard(model: nn.Module, device: torch.device) -> None:
    """Shards each block's weights over the ranks by FSDP2; they are whole while the block runs."""
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # logits, which nothing changes
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in reversed(blocks_of(model)):  # what is inside before what holds it
        fully_shard(block, mesh=mesh)
    # Whole until its backward pass: losses are found inside the forward, so that nothing would gather it for them.
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, "generate")  # it runs the vision part before any forward
    vars(model)["_is_fsdp_managed_module"] = True  # so that transformers' generate keeps ranks in step


def let_go_of_whole_weights(model: nn.Module) -> None:
    """Makes FSDP2 gather weights again from shards that were written to; it may still hold old ones from a pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def loading_in(dtype: torch.dtype) -> Iterator[None]:
    """Loads a model's weights in `dtype` under ZeRO-3.

    transformers shards while loading (zero.Init) in the number type of DeepSpeed's own bf16/fp16 switch, which is
    off while float32 adapters train: without this a bfloat16 base becomes float32, twice the memory, in silence.
    """
    from transformers.integrations import deepspeed as integration  # not for --help

    config = integration.deepspeed_config()
    if config is None:
        yield
        return
    before = {name: config[name] for name in ("bf16", "fp16") if name in config}
    config |= {"bf16": {"enabled": dtype == torch.bfloat16}, "fp16": {"enabled": dtype == torch.float16}}
    try:
        yield
    finally:
        for name in ("bf16", "fp16"):
            del config[name]
        config |= before


@contextlib.contextmanager
def without_sharding(arguments: TrainingArguments) -> Iterator[None]:
    """Builds models whole, on this rank only, though the run uses ZeRO-3 (whose sharding needs all ranks)."""
    from transformers.integrations import deepspeed as integration  # not for --help

    holder = vars(arguments).get("hf_deepspeed_config")  # set by transformers where DeepSpeed is used
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if holder is not None:
            integration.set_hf_deepspeed_config(holder)


def load_whole_models_again() -> None:
    """Lets models load whole after training, which transformers would go on sharding under the run's ZeRO-3."""
    from transformers.integrations import deepspeed as integration  # not for --help

    integration.unset_hf_deepspeed_config()
