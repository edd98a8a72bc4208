"""The lines of `log.jsonl` as charts: loss, rates by part, gradients, speed, padding, memory; runs over each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dora_vl.evaluation.pictures import series, smoothed
from dora_vl.report.charts import Chart, Series, chart
from dora_vl.report.run_record import RunRecord

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
