"""`dora-vl train`, and the scripts in tasks/ that train: settings from the command line, a run, an exit status.

Imports that take seconds come after mistakes in the settings were reported.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dora_vl.errors import exit_on_user_error

if TYPE_CHECKING:
    from dora_vl.run.settings import VlBartRunConfig
    from dora_vl.training.pipeline import Pipeline

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
TASKS = ("llava_instruct", "vlbart_image", "vlbart_video", "commonsense")
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

    The words are settings of `task`, or of the one that is seen by them.
    """
    from dora_vl.run.folder import finished_already, run_folder_of
    from dora_vl.run.launch import cause_speaks_first, end_with_launcher, log_to_stderr

    log_to_stderr()
    end_with_launcher()
    logger = logging.getLogger(__name__)
    with cause_speaks_first():
        config, task = settings_and_task(words, task, program=program, description=description)
        if finished_already(config):
            logger.info("%s: finished already; --overwrite true replaces it", run_folder_of(config.training))
            return
        pipeline = pipeline_of(task)(config)

        from dora_vl.training.run import run

        stopped_by = run(pipeline)
    if stopped_by is not None:
        logger.info("stopped by %s; --resume last resumes from there", signal.Signals(stopped_by).name)
        sys.exit(STATUS_OF_A_SIGNAL + stopped_by)


def settings_and_task(
    words: Sequence[str], task: str | None, *, program: str, description: str = ""
) -> tuple[Any, str]:
    """The settings by the class of the named task, or of the one that knows most of what is stated."""
    from dora_vl.run.reading import kind_of, read_settings
    from dora_vl.run.settings import CommonsenseRunConfig, RunConfig, VlBartRunConfig

    kinds: dict[str, type[Any]] = {
        "llava_instruct": RunConfig,
        "vlbart_image": VlBartRunConfig,
        "vlbart_video": VlBartRunConfig,
        "commonsense": CommonsenseRunConfig,
    }
    if task is not None:
        return read_settings(words, kinds[task], program=program, description=description), task
    kind = kind_of(words)
    config = read_settings(words, kind, program=program, description=description)
    task = next(name for name, candidate in kinds.items() if candidate is kind)
    if task == "vlbart_image":
        from dora_vl.evaluation.vlbart_tasks import image_subtasks

        task = "vlbart_image" if set(config.data.train) <= set(image_subtasks()) else "vlbart_video"
    return config, task


def pipeline_of(task: str) -> Callable[[Any], Pipeline]:
    """What makes a task's pipeline of its settings."""
    if task in ("llava_instruct", "commonsense"):
        from dora_vl.training.decoder_pipeline import CommonsensePipeline, DecoderPipeline

        return DecoderPipeline if task == "llava_instruct" else CommonsensePipeline
    from dora_vl.evaluation.vlbart_tasks import image_subtasks, video_subtasks
    from dora_vl.training.vlbart_pipeline import VlBartPipeline

    is_video = task == "vlbart_video"

    def of_tasks(config: VlBartRunConfig) -> VlBartPipeline:
        subtasks = (video_subtasks if is_video else image_subtasks)(task_prompt=config.data.task_prompt)
        return VlBartPipeline(config, subtasks, name=task, is_video=is_video)

    return of_tasks
