"""The largest micro-batch that the data can give, tried before the first step and undone: what does not fit ends there.

A run that ends for memory does so at its longest sample, which may come after hours. Here a step is taken over that
one: with the optimizer's state in its place, gradients that are zero and a learning rate of zero. Afterwards weights,
optimizer and generators are as they were, to the bit.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dora_vl.data.dataset import BOOKKEEPING, IGNORED_LABEL, Sample
from dora_vl.errors import UserError
from dora_vl.run.run_settings import RunSettings
from dora_vl.runtime_errors import is_out_of_memory
from dora_vl.tasks.seq2seq import MicroBatch, Seq2SeqSample, over_step
from dora_vl.training.checkpoint_state import loss_scale_of
from dora_vl.training.memory_estimate import Activations
from dora_vl.training.memory_used import memory_gib
from dora_vl.training.out_of_memory import what_did_not_fit, what_to_lower
from dora_vl.training.validation import random_state_kept

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
