"""`dora-vl replay`: has a run's base write the chats that `data.replay` takes, before the run."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import cast

DESCRIPTION = """\
Has the base of a run write the short chats of data.replay, which a run otherwise does at its start. They are written
once for each base and kept. Minutes on two CPU cores.

  dora-vl replay my.yaml

CONFIG is a file or a recipe's name; after it any setting of the run, --section.key value.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's option; a run's own settings may follow."""
    parser.description = DESCRIPTION
    parser.set_defaults(work=run, takes_settings=True, logs=True)
    parser.add_argument("config", metavar="CONFIG", help="YAML file with the run's settings, or a recipe's name")


def run(options: argparse.Namespace) -> Iterator[str]:
    """Writes the chats unless they are there; yields where they are."""
    import torch

    from dora_vl.evaluation.assistant import Assistant
    from dora_vl.run.launch import log_to_stderr
    from dora_vl.run.settings_parser import read_run
    from dora_vl.training.decoder_pipeline import DecoderPipeline
    from dora_vl.training.extras.replay import find_or_write_chats
    from dora_vl.training.show import shown_settings
    from dora_vl.training.train_command import pipeline_of

    log_to_stderr()
    words = [f"--config={options.config}", "--data.replay=0.1", *options.settings]  # a VL-BART refuses `data.replay`
    config = read_run(words, program="dora-vl replay")
    with tempfile.TemporaryDirectory() as folder:
        pipeline = cast(DecoderPipeline, pipeline_of(shown_settings(config, Path(folder))))
        arguments = pipeline.arguments()
        pipeline.prepare(arguments)  # composes the base, and looks whether the data has thoughts
    pipeline.config = config
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assistant = Assistant(pipeline.load(), pipeline.opened(arguments).encoder)
    yield f"{find_or_write_chats(config, assistant, device)}: chats of {config.model.base}"
