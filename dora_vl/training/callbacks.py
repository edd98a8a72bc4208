"""Trainer callbacks: the loss log, epochs, watched questions, and stopping on a signal."""

from __future__ import annotations

import faulthandler
import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from dora_vl.errors import UserError, short_text
from dora_vl.files import write_json, write_json_lines
from dora_vl.run.folder import ANSWERS, DRAWN, LOSS_LOG, PLAN, WATCHED, Watch, begin, read_log
from dora_vl.training.memory import memory_gib
from dora_vl.training.progress import BatchStatistics, Counts, random_state_kept, validation_owed

logger = logging.getLogger(__name__)

ECHO_SECONDS = 1.0
"""A signal that comes this soon after the first is the same one, passed on by the launcher."""
SHOWN = {
    "loss": "loss {:.4f}",
    "rewards/mean": "reward {:.2f}",
    "rewards/accuracy": "{:.0%} of pairs right",
    "samples_per_second": "{:,.1f} samples/s",
    "memory_gib": "{:.2f} GiB measured",
}
"""Maps each number of the log that the bar and the plain line show to its format."""


class Epochs(TrainerCallback):
    """Tells the data which epoch it is, and keeps checkpoints and validations at an epoch's end in their order.

    The Trainer saves at an epoch's last step and validates afterwards, so a run resumed from there would miss this
    validation in its log and when it chooses the best checkpoint. Here that checkpoint is written after the validation.
    A run that was stopped before a validation begins with it when it resumes (`validate`).
    """

    def __init__(self, set_epoch: Sequence[Callable[[int], None]], validate: Callable[[], None]) -> None:
        self._set_epoch, self._validate = set_epoch, validate
        self._save_waits = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Makes up for a validation that the stopped run left out; every rank takes part."""
        if validation_owed(state, args):
            self._validate()

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Tells the data its epoch before the first batch is drawn, also after resuming."""
        for set_epoch in self._set_epoch:
            set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Postpones the checkpoint where the epoch ends with this step."""
        ends = float(state.epoch or 0).is_integer() or control.should_training_stop
        self._save_waits = control.should_save and ends and args.eval_strategy == IntervalStrategy.EPOCH
        if self._save_waits:
            control.should_save = False

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Asks for the postponed checkpoint."""
        if self._save_waits:
            self._save_waits = False
            control.should_save = True


class LossLog(TrainerCallback):
    """Writes `log.jsonl`, each line with speed, padding, memory, rates by part and skipped samples; and `plan.json`.

    Both are written once training begins, so a refused resume leaves them as they were. The log of a resumed run keeps
    the lines up to the step that it resumes from.
    """

    def __init__(self, run_folder: Path, statistics: BatchStatistics, plan: Mapping[str, Any]) -> None:
        self._folder, self._statistics, self._plan = run_folder, statistics, plan
        self._before, self._since, self._waited = Counts(), 0.0, 0.0
        self._rates: dict[str, float] = {}

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Notes the learning rates of the step by part, when the Trainer notes its own."""
        groups = more["optimizer"].param_groups
        self._rates = {f"learning_rate/{group['name']}": group["lr"] for group in groups if "name" in group}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Starts the clock, and removes lines that a resumed run will write again."""
        self._since, self._before, self._waited = time.monotonic(), self._statistics.earlier, self._statistics.waited
        if state.is_world_process_zero:
            write_json(self._folder / PLAN, self._plan)
            step, again = state.global_step, validation_owed(state, args)
            lines = read_log(self._folder / LOSS_LOG)
            kept = [line for line in lines if line["step"] < step + (not again or "eval_loss" not in line)]
            write_json_lines(self._folder / LOSS_LOG, kept)
            if (drawn := self._folder / DRAWN).is_file():
                write_json_lines(drawn, [line for line in read_log(drawn) if line["step"] <= step])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Writes one line; every rank takes part in the sums."""
        logs: dict[str, Any] = more["logs"]
        if "train_loss" in logs:  # the end: what came after the last logged loss counts as well
            self._statistics.judge(self._statistics.over_ranks(args.device))
            return
        if "loss" in logs:
            logs.update(self._statistics.noted())
            logs.update(self._speed(args.device))
            logs.update(self._rates)
        if state.is_world_process_zero:
            # JSON knows no NaN: it is written as text, so that the line still says what happened.
            finite = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in logs.items()}
            with (self._folder / LOSS_LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **finite}) + "\n")

    def _speed(self, device: torch.device) -> dict[str, float | int]:
        now, counts = time.monotonic(), self._statistics.over_ranks(device)
        window, seconds = counts - self._before, max(1e-9, now - self._since)
        waited, self._waited = self._statistics.waited - self._waited, self._statistics.waited
        self._before, self._since = counts, now
        self._statistics.judge(counts)
        return {
            "samples_per_second": round(window.samples / seconds, 3),
            "tokens_per_second": round(window.tokens / seconds, 1),
            "padding_share": round(window.padding_share, 4),
            "data_wait_share": round(waited / seconds, 4),
            "labelled_tokens": window.labelled_tokens,
            "skipped": counts.skipped,
            "cut_samples": counts.cut_samples,
            "shrunk_samples": counts.shrunk_samples,
            "memory_gib": round(memory_gib(device), 3),
        }


class RunProgress(TrainerCallback):
    """Shows progress: a bar in a terminal, elsewhere a line for each line of the log. For the first rank only.

    It is drawn when steps end, not by a thread: data workers are forked from this process, and a lock that a thread
    holds at that moment would stay locked in them.
    """

    def __init__(self, console: Console) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
        times = (TimeElapsedColumn(), TextColumn("so far,"), TimeRemainingColumn(), TextColumn("left"))
        self._bar = Progress(
            *columns,
            *times,
            console=console,
            auto_refresh=False,
            speed_estimate_period=24 * 3600,  # steps may take minutes, with a validation between them
            disable=not console.is_interactive,
        )
        self._task = self._bar.add_task("", start=False)
        self._handlers: list[tuple[logging.StreamHandler[Any], Any]] = []
        self._next = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Opens the bar; what loggers write to the terminal goes above it."""
        self._bar.reset(self._task, total=state.max_steps, completed=state.global_step)
        streams = {id(stream): name for name in ("stdout", "stderr") if (stream := vars(sys)[name]).isatty()}
        self._bar.start()
        if self._bar.disable:
            return
        for owner in (logging.root, *map(logging.getLogger, list(logging.root.manager.loggerDict))):
            for handler in owner.handlers:
                if isinstance(handler, logging.StreamHandler) and (name := streams.get(id(handler.stream))):
                    self._handlers.append((handler, handler.setStream(vars(sys)[name])))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Advances the bar by a step."""
        self._bar.update(self._task, completed=state.global_step)
        if time.monotonic() >= self._next:
            self._bar.refresh()
            self._next = time.monotonic() + 0.25

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Shows the newest numbers; a validation gets its own line."""
        logs: Mapping[str, Any] = more["logs"]
        if "loss" in logs:
            numbers = {name: text.format(logs[name]) for name, text in SHOWN.items() if name in logs}
            self._bar.update(self._task, description="  ".join(numbers.values()), refresh=True)
            if self._bar.disable:
                left = self._bar.tasks[0].time_remaining
                times = "" if left is None else f"  {timedelta(seconds=round(left))} left"
                logger.info(
                    "step %d of %d  %s%s", state.global_step, state.max_steps, "  ".join(numbers.values()), times
                )
        elif "eval_loss" in logs:
            skipped = logs.get("eval_skipped", 0)
            logger.info("step %d: validation loss %.4f, skipped %d", state.global_step, logs["eval_loss"], skipped)

    def close(self) -> None:
        """Draws the final state and releases the terminal."""
        self._bar.stop()
        while self._handlers:
            handler, stream = self._handlers.pop()
            handler.setStream(stream)


class StopOnSignal(TrainerCallback):
    """On SIGINT, SIGTERM or SIGHUP (a closed terminal), finishes the step, saves a checkpoint and stops.

    All ranks agree at the end of a step, since a rank that stopped alone would leave the others waiting. A second
    Ctrl-C ends the process at once; a further SIGTERM does not, since the deepspeed launcher turns one Ctrl-C into
    a SIGINT and several SIGTERM, and kills after 30 seconds anyway.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.received: int | None = None
        """Holds the signal that all ranks stop for; None also where it came after the last step."""
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
        """Skips the validation of a run that stops; the resumed run begins with it."""
        if self.received is not None:
            control.should_evaluate = False

    def restore(self) -> None:
        """Restores the earlier signal handlers."""
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


class EarlyStopping(EarlyStoppingCallback):
    """Is transformers' own, but a resumed run keeps its count, and one that it ended does not train on."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Restores the count from the checkpoint."""
        saved: Any = state.stateful_callbacks or {}
        if (kept := saved.get(type(self).__name__)) is not None:
            self.early_stopping_patience_counter = kept["attributes"]["early_stopping_patience_counter"]
        control.should_training_stop = self.early_stopping_patience_counter >= self.early_stopping_patience

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **more: Any) -> None:
        """Counts a validation, and says when it was the last."""
        super().on_evaluate(args, state, control, metrics, **more)
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            logger.info(
                "step %d: no lower validation loss than %.4f for %d validations; training ends",
                *(state.global_step, state.best_metric, self.early_stopping_patience_counter),
            )


class StepLimit(TrainerCallback):
    """Ends a rank that makes no progress for `training.ddp_timeout` with its stacks; the launcher ends the others.

    The collectives' own limit is no substitute: groups that DeepSpeed makes have 30 minutes with gloo whatever is set.
    Call `faulthandler.cancel_dump_traceback_later` after training.
    """

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Restarts the timer."""
        if args.world_size > 1:
            faulthandler.dump_traceback_later(args.ddp_timeout, exit=True, file=2)  # whatever stands in sys.stderr

    on_substep_end = on_step_end = on_prediction_step = on_save = on_evaluate = on_step_begin


# Watched questions: asked while it trains, their answers kept.


class WatchQuestions(TrainerCallback):
    """Asks the watched questions before the first step and at every validation, or five times where there is none.

    Every rank answers, as ZeRO-3 needs; the first one writes. Random numbers drawn afterwards (dropout) do not
    change.
    """

    def __init__(self, watch: Watch, folder: Path) -> None:
        self._watch, self._folder = watch, folder
        self._failed = False

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Writes the questions; a new run answers them untrained, a resumed one keeps its earlier answers."""
        if state.is_world_process_zero:
            begin(self._folder, self._watch, step=state.global_step)
        if state.global_step == 0:
            self._ask(args, state, more["model"])

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Asks with each validation."""
        self._ask(args, state, more["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Asks five times, evenly over the run and at its end, where nothing is validated."""
        times = {-(-state.max_steps * part // 5) for part in range(1, 6)}
        if args.eval_strategy == IntervalStrategy.NO and state.global_step in times:
            self._ask(args, state, more["model"])

    def _ask(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        if self._failed:
            return
        training = model.training
        model.eval()
        try:
            with random_state_kept(args.device):
                answers = self._watch.ask()
        except UserError as error:  # of every rank, so that none waits for another
            self._failed = True
            logger.warning("the watched questions are not asked any more, watch: 0 leaves them out: %s", error)
            return
        finally:
            model.train(training)
        if not state.is_world_process_zero:
            return
        with (self._folder / WATCHED / ANSWERS).open("a", encoding="utf-8") as file:
            line = {"step": state.global_step, "answers": dict(answers)}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        for question in self._watch.questions:
            if question.id in answers and not args.disable_tqdm:
                texts = (question.question, answers[question.id], question.truth)
                logger.info("step %d: %s -> %s (right: %s)", state.global_step, *(short_text(text) for text in texts))
