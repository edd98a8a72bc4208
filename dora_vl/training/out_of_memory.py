"""Too little memory, wherever it shows: one line with the bytes, and which setting to lower to what."""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import psutil
import torch
from transformers import TrainingArguments

from dora_vl.errors import UserError, one_line
from dora_vl.run.recipe import SampleBound
from dora_vl.run.run_settings import RunSettings
from dora_vl.runtime_errors import is_out_of_memory
from dora_vl.training.memory_estimate import GIB

PIXELS_TO_START_WITH = 1280 * 28 * 28
"""Of a picture of a model of dynamic resolution: 1,280 pieces of 28 x 28 (Qwen2-VL's own example)."""
SHORTEST = 64
"""Tokens below which `data.max_tokens` is no longer what to lower."""
_WORKER = "DataLoader worker"
"""How torch begins to say that one was killed."""
_ASKED = re.compile(r"allocate ([\d.]+) ?(bytes|KiB|MiB|GiB|TiB)")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def asked_bytes(error: BaseException) -> int | None:
    """Bytes that the allocator was asked for, as its message says."""
    found = _ASKED.search(str(error))
    return None if found is None else int(float(found[1]) * _UNITS[found[2]])


def free_bytes(device: torch.device) -> int:
    """Bytes that are left: of the GPU, or of the machine and this process's own limit (`ulimit -v`)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free, (limit, _) = psutil.virtual_memory().available, resource.getrlimit(resource.RLIMIT_AS)
    return free if limit == resource.RLIM_INFINITY else max(0, min(free, limit - psutil.Process().memory_info().vms))


def what_did_not_fit(error: BaseException, device: torch.device) -> str:
    """The numbers of an error, in words."""
    asked, free = asked_bytes(error), free_bytes(device)
    wanted = "more was asked for" if asked is None else f"{_in_words(asked)} more were asked for"
    return f"{wanted}, {_in_words(free)} are free on {'the GPU' if device.type == 'cuda' else 'this machine'}"


def _in_words(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB // 100 else f"{size:,} bytes"


@contextlib.contextmanager
def out_of_memory_reported(where: Callable[[], str], device: torch.device, advice: Callable[[], str]) -> Iterator[None]:
    """Turns too little memory into one line.

    Args:
        where: what was being done; asked when it is needed, as is `advice`.
        device: that trains.
        advice: which setting to lower to what.

    Raises:
        UserError: memory was too small.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            one_line(f"out of memory in {where()}: {what_did_not_fit(error, device)}. {advice()}")
        ) from None


@contextlib.contextmanager
def training_fits(trainer: Any, config: RunSettings) -> Iterator[None]:
    """The same around a run's steps, told by the step, or as a validation's; and a line for a data worker's end."""

    def where() -> str:
        validates = not trainer.model.training
        return "the validation" if validates else f"step {trainer.state.global_step + 1}"

    def advice() -> str:
        return (
            what_to_lower(config, trainer.args) if trainer.model.training else smaller_validation(config, trainer.args)
        )

    with out_of_memory_reported(where, trainer.args.device, advice):
        try:
            yield
        except RuntimeError as error:
            if not str(error).startswith(_WORKER):
                raise
            raise UserError(
                f"{one_line(str(error), 120)} It was at step {trainer.state.global_step}; where the memory was "
                f"used up, set data.workers below {config.data.workers}. --resume last resumes from the last checkpoint"
            ) from None


def what_to_lower(config: RunSettings, arguments: TrainingArguments, *, fits: int | None = None) -> str:
    """What makes a training step smaller, with its values, the mildest first.

    Args:
        config: the run's settings.
        arguments: its arguments.
        fits: samples of a micro-batch that were tried and fit; None: nothing was tried.
    """
    micro, parts = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    samples = config.data.step_samples
    if samples is not None and samples > arguments.world_size * parts:
        return (
            f"Set training.gradient_accumulation_steps to {2 * parts} (it is {parts}): the step keeps its "
            f"{samples} samples"
        )
    if micro > 1 and fits != 0:
        smaller = smaller_micro_batch(micro * parts, at_most=fits or micro // 2)
        tried = ", which has been tried and fits," if fits else ""
        return (
            f"Set training.per_device_train_batch_size to {smaller} (it is {micro}){tried} and "
            f"training.gradient_accumulation_steps to {micro * parts // smaller} (it is {parts}): the step keeps its "
            f"{micro * parts * arguments.world_size} samples"
        )
    if not arguments.gradient_checkpointing:
        return "Set training.gradient_checkpointing to true (it is false): slower by about a third, far less memory"
    return _smaller_samples(config.data.sample_bounds)


def smaller_micro_batch(step: int, *, at_most: int) -> int:
    """The largest number of samples up to `at_most` that parts a step evenly, so that it stays the same step."""
    return next(size for size in range(max(1, at_most), 0, -1) if step % size == 0)


def _smaller_samples(bounds: Mapping[SampleBound, int | None]) -> str:
    """Where a micro-batch of one sample is too large, with its activations recomputed."""
    said = []
    if "max_pixels_per_step" in bounds:
        now = bounds["max_pixels_per_step"]
        to = PIXELS_TO_START_WITH if now is None else now // 2
        said.append(f"data.max_pixels_per_step to {to} (it is {'not set' if now is None else now})")
    if (tokens := bounds.get("max_tokens") or 0) > SHORTEST:
        said.append(f"data.max_tokens to {tokens // 2} (it is {tokens})")
    said.append("training.deepspeed to zero3, which shares the weights out among ranks")
    return "Set " + ", or ".join(said)


def smaller_model(config: RunSettings) -> str:
    """What to do where the model alone does not fit."""
    four = ", or model.quantisation to nf4" if config.model.may_be_quantised else ""
    half = ", or model.dtype to bfloat16 (it is float32)" if config.model.dtype == "float32" else ""
    return f"Set training.deepspeed to zero3 with more ranks, or to zero3_offload{half}{four}"


def smaller_validation(config: RunSettings, arguments: TrainingArguments) -> str:
    """What makes a validation batch smaller."""
    if config.data.step_samples is not None:  # such a run validates by the test's batches
        return smaller_test(config)
    size = arguments.per_device_eval_batch_size
    return f"Set training.per_device_eval_batch_size to {max(1, size // 2)} (it is {size})"


def smaller_test(config: RunSettings) -> str:
    """What makes a test's batch smaller."""
    size = config.evaluation.batch_size
    return f"Set evaluation.batch_size to {max(1, size // 2)} (it is {size}); --test_only true tests the adapter again"
