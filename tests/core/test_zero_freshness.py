"""Under DeepSpeed ZeRO a parameter changes without a trace in `_version`; the norm must follow all the same."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("zero_freshness.py")
ROOT = SCRIPT.parents[2]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_norm_follows_every_step(stage):
    environment = {**os.environ, "MASTER_PORT": free_port(), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(stage)], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    seen = json.loads(run.stdout.strip().splitlines()[-1])
    assert seen["error"] < 1e-5, seen
    assert seen["norms"] == 2 * 4, "two layers, four optimizer steps, two micro-batches each"
    assert abs(seen["losses"][0] - seen["losses"][-1]) > 1e-3, "nothing trained"
