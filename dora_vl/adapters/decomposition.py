"""The paper's weight decomposition over whole models: one panel a model, one point a layer and checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from dora_vl.adapters.base_weights import BaseWeights
from dora_vl.adapters.merge import Saved, TunedWeights, opened
from dora_vl.core.analysis import Axis, Line, WeightChange, change_of_blocks, fit_line
from dora_vl.errors import UserError


@dataclass(frozen=True)
class Point:
    """One layer at one checkpoint."""

    layer: str
    step: int | None
    change: WeightChange


@dataclass(frozen=True)
class Panel:
    """One tuned model."""

    label: str
    source: str
    method: str
    points: tuple[Point, ...]
    unchanged: int
    """Matrices, over all checkpoints, that are the base's to the last bit: frozen ones; they are no points."""

    @property
    def line(self) -> Line | None:
        """dM over dD, through all points."""
        return fit_line([p.change.direction for p in self.points], [p.change.magnitude for p in self.points])

    @property
    def steps(self) -> tuple[int | None, ...]:
        """The checkpoints, oldest first."""
        return tuple(dict.fromkeys(point.step for point in self.points))


@dataclass(frozen=True)
class Request:
    """One model to look at."""

    label: str
    path: Path
    saved: tuple[Saved, ...]


def layers_to_compare(requests: Sequence[Request], base: BaseWeights, globs: Sequence[str]) -> list[str]:
    """The layers of all panels, in the model's order: the same ones, so that panels can be compared.

    Without globs these are the layers that any of the adapters adapts, or every matrix where there is no adapter.
    """
    adapted: set[str] = set()
    there: set[str] = set()
    for request in requests:
        with opened(request.saved[0], base) as tuned:
            adapted |= set(tuned.factors)
            there |= set(tuned.factors) | tuned.whole
    chosen = adapted or there
    if globs:
        for glob in globs:
            if not any(fnmatchcase(layer, glob) for layer in there):
                raise UserError(f"--layers {glob!r} matches none of {len(there)} matrices, such as {min(there)}")
        chosen = {layer for layer in there if any(fnmatchcase(layer, glob) for glob in globs)}
    return sorted(chosen, key=natural_order)


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def measured(
    request: Request, base: BaseWeights, layers: Sequence[str], *, axis: Axis, done: Callable[[], object]
) -> Panel:
    """Reads one model, a layer and checkpoint at a time; `done` is called after each."""
    points: list[Point] = []
    unchanged, method = 0, ""
    for saved in request.saved:
        with opened(saved, base) as tuned:
            method = tuned.method
            for layer in layers:
                if layer in tuned.factors or layer in tuned.whole:
                    change = _change(tuned, layer, axis)
                    if layer in tuned.factors or change.magnitude or change.direction:
                        points.append(Point(layer, saved.step, change))
                    else:
                        unchanged += 1
                done()
    if not points:
        raise UserError(f"{request.path} changes none of the {len(layers)} layers that are compared; see --layers")
    return Panel(request.label, str(request.path), method, tuple(points), unchanged)


def _change(tuned: TunedWeights, layer: str, axis: Axis) -> WeightChange:
    change = change_of_blocks(tuned.blocks(layer), axis=axis)
    if not math.isfinite(change.magnitude) or not math.isfinite(change.direction):
        raise UserError(f"{layer} holds NaN or infinity in {tuned.source} or in {tuned.base.folder}")
    return change


def as_json(panels: Sequence[Panel], base: Path, axis: Axis) -> dict[str, Any]:
    """Everything that is drawn, as plain values."""
    return {"base": str(base), "axis": axis, "panels": [_panel_json(panel) for panel in panels]}


def _panel_json(panel: Panel) -> dict[str, Any]:
    line = panel.line
    return {
        "label": panel.label,
        "source": panel.source,
        "method": panel.method,
        "regression": None if line is None else asdict(line),
        "unchanged_matrices": panel.unchanged,
        "points": [
            {
                "layer": point.layer,
                "step": point.step,
                "magnitude_change": point.change.magnitude,
                "direction_change": point.change.direction,
                "vectors": point.change.vectors,
                "vectors_without_direction": point.change.without_direction,
            }
            for point in panel.points
        ],
    }
