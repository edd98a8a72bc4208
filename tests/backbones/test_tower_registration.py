"""Verbs that open bases make transformers' auto classes open a composed tower."""

from __future__ import annotations

import subprocess
import sys

import pytest

VERB = """
import sys
from importlib import import_module
from transformers import AutoConfig
from dora_vl import cli
module = import_module(cli.COMMANDS[sys.argv[1]].module)
towers = {'architecture': 'resnet18', 'hidden_size': 512}
module.run = lambda options: [type(AutoConfig.for_model('dora_grid_tower', **towers)).__name__]
cli.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "words", [("merge", "--adapter", "a", "--to", "b"), ("report", "a"), ("convert", "a", "--to", "b")]
)
def test_verbs_that_open_bases_have_registered_them(words: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-c", VERB, *words], capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.stderr) == (["GridTowerConfig"], ""), done.stderr
