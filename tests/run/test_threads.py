"""OpenMP's threads: they wait as the user says, and have a core each while a step computes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dora_vl.errors import SPINS

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


@pytest.mark.skipif(sys.platform != "linux", reason="nothing is bound")
def test_runs_at_once_bind_their_main_threads_to_different_cores_or_none() -> None:
    code = """
import os, subprocess, sys
from dora_vl.errors import bind_threads
bind_threads()
print(os.environ.get("OMP_PLACES", "none").partition("},")[0])
if (more := int(sys.argv[1])):
    del os.environ["OMP_PROC_BIND"], os.environ["OMP_PLACES"]
    sys.stdout.flush()
    subprocess.run([sys.executable, "-c", sys.argv[2], str(more - 1), sys.argv[2]], check=True)
"""
    cores = len(os.sched_getaffinity(0))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "LOCAL_"))}
    command = [sys.executable, "-c", code, str(cores), code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    *bound, last = done.stdout.split()
    assert len({*bound}) == len(bound) == cores
    assert last == "none"


@pytest.mark.skipif(sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="one core has no other")
@pytest.mark.parametrize("stated", [{}, {"OMP_NUM_THREADS": "2"}])
def test_each_thread_has_a_core_of_its_own_while_a_step_computes(
    stated: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between steps the main thread has all cores, since data workers start with its own."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code = """
import os, threading
from dora_vl.errors import bind_threads
every = os.sched_getaffinity(0)
bind_threads()
from dora_vl.run.launch import bind_main_thread
core, main = bind_main_thread(), threading.get_native_id()
if core is None:
    print("unbound")
else:
    from dora_vl.training.callbacks import OwnCore
    callback = OwnCore(*core)
    threads = [os.sched_getaffinity(int(name)) for name in os.listdir("/proc/self/task") if int(name) != main]
    bound = [cores for cores in threads if cores != every]
    between = os.sched_getaffinity(0)
    callback.on_step_begin(None, None, None)
    own = os.sched_getaffinity(0)
    callback.on_step_end(None, None, None)
    print(between == every == os.sched_getaffinity(0), own < every, len(bound) > 0, any(own & cores for cores in bound))
"""
    assert printed(code, **stated) == (["unbound"] if stated else ["True", "True", "True", "False"])
