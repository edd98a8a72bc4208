"""`dora-vl replay`: has a run's base write the chats that `data.replay` takes, before the run."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

DESCRIPTION = """\
Has the base of a run write short chats (data.replay), which its runs learn beside their data so that it keeps what it
knows. A run does the same at its start; they are written once for each base, and kept. Minutes on two CPU cores.

  dora-vl replay my.yaml
  dora-vl replay my.yaml --to chats.jsonl           for a look, or as a file of data.train

CONFIG is a file or a recipe's name; behind it any setting of the run, --section.key value.
"""
TAKES_SETTINGS = SETS_UP_LOGGING = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options; a run's own settings may stand between them."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file with the run's settings, or a recipe's name")
    parser.add_argument("--to", type=Path, metavar="FILE", help="also copies the chats there")


def run(options: argparse.Namespace) -> Iterator[str]:
    """Writes the chats unless they are there; yields the lines to print."""
    import shutil

    import torch

    from dora_vl.errors import SettingError
    from dora_vl.evaluation.assistant import Assistant, EncoderPrompts
    from dora_vl.run.launch import log_to_stderr
    from dora_vl.run.reading import read_run
    from dora_vl.training.decoder_pipeline import DecoderPipeline
    from dora_vl.training.replay import file_of_chats, write_chats
    from dora_vl.training.show_command import shown_settings
    from dora_vl.training.train_command import pipeline_of

    log_to_stderr()
    config = read_run([f"--config={options.config}", *options.settings], program="dora-vl replay")
    with tempfile.TemporaryDirectory() as folder:
        pipeline = pipeline_of(shown_settings(config, Path(folder)))
        if not isinstance(pipeline, DecoderPipeline):
            raise SettingError("task", f" is {config.task}, which writes no chats")
        pipeline.prepare(pipeline.arguments())  # composes the base, and looks whether the data has thoughts
    path = file_of_chats(config, pipeline.encoder)
    if not path.is_file():
        pipeline.config = config
        backbone = pipeline.load().to(torch.device("cuda" if torch.cuda.is_available() else "cpu")).eval()
        write_chats(path, Assistant(backbone, EncoderPrompts(pipeline.encoder)), config.model)
    if options.to is not None:
        shutil.copyfile(path, options.to)
    yield f"{options.to or path}: chats of {config.model.base}"
