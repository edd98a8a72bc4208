"""Threads that wait leave their core to others while others need it: for runs on a CPU that is shared.

OpenMP's threads spin for milliseconds while they wait for each other. Where another process takes part of the machine,
they keep the core that their partner needs: a small model beside one busy process on two cores has 0.3 of its speed.
To wait asleep costs as much where the machine is free. libgomp reads which of the two it shall do when it is loaded;
but it spins for 100 turns instead of 300,000 while there are more OpenMP threads than cores, whatever they do (its
manual, GOMP_SPINCOUNT). So a thread beside the work looks how many cores others keep busy, and holds idle OpenMP
threads while these are needed. The work's own threads stay as many as they were, and so do its sums.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
import time
from pathlib import Path

import psutil
import torch

SECONDS_BETWEEN_LOOKS = 0.5
MARGIN = 0.3
"""Cores that others may keep busy before it counts: a system is never quite at rest."""
SAID_BY_THE_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@functools.cache
def give_way_when_busy() -> bool:
    """Begins to look, once in a process, until it ends; returns whether it does.

    Not with a GPU, one thread, another OpenMP than GNU's, or where the environment says how threads wait.
    """
    said = any(os.environ.get(name) for name in SAID_BY_THE_USER)
    if said or torch.cuda.is_available() or torch.get_num_threads() == 1 or not openmp_libraries():
        return False
    threading.Thread(target=_look, args=(torch.get_num_threads(),), daemon=True, name="busy cores").start()
    return True


def _look(threads: int) -> None:
    cores, load, idle = os.sched_getaffinity(0), OthersLoad(), IdleThreads()
    while True:
        time.sleep(SECONDS_BETWEEN_LOOKS)
        if threads + load.cores() > len(cores) + MARGIN:
            idle.hold()
        else:
            idle.release()


class OthersLoad:
    """How much of the cores that this process may use goes to other processes, its own workers among them."""

    def __init__(self) -> None:
        self._before = self._times()

    def cores(self) -> float:
        """Cores that others kept busy since the last look."""
        now = self._times()
        passed, all_of_them, own = (new - old for new, old in zip(now, self._before, strict=True))
        self._before = now
        return max(0.0, all_of_them - own) / max(passed, 1e-9)

    @staticmethod
    def _times() -> tuple[float, float, float]:
        """The clock, seconds in which the cores did something, and seconds of this process.

        What a hypervisor takes is not counted: nobody here could use it.
        """
        own_cores = os.sched_getaffinity(0)
        busy = sum(
            one.user + one.nice + one.system + one.irq + one.softirq
            for core, one in enumerate(psutil.cpu_times(percpu=True))
            if core in own_cores
        )
        return time.monotonic(), busy, time.process_time()


class IdleThreads:
    """OpenMP threads that do nothing, more than there are cores."""

    def __init__(self) -> None:
        self._over: threading.Event | None = None

    def hold(self) -> None:
        """Has them, from a moment later on."""
        if self._over is None:
            self._over = threading.Event()
            threading.Thread(target=_stand_by, args=(self._over,), daemon=True, name="idle threads").start()

    def release(self) -> None:
        """Lets them end."""
        if self._over is not None:
            self._over.set()
            self._over = None


def _stand_by(over: threading.Event) -> None:
    """A team belongs to the thread that opened it, and ends with it."""
    nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # of no memory: what each thread does
    for library in openmp_libraries():
        ctypes.CDLL(library).GOMP_parallel(nothing, None, len(os.sched_getaffinity(0)) + 1, 0)
    over.wait()


def openmp_libraries() -> list[str]:
    """Files of GNU's OpenMP in this process; wheels bring their own."""
    if sys.platform != "linux":
        return []
    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    files = (line.split(maxsplit=5)[5] for line in lines if line.count("/"))
    return sorted({file for file in files if Path(file).name.startswith("libgomp")})
