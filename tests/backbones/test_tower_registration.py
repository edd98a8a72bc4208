"""Verbs that open bases make transformers' auto classes open a composed tower."""

from __future__ import annotations

import json
import subprocess
import sys

VERBS = """
import json, sys
from importlib import import_module
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from dora_vl import cli
towers = {'architecture': 'resnet18', 'hidden_size': 512}
for words in json.loads(sys.argv[1]):
    CONFIG_MAPPING._extra_content.pop('dora_grid_tower', None)
    module = import_module(cli.COMMANDS[words[0]].module)
    module.run = lambda options: [type(AutoConfig.for_model('dora_grid_tower', **towers)).__name__]
    cli.main(words)
"""


def test_verbs_that_open_bases_have_registered_them() -> None:
    verbs = [["merge", "--adapter", "a", "--to", "b"], ["analyze", "a", "b", "--to", "c"]]
    command = [sys.executable, "-c", VERBS, json.dumps(verbs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.stderr) == (["GridTowerConfig"] * 2, ""), done.stderr
