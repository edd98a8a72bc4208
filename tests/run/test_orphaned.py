"""A rank ends when its launcher is killed; a process without a launcher does not mind its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

RANK = """
import signal, sys, time
from dora_vl.training.ranks import end_with_launcher
if sys.argv[1] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
end_with_launcher(every=0.1, patience=0.5)
print("ready", flush=True)
time.sleep(60)
"""
LAUNCHER = """
import subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], stdout=subprocess.PIPE, text=True)
rank.stdout.readline()
print(rank.pid, flush=True)
time.sleep(60)
"""


def orphan(how: str, environment: dict[str, str], *, between: str | None = None) -> int:
    """Starts a launcher and its rank, kills the launcher, returns the rank's number.

    Args:
        how: `deaf` or `polite`, of the rank.
        environment: in addition.
        between: a script that stands between the two, as DeepSpeed's does.
    """
    command = [sys.executable, "-c", LAUNCHER, RANK, how]
    if between is not None:
        outer = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(60)"
        command = [sys.executable, "-c", outer, sys.executable, between, RANK, how]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    assert launcher.stdout is not None
    rank = int(launcher.stdout.readline())
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    return rank


def is_gone(process: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        status = Path(f"/proc/{process}/stat")
        if not status.exists() or ") Z" in status.read_text():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("how", ["polite", "deaf"])
def test_a_rank_ends_with_its_launcher(how: str) -> None:
    assert is_gone(orphan(how, {"LOCAL_RANK": "0"}), seconds=20)


def test_a_rank_ends_with_the_launcher_behind_deepspeeds_own_process(tmp_path: Path) -> None:
    between = tmp_path / "deepspeed.launcher.launch.py"
    between.write_text(LAUNCHER)
    rank = orphan("polite", {"LOCAL_RANK": "0"}, between=str(between))
    assert is_gone(rank, seconds=20)


def test_a_process_without_a_launcher_outlives_its_parent() -> None:
    assert "LOCAL_RANK" not in os.environ
    rank = orphan("polite", {})
    assert not is_gone(rank, seconds=1.5)
    os.kill(rank, signal.SIGKILL)
