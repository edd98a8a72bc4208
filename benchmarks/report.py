"""Shared by all benchmarks: a record of the machine, tables to read, JSON for machines."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median as median
from typing import Any

from dora_vl.files import write_json_lines
from dora_vl.run.folder import read_log
from dora_vl.start.doctor import installed_version

PACKAGES = ("torch", "triton", "transformers", "peft", "deepspeed")


def machine() -> dict[str, Any]:
    """Describes the kind of machine and the versions that a figure belongs to; it holds no names and no paths."""
    import torch

    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **{package: installed_version(package) or None for package in PACKAGES},
    }


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Formats rows as a Markdown table that can be pasted into a document."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[column]) for row in [list(heads), *cells]) for column in range(len(heads))]
    head, *lines = (
        f"| {' | '.join(text.ljust(width) for text, width in zip(row, widths, strict=True))} |"
        for row in (heads, *cells)
    )
    return "\n".join([head, "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines])


def write_json(path: Path | None, content: Mapping[str, Any], *, name: str | None = None) -> None:
    """Writes figures and machine into a file of JSON lines, in place of this script's earlier line; None is no file."""
    if path is None:
        return
    name = name or Path(sys.argv[0]).stem
    others = [line for line in read_log(path) if line["name"] != name]
    lines = sorted([*others, {"name": name, "machine": machine(), **content}], key=lambda line: str(line["name"]))
    write_json_lines(path, lines)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
