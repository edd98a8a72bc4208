"""When a signal stops a run: at the end of a step, for all ranks; one that comes later lets the end be written."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from dora_vl.training.callbacks import StopOnSignal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_at_the_next_step_and_begins_no_validation(tmp_path: Path, number: signal.Signals) -> None:
    stop, arguments = StopOnSignal(), TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    state, control = TrainerState(), TrainerControl()
    stop.on_train_begin(arguments, state, control)
    try:
        stop.on_step_end(arguments, state, control)
        assert not control.should_training_stop
        os.kill(os.getpid(), number)
        assert stop.received is None  # nobody has agreed yet: after the last step the adapter is still written
        stop.on_step_end(arguments, state, control)
        assert stop.received == number
        assert control.should_save
        assert control.should_training_stop
        control.should_evaluate = True
        stop.on_epoch_end(arguments, state, control)
        assert not control.should_evaluate
    finally:
        stop.restore()


def test_what_nohup_ignores_stays_ignored(tmp_path: Path) -> None:
    stop, before = StopOnSignal(), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop.on_train_begin(TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerState(), TrainerControl())
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        stop.restore()
        signal.signal(signal.SIGHUP, before)
