"""A launch one of whose ranks dies, raises or hangs ends in the seconds of docs/starting.md; OpenMP's threads wait."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from torch.distributed import DistNetworkError

from dora_vl.errors import SPINS, LostRank, UserError
from dora_vl.run import launch as run_launch
from dora_vl.run.launch import first_rank_reports_first, stand_alone_environment
from tests.training.launched import launch
from tests.training.tiny_run import MakeRun

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
LIMIT, BUSY = 15, 25
FULL = pytest.mark.slow


@pytest.mark.timeout(200)
@pytest.mark.parametrize("launcher", ["deepspeed", pytest.param("torchrun", marks=FULL)])
@pytest.mark.parametrize(
    ("how", "seconds"),
    [
        pytest.param("kill", 3, marks=FULL),
        pytest.param("raise", 5, marks=FULL),
        pytest.param("sleep", LIMIT + 8, marks=FULL),
        pytest.param("stop", LIMIT + 33, marks=FULL),  # it hears no SIGTERM: the launcher kills it after 30 s
    ],
)
def test_a_launch_ends_soon_after_one_of_its_ranks(make_run: MakeRun, how: str, seconds: float, launcher: str) -> None:
    training = {"max_steps": 6, "per_device_train_batch_size": 2, "deepspeed": "zero2", "ddp_timeout": LIMIT}
    run_file = make_run(training=training)
    program = ("tests/run/faulty_rank.py", how)
    done = launch(run_file, ranks=2, launcher=launcher, program=program, succeeds=False)
    wrong = re.search(r"goes wrong at ([\d.]+)", done.stderr)
    assert time.time() - float(wrong[1]) < seconds + BUSY
    words = {"raise": "LookupError: no such word", "sleep": "in go_wrong", "stop": "Timeout (0:00:15)"}
    assert words.get(how, "") in done.stderr  # the cause itself, or where each rank stood


GLOO = "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:84] Timed out waiting 15000ms for recv operation"


@pytest.mark.parametrize(
    ("error", "rank", "kind", "waits"),
    [
        (DistNetworkError("closed"), "0", LostRank, 2),
        (RuntimeError(GLOO), "1", LostRank, 2),
        *((UserError("bad"), rank, UserError, int(rank)) for rank in "01"),
        (RuntimeError("a bug"), "1", RuntimeError, 0),
    ],
)
def test_the_rank_that_knows_most_speaks_first(monkeypatch, error, rank, kind, waits) -> None:
    waited: list[float] = []
    monkeypatch.setattr(run_launch.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(kind) as raised, first_rank_reports_first():
        raise error
    assert type(raised.value) is kind
    assert getattr(raised.value, "status", None) == {LostRank: 1, UserError: 2}.get(kind)
    assert sum(waited) == waits * run_launch.FIRST_RANK_SECONDS


def test_one_rank_takes_a_free_port_and_keeps_what_the_launcher_said(monkeypatch: pytest.MonkeyPatch):
    launched = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    stand_alone_environment()
    port = os.environ["MASTER_PORT"]
    assert {**launched, "MASTER_PORT": port} == {name: os.environ[name] for name in launched}
    assert int(port) != 29500
    monkeypatch.setenv("WORLD_SIZE", "2")
    stand_alone_environment()  # two ranks meet at the launcher's port
    assert os.environ["MASTER_PORT"] == port


ORPHAN = """
import time
from dora_vl.run.launch import end_with_launcher
end_with_launcher()
print("ready", flush=True)
time.sleep(60)
"""
LAUNCHER = """
import subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
rank.stdout.readline()
print(rank.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("launched", [True, False])
def test_a_rank_ends_with_its_launcher_and_a_process_without_one_does_not(launched: bool) -> None:
    assert "LOCAL_RANK" not in os.environ
    environment = {**os.environ, **({"LOCAL_RANK": "0"} if launched else {})}
    command = [sys.executable, "-c", LAUNCHER, ORPHAN]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    rank = psutil.Process(int(launcher.stdout.readline()))
    launcher.kill()
    launcher.wait()
    until = time.monotonic() + (10 if launched else 1)
    while rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE and time.monotonic() < until:
        time.sleep(0.05)
    gone = not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE
    assert gone == launched
    if not gone:
        rank.send_signal(signal.SIGKILL)


ROOT = Path(__file__).parents[2]
SCRIPTS = ("llava_instruct", "vlbart_image", "vlbart_video", "commonsense", "image_qa", "video_qa")


def printed(code: str, **stated: str) -> list[str]:
    """The words of a program's last line."""
    environment = {name: value for name, value in os.environ.items() if name not in SPINS}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT), **stated},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()[-1].split()


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({}, [*SPINS.values()]),
        ({"GOMP_SPINCOUNT": "7"}, ["7", SPINS["KMP_BLOCKTIME"]]),
        ({"OMP_WAIT_POLICY": "active"}, ["None", "None"]),
    ],
)
def test_threads_do_not_spin_but_as_the_user_says(stated: dict[str, str], expected: list[str]) -> None:
    """OpenMP's library reads it when torch loads it, so no entry may import torch before."""
    code = f"""
import importlib, os, sys
before = dict(os.environ)
for name in {("dora_vl.cli", *(f"tasks.{name}" for name in SCRIPTS))}:
    importlib.import_module(name)
assert dict(os.environ) == before and "torch" not in sys.modules
sys.modules["dora_vl.cli"].main(["--version"])
print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("KMP_BLOCKTIME"), "torch" in sys.modules)
"""
    assert printed(code, **stated) == [*expected, "False"]
