"""The resolved settings of runs as rows: of one run what is not its default first, of several what differs first."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dora_vl.adapters.adapter import base_of, read_adapter
from dora_vl.adapters.base_weights import CONFIG_FILE, BaseWeights
from dora_vl.adapters.decomposition import Panel, Point, Request, layers_to_compare, measured
from dora_vl.adapters.folder import WEIGHTS_FILE
from dora_vl.adapters.merge import Saved, refuse_saved_on_another_base, saved_in
from dora_vl.evaluation.scores.exact import final_answer, normalised
from dora_vl.report.charts import COLOURS, Chart, Series, chart
from dora_vl.report.run_record import InlinePictures, RunRecord
from dora_vl.training.run_folder import ADAPTER
from dora_vl.training.watching import Watched, WatchedQuestion, evenly

ABSENT = "–"


@dataclass(frozen=True, kw_only=True)
class SettingRow:
    """One setting, its value in each run."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SettingTables:
    """Settings to be seen at once, and the rest."""

    first_title: str
    first: tuple[SettingRow, ...]
    others: tuple[SettingRow, ...]


def setting_tables(runs: Sequence[RunRecord]) -> SettingTables:
    """All settings of all runs, parted."""
    flat = [flattened(run.settings) for run in runs]
    names = list(dict.fromkeys(name for one in flat for name in one))
    rows = {name: SettingRow(name=name, values=tuple(_text(one.get(name, ABSENT)) for one in flat)) for name in names}
    if len(runs) > 1:
        first = [row for row in rows.values() if len(set(row.values)) > 1]
        title = "What differs"
    else:
        defaults = _defaults(runs[0])
        first = [rows[name] for name in names if name not in defaults or defaults[name] != flat[0][name]]
        title = "What is not the default"
    shown = {row.name for row in first}
    others = tuple(row for row in rows.values() if row.name not in shown)
    return SettingTables(first_title=title, first=tuple(first), others=others)


def flattened(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value; an empty mapping is a value."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value} if prefix else {}
    named = {f"{prefix}.{key}" if prefix else str(key): one for key, one in value.items()}
    return {name: leaf for key, one in named.items() for name, leaf in flattened(one, key).items()}


def _defaults(run: RunRecord) -> dict[str, Any]:
    """What the run's kind of settings has where nothing is said, as JSON has it."""
    from dora_vl.training.command_line import run_parser

    parsed = run_parser("run", "", _kind(run)).get_defaults().as_dict()
    return flattened(json.loads(json.dumps(parsed, default=str)))


def _kind(run: RunRecord) -> type[Any]:
    """The settings' class, by what only one of them has."""
    from dora_vl.training.recipe import CommonsenseRunConfig, RunConfig, VlBartRunConfig

    if "scoring" in run.section("evaluation"):
        return CommonsenseRunConfig
    return VlBartRunConfig if "features" in run.section("data") else RunConfig


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# The fixed questions of a run as a table: a row for each question, a column for each step they were asked at.


MOST_STEPS = 8


@dataclass(frozen=True, kw_only=True)
class WatchedAnswer:
    """What was said at one step; None: it could not be asked."""

    text: str | None
    right: bool


@dataclass(frozen=True, kw_only=True)
class WatchedRow:
    """One question; `picture` is a data URL."""

    question: str
    truth: str
    picture: str
    why_no_picture: str
    answers: tuple[WatchedAnswer, ...]


@dataclass(frozen=True, kw_only=True)
class WatchedTable:
    """All of one run."""

    label: str
    steps: tuple[int, ...]
    asked: int
    """At how many steps; a few of them are shown."""
    rows: tuple[WatchedRow, ...]


def watched_tables(runs: Sequence[RunRecord], pictures: InlinePictures) -> tuple[list[WatchedTable], list[str]]:
    """A table for each run that has been watched, and a sentence for each that has not."""
    tables: list[WatchedTable] = []
    notes: list[str] = []
    for run in runs:
        if run.watched is None or not run.watched.answers:
            notes.append(
                f"{run.label}: no fixed questions were asked while it trained; that needs validation data or a test, "
                "and watch above 0."
            )
            continue
        tables.append(_table(run, run.watched, pictures))
    return tables, notes


def _table(run: RunRecord, watched: Watched, pictures: InlinePictures) -> WatchedTable:
    steps = _steps(sorted(watched.answers))
    after = run.section("evaluation").get("answer_after")
    after = after if isinstance(after, str) else None
    rows = tuple(_row(one, watched, steps, after, pictures) for one in watched.questions)
    return WatchedTable(label=run.label, steps=tuple(steps), asked=len(watched.answers), rows=rows)


def _steps(all_steps: Sequence[int]) -> list[int]:
    """A few, evenly, the last among them."""
    return sorted({*evenly(all_steps, MOST_STEPS - 1), *all_steps[-1:]})


def _row(
    one: WatchedQuestion, watched: Watched, steps: Sequence[int], after: str | None, pictures: InlinePictures
) -> WatchedRow:
    url, why = pictures.file(watched.folder / one.picture) if one.picture else ("", one.why_no_picture)
    right = _compared(one.truth, after)
    said = [watched.answers[step].get(one.id) for step in steps]
    answers = tuple(
        WatchedAnswer(text=text, right=text is not None and _compared(text, after) == right) for text in said
    )
    return WatchedRow(question=one.question, truth=one.truth, picture=url, why_no_picture=why, answers=answers)


def _compared(text: str, after: str | None) -> str:
    return normalised(final_answer(text, after) or "")


# What training changed in each adapted layer's weight, magnitude and direction: the paper's plot, for a report.


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
