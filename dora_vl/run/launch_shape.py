"""The processes of a run, and whether other ones may go on with it: they must take the same samples in each step."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_vl.errors import UserError

logger = logging.getLogger(__name__)

DEFAULTS = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "optim": "adamw_torch_fused"}
"""transformers' own, where a run does not say."""
BY_ELEMENT = ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop")
"""Optimizers whose state has a number for each weight, whatever cuts the weights into parts (`training.optim`)."""


@dataclass(frozen=True)
class Launch:
    """The processes of a run: how many, and DeepSpeed's ZeRO stage; None without DeepSpeed."""

    ranks: int
    zero_stage: int | None

    def __str__(self) -> str:
        engine = "without DeepSpeed" if self.zero_stage is None else f"with ZeRO-{self.zero_stage}"
        return f"{self.ranks} {'rank' if self.ranks == 1 else 'ranks'} {engine}"


@dataclass(frozen=True)
class Shape:
    """A run's settings and processes, as far as they say who does what of a step."""

    settings: Mapping[str, Any]
    launch: Launch

    def of_training(self, name: str) -> Any:
        """A field of `training:`, or its default."""
        value = self.settings.get("training", {}).get(name)
        return DEFAULTS.get(name) if value is None else value

    @property
    def mixes_tasks(self) -> bool:
        """Whether `data.batch_size` says how many samples a step has (VL-BART)."""
        return self.settings.get("data", {}).get("batch_size") is not None

    @property
    def micro_batch(self) -> int:
        """Samples of a rank's micro-batch."""
        return int(self.of_training("per_device_train_batch_size"))

    @property
    def step_samples(self) -> int:
        """Samples of a step; 0 where the data's settings say it, which are compared themselves."""
        accumulation = int(self.of_training("gradient_accumulation_steps"))
        return 0 if self.mixes_tasks else self.micro_batch * accumulation * self.launch.ranks


def check_shape(checkpoint: Path, then: Shape, now: Shape) -> None:
    """Refuses processes that cannot go on with what others did, and says it where others go on.

    Raises:
        UserError: a step would take another number of samples, or an epoch would, or the optimizer's state cannot be
            dealt out anew.
    """
    if then.step_samples != now.step_samples:
        raise UserError(
            f"resume: {checkpoint} was written by {then.launch}, whose steps took {then.step_samples:,} samples; those "
            f"of this run ({now.launch}) take {now.step_samples:,}: {_what_to_set(then.step_samples, now)}"
        )
    if (then.launch, then.micro_batch) == (now.launch, now.micro_batch):
        return
    _check_epoch(checkpoint, then, now)
    _check_optimizer(checkpoint, then, now)
    logger.info("resume: written by %s, goes on on %s%s", then.launch, now.launch, _of_the_loss(then, now))


def _what_to_set(samples: int, now: Shape) -> str:
    ranks = now.launch.ranks
    if samples % (now.micro_batch * ranks) == 0:
        return f"set training.gradient_accumulation_steps to {samples // (now.micro_batch * ranks)}"
    if samples % ranks == 0:
        return (
            "set training.per_device_train_batch_size and training.gradient_accumulation_steps so that their product "
            f"is {samples // ranks}"
        )
    return f"start as many ranks as divide {samples}"


def _check_epoch(checkpoint: Path, then: Shape, now: Shape) -> None:
    together = [one.micro_batch * one.launch.ranks for one in (then, now)]
    drops = then.of_training("dataloader_drop_last") or now.of_training("dataloader_drop_last")
    if drops and together[0] != together[1] and not now.mixes_tasks:
        raise UserError(
            f"resume: {checkpoint} was written by {then.launch}, this run is {now.launch}, and "
            "training.dataloader_drop_last leaves others of an epoch's samples out for each: start it as then"
        )


def _check_optimizer(checkpoint: Path, then: Shape, now: Shape) -> None:
    optimizer, partitioned = str(now.of_training("optim")), (bool(one.launch.zero_stage) for one in (then, now))
    if any(partitioned) and then.launch != now.launch and optimizer not in BY_ELEMENT:
        raise UserError(
            f"resume: {checkpoint} was written by {then.launch}, this run is {now.launch}, and the state of "
            f"training.optim {optimizer} cannot be dealt out anew: start it as then"
        )


def _of_the_loss(then: Shape, now: Shape) -> str:
    normalised = now.settings.get("optim", {}).get("loss_normalisation")
    if then.micro_batch == now.micro_batch or now.mixes_tasks or normalised != "micro_batch":
        return ""
    return (
        f"; the loss is the mean of micro-batches (optim.loss_normalisation), which were of {then.micro_batch} samples "
        f"and are of {now.micro_batch}"
    )
