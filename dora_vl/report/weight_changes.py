"""What training changed in each adapted layer's weight, magnitude and direction: the paper's plot, for a report."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from dora_vl.adapters.adapter import read_adapter
from dora_vl.adapters.base_weights import CONFIG_FILE, BaseWeights
from dora_vl.adapters.decomposition import Panel, Point, Request, layers_to_compare, measured
from dora_vl.adapters.folder import WEIGHTS_FILE
from dora_vl.adapters.provenance import base_of
from dora_vl.adapters.tuned_weights import Saved, refuse_saved_on_another_base, saved_in
from dora_vl.report.charts import COLOURS, Chart, Series, chart
from dora_vl.report.run_record import RunRecord
from dora_vl.run.run_folder import ADAPTER
from dora_vl.run.watched import evenly

MOST_CHECKPOINTS = 3
_DEPTH = re.compile(r"\.(?:layers|layer|blocks|block|h)\.(\d+)\.")


def weight_changes(run: RunRecord, base: Path | None) -> Panel:
    """The run's adapter, and checkpoints of it that are still there, against the base.

    Args:
        base: where the base is now; None looks where the adapter says.

    Raises:
        UserError: no adapter or base is there, or they do not belong together.
    """
    saved = _saved(run)
    folder = _base(run, saved[-1]) if base is None else base
    with BaseWeights(folder) as weights:
        refuse_saved_on_another_base(saved[-1], weights)
        request = Request(run.label, run.folder, tuple(saved))
        layers = layers_to_compare([request], weights, ())
        with tqdm(total=len(layers) * len(saved), desc="comparing", unit="layer") as progress:
            return measured(request, weights, layers, axis="output", done=progress.update)


def _base(run: RunRecord, saved: Saved) -> Path:
    """The folder that the settings name, or what the adapter states."""
    stated = run.path(run.section("model").get("base", ""))
    return stated if (stated / CONFIG_FILE).is_file() else base_of(read_adapter(saved.folder))


def _saved(run: RunRecord) -> list[Saved]:
    """A few checkpoints and, where it is none of them, what the run ended with."""
    final = run.folder / ADAPTER
    if not (final / WEIGHTS_FILE).is_file():
        return list(saved_in(run.folder))[-MOST_CHECKPOINTS:]
    earlier = [one for one in saved_in(run.folder) if one.step is not None and one.step < run.last_step]
    return [*evenly(earlier, MOST_CHECKPOINTS - 1), Saved(final, run.last_step)]


def plane(panel: Panel) -> Chart | None:
    """Every layer of the last checkpoint as a point, a colour for each kind; the line is through all checkpoints."""
    last = panel.steps[-1]
    series = [
        _cloud(kind, [point for point in points if point.step == last], colour)
        for colour, (kind, points) in enumerate(by_kind(panel.points).items())
    ]
    line = panel.line
    if line is not None:
        xs = [point.change.direction for point in panel.points]
        ends = [min(xs), max(xs)]
        told = f"slope {line.slope:.3g}, correlation {line.correlation:.2f}"
        ys = [line.intercept + line.slope * end for end in ends]
        series.append(Series(name=told, x=ends, y=ys, look="dashed", colour=COLOURS - 1))
    title = f"{panel.label} ({panel.method})"
    return chart(title, series, x_label="direction change ΔD", y_label="magnitude change ΔM")


def _cloud(kind: str, points: Sequence[Point], colour: int) -> Series:
    return Series(
        name=kind,
        x=[point.change.direction for point in points],
        y=[point.change.magnitude for point in points],
        look="dots",
        colour=colour % (COLOURS - 1),
        names=[f"{one.layer}: ΔM {one.change.magnitude:.3g}, ΔD {one.change.direction:.3g}" for one in points],
    )


def over_depth(panel: Panel) -> list[Chart]:
    """Magnitude and direction change by the layer's number, a line for each stack of layers, of the last checkpoint."""
    last = [point for point in panel.points if point.step == panel.steps[-1] and depth_of(point.layer) is not None]
    several = {kind: points for kind, points in by_stack(last).items() if len(points) > 1}

    def drawn(title: str, value: Callable[[Point], float]) -> Chart | None:
        series = [
            Series(
                name=kind,
                x=[float(depth_of(point.layer) or 0) for point in points],
                y=[value(point) for point in points],
                colour=colour % (COLOURS - 1),
            )
            for colour, (kind, points) in enumerate(several.items())
        ]
        return chart(f"{panel.label}, by depth", series, x_label="layer", y_label=title, zero=True)

    found = [
        drawn("magnitude change ΔM", lambda point: point.change.magnitude),
        drawn("direction change ΔD", lambda point: point.change.direction),
    ]
    return [one for one in found if one is not None]


def by_kind(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Points by the last word of the layer's name, such as q_proj."""
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(point.layer.rpartition(".")[2], []).append(point)
    return found


def by_stack(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Points by the layer's name without its number, as short as tells them apart: `q_proj`, or all of a path."""
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(_DEPTH.sub(".", point.layer), []).append(point)
    short = [name.rpartition(".")[2] for name in found]
    names = short if len(set(short)) == len(short) else [name.removeprefix("model.") for name in found]
    return dict(zip(names, found.values(), strict=True))


def depth_of(layer: str) -> int | None:
    """A layer's number in its stack; None where its name has none."""
    found = _DEPTH.search(layer)
    return None if found is None else int(found[1])
