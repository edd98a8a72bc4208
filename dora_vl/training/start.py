"""How a training script begins and ends as a program: settings from the command line, a run, an exit status."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from dora_vl.errors import exit_on_user_error
from dora_vl.run.command_line import read_settings
from dora_vl.run.launch import first_rank_speaks, log_to_stderr
from dora_vl.run.orphaned import end_with_launcher

if TYPE_CHECKING:
    from dora_vl.training.pipeline import Pipeline

Settings = TypeVar("Settings")
STATUS_OF_A_SIGNAL = 128  # as shells count it: 130 after Ctrl-C, 143 after SIGTERM


@exit_on_user_error
def start(
    program: str, description: str, settings: type[Settings], pipeline_of: Callable[[Settings], Pipeline]
) -> None:
    """Reads the settings, trains, tests.

    Args:
        program: the file's name, for --help.
        settings: the dataclass of the pipeline's run.
        pipeline_of: makes the pipeline; it may import what takes seconds, since mistakes in the settings were reported
            before.
    """
    log_to_stderr()
    end_with_launcher()
    with first_rank_speaks():
        config = read_settings(sys.argv[1:], settings, program=program, description=description)
        pipeline = pipeline_of(config)

        from dora_vl.training.run import run

        stopped_by = run(pipeline)
    if stopped_by is not None:
        logging.getLogger(__name__).info(
            "stopped by %s; --resume last resumes from there", signal.Signals(stopped_by).name
        )
        sys.exit(STATUS_OF_A_SIGNAL + stopped_by)
