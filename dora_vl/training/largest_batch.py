"""Tries the largest micro-batch that the data can give before the first step, so that a lack of memory shows at once.

A run out of memory fails at its longest sample, which may come after hours. Here a step is taken over that sample
first: with the optimizer's state allocated, zero gradients and a learning rate of zero. Afterwards weights, optimizer
and generators are as they were, to the bit.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dora_vl.data.batches import weigh_over_step
from dora_vl.data.samples import BOOKKEEPING, IGNORED_LABEL, Sample, Skipped
from dora_vl.errors import UserError, is_out_of_memory, one_line
from dora_vl.run.settings import RunConfig
from dora_vl.training.checkpoint import loss_scale_of
from dora_vl.training.memory import Activations, memory_gib
from dora_vl.training.progress import random_state_kept
from dora_vl.training.training_data import TrainingData

logger = logging.getLogger(__name__)

ENGINE_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
Pool = Sequence[Any]
"""Holds items that a loader can make one micro-batch of."""

WHAT_TO_LOWER = (
    "Lower training.per_device_train_batch_size, evaluation.batch_size or data.max_tokens, or set "
    "training.gradient_checkpointing: true or model.quantisation: nf4"
)


@contextlib.contextmanager
def out_of_memory_reported(where: Callable[[], str]) -> Iterator[None]:
    """Turns any out-of-memory error into a `UserError` that says where it happened."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory in {where()}: {one_line(str(error), 200)}. {WHAT_TO_LOWER}") from None


@contextlib.contextmanager
def training_fits(trainer: Any, config: RunConfig) -> Iterator[None]:
    """Reports out-of-memory errors in steps and validations, and killed data workers."""

    def where() -> str:
        return f"step {trainer.state.global_step + 1}" if trainer.model.training else "the validation"

    with out_of_memory_reported(where):
        try:
            yield
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise UserError(
                f"{one_line(str(error), 120)} It was at step {trainer.state.global_step}; where the memory was "
                f"used up, set data.workers below {config.data.workers}. --resume last resumes from the last checkpoint"
            ) from None


class LargestBatch(TrainerCallback):
    """Tries the largest micro-batch when training begins; every rank tries the same one at the same time.

    `cost` is a micro-batch's in any unit. A UserError ends the run where it does not fit.
    """

    def __init__(self, trainer: Any, *, data: TrainingData, cost: Callable[[Pool], int]) -> None:
        self._trainer, self._data, self._cost = trainer, data, cost

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Tries the batch before any question is asked or step is taken."""
        with random_state_kept(args.device):
            items = largest_batch(self._data.pools(), self._cost, args.per_device_train_batch_size)
            if not items:
                return
            trouble, batch = self._trouble(items, args), self._data.collate(items)
            sequences, tokens = batch["input_ids"].shape
            size = f"{batch['samples']} samples in {sequences} sequences of {tokens} tokens"
            if trouble is None:
                logger.info("the largest micro-batch fits, %s, with %.2f GiB", size, memory_gib(args.device))
                return
            fits = None
            # Several ranks, or DeepSpeed, were left in midst: nothing more can be tried there.
            if args.world_size == 1 and not self._trainer.is_deepspeed_enabled and len(items) > 1:
                fits = len(items) // 2
                while fits and self._trouble(items[:fits], args) is not None:
                    fits //= 2
        raise UserError(
            f"out of memory in the largest micro-batch ({size}{'' if fits is None else f'; {fits} fit'}), before the "
            f"first step: {trouble}. {WHAT_TO_LOWER}"
        )

    def _trouble(self, items: list[Any], args: TrainingArguments) -> str | None:
        """Returns what did not fit, or None; the error itself is dropped, since it holds the step's tensors."""
        try:
            try_step(self._trainer, self._data.collate(items))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            trouble = one_line(str(error), 200)
        else:
            return None
        self._trainer.model.zero_grad(set_to_none=True)
        if args.device.type == "cuda":
            torch.cuda.empty_cache()
        return trouble


def largest_batch(pools: Sequence[Pool], cost: Callable[[Pool], int], size: int) -> list[Any]:
    """Returns the costliest micro-batch of `size` items, or a smaller pool; nothing if no item is usable."""
    usable = [[item for item in pool if _samples([item])] for pool in pools]
    return max((sorted(pool, key=lambda item: -cost([item]))[:size] for pool in usable), key=cost, default=[])


def _samples(items: Pool) -> list[Any]:
    """Returns the usable samples, also of items that are whole micro-batches (a mixture's)."""
    samples = [sample for item in items for sample in getattr(item, "items", [item])]
    return [sample for sample in samples if not isinstance(sample, Skipped)]


def cost_of(activations: Activations, *, recomputed: bool) -> Callable[[Pool], int]:
    """Returns a function that estimates a micro-batch's bytes from its padded tokens and its labels."""

    def tokens_of(sample: Any) -> int:
        features = getattr(sample, "features", None)  # of a VL-BART, pictures x tokens
        return len(sample.input_ids) + (0 if features is None else features.shape[0] * features.shape[1])

    def cost(items: Pool) -> int:
        samples = [
            text for sample in _samples(items) for text in (sample.texts() if isinstance(sample, Sample) else [sample])
        ]
        padded = len(samples) * max(map(tokens_of, samples), default=0)
        labelled = sum(int((sample.labels != IGNORED_LABEL).sum()) for sample in samples)
        return activations.of(tokens=padded, labelled=labelled, recomputed=recomputed)

    return cost


# ---- one step, undone


def try_step(trainer: Any, batch: Mapping[str, Any]) -> None:
    """Takes a whole step over a batch and undoes it; under DeepSpeed every rank must call it.

    With accumulation it takes two micro-batches, since the second finds the first one's gradients in memory.
    """
    parts, alone = min(2, trainer.args.gradient_accumulation_steps), not trainer.is_deepspeed_enabled
    optimizer: torch.optim.Optimizer = trainer.optimizer_layout.optimizer
    with _restored_afterwards(trainer):
        if alone and not optimizer.state:  # it comes with the first step, so only the second finds it in memory
            for parameter in trainer.optimizer_layout.flats:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for part in range(parts):
            trainer.accelerator.gradient_state._set_sync_gradients(part == parts - 1)
            _forward_and_backward(trainer, batch)
        if alone:  # else the engine has taken the step at the end of the backward pass
            optimizer.step()


def _forward_and_backward(trainer: Any, batch: Mapping[str, Any]) -> None:
    model = trainer.model_wrapped
    model.train()
    (taken,) = weigh_over_step([batch], trainer.args.device)
    inputs = trainer._prepare_inputs({name: value for name, value in taken.items() if name not in BOOKKEEPING})
    labelled = (inputs["labels"] != IGNORED_LABEL).sum()
    unsynchronised = model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()
    with unsynchronised, trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(model, inputs, num_items_in_batch=labelled)
        trainer.accelerator.backward(loss * 0.0)


@contextlib.contextmanager
def _restored_afterwards(trainer: Any) -> Iterator[None]:
    """Sets the learning rate to zero inside; restores optimizer and weights afterwards, from copies on the host."""

    def to_cpu(value: Any) -> Any:
        return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value

    optimizer: torch.optim.Optimizer = trainer.optimizer_layout.optimizer
    trained = [(flat.data, to_cpu(flat.data)) for flat in trainer.optimizer_layout.flats]
    states = {key: {name: to_cpu(value) for name, value in state.items()} for key, state in optimizer.state.items()}
    rates = [group["lr"] for group in optimizer.param_groups]
    engine = trainer.model_wrapped if trainer.is_deepspeed_enabled else None
    counters = [(vars(owner), _counters(owner)) for owner in (engine, loss_scale_of(engine)) if owner is not None]
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
        with torch.no_grad():
            for tensor, value in trained:
                tensor.copy_(value)
            for key in [key for key in optimizer.state if key not in states]:
                del optimizer.state[key]
            for key, before in states.items():
                _restore(optimizer.state[key], before)
        for attributes, numbers in counters:
            attributes.update(numbers)


def _restore(state: dict[str, Any], before: Mapping[str, Any]) -> None:
    """Restores values, in place where the tensor is still there, and removes new ones."""
    for name in [name for name in state if name not in before]:
        del state[name]
    for name, value in before.items():
        if isinstance(value, Tensor) and isinstance(state.get(name), Tensor):
            state[name].copy_(value)
        else:
            state[name] = value


def _counters(owner: Any) -> dict[str, Any]:
    """Returns the counters of DeepSpeed's engine that its checkpoints hold, or its loss scale."""
    names = [name for name in ENGINE_COUNTERS if name in vars(owner)] or list(vars(owner))
    return {name: vars(owner)[name] for name in names}
