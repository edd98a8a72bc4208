"""`dora-vl train`, and the scripts in tasks/ that train: settings from the command line, a run, an exit status."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Iterator, Sequence

from dora_vl.errors import exit_on_user_error
from dora_vl.training.run_settings import pipeline_of, settings_and_task

DESCRIPTION = """\
Trains as CONFIG says, then tests where its evaluation section names a file. What it trains (a vision-language model, a
VL-BART, a plain language model) is seen by its settings; behind it any of them may follow, --section.key value.

  dora-vl train runs/my/run.yaml
  dora-vl train llava/llava15 --variant 7b_dora --data.train my.json --data.image_folder pictures
  dora-vl train runs/my/run.yaml --help                          every setting, with what it does
  deepspeed --module dora_vl.cli train runs/my/run.yaml          on all GPUs of this machine

Writes adapter/, log.jsonl, metrics.json and checkpoints to training.output_dir; --resume last resumes from the last
checkpoint.
"""
SETS_UP_LOGGING = True
STATUS_OF_A_SIGNAL = 128  # as shells count it: 130 after Ctrl-C, 143 after SIGTERM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options; what stands behind CONFIG is read as the run's settings."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file with the run's settings, or a recipe's name")
    parser.add_argument("settings", nargs=argparse.REMAINDER, metavar="...", help="--variant NAME, --section.key value")


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Trains and tests; what there is to say goes to the log."""
    words = [f"--config={arguments.config}", *arguments.settings]
    train(words, None, program="dora-vl train", description=DESCRIPTION)
    yield from ()


@exit_on_user_error
def train_script(task: str, description: str | None) -> None:
    """What a script in tasks/ does, named by its task."""
    train(sys.argv[1:], task, program=f"{task}.py", description=description or "")


def train(words: Sequence[str], task: str | None, *, program: str, description: str) -> None:
    """Reads the settings, trains, tests; a run that a signal stopped ends the process with the signal's status.

    Args:
        task: whose settings the words are; None: seen by them.
        program: for --help, as is `description`.

    Raises:
        UserError: something in the settings or the data cannot be used.
    """
    from dora_vl.run.folder import finished_already, run_folder_of
    from dora_vl.run.launch import first_rank_speaks, log_to_stderr
    from dora_vl.training.ranks import end_with_launcher

    log_to_stderr()
    end_with_launcher()
    logger = logging.getLogger(__name__)
    with first_rank_speaks():
        config, task = settings_and_task(words, task, program=program, description=description)
        if finished_already(config):
            logger.info("%s: finished already; --overwrite true replaces it", run_folder_of(config))
            return
        pipeline = pipeline_of(config, task)

        from dora_vl.training.run import run

        stopped_by = run(pipeline)
    if stopped_by is not None:
        logger.info("stopped by %s; --resume last resumes from there", signal.Signals(stopped_by).name)
        sys.exit(STATUS_OF_A_SIGNAL + stopped_by)
