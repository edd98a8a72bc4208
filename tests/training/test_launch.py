"""What a launch sets in the process: here, that a step's memory stays for the next."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from dora_vl.training.launch import keep_freed_memory
if sys.argv[1] == "kept":
    print(keep_freed_memory())
def step():
    kept = [torch.zeros(2 ** 22) for _ in range(6)]
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> list[str]:
    finished = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True)
    return finished.stdout.split()


@pytest.mark.skipif(sys.platform != "linux", reason="the GNU C library's allocator")
def test_freed_memory_is_kept_for_the_next_step():
    (left_alone,) = page_faults("alone")
    kept, faults = page_faults("kept")
    if kept == "False":
        pytest.skip("a GPU, or another C library")
    assert int(left_alone) > 10_000  # 3 x 100 MB come back page by page
    assert int(faults) < int(left_alone) / 4
