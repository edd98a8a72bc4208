"""The picture of `gpu.py`: every contender's step, decoding and memory beside PEFT's LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

COLOURS = {
    "frozen": "#bbbbbb",
    "peft_lora": "#555555",
    "peft_dora": "#cc6677",
    "ours_eager": "#ddcc77",
    "ours": "#117733",
    "ours_compiled": "#332288",
}


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes a PNG: cases from top to bottom, a bar for each contender; PEFT's LoRA is the line at 1."""
    panels = [("train_vs_peft_lora", "training step"), ("decode_vs_peft_lora", "decoding one token")]
    if all("step_mib" in row for row in rows):
        panels.append(("step_mib", "memory of a step, MiB"))
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5 * len(panels), 1.2 + 0.9 * len(rows)), sharey=True, layout="constrained"
    )
    for axis, (key, title) in zip(axes, panels, strict=True):
        _bars(axis, [row[key] for row in rows])
        axis.set_title(title)
        if key.endswith("peft_lora"):
            axis.axvline(1.0, color="black", linewidth=0.8)
            axis.set_xlabel("time, PEFT LoRA = 1")
    axes[0].set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=8)
    axes[0].invert_yaxis()
    axes[-1].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _bars(axis: Any, rows: Sequence[dict[str, float]]) -> None:
    names = [name for name in COLOURS if any(name in row for row in rows)]
    height = 0.8 / len(names)
    for place, name in enumerate(names):
        there = [(number, row[name]) for number, row in enumerate(rows) if name in row]
        offsets = [number - 0.4 + (place + 0.5) * height for number, _ in there]
        axis.barh(offsets, [value for _, value in there], height=height, color=COLOURS[name], label=name)
