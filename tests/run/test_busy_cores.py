"""Threads that wait leave their core to others while others need it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from dora_vl.training import launch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP on Linux")
WAITING = """
import json, time, torch
from dora_vl.training.launch import IdleThreads
torch.set_num_threads(2)
work = torch.ones(1 << 20)

def spun():  # seconds of all threads while nothing is to be done but to wait for more
    work.add_(1)
    before = time.process_time()
    for _ in range(100):
        work[:70_000].add_(1)
        time.sleep(0.005)
    return time.process_time() - before

idle, found = IdleThreads(), [spun()]
for change in (idle.hold, idle.hold, idle.release, idle.release):
    change()
    time.sleep(0.3)
    found.append(spun())
print(json.dumps([found, work[0].item()]))
"""
LOOKING = """
import json, subprocess, sys, threading, time, torch
from dora_vl.training import launch as busy_cores
torch.set_num_threads(2)
names = lambda: {one.name for one in threading.enumerate()}
started = [busy_cores.give_way_when_busy(), busy_cores.give_way_when_busy()]
looking = sum(one.name == "busy cores" for one in threading.enumerate())

def within(seconds, there):
    until = time.monotonic() + seconds
    while time.monotonic() < until and ("idle threads" in names()) != there:
        time.sleep(0.1)
    return ("idle threads" in names()) == there

command = [sys.executable, "-c", "while True: pass"]
others = [subprocess.Popen(command) for _ in busy_cores.os.sched_getaffinity(0)]
came = within(60, True)
for one in others:
    one.kill()
print(json.dumps([started, looking, came]))
"""


def printed(program: str, **environment: str) -> Any:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "MKL_"))}
    done = subprocess.run(
        [sys.executable, "-c", program], env=kept | environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core: nothing waits")
def test_idle_threads_stop_the_others_from_spinning() -> None:
    (before, held, still, released, after), value = printed(WAITING)
    assert held < before / 2
    assert still < before / 2
    assert released > before / 2
    assert after > before / 2
    assert value == 506


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core: nothing waits")
def test_they_come_where_others_keep_the_cores_busy() -> None:
    assert printed(LOOKING) == [[True, True], 1, True]


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_who_says_how_threads_wait_is_left_alone(name: str) -> None:
    value = {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "1000"}[name]
    assert printed(LOOKING.replace("came = within(60, True)", "came = within(3, True)"), **{name: value}) == [
        [False, False],
        0,
        False,
    ]


def test_load_of_others_is_not_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of four cores are this process's; in two seconds they do 3.25, of which 1.5 are its own."""
    zero = dict.fromkeys(("user", "nice", "system", "irq", "softirq", "steal", "idle", "iowait", "guest"), 0.0)
    cores = [dict(zero) for _ in range(4)]
    clock = {"wall": 10.0, "own": 5.0}
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda of: {1, 3})
    monkeypatch.setattr(launch.psutil, "cpu_times", lambda percpu: [SimpleNamespace(**one) for one in cores if percpu])
    monkeypatch.setattr(launch.time, "monotonic", lambda: clock["wall"])
    monkeypatch.setattr(launch.time, "process_time", lambda: clock["own"])
    load = launch.OthersLoad()
    assert load.cores() == 0
    cores[0]["user"] = cores[2]["user"] = 2.0
    cores[1] |= {"user": 1.0, "system": 0.5, "steal": 0.25, "idle": 0.25}
    cores[3] |= {"user": 1.25, "guest": 1.25, "nice": 0.25, "irq": 0.125, "softirq": 0.125, "iowait": 0.25}
    clock |= {"wall": 12.0, "own": 6.5}
    assert load.cores() == 0.875  # what the hypervisor took is nobody's
    clock |= {"wall": 13.0, "own": 7.5}  # the kernel has not counted it yet
    assert load.cores() == 0


def test_libraries_are_torchs() -> None:
    import torch  # noqa: F401

    found = launch.openmp_libraries()
    assert found
    assert all("libgomp" in one for one in found)
