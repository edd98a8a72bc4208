"""When a signal stops a run: at the end of a step, for all ranks; one that comes later lets the end be written."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from transformers import TrainerControl, TrainerState, TrainingArguments

from dora_vl.training.callbacks import StopOnSignal


def test_a_signal_stops_at_the_next_step_and_begins_no_validation(tmp_path: Path) -> None:
    stop, arguments = StopOnSignal(), TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    state, control = TrainerState(), TrainerControl()
    stop.on_train_begin(arguments, state, control)
    try:
        stop.on_step_end(arguments, state, control)
        assert not control.should_training_stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received is None  # nobody has agreed yet: after the last step the adapter is still written
        stop.on_step_end(arguments, state, control)
        assert stop.received == signal.SIGTERM
        assert control.should_save
        assert control.should_training_stop
        control.should_evaluate = True
        stop.on_epoch_end(arguments, state, control)
        assert not control.should_evaluate
    finally:
        stop.restore()
