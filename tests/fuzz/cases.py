"""What the tests of damaged files share: how many cases, memory, and what a case says."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

LONGEST_LINE = 500


def numbers(count: int) -> Iterator[int]:
    """`FUZZ_CASES` of the environment, or `count`; `FUZZ_ONLY` is one case alone."""
    only = os.environ.get("FUZZ_ONLY")
    yield from [int(only)] if only else range(1, int(os.environ.get("FUZZ_CASES", count)) + 1)


def failures(run: Callable[[int], str], count: int) -> list[str]:
    """What went wrong in the cases, the first ten; each can be run again by its number."""
    found = [f"FUZZ_ONLY={number}: {failure}" for number in numbers(count) if (failure := run(number))]
    return found[:10]


def memory_mb(*, begin: bool = False) -> float:
    """The most memory that this process held since `begin`; 0 where the system does not say."""
    try:
        if begin:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return 0.0
    peak = next((line for line in status.splitlines() if line.startswith("VmHWM")), "VmHWM: 0")
    return int(peak.split()[1]) / 1024
