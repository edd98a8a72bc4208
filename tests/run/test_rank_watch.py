"""Two ranks under the launcher, one of which dies, hangs or is stopped: the other ends soon, with one line."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest
from torch.distributed import DistBackendError, DistNetworkError, DistStoreError, HashStore

from dora_vl.errors import is_communication
from dora_vl.training import ranks
from dora_vl.training.ranks import RankWatch, Sign, is_timeout, who_did_not_come
from tests.training.tiny_run import write_run

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
LIMIT = 15


@dataclass(frozen=True)
class Ended:
    """How a launch ended; `lines` are those of the ranks, without the launcher's own."""

    status: int
    seconds: float
    lines: list[str]


def launch(how: str, tiny_llava: Path, tiny_data: Path, folder: Path, *, stage: str) -> Ended:
    training = {"max_steps": 6, "per_device_train_batch_size": 2, "deepspeed": stage, "ddp_timeout": LIMIT}
    run_file = write_run(folder / "run.yaml", tiny_llava, tiny_data, training=training)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", port]
    command += ["tests/run/faulty_rank.py", how, "--config", str(run_file)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace", timeout=170, check=False
    )
    own = [line for line in done.stderr.splitlines() if line.strip() and "[launch.py:" not in line]
    return Ended(done.returncode, time.monotonic() - began, own)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("stage", ["zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_other_with_one_line(
    tiny_llava: Path, tiny_data: Path, tmp_path: Path, stage: str
) -> None:
    ended = launch("kill", tiny_llava, tiny_data, tmp_path, stage=stage)
    assert ended.status not in (0, 2)
    assert ended.seconds < 60 + 30  # of which the start takes most
    assert re.fullmatch(
        r"error: rank 1 \(process \d+ on \S+\) is gone without a word, as after kill -9 or where memory ran out; "
        "--resume last goes on from the last checkpoint",
        ended.lines[-1],
    )
    assert not any("Traceback" in line for line in ended.lines)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("stage", [pytest.param("zero2", marks=pytest.mark.slow), "zero3"])
def test_an_exception_of_one_rank_is_shown_by_it_alone(
    tiny_llava: Path, tiny_data: Path, tmp_path: Path, stage: str
) -> None:
    ended = launch("raise", tiny_llava, tiny_data, tmp_path, stage=stage)
    assert ended.status not in (0, 2)
    assert ended.seconds < 60 + 30
    assert sum("Traceback" in line for line in ended.lines) == 1
    assert ended.lines[-2].endswith("LookupError: no such word")
    assert re.fullmatch(
        r"error: rank 1 \(process \d+ on \S+\) ended with LookupError: no such word; --resume last goes on .*",
        ended.lines[-1],
    )


@pytest.mark.slow  # each waits for the limit
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("how", "why"),
    [("stop", "no sign of life"), ("sleep", "in no collective, as its stack says")],
)
def test_a_rank_that_does_not_come_is_named_after_the_limit_and_stacks_are_shown(
    tiny_llava: Path, tiny_data: Path, tmp_path: Path, how: str, why: str
) -> None:
    ended = launch(how, tiny_llava, tiny_data, tmp_path, stage="zero2")
    assert ended.status not in (0, 2)
    assert re.fullmatch(
        rf"error: no step for {LIMIT} s \(training.ddp_timeout\): rank 1 \(process \d+ on \S+\) did not come "
        rf"\({why}\); --resume last goes on from the last checkpoint",
        ended.lines[-1],
    )
    stacks = [line for line in ended.lines if line.endswith("its stack:")]
    assert len(stacks) == (1 if how == "stop" else 2)  # a stopped process shows nothing
    assert any("most recent call first" in line for line in ended.lines)
    if how == "sleep":
        assert any("faulty_rank.py" in line and "go_wrong" in line for line in ended.lines)


GLOO = "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:84] Timed out waiting 15000ms for recv operation"


def test_errors_because_of_another_rank_are_told_by_their_type_or_by_gloos_words() -> None:
    typed = [kind("ended") for kind in (DistBackendError, DistNetworkError, DistStoreError)]
    assert all(is_communication(one) for one in (*typed, RuntimeError(GLOO)))
    assert not any(is_communication(one) for one in (RuntimeError("shapes do not fit"), ValueError(GLOO)))
    assert is_timeout(RuntimeError(GLOO))
    assert is_timeout(RuntimeError("[gloo/transport/tcp/pair.cc:529] Application timeout caused pair closure"))
    assert not is_timeout(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:123"))


def test_a_rank_that_gives_up_shows_no_traceback_of_what_it_tells_of(monkeypatch, capsys) -> None:
    monkeypatch.setattr(ranks, "SECONDS_FOR_THE_NEWS", 0.0)
    left = threading.Event()

    def leave(status: int) -> NoReturn:
        left.set()
        raise SystemExit(status)

    monkeypatch.setattr(ranks.os, "_exit", leave)
    watch = RankWatch(HashStore(), 1, 2, limit=LIMIT)
    error = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:123")

    def end() -> None:
        with contextlib.suppress(SystemExit):
            watch.end(error)

    with watch._ending:  # as a thread has it that asks the store which rank did not come
        threading.Thread(target=end, daemon=True).start()
        assert not left.wait(0.5)
        assert not capsys.readouterr().err
    assert left.wait(5)
    assert "error: the connection to another rank broke" in capsys.readouterr().err


def test_who_did_not_come_is_told_by_signs_then_steps_then_collectives() -> None:
    names = ["rank 0", "rank 1", "rank 2"]
    before = [Sign(5, 3, waits=True)] * 3
    here = Sign(6, 3, waits=True)
    assert who_did_not_come(before, [here, before[1], here], names) == "rank 1 did not come (no sign of life)"
    behind = Sign(6, 2, waits=True)
    assert who_did_not_come(before, [here, here, behind], names) == "rank 2 did not come (behind step 3)"
    busy = Sign(6, 3, waits=False)
    told = "rank 0 did not come (in no collective, as its stack says)"
    assert who_did_not_come(before, [busy, here, here], names) == told
    assert who_did_not_come(before, [here] * 3, names) == "all ranks wait for each other, as their stacks say"
