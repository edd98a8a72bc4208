"""`dora-vl train`, and the scripts in tasks/ that train: settings from the command line, a run, an exit status.

Slow imports wait until the settings have been checked.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from dora_vl.errors import exit_on_user_error

if TYPE_CHECKING:
    from dora_vl.run.settings import RunConfig, Task
    from dora_vl.training.pipeline import Pipeline

DESCRIPTION = """\
Trains as CONFIG says, then tests where its evaluation section names a file. Its `task:` says what is trained, and which
settings there are:

  llava         a LLaVA-1.5, also one that is composed here of a vision tower and a language model
  image_text    any other model of transformers for pictures, videos and text, or for text only (the default)
  commonsense   a language model on instructions, each a question and its output
  vlbart        a VL-BART on picture or video features

After CONFIG any setting may follow, --section.key value.

  dora-vl train runs/my/run.yaml
  dora-vl train llava/llava15 --variant 7b_dora --data.train my.json --data.image_folder pictures
  dora-vl train runs/my/run.yaml --help                          every setting of its task, with what it does
  dora-vl train vlbart/image --help                              those of another task, by one of its recipes
  deepspeed --module dora_vl.cli train runs/my/run.yaml          on all GPUs of this machine

Writes adapter/, log.jsonl, metrics.json and checkpoints to training.output_dir; --resume last resumes from the last
checkpoint.
"""
SCRIPT = """\
It also runs under torchrun and plain python. Writes `adapter/`, `log.jsonl`, `metrics.json`, of a test
`predictions.jsonl`, and checkpoints to training.output_dir; `--resume last` resumes from the last checkpoint.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options; what follows CONFIG is read as the run's settings."""
    parser.description = DESCRIPTION
    parser.set_defaults(work=run, logs=True)
    parser.add_argument("config", metavar="CONFIG", help="YAML file with the run's settings, or a recipe's name")
    parser.add_argument("settings", nargs=argparse.REMAINDER, metavar="...", help="--variant NAME, --section.key value")


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Trains and tests; its messages go to the log."""
    words = [f"--config={arguments.config}", *arguments.settings]
    train(words, program="dora-vl train", description=DESCRIPTION)
    yield from ()


@exit_on_user_error
def train_script(task: Task, description: str | None) -> None:
    """Runs a script of tasks/, whose settings name this task or none."""
    train(sys.argv[1:], task, program=f"{task}.py", description=f"{description}\n{SCRIPT}")


def train(words: Sequence[str], task: Task = "image_text", *, program: str, description: str) -> None:
    """Reads the settings, whose default task is `task`, trains, tests; a signal's status ends a stopped run."""
    from dora_vl.run.folder import is_finished_run, is_trained_run, run_folder_of
    from dora_vl.run.launch import end_with_launcher, first_rank_reports_first, log_to_stderr
    from dora_vl.run.settings_parser import read_run

    log_to_stderr()
    end_with_launcher()
    logger = logging.getLogger(__name__)
    with first_rank_reports_first():
        config = read_run(words, task=task, program=program, description=description)
        if is_finished_run(config):
            logger.info("%s: finished already; --overwrite true replaces it", run_folder_of(config.training))
            return
        if is_trained_run(config):
            logger.info("%s: trained already; its test is what is left", run_folder_of(config.training))
            config = dataclasses.replace(config, resume=None, test_only=True)
        pipeline = pipeline_of(config)

        from dora_vl.training.run import run

        stopped_by = run(pipeline)
    if stopped_by is not None:
        logger.info("stopped by %s; --resume last resumes from there", signal.Signals(stopped_by).name)
        sys.exit(128 + stopped_by)  # as shells count it: 130 after Ctrl-C, 143 after SIGTERM


def pipeline_of(config: RunConfig) -> Pipeline:
    """Returns the pipeline of the run's task."""
    if config.task == "vlbart":
        from dora_vl.training.vlbart_pipeline import VlBartPipeline

        return VlBartPipeline(config)
    from dora_vl.training.decoder_pipeline import DecoderPipeline

    return DecoderPipeline(config)
