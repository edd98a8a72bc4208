"""Locks that a killed build of a C++ extension leaves: whoever needs that extension next waits for ever."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

logger = logging.getLogger(__name__)

OLD_SECONDS = 600.0
"""Longer than any of DeepSpeed's or torch's extensions takes to build."""


def report_old_build_locks() -> list[Path]:
    """Names locks in torch's folder of built extensions that no living build can hold; returns them.

    Torch's builder makes an empty file `lock`, and waits without a word while there is one; DeepSpeed builds its CPU
    optimizer (offloading) and other operations that way.
    """
    found = [path for path in _locks() if _age(path) > OLD_SECONDS]
    for path in found:
        logger.warning(
            "%s is %.0f minutes old: a build of a C++ extension that was killed leaves such a file, and whatever needs "
            "the extension waits for ever; remove the file if no other process builds there",
            path,
            _age(path) / 60,
        )
    return found


def _locks() -> list[Path]:
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if given is not None:
        return sorted(Path(given).glob("*/lock"))
    from torch.utils.cpp_extension import get_default_build_root

    return sorted(Path(get_default_build_root()).glob("*/*/lock"))  # below py311_cpu, py311_cu126


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:  # its build has ended meanwhile
        return 0.0
