"""A composed tower is opened by transformers' auto classes once `register_towers` was called, and not before."""

from __future__ import annotations

import subprocess
import sys

OPENS = """
from transformers import AutoConfig, AutoModel
from dora_vl.backbones import register_towers
try:
    AutoConfig.for_model('dora_grid_tower')
except ValueError:
    register_towers()
    register_towers()
config = AutoConfig.for_model('dora_grid_tower', architecture='resnet18', hidden_size=512)
print(type(config).__name__, type(AutoModel.from_config(config)).__name__)
"""


def test_towers_are_registered_when_they_are_asked_for() -> None:
    done = subprocess.run([sys.executable, "-c", OPENS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["GridTowerConfig", "GridTower"]
