"""What happens beside the steps: the loss log, one line of progress, epochs for the data, stopping on a signal."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from dora_vl.run.folder import read_log, write_json, write_log
from dora_vl.training.memory import memory_gib
from dora_vl.training.progress import BatchStatistics, Counts
from dora_vl.training.validation import validation_owed

logger = logging.getLogger(__name__)

ECHO_SECONDS = 1.0  # a signal this soon after the first is the launcher passing on the same one


class EpochCallback(TrainerCallback):
    """Tells the sampler and the data set which epoch it is, also after resuming, where loaders are nested."""

    def __init__(self, *listeners: Callable[[int], None]) -> None:
        self._listeners = listeners

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Before the epoch's first batch is drawn."""
        for listener in self._listeners:
            listener(int(state.epoch or 0))


class LossLog(TrainerCallback):
    """Adds speed, padding, memory, rates by part and skipped samples to each line, and appends it to `log.jsonl`.

    The file of a resumed run keeps the lines up to the step it resumes from.
    """

    def __init__(self, path: Path, statistics: BatchStatistics) -> None:
        self._path, self._statistics = path, statistics
        self._before, self._since = Counts(), 0.0
        self._rates: dict[str, float] = {}

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Keeps the rates of the step by part, when the Trainer notes the one that it logs."""
        groups = more["optimizer"].param_groups
        self._rates = {f"learning_rate/{group['name']}": group["lr"] for group in groups if "name" in group}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Starts the clock, and cuts lines that a resumed run will write again."""
        self._since, self._before = time.monotonic(), self._statistics.earlier
        if state.is_world_process_zero:
            step, again = state.global_step, validation_owed(state, args)
            lines = read_log(self._path)
            kept = [line for line in lines if line["step"] < step + (not again or "eval_loss" not in line)]
            write_log(self._path, kept)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """One line; every rank takes part in the sums."""
        logs: dict[str, Any] = more["logs"]
        if "train_runtime" in logs:  # the end: what came after the last logged loss counts as well
            self._statistics.judge(self._statistics.over_ranks(args.device))
            return
        if "loss" in logs:
            logs.update(self._speed(args.device))
            logs.update(self._rates)
        if state.is_world_process_zero:
            # JSON knows no NaN: it is written as text, so that the line still says what happened.
            finite = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in logs.items()}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **finite}) + "\n")

    def _speed(self, device: torch.device) -> dict[str, float | int]:
        now, counts = time.monotonic(), self._statistics.over_ranks(device)
        window, seconds = counts - self._before, max(1e-9, now - self._since)
        self._before, self._since = counts, now
        self._statistics.judge(counts)
        return {
            "samples_per_second": round(window.samples / seconds, 3),
            "tokens_per_second": round(window.tokens / seconds, 1),
            "padding_share": round(window.padding_share, 4),
            "labelled_tokens": window.labelled_tokens,
            "skipped": counts.skipped,
            "cut_samples": counts.cut_samples,
            "shrunk_samples": counts.shrunk_samples,
            "memory_gib": round(memory_gib(device), 3),
        }


class PlanFile(TrainerCallback):
    """Writes what trains and what it takes once training begins: a resume that is refused leaves the file as it was."""

    def __init__(self, path: Path, plan: Mapping[str, Any]) -> None:
        self._path, self._plan = path, plan

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """On the first rank."""
        if state.is_world_process_zero:
            write_json(self._path, self._plan)


class SaveAfterValidation(TrainerCallback):
    """Where validation follows an epoch, the checkpoint of its last step is written after it.

    The Trainer saves at the step and validates afterwards: a run resumed from there would never hear of this
    validation, neither in its log nor when it chooses the best checkpoint.
    """

    def __init__(self) -> None:
        self._waiting = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Puts the checkpoint off where the epoch ends with this step."""
        ends = float(state.epoch or 0).is_integer() or control.should_training_stop
        self._waiting = control.should_save and ends and args.eval_strategy == IntervalStrategy.EPOCH
        if self._waiting:
            control.should_save = False

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Asks for it again."""
        if self._waiting:
            self._waiting = False
            control.should_save = True


class ValidateFirst(TrainerCallback):
    """Has a resumed run begin with the validation that the run before was stopped in front of; on every rank."""

    def __init__(self, validate: Callable[[], None]) -> None:
        self._validate = validate

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Before the first step."""
        if validation_owed(state, args):
            self._validate()


class StopOnSignal(TrainerCallback):
    """SIGINT, SIGTERM or SIGHUP (a terminal or an ssh that was closed): finish the step, save a checkpoint, stop.

    All ranks agree at the end of a step, since one that stopped alone would leave the others waiting. A second
    Ctrl-C ends the process at once; a further SIGTERM does not, since the deepspeed launcher turns one Ctrl-C into
    a SIGINT and several SIGTERM, and kills after 30 seconds anyway.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.received: int | None = None
        """The signal that all ranks stop for; one that comes after the last step stops nothing, the end is written."""
        self._heard: int | None = None
        self._since = 0.0
        self._process = os.getpid()
        self._before: dict[int, Any] = {}
        self._terminals: list[int] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Starts listening."""
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        for number in self.SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # what nohup says stays
                self._before[number] = signal.signal(number, self._note)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Asks all ranks whether one of them received a signal to stop."""
        number = self._heard or 0
        if args.world_size > 1:
            heard = torch.tensor(number, device=args.device)
            torch.distributed.all_reduce(heard, torch.distributed.ReduceOp.MAX)
            number = int(heard)
        if number:
            self.received = number
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A run that stops begins no validation; one that a whole run has there begins the run that resumes it."""
        if self.received is not None:
            control.should_evaluate = False

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Gives the signals back."""
        self.restore()

    def restore(self) -> None:
        """Gives the signals back, also after an error in training."""
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self._heard is not None
        if number == signal.SIGHUP:
            for descriptor in self._terminals:  # gone, so that a line to it would be an error in place of the save
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        if again and number == signal.SIGINT and time.monotonic() - self._since > ECHO_SECONDS:
            raise KeyboardInterrupt
        if not again:
            name = signal.Signals(number).name
            if os.getpid() == self._process:  # data workers, forked from here, hear a terminal's Ctrl-C as well
                logger.warning("%s: finishing the step and saving it first; Ctrl-C again stops at once", name)
            self._heard, self._since = number, time.monotonic()
