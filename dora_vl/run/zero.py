"""What ZeRO-3 asks of the code around it: gathering, loading in the base's number type, staying out of the way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.integrations import deepspeed as integration


def gather_to_read(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
    """Makes sharded parameters whole on every rank; what is written to them is lost."""
    return _gathered(parameters, modifier_rank=None)


def gather_to_write(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
    """Makes sharded parameters whole on every rank; what the first rank writes becomes part of the shards."""
    return _gathered(parameters, modifier_rank=0)


def _gathered(parameters: Iterable[nn.Parameter], *, modifier_rank: int | None) -> AbstractContextManager[None]:
    sharded = [one for one in parameters if "ds_id" in vars(one)]  # DeepSpeed's own mark of a sharded parameter
    if not sharded:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded, modifier_rank=modifier_rank)


@contextlib.contextmanager
def loading_in(dtype: torch.dtype) -> Iterator[None]:
    """Loads a model's weights in `dtype` under ZeRO-3.

    transformers shards while loading (zero.Init) in the number type of DeepSpeed's own bf16/fp16 switch, which is
    off while float32 adapters train: without this a bfloat16 base becomes float32, twice the memory, in silence.
    """
    config = integration.deepspeed_config()
    if config is None:
        yield
        return
    before = {name: config.get(name) for name in ("bf16", "fp16")}
    config["bf16"] = {"enabled": dtype == torch.bfloat16}
    config["fp16"] = {"enabled": dtype == torch.float16}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del config[name]
            else:
                config[name] = value


@contextlib.contextmanager
def without_sharding(arguments: TrainingArguments) -> Iterator[None]:
    """Builds models whole, on this rank alone, though the run uses ZeRO-3 (whose sharding needs all ranks)."""
    holder = vars(arguments).get("hf_deepspeed_config")  # set by transformers where DeepSpeed is used
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if holder is not None:
            integration.set_hf_deepspeed_config(holder)


def load_whole_models_again() -> None:
    """After training, models load whole: transformers would go on sharding them under the run's ZeRO-3."""
    integration.unset_hf_deepspeed_config()
