"""Charts, tables and pictures of a run for its page: SVG by matplotlib, settings, watched questions."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator
from PIL import Image

from dora_vl.data.example import Clip
from dora_vl.data.pictures import open_image
from dora_vl.data.video import Uniform, VideoReader
from dora_vl.errors import BadSample
from dora_vl.evaluation.plots import loss_unit, new_figure, plain_axes, series, smoothed
from dora_vl.evaluation.scores.exact import final_answer, normalised
from dora_vl.report.run_record import RunRecord
from dora_vl.run.folder import SIDE, Watched, WatchedQuestion, data_url, evenly, tiled
from dora_vl.run.settings import FIELDS
from dora_vl.run.settings_parser import flattened, run_parser

ABSENT = "–"


def setting_tables(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Returns all settings of all runs: of one run what is not its default first, of several what differs first."""
    flat = [flattened(run.settings) for run in runs]
    names = list(dict.fromkeys(name for item in flat for name in item))
    rows = {name: [_text(item.get(name, ABSENT)) for item in flat] for name in names}
    if len(runs) > 1:
        title, first = "What differs", [name for name in names if len(set(rows[name])) > 1]
    else:
        title, task = "What is not the default", runs[0].settings.get("task")
        parsed = run_parser(task).get_defaults().as_dict() if task in FIELDS else {}
        defaults = flattened(json.loads(json.dumps(parsed, default=str)))
        first = [name for name in names if name not in defaults or defaults[name] != flat[0][name]]
    others = {name: rows[name] for name in names if name not in first}
    return {"first_title": title, "first": {name: rows[name] for name in first}, "others": others}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# -- the fixed questions of a run: a row for each question, a column for each step they were asked at ------------------


MOST_STEPS = 8


def watched_tables(runs: Sequence[RunRecord], pictures: InlinePictures) -> tuple[list[dict[str, Any]], list[str]]:
    """Makes a table for each run that was watched, and a note for each that was not."""
    tables: list[dict[str, Any]] = []
    notes: list[str] = []
    for run in runs:
        watched = run.watched
        if watched is None or not watched.answers:
            notes.append(
                f"{run.label}: no fixed questions were asked while it trained; that needs validation data or a test, "
                "and watch above 0."
            )
            continue
        all_steps = sorted(watched.answers)
        steps = sorted({*evenly(all_steps, MOST_STEPS - 1), all_steps[-1]})
        after = run.section("evaluation").get("answer_after")
        after = after if isinstance(after, str) else None
        rows = [_row(question, watched, steps, after, pictures) for question in watched.questions]
        tables.append({"label": run.label, "steps": steps, "asked": len(all_steps), "rows": rows})
    return tables, notes


def _row(
    question: WatchedQuestion, watched: Watched, steps: Sequence[int], after: str | None, pictures: InlinePictures
) -> dict[str, Any]:
    """Returns a question with its answers; None where it could not be asked."""
    picture = ("", question.why_no_picture)
    if question.picture:
        picture = pictures.file(watched.folder / question.picture)
    texts = [watched.answers[step].get(question.id) for step in steps]
    right = _compared(question.truth, after)
    answers = [(text, text is not None and _compared(text, after) == right) for text in texts]
    return {"question": question.question, "truth": question.truth, "picture": picture, "answers": answers}


def _compared(text: str, after: str | None) -> str:
    return normalised(final_answer(text, after))


# -- pictures inside the page ---------------------------------------------------------------------------------------


TOO_MANY = "left out, so that the page stays small"


class InlinePictures:
    """Small pictures as data URLs, each once and up to a budget of bytes; close it after use."""

    def __init__(self) -> None:
        self._left = 3_400_000
        self._seen: set[str] = set()
        self._reader = VideoReader()

    def close(self) -> None:
        """Closes the videos."""
        self._reader.close()

    def file(self, path: Path) -> tuple[str, str]:
        """Returns a picture file as a data URL, or why there is none."""
        return self._add(lambda: open_image(path.parent, path.name))

    def shown(self, root: Path | None, pictures: Sequence[str], clip: Clip | None) -> tuple[str, str]:
        """Returns a question's pictures or clip as one small picture, or why there is none."""
        if not pictures and clip is None:
            return "", ""
        if root is None:
            return "", "the settings name no folder of its pictures"
        if clip is not None:
            return self._add(lambda: tiled(self._reader.read(root, clip, Uniform(SIDE**2)).pictures))
        return self._add(lambda: tiled([open_image(root, path) for path in pictures]))

    def _add(self, opened: Callable[[], Image.Image]) -> tuple[str, str]:
        if self._left <= 0:
            return "", TOO_MANY
        try:
            url = data_url(opened())
        except BadSample as error:
            return "", error.reason
        name = hashlib.sha256(url.encode()).hexdigest()
        if name not in self._seen:
            if len(url) > self._left:
                return "", TOO_MANY
            self._left -= len(url)
            self._seen.add(name)
        return url, ""


MOST_POINTS = 400
"""A line of more points is drawn by the means of equal stretches, which a screen shows no better."""
COLOURS = ("#2f6fde", "#d9580b", "#1f9d6b", "#a23bb8", "#b8860b", "#0f8b9d", "#c2255c", "#6b7684")
"""The page's style calls these `--c0` to `--c7`, and has others for a dark screen."""
WIDTH, HEIGHT, DPI = 560, 260, 72
LEFT, RIGHT, TOP, BOTTOM = 58, 546, 12, 216
STYLES: Mapping[str, Mapping[str, Any]] = {
    "line": {"linewidth": 2},
    "faint": {"linewidth": 1, "alpha": 0.35},
    "dashed": {"linewidth": 2, "linestyle": "--"},
    "dots": {"linestyle": "", "marker": "o", "markersize": 7, "alpha": 0.72, "markeredgewidth": 0},
}


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line, in one of the page's colours."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    look: Literal["line", "faint", "dashed"] = "line"
    colour: int = 0


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Holds what a template draws; `data` gives the page's script the drawing's limits, and each series' numbers."""

    title: str
    y_label: str
    svg: str
    legend: tuple[Series, ...]
    data: Mapping[str, Any]


def chart(
    title: str,
    lines: Sequence[Series],
    *,
    y_label: str,
    log: bool = False,
    zero: bool = False,
    always_legend: bool = False,
) -> Chart | None:
    """Draws all series that have a point, if any; `log` is for y that is above 0, and with `zero` y begins at 0."""
    drawn = [line for line in map(_drawable, lines) if line.x]
    if not drawn:
        return None
    least, most = min(min(item.y) for item in drawn), max(max(item.y) for item in drawn)
    log = log and least > 0
    with rc_context({"font.size": 11, "svg.fonttype": "none"}):
        figure = new_figure(WIDTH / DPI, HEIGHT / DPI)
        figure.subplots_adjust(LEFT / WIDTH, 1 - BOTTOM / HEIGHT, RIGHT / WIDTH, 1 - TOP / HEIGHT)
        axes = figure.add_subplot()
        for item in drawn:
            style = STYLES["dots" if len(item.x) == 1 else item.look]
            axes.plot(item.x, item.y, color=COLOURS[item.colour % len(COLOURS)], **style)
        axes.set_yscale("log" if log else "linear")
        plain_axes(axes, "step", "")
        axes.grid(visible=False, axis="x")
        axes.minorticks_off()
        wide = log and most > 20 * least
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8) if wide else MaxNLocator(5))
        axes.yaxis.set_major_formatter(EngFormatter(sep="") if most >= 1e4 else "{x:.4g}")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if zero:
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]) if least < 0 else 0.0)
        svg = _svg(figure)
    named = tuple(item for item in drawn if item.look != "faint")
    return Chart(
        title=title,
        y_label=y_label,
        svg=svg,
        legend=named if always_legend or len(drawn) > 1 else (),
        data={
            "x": list(axes.get_xlim()),
            "y": list(axes.get_ylim()),
            "log": log,
            "box": [LEFT, RIGHT, TOP, BOTTOM],
            "series": [
                {
                    "name": item.name,
                    "colour": item.colour % len(COLOURS),
                    "x": [float(f"{x:.4g}") for x in item.x],
                    "y": [float(f"{y:.4g}") for y in item.y],
                }
                for item in named
            ],
        },
    )


def _svg(figure: Any) -> str:
    """Returns a drawing as an element of the page, whose style gives letters and colours."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True)
    text = file.getvalue()
    text = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}">' + text[text.index("<g id") :]
    text = re.sub(r"(?<=<g) id=\"[^\"]*\"", "", text)  # the same in each drawing of a page
    text = re.sub(r"font-(size|family): [^;\"]*;? ?|fill: #1f2933;? ?", "", text)
    for number, colour in enumerate(COLOURS):
        text = text.replace(colour, f"var(--c{number})")
    return text.replace("#e4e7eb", "var(--grid)")


def _drawable(line: Series) -> Series:
    """Returns a series' finite points; of more than a screen shows, the means of equally long stretches."""
    finite = [index for index, pair in enumerate(zip(line.x, line.y, strict=True)) if all(map(math.isfinite, pair))]
    x, y = ([axis[index] for index in finite] for axis in (line.x, line.y))
    length = -(-len(finite) // MOST_POINTS)
    if length > 1:
        parts = [slice(start, start + length) for start in range(0, len(finite), length)]
        x, y = ([sum(axis[part]) / len(axis[part]) for part in parts] for axis in (x, y))
    return replace(line, x=x, y=y)


RATE = "learning_rate"
NUMBERS = (
    ("grad_norm", "gradient norm", "norm"),
    ("samples_per_second", "throughput", "samples per second"),
    ("tokens_per_second", "throughput", "tokens per second"),
    ("padding_share", "padding", "share of positions"),
    ("memory_gib", "memory", "GiB of the fullest rank: on a GPU its tensors, on a CPU the whole process"),
)
"""Each row names a field of a log line, its chart and the unit."""
OBJECTIVE = (
    ("rewards/accuracy$", "accuracy of pairs", "share with a margin above 0"),
    ("rewards/(picture_)?margin$", "margin", "chosen answer's reward less the other's"),
    ("rewards/(?!accuracy$|margin$|picture_margin$)", "rewards", ""),
    ("log_probs/", "log-probabilities", "nats"),
    ("answers/", "drawn answers", ""),
)
"""Each row has a pattern of fields of a loss of preferences or rewards, their chart and the unit."""


def curves(runs: Sequence[RunRecord]) -> tuple[list[Chart], list[str]]:
    """Draws all charts that a run has numbers for, and says which are missing."""
    notes: list[str] = []
    units = dict.fromkeys(loss_unit(run.section("objective")) for run in runs)
    loss = chart("loss", _losses(runs), y_label=", ".join(units), log=True)
    if loss is None:
        notes.append("No line of the log holds a loss.")
    for run in runs:
        if not series(run.log, "eval_loss")[0]:
            notes.append(f"{run.label}: no validation loss in its log; data.validation, or a share, makes one.")
    rates = chart("learning rate by part", _rates(runs), y_label="of the step", zero=True, always_legend=True)
    charts = [loss, rates]
    for key, title, unit in NUMBERS:
        lines = [
            Series(name=run.label, x=steps, y=values, colour=number)
            for number, run in enumerate(runs)
            for steps, values in [series(run.log, key)]
        ]
        charts.append(chart(title, lines, y_label=unit, zero=key != "grad_norm", log=key == "grad_norm"))
        if charts[-1] is None:
            notes.append(f"No chart of {title} ({unit}): no line of the log holds {key}.")
    for pattern, title, unit in OBJECTIVE:
        fields = dict.fromkeys(key for run in runs for line in run.log for key in line if re.match(pattern, key))
        lines = [
            Series(name=f"{before}{key.partition('/')[2]}", x=steps, y=smoothed(values), colour=number)
            for number, (run, key) in enumerate((run, key) for run in runs for key in fields)
            for before in ["" if len(runs) == 1 else f"{run.label}: "]
            for steps, values in [series(run.log, key)]
        ]
        charts.append(chart(title, lines, y_label=unit, always_legend=True))
    return [item for item in charts if item is not None], notes


def _losses(runs: Sequence[RunRecord]) -> list[Series]:
    """Returns the losses: of one run each logged one, faint, and its mean; of several the means; validation dashed."""
    lines: list[Series] = []
    for number, run in enumerate(runs):
        steps, losses = series(run.log, "loss")
        name = "" if len(runs) == 1 else f"{run.label}: "
        if len(runs) == 1:
            lines.append(Series(name="each logged loss", x=steps, y=losses, look="faint"))
        lines.append(Series(name=f"{name}training, smoothed", x=steps, y=smoothed(losses), colour=number))
        x, y = series(run.log, "eval_loss")
        colour = 1 if len(runs) == 1 else number
        lines.append(Series(name=f"{name}validation", x=x, y=y, look="dashed", colour=colour))
    return lines


def _rates(runs: Sequence[RunRecord]) -> list[Series]:
    """Returns a line for each part of each run that has a rate of its own; parts of equal rates share one."""
    lines: list[Series] = []
    for run in runs:
        parts = dict.fromkeys(key for line in run.log for key in line if key.startswith(f"{RATE}/"))
        groups: dict[tuple[tuple[float, ...], tuple[float, ...]], list[str]] = {}
        for key in parts or (RATE,):
            steps, rates = series(run.log, key)
            groups.setdefault((tuple(steps), tuple(rates)), []).append(key.removeprefix(f"{RATE}/"))
        for (steps, rates), names in groups.items():
            before = "" if len(runs) == 1 else f"{run.label}: "
            lines.append(Series(name=before + ", ".join(names), x=steps, y=rates, colour=len(lines)))
    return lines
