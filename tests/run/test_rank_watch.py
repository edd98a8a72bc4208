"""Two ranks under the launcher, one of which dies, hangs or is stopped: the other ends soon, with one line."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from torch.distributed import DistBackendError, DistNetworkError, DistStoreError

from dora_vl.errors import is_communication
from dora_vl.training.ranks import Sign, is_timeout, who_did_not_come
from tests.training.launched import launch
from tests.training.tiny_run import write_run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
LIMIT = 15
RANK_1 = r"rank 1 \(process \d+ on \S+\)"


@dataclass(frozen=True)
class Ended:
    """How a launch ended; `lines` are those of the ranks, without the launcher's own."""

    status: int
    seconds: float
    lines: list[str]


def launched(how: str, tiny_llava: Path, tiny_data: Path, folder: Path, *, stage: str) -> Ended:
    training = {"max_steps": 6, "per_device_train_batch_size": 2, "deepspeed": stage, "ddp_timeout": LIMIT}
    run_file = write_run(folder / "run.yaml", tiny_llava, tiny_data, training=training)
    began = time.monotonic()
    done = launch(run_file, ranks=2, program=("tests/run/faulty_rank.py", how), succeeds=False)
    own = [line for line in done.stderr.splitlines() if line.strip() and "[launch.py:" not in line]
    assert done.returncode != 2
    return Ended(done.returncode, time.monotonic() - began, own)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("stage", ["zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_other_with_one_line(
    tiny_llava: Path, tiny_data: Path, tmp_path: Path, stage: str
) -> None:
    ended = launched("kill", tiny_llava, tiny_data, tmp_path, stage=stage)
    assert ended.seconds < 60 + 30  # of which the start takes most
    assert re.match(rf"error: {RANK_1} .*--resume last", ended.lines[-1])
    assert not any("Traceback" in line for line in ended.lines)


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_an_exception_of_one_rank_is_shown_by_it_alone(
    tiny_llava: Path, tiny_data: Path, tmp_path: Path, stage: str
) -> None:
    ended = launched("raise", tiny_llava, tiny_data, tmp_path, stage=stage)
    assert ended.seconds < 60 + 30
    assert sum("Traceback" in line for line in ended.lines) == 1
    assert ended.lines[-2].endswith("LookupError: no such word")
    assert re.match(rf"error: {RANK_1} .*LookupError: no such word.*--resume last", ended.lines[-1])


@pytest.mark.slow  # each waits for the limit
@pytest.mark.timeout(200)
@pytest.mark.parametrize(("how", "why"), [("stop", "no sign of life"), ("sleep", "in no collective")])
def test_a_rank_that_does_not_come_is_named_after_the_limit_and_stacks_are_shown(
    tiny_llava: Path, tiny_data: Path, tmp_path: Path, how: str, why: str
) -> None:
    ended = launched(how, tiny_llava, tiny_data, tmp_path, stage="zero2")
    assert re.match(rf"error: .* {LIMIT} s \(training.ddp_timeout\): {RANK_1} did not come \({why}", ended.lines[-1])
    stacks = [line for line in ended.lines if line.endswith("its stack:")]
    assert len(stacks) == (1 if how == "stop" else 2)  # a stopped process shows nothing
    if how == "sleep":
        assert any("faulty_rank.py" in line and "go_wrong" in line for line in ended.lines)


GLOO = "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:84] Timed out waiting 15000ms for recv operation"


def test_errors_because_of_another_rank_are_told_by_their_type_or_by_gloos_words() -> None:
    typed = [kind("ended") for kind in (DistBackendError, DistNetworkError, DistStoreError)]
    assert all(is_communication(error) for error in (*typed, RuntimeError(GLOO)))
    assert not any(is_communication(error) for error in (RuntimeError("shapes do not fit"), ValueError(GLOO)))
    assert is_timeout(RuntimeError(GLOO))
    assert is_timeout(RuntimeError("[gloo/transport/tcp/pair.cc:529] Application timeout caused pair closure"))
    assert not is_timeout(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:123"))


def test_who_did_not_come_is_told_by_signs_then_steps_then_collectives() -> None:
    first, second, third = (Sign(rank, "host", 100 + rank, step=3, waits=True) for rank in range(3))
    behind, busy = replace(third, step=2), replace(first, waits=False)
    assert who_did_not_come([busy, second, behind], [second]).startswith(f"{second} did not come")
    assert who_did_not_come([busy, second, behind], []).startswith(f"{third} did not come (behind step 3")
    assert who_did_not_come([busy, second, third], []).startswith(f"{first} did not come (in no collective")
    assert who_did_not_come([first, second, third], []).startswith("all ranks wait")


# ---- a rank whose launcher is gone

ORPHAN = """
import signal, sys, time
from dora_vl.run.launch import end_with_launcher
if sys.argv[1] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
end_with_launcher(interval=0.1, patience=0.5)
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


@pytest.mark.parametrize(
    ("how", "environment", "behind_deepspeed"),
    [("deaf", {"LOCAL_RANK": "0"}, False), ("polite", {"LOCAL_RANK": "0"}, True), ("polite", {}, False)],
)
def test_a_rank_ends_with_its_launcher_and_a_process_without_one_does_not(
    tmp_path: Path, how: str, environment: dict[str, str], behind_deepspeed: bool
) -> None:
    assert "LOCAL_RANK" not in os.environ
    command = [sys.executable, "-c", LAUNCHER, ORPHAN, how]
    if behind_deepspeed:  # its own process stands between the two, and outlives the launcher
        between = tmp_path / "deepspeed.launcher.launch.py"
        between.write_text(LAUNCHER)
        outer = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:]); time.sleep(60)"
        command = [sys.executable, "-c", outer, sys.executable, str(between), ORPHAN, how]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    assert launcher.stdout is not None
    rank = Sign(0, "here", int(launcher.stdout.readline()))
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    until = time.monotonic() + (20 if environment else 1.5)
    while time.monotonic() < until and not rank.is_gone():
        time.sleep(0.05)
    assert rank.is_gone() == bool(environment)
    if not environment:
        os.kill(rank.process, signal.SIGKILL)
