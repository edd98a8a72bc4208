"""The largest micro-batch that the data can give, tried before the first step and undone: what does not fit ends there.

A run that ends for memory does so at its longest sample, which may come after hours. Here a step is taken over that
one: with the optimizer's state in its place, gradients that are zero and a learning rate of zero. Afterwards weights,
optimizer and generators are as they were, to the bit.
"""

from __future__ import annotations

import contextlib
import logging
import re
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import psutil
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dora_vl.data.samples import BOOKKEEPING, IGNORED_LABEL, Sample
from dora_vl.errors import UserError, is_out_of_memory, one_line
from dora_vl.training.checkpoint import loss_scale_of
from dora_vl.training.memory import GIB, Activations, memory_gib
from dora_vl.training.recipe import RunSettings, SampleBound
from dora_vl.training.seq2seq_tasks import MicroBatch, Seq2SeqSample, over_step
from dora_vl.training.validation import random_state_kept

# Too little memory, wherever it shows: one line with the bytes, and which setting to lower to what.


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


logger = logging.getLogger(__name__)

BYTES_PER_SCORE = 12
"""Of a vocabulary's score at a labelled place: its float32, that one's gradient, and both as the model makes them."""
Pool = Sequence[Any]
"""Items of which a loader can make one micro-batch."""


class LargestBatch(TrainerCallback):
    """Tries the largest micro-batch when training begins; every rank tries the same one at the same time.

    Args:
        trainer: whose model and optimizer are used; with them its arguments.
        config: the run's settings, for the message.
        pools: what micro-batches are drawn from, the largest items of each.
        cost: of a micro-batch, in any unit.
        collate: a batch of items.

    Raises: UserError at the start of training, where it does not fit.
    """

    def __init__(
        self,
        trainer: Any,
        config: RunSettings,
        *,
        pools: Callable[[], Sequence[Pool]],
        cost: Callable[[Pool], int],
        collate: Callable[[list[Any]], Mapping[str, Any]],
    ) -> None:
        self._trainer = trainer
        self._config = config
        self._pools = pools
        self._cost = cost
        self._collate = collate

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Before anything is asked or trained."""
        with random_state_kept(args.device):
            items = largest(self._pools(), self._cost, args.per_device_train_batch_size)
            if items:
                self._try(items, args)

    def _try(self, items: list[Any], args: TrainingArguments) -> None:
        trouble = self._trouble(items, args)
        if trouble is None:
            logger.info(
                "the largest micro-batch fits, %s, with %.2f GiB",
                described(self._collate(items)),
                memory_gib(args.device),
            )
            return
        fits = self._what_fits(items, args)
        where = f"the largest micro-batch that the data can give ({described(self._collate(items))})"
        raise UserError(
            f"out of memory in {where}, tried before the first step: {trouble}. "
            f"{what_to_lower(self._config, args, fits=fits)}"
        )

    def _what_fits(self, items: list[Any], args: TrainingArguments) -> int | None:
        """How many of the items fit; None where that cannot be tried, since ranks or DeepSpeed were left in midst."""
        if args.world_size > 1 or self._trainer.is_deepspeed_enabled or len(items) < 2:
            return None
        size = len(items) // 2
        while size and self._trouble(items[:size], args) is not None:
            size //= 2
        return size

    def _trouble(self, items: list[Any], args: TrainingArguments) -> str | None:
        """What did not fit; None where all did. The error itself is let go, since it holds what the step had made."""
        try:
            take_and_undo(self._trainer, self._collate(items))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            trouble = what_did_not_fit(error, args.device)
        else:
            return None
        self._trainer.model.zero_grad(set_to_none=True)
        if args.device.type == "cuda":
            torch.cuda.empty_cache()
        return trouble


def largest(pools: Sequence[Pool], cost: Callable[[Pool], int], size: int) -> list[Any]:
    """The most expensive micro-batch of `size` items, or of all of a smaller pool; nothing where no item is usable."""
    batches = [sorted(filter(_usable, pool), key=lambda item: -cost([item]))[:size] for pool in pools]
    return max(batches, key=cost, default=[])


def _usable(item: Any) -> bool:
    return bool(_samples([item]))


def _samples(items: Pool) -> list[Sample | Seq2SeqSample]:
    inside = [one for item in items for one in (item.items if isinstance(item, MicroBatch) else [item])]
    return [one for one in inside if isinstance(one, Sample | Seq2SeqSample)]


def cost_of(activations: Activations, vocabulary: int) -> Callable[[Pool], int]:
    """Bytes of a micro-batch by its padded tokens and its labels, which are what differs between micro-batches.

    Args:
        activations: of the run's model, for bytes a token.
        vocabulary: scores at each labelled place.
    """
    token = activations.bytes // max(1, activations.tokens)

    def cost(items: Pool) -> int:
        samples = _samples(items)
        padded = len(samples) * max((_tokens(one) for one in samples), default=0)
        labelled = sum(int((one.labels != IGNORED_LABEL).sum()) for one in samples)
        return padded * token + labelled * vocabulary * BYTES_PER_SCORE

    return cost


def _tokens(sample: Sample | Seq2SeqSample) -> int:
    features = sample.features.shape[0] * sample.features.shape[1] if isinstance(sample, Seq2SeqSample) else 0
    return len(sample.input_ids) + features


def described(batch: Mapping[str, Any]) -> str:
    """A batch's size in words."""
    rows, tokens = batch["input_ids"].shape
    return f"{batch['samples']} samples in {rows} rows of {tokens} tokens"


# ---- one step, undone


def take_and_undo(trainer: Any, batch: Mapping[str, Any]) -> None:
    """A whole step over a batch that changes nothing; every rank must call it under DeepSpeed.

    With accumulation two micro-batches, since the second finds the first one's gradients in memory.
    """
    parts = min(2, trainer.args.gradient_accumulation_steps)
    with nothing_learnt(trainer):
        _make_state(trainer)
        for part in range(parts):
            trainer.accelerator.gradient_state._set_sync_gradients(part == parts - 1)
            _forward_and_backward(trainer, batch)
        if not trainer.is_deepspeed_enabled:  # whose engine has taken the step at the end of the backward pass
            _torch_optimizer(trainer).step()


def _forward_and_backward(trainer: Any, batch: Mapping[str, Any]) -> None:
    model = trainer.model_wrapped
    model.train()
    (taken,) = over_step([batch], trainer.args.device)
    inputs = trainer._prepare_inputs({name: value for name, value in taken.items() if name not in BOOKKEEPING})
    labelled = (inputs["labels"] != IGNORED_LABEL).sum()
    alone = model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()
    with alone, trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(model, inputs, num_items_in_batch=labelled)
        trainer.accelerator.backward(loss * 0.0)


def _make_state(trainer: Any) -> None:
    """An optimizer's state comes with its first step, so only the second finds it in memory; DeepSpeed's is there."""
    if trainer.is_deepspeed_enabled:
        return
    optimizer = _torch_optimizer(trainer)
    if not optimizer.state:
        for parameter in _parameters(optimizer):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@contextlib.contextmanager
def nothing_learnt(trainer: Any) -> Iterator[None]:
    """Steps inside have a learning rate of zero; afterwards the optimizer, and what it trains, is as it was."""
    optimizer = _torch_optimizer(trainer)
    rates = [group["lr"] for group in optimizer.param_groups]
    held = _Held(_trained_tensors(trainer))
    state = {key: {name: _copied(value) for name, value in one.items()} for key, one in optimizer.state.items()}
    engine = _engine_numbers(trainer)
    synchronises = trainer.accelerator.gradient_state.sync_gradients
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * 0
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        trainer.accelerator.gradient_state._set_sync_gradients(synchronises)
        trainer.model.zero_grad(set_to_none=True)
        held.restore()
        _restore_state(optimizer, state)
        for owner, numbers in engine:
            vars(owner).update(numbers)


class _Held:
    """Tensors and what they hold now, kept in the machine's memory, so that the device has as much room as ever."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._values = [one.detach().to("cpu", copy=True) for one in tensors]

    def restore(self) -> None:
        """Writes them back."""
        with torch.no_grad():
            for tensor, value in zip(self._tensors, self._values, strict=True):
                tensor.copy_(value)


def _torch_optimizer(trainer: Any) -> torch.optim.Optimizer:
    """The optimizer under whatever accelerate and DeepSpeed have put around it."""
    found = trainer.optimizer
    while (inner := vars(found).get("optimizer")) is not None:
        found = inner
    return cast(torch.optim.Optimizer, found)


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [one for group in optimizer.param_groups for one in group["params"]]


def _trained_tensors(trainer: Any) -> list[Tensor]:
    """What steps write to: the parameters, or under ZeRO this rank's float32 share of them."""
    zero = vars(trainer.model_wrapped).get("optimizer") if trainer.is_deepspeed_enabled else None
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        if zero is not None and name in vars(zero):
            return [one for one in vars(zero)[name] if one is not None]
    return [one.data for one in _parameters(_torch_optimizer(trainer))]


def _copied(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _restore_state(optimizer: torch.optim.Optimizer, state: Mapping[Any, Mapping[str, Any]]) -> None:
    """In place where a tensor was there already; what is new goes."""
    for key in [one for one in optimizer.state if one not in state]:
        del optimizer.state[key]
    with torch.no_grad():
        for key, before in state.items():
            now = optimizer.state[key]
            for name in [one for one in now if one not in before]:
                del now[name]
            for name, value in before.items():
                if isinstance(value, Tensor) and isinstance(now.get(name), Tensor):
                    now[name].copy_(value)
                else:
                    now[name] = value


COUNTED = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
"""Of DeepSpeed's engine, what its checkpoints hold."""


def _engine_numbers(trainer: Any) -> list[tuple[Any, dict[str, Any]]]:
    """DeepSpeed's counters and loss scale as they are, each with the object that has them."""
    if not trainer.is_deepspeed_enabled:
        return []
    engine = trainer.model_wrapped
    owners = [(engine, {name: vars(engine)[name] for name in COUNTED if name in vars(engine)})]
    scaler = loss_scale_of(engine)
    return [*owners, (scaler, dict(vars(scaler)))] if scaler is not None else owners
