"""Numbers as SVG that a template draws: lines over steps and points in a plane, with ticks that people read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from dora_vl.evaluation.pictures import series, smoothed
from dora_vl.report.run_record import RunRecord

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 40
MOST_POINTS = 400
"""Of a line; a longer one is drawn by the mean of equal stretches, which a screen shows no better."""
COLOURS = 8
Look = Literal["line", "faint", "dashed", "dots"]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line or cloud of points.

    Attributes:
        colour: which of the page's colours, from 0.
        names: of each point, shown when a pointer is on it.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    look: Look = "line"
    colour: int = 0
    names: Sequence[str] = ()
    told: bool = True
    """Whether it is in the legend."""


@dataclass(frozen=True)
class Tick:
    """A place on an axis, in the drawing's units, and what stands there."""

    place: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One series in the drawing's units: a path, or points with their names."""

    series: Series
    path: str
    points: tuple[tuple[float, float, str], ...]

    @property
    def style(self) -> str:
        """CSS classes."""
        return f"{self.series.look} c{self.series.colour % COLOURS}"


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What a template draws.

    Attributes:
        data: what the page's script shows beside the pointer: x, and of each line its y, in the series' own units.
    """

    title: str
    x_label: str
    y_label: str
    drawn: tuple[Drawn, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    data: Mapping[str, Any]
    tells_one: bool = False
    """Whether the legend is there for a single line too."""
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM

    @property
    def legend(self) -> list[Drawn]:
        """What is told under the drawing."""
        named = [one for one in self.drawn if one.series.told]
        return named if len(named) > 1 or self.tells_one else []


@dataclass(frozen=True)
class _Axis:
    """From numbers to places."""

    low: float
    high: float
    start: int
    end: int
    log: bool

    def place(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 2)


def chart(
    title: str, series: Sequence[Series], *, y_label: str, x_label: str = "step", log: bool = False, zero: bool = False
) -> Chart | None:
    """A drawing of all series that have a point; None where none has.

    Args:
        log: y is drawn by its logarithm, where all are above 0.
        zero: y begins at 0.
    """
    kept = [shown for one in series if len((shown := _finite(_thinned(one))).x)]
    if not kept:
        return None
    ys = [value for one in kept for value in one.y]
    log = log and min(ys) > 0
    x_axis = _axis([value for one in kept for value in one.x], LEFT, WIDTH - RIGHT, log=False, zero=False, pad=0.0)
    y_axis = _axis(ys, HEIGHT - BOTTOM, TOP, log=log, zero=zero, pad=0.06)
    return Chart(
        title=title,
        x_label=x_label,
        y_label=y_label,
        drawn=tuple(_drawn(one, x_axis, y_axis) for one in kept),
        x_ticks=_ticks(x_axis, 6),
        y_ticks=_ticks(y_axis, 5),
        data={
            "x": [x_axis.low, x_axis.high],
            "label": x_label,
            "series": [
                {"name": one.name, "colour": one.colour % COLOURS, "x": _short(one.x), "y": _short(one.y)}
                for one in kept
                if one.told and one.look != "dots"
            ],
        },
    )


def _short(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def _thinned(one: Series) -> Series:
    """Means of equally long stretches, where there are more points than a screen shows."""
    every = -(-len(one.x) // MOST_POINTS)
    if every <= 1 or one.look == "dots":
        return one
    starts = range(0, len(one.x), every)
    means = [
        [sum(part) / len(part) for start in starts if (part := axis[start : start + every])] for axis in (one.x, one.y)
    ]
    return Series(name=one.name, x=means[0], y=means[1], look=one.look, colour=one.colour, told=one.told)


def _finite(one: Series) -> Series:
    kept = [place for place, pair in enumerate(zip(one.x, one.y, strict=True)) if all(map(math.isfinite, pair))]
    if len(kept) == len(one.x):
        return one
    picked = [[axis[place] for place in kept] for axis in (one.x, one.y)]
    names = [one.names[place] for place in kept] if one.names else ()
    return Series(name=one.name, x=picked[0], y=picked[1], look=one.look, colour=one.colour, names=names, told=one.told)


def _axis(values: Sequence[float], start: int, end: int, *, log: bool, zero: bool, pad: float) -> _Axis:
    scaled = [math.log10(value) for value in values] if log else list(values)
    low, high = min(scaled), max(scaled)
    if zero and not log:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-12 * max(1.0, abs(high)):
        wide = abs(high) * 0.1 or 1.0
        low, high = (0.0 if zero and low >= 0 else low - wide), high + wide
    room = pad * (high - low)
    return _Axis(low if zero and low == 0 else low - room, high + room, start, end, log)


def _ticks(axis: _Axis, about: int) -> tuple[Tick, ...]:
    if axis.log:
        return tuple(Tick(axis.place(value), _number(value)) for value in _log_values(axis, about))
    step = _round_step((axis.high - axis.low) / about)
    first = math.ceil(axis.low / step - 1e-9)
    last = math.floor(axis.high / step + 1e-9)
    return tuple(Tick(axis.place(count * step), _number(count * step)) for count in range(first, last + 1))


def _log_values(axis: _Axis, about: int) -> list[float]:
    """Powers of ten in the axis, or 1, 2, 5 times them, or round steps where it spans less."""
    for factors in ((1,), (1, 3), (1, 2, 5)):
        powers = range(math.floor(axis.low), math.ceil(axis.high) + 1)
        found = [factor * 10.0**power for power in powers for factor in factors]
        inside = [value for value in found if axis.low <= math.log10(value) <= axis.high]
        if len(inside) >= 3:
            return inside
    low, high = 10**axis.low, 10**axis.high
    step = _round_step((high - low) / about)
    return [count * step for count in range(math.ceil(low / step), math.floor(high / step) + 1) if count]


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))


def _number(value: float) -> str:
    """As short as it can be read."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        mantissa, _, power = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(power)}"
    if size >= 1e4:
        return f"{value / 1000:g}k"
    return f"{value:.4g}"


def _drawn(one: Series, x_axis: _Axis, y_axis: _Axis) -> Drawn:
    places = [(x_axis.place(x), y_axis.place(y)) for x, y in zip(one.x, one.y, strict=True)]
    path = "M" + "L".join(f"{x:g} {y:g}" for x, y in places)
    names = list(one.names) or [""] * len(places)
    dots = one.look == "dots" or len(places) == 1
    points = tuple((x, y, name) for (x, y), name in zip(places, names, strict=True)) if dots else ()
    return Drawn(series=one, path="" if dots else path, points=points)


# The lines of `log.jsonl` as charts: loss, rates by part, gradients, speed, padding, memory; runs over each other.


RATE = "learning_rate"
NUMBERS = (
    ("grad_norm", "gradient norm", "norm"),
    ("samples_per_second", "throughput", "samples a second"),
    ("tokens_per_second", "throughput", "tokens a second"),
    ("padding_share", "padding", "share of positions"),
    ("memory_gib", "memory", "GiB of the fullest rank"),
)
"""Field of a log line, what its chart is called, and the unit."""


def curves(runs: Sequence[RunRecord]) -> tuple[list[Chart], list[str]]:
    """All charts that any of the runs has numbers for, and a sentence for each that is missing."""
    found: list[Chart] = []
    notes: list[str] = []
    loss = chart("loss", _losses(runs), y_label="nats per answer token", log=True)
    if loss is None:
        notes.append("No line of the log holds a loss.")
    for run in runs:
        if not series(run.log, "eval_loss")[0]:
            notes.append(f"{run.label}: no validation loss in its log; data.validation, or a share, makes one.")
    rates, told = _rates(runs)
    notes += told
    found += [one for one in (loss, rates) if one is not None]
    for key, title, unit in NUMBERS:
        drawn = chart(title, _plain(runs, key), y_label=unit, zero=key != "grad_norm", log=key == "grad_norm")
        if drawn is None:
            notes.append(f"No chart of {title} ({unit}): no line of the log holds {key}.")
        else:
            found.append(drawn)
    return found, notes


def _losses(runs: Sequence[RunRecord]) -> list[Series]:
    """Of one run each logged loss, faint, below its mean; of several the means. Validation is dashed."""
    found: list[Series] = []
    for number, run in enumerate(runs):
        steps, losses = series(run.log, "loss")
        own, name = (0, "") if len(runs) == 1 else (number, f"{run.label}: ")
        if len(runs) == 1:
            found.append(Series(name="each logged loss", x=steps, y=losses, look="faint", told=False))
        found.append(Series(name=f"{name}training, smoothed", x=steps, y=smoothed(losses), colour=own))
        checked, held_out = series(run.log, "eval_loss")
        other = 1 if len(runs) == 1 else number
        found.append(Series(name=f"{name}validation", x=checked, y=held_out, look="dashed", colour=other))
    return found


def _rates(runs: Sequence[RunRecord]) -> tuple[Chart | None, list[str]]:
    """A line for each part of each run that has a rate of its own; parts of equal rates share one."""
    found: list[Series] = []
    notes: list[str] = []
    for run in runs:
        parts = [key for line in run.log for key in line if key.startswith(f"{RATE}/")]
        if not parts:
            notes.append(f"{run.label}: its log has one learning rate, not those of its parts.")
        groups: dict[tuple[tuple[float, ...], tuple[float, ...]], list[str]] = {}
        for key in dict.fromkeys(parts or [RATE]):
            steps, rates = series(run.log, key)
            groups.setdefault((tuple(steps), tuple(rates)), []).append(key.removeprefix(f"{RATE}/"))
        for (steps, rates), names in groups.items():
            before = "" if len(runs) == 1 else f"{run.label}: "
            found.append(Series(name=before + ", ".join(names), x=steps, y=rates, colour=len(found)))
    drawn = chart("learning rate by part", found, y_label="of the step", zero=True)
    return None if drawn is None else replace(drawn, tells_one=True), notes


def _plain(runs: Sequence[RunRecord], key: str) -> list[Series]:
    found = []
    for number, run in enumerate(runs):
        steps, values = series(run.log, key)
        found.append(Series(name=run.label, x=steps, y=values, colour=number))
    return found
