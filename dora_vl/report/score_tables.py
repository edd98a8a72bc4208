"""Scores with their intervals, run beside run with paired differences, and who was taken for whom in closed answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dora_vl.errors import UserError
from dora_vl.evaluation.baselines import COMMONEST, EXCHANGED, WARNING
from dora_vl.report.answers import Item, SetAnswers, set_name
from dora_vl.report.run_record import RunRecord
from dora_vl.scores.bootstrap import intervals, paired_differences
from dora_vl.scores.exact_match import normalised

BASELINES = {COMMONEST: "each question's commonest answer", EXCHANGED: "with pictures exchanged"}
MOST_LABELS = 24
OTHER = "other"
DETAIL = "/"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run's number of a metric over `n` items; `difference` is from the first run, "" where there is none."""

    value: float
    n: int
    interval: tuple[float, float] | None
    difference: str = ""
    clear: bool = False
    """The difference's interval leaves 0 out."""


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """One metric of one set over the runs; None where a run has no such number."""

    test: str
    metric: str
    cells: tuple[Cell | None, ...]

    @property
    def n(self) -> int:
        """How many items it is over."""
        return next(cell.n for cell in self.cells if cell is not None)

    @property
    def is_part(self) -> bool:
        """Whether it is of a part of the set."""
        return DETAIL in self.metric


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """How often each right answer (a row) was answered with each (a column)."""

    title: str
    labels: tuple[str, ...]
    columns: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    def share(self, row: int, column: int) -> float:
        """Of the row's answers; what is there at all is seen."""
        counts = self.counts[row]
        return max(0.12, counts[column] / sum(counts)) if counts[column] else 0.0


def score_rows(runs: Sequence[RunRecord], tests: Sequence[Sequence[SetAnswers]]) -> tuple[list[ScoreRow], list[str]]:
    """A row for each metric of each set, and sentences about what cannot be compared.

    Args:
        tests: of each run; what cannot be scored again is as its `metrics.json` has it.
    """
    by_name = [{one.name: one for one in several if one.scored is not None} for several in tests]
    rows: list[ScoreRow] = []
    notes: list[str] = []
    recorded = [_recorded(run) for run in runs]
    for name in dict.fromkeys(name for one in (*by_name, *recorded) for name in one):
        found = [one.get(name) for one in by_name]
        cells = [
            kept.get(name, {}) | ({} if one is None else _cells(one, found[0] if place else None, notes))
            for place, (one, kept) in enumerate(zip(found, recorded, strict=True))
        ]
        rows += _rows(name, cells)
    return rows, list(dict.fromkeys(notes))


def _rows(name: str, cells: Sequence[Mapping[str, Cell]]) -> list[ScoreRow]:
    metrics = dict.fromkeys(metric for one in cells for metric in one)
    return [ScoreRow(test=name, metric=one, cells=tuple(cell.get(one) for cell in cells)) for one in metrics]


def _cells(one: SetAnswers, first: SetAnswers | None, notes: list[str]) -> dict[str, Cell]:
    scored = one.scored
    if scored is None:
        return {}
    ranges = intervals(scored)
    differences = {}
    if first is not None and first.scored is not None:
        try:
            differences = paired_differences(scored, first.scored)
        except UserError as error:
            notes.append(f"No paired difference for {one.name}: {error}.")
    found = {}
    for name, value in scored.metrics.items():
        apart = differences.get(name)
        told = "" if apart is None else f"{apart.value:+.2f} ({apart.low:+.2f} to {apart.high:+.2f})"
        clear = apart is not None and (apart.low > 0 or apart.high < 0)
        n = scored.items_of(name)
        found[name] = Cell(value=value, n=n, interval=ranges.get(name), difference=told, clear=clear)
    return found


def _recorded(run: RunRecord) -> dict[str, dict[str, Cell]]:
    """The numbers of `metrics.json` by set and metric, in percent."""
    tasks, found = run.metrics.get("tasks"), dict[str, dict[str, Cell]]()
    for name, one in tasks.items() if isinstance(tasks, Mapping) else ():
        limits = one.get("intervals_95") or {}
        own = {metric: _cell(value, one["n"], limits.get(metric)) for metric, value in one["metrics"].items()}
        found[name] = own | _baseline_cells(one)
    if "accuracy" in run.metrics and "interval_95" in run.metrics:
        limits = [100 * limit for limit in run.metrics["interval_95"]]
        own = {"accuracy": _cell(100 * run.metrics["accuracy"], run.metrics["n"], limits)}
        found[set_name(run.metrics.get("evaluation_file"))] = own | _baseline_cells(run.metrics)
    return found


def _cell(value: float, n: int, limits: Sequence[float] | None) -> Cell:
    return Cell(value=float(value), n=int(n), interval=None if limits is None else (limits[0], limits[1]))


def _baseline_cells(entry: Mapping[str, Any]) -> dict[str, Cell]:
    """What a score is compared with, by what a row of it is called."""
    known = entry.get("baselines") or {}
    return {
        title: _cell(one["value"], one["n"], one["interval_95"])
        for name, title in BASELINES.items()
        if (one := known.get(name)) is not None
    }


def blind(runs: Sequence[RunRecord]) -> list[str]:
    """A sentence for each set whose answers do not depend on its pictures."""
    said = []
    for run in runs:
        parts = [run.metrics.get("tasks"), run.benchmarks.get("benchmarks"), {"": run.metrics}]
        for name, entry in (pair for part in parts if isinstance(part, Mapping) for pair in part.items()):
            warning = (entry.get("baselines") or {}).get(WARNING)
            said += [f"{', '.join(filter(None, (run.label, name)))}: {warning}."] if warning else []
    return said


def benchmark_rows(runs: Sequence[RunRecord]) -> list[ScoreRow]:
    """What `dora-vl evaluate` wrote beside the runs: headline and other whole metrics of each benchmark."""
    found = [_benchmarks(run) for run in runs]
    names = dict.fromkeys(name for one in found for name in one)
    rows = [row for name in names for row in _rows(name, [one.get(name, {}) for one in found])]
    return [row for row in rows if not row.is_part]


def _benchmarks(run: RunRecord) -> dict[str, dict[str, Cell]]:
    entries = run.benchmarks.get("benchmarks")
    return {
        name: {metric: _cell(one["value"], one["n"], one["interval_95"]) for metric, one in entry["metrics"].items()}
        | _baseline_cells(entry)
        for name, entry in (entries.items() if isinstance(entries, Mapping) else ())
    }


def confusion(title: str, items: Sequence[Item]) -> Confusion | None:
    """The table of a set whose answers are a closed list; None where they are none: too many, or hardly repeated."""
    pairs = [(normalised(one.label), normalised(one.said_label)) for one in items if one.label]
    counts = Counter(truth for truth, _ in pairs)
    if not 2 <= len(counts) <= MOST_LABELS or len(pairs) < 2 * len(counts):
        return None
    labels = tuple(sorted(counts, key=lambda label: (-counts[label], label)))
    cells = Counter((truth, said if said in counts else OTHER) for truth, said in pairs)
    strangers = any(said not in counts for _, said in pairs)
    columns = (*labels, OTHER) if strangers else labels
    rows = tuple(tuple(cells[truth, said] for said in columns) for truth in labels)
    return Confusion(title=title, labels=labels, columns=columns, counts=rows)


def worst(items: Sequence[Item], most: int, *, is_accuracy: bool) -> list[Item]:
    """The answers with the lowest scores, of every kind in turn; of right and wrong ones those that are wrong."""
    scored = [one for one in items if one.share is not None and (one.share < 0.5 or not is_accuracy)]
    by_kind: dict[str, list[Item]] = {}
    for one in sorted(scored, key=lambda one: one.share or 0.0):
        by_kind.setdefault(one.kind, []).append(one)
    longest = max(map(len, by_kind.values()), default=0)
    in_turn = [of_kind[place] for place in range(longest) for of_kind in by_kind.values() if place < len(of_kind)]
    return in_turn[:most]
