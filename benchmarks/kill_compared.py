"""How two runs of `benchmarks/kills.py` differ; "" where they do not."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.kill_case import SAMPLES, STEP_SAMPLES, Case

OF_TIME = ("train_seconds", "samples_per_second")
CLOSE = 1e-4


def exactly(reference: Path, folder: Path) -> str:
    """What differs between two runs that should be the same to the bit."""
    from safetensors import safe_open

    if losses(reference) != losses(folder):
        return f"losses differ: {losses(reference)} and {losses(folder)}"
    weights = [one / "adapter" / "adapter_model.safetensors" for one in (reference, folder)]
    with safe_open(weights[0], "np") as ours, safe_open(weights[1], "np") as theirs:
        if set(ours.keys()) != set(theirs.keys()):
            return "the adapters hold other tensors"
        for name in ours.keys():  # noqa: SIM118 - a safetensors file is no mapping
            if ours.get_tensor(name).tobytes() != theirs.get_tensor(name).tobytes():
                return f"{name} differs"
    if numbers(reference) != numbers(folder):
        return f"metrics differ: {numbers(reference)} and {numbers(folder)}"
    left = [one.name for one in folder.iterdir() if "writing" in one.name or "old" in one.name]
    return f"left behind: {', '.join(left)}" if left else ""


def closely(reference: Path, folder: Path) -> str:
    """What differs by more than rounding between losses."""
    ours, theirs = losses(reference), losses(folder)
    if [step for step, _ in ours] != [step for step, _ in theirs]:
        return f"steps differ: {ours} and {theirs}"
    far = max(abs(one - other) for (_, one), (_, other) in zip(ours, theirs, strict=True))
    return f"losses differ by {far:.2g}" if far > CLOSE else ""


def once_an_epoch(folder: Path, case: Case) -> str:
    """Which samples were trained on otherwise than once in each epoch; a VL-BART's repeat by its plan."""
    if case.kind == "vlbart":
        return ""
    notes = folder.with_name(f"{folder.name}-notes")
    later = _samples(notes / "resumed")
    first = min(later, default=0)
    steps = {step: ids for step, ids in _samples(notes / "killed").items() if not later or step < first} | later
    in_an_epoch = SAMPLES // STEP_SAMPLES
    for epoch in range(max(steps) // in_an_epoch):
        seen = Counter(one for step in range(in_an_epoch) for one in steps[1 + epoch * in_an_epoch + step])
        if len(seen) != SAMPLES or set(seen.values()) != {1}:
            return f"epoch {epoch}: samples seen {dict(seen)}"
    return ""


def _samples(notes: Path) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for file in notes.glob("samples-*.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found.setdefault(row["step"], []).extend(row["ids"])
    return found


def losses(run_folder: Path) -> list[tuple[int, float]]:
    """Each logged step's."""
    lines = [json.loads(line) for line in (run_folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def numbers(run_folder: Path) -> dict[str, Any]:
    """Those of `metrics.json` that a second run must have too."""
    found = json.loads((run_folder / "metrics.json").read_text(encoding="utf-8"))
    return {name: value for name, value in found.items() if name not in OF_TIME}
