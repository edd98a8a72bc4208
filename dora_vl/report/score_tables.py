"""Scores with their intervals, run beside run with paired differences, and who was taken for whom in closed answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dora_vl.errors import UserError
from dora_vl.report.answers import Item, SetAnswers, set_name
from dora_vl.report.run_record import RunRecord
from dora_vl.scores.bootstrap import intervals, paired_differences
from dora_vl.scores.exact_match import normalised

MOST_LABELS = 24
OTHER = "other"
DETAIL = "/"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run's number of a metric; `difference` is from the first run, "" where there is none."""

    value: float
    interval: tuple[float, float] | None
    difference: str = ""
    clear: bool = False
    """The difference's interval leaves 0 out."""


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """One metric of one set over the runs; None where a run has no such number."""

    test: str
    metric: str
    n: int
    cells: tuple[Cell | None, ...]

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
            kept.get(name, {}) if one is None else _cells(one, found[0] if place else None, notes)
            for place, (one, kept) in enumerate(zip(found, recorded, strict=True))
        ]
        n = next((one.scored.n for one in found if one is not None and one.scored is not None), _asked(runs, name))
        metrics = dict.fromkeys(metric for one in cells for metric in one)
        rows += [ScoreRow(test=name, metric=one, n=n, cells=tuple(cell.get(one) for cell in cells)) for one in metrics]
    return rows, list(dict.fromkeys(notes))


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
        found[name] = Cell(value=value, interval=ranges.get(name), difference=told, clear=clear)
    return found


def _recorded(run: RunRecord) -> dict[str, dict[str, Cell]]:
    """The numbers of `metrics.json` by set and metric, in percent."""
    tasks, found = run.metrics.get("tasks"), dict[str, dict[str, Cell]]()
    for name, one in tasks.items() if isinstance(tasks, Mapping) else ():
        limits = one.get("intervals_95") or {}
        found[name] = {
            metric: Cell(value=value, interval=None if metric not in limits else (limits[metric][0], limits[metric][1]))
            for metric, value in one["metrics"].items()
        }
    if "accuracy" in run.metrics and "interval_95" in run.metrics:
        low, high = run.metrics["interval_95"]
        cell = Cell(value=100 * run.metrics["accuracy"], interval=(100 * low, 100 * high))
        found[set_name(run.metrics.get("evaluation_file"))] = {"accuracy": cell}
    return found


def _asked(runs: Sequence[RunRecord], name: str) -> int:
    """How many questions a set has, by the runs' `metrics.json`."""
    tasks = [run.metrics.get("tasks") for run in runs]
    counts = [one[name]["n"] for one in tasks if isinstance(one, Mapping) and name in one]
    return int(next(iter([*counts, *(run.metrics["n"] for run in runs if "n" in run.metrics)]), 0))


def benchmark_rows(runs: Sequence[RunRecord]) -> list[ScoreRow]:
    """What `dora-vl evaluate` wrote beside the runs: headline and other whole metrics of each benchmark."""
    found = [_benchmarks(run) for run in runs]
    names = dict.fromkeys((name, metric) for one in found for name, metrics in one.items() for metric in metrics)
    rows = []
    for name, metric in names:
        cells = tuple(one.get(name, {}).get(metric) for one in found)
        n = next((cell[1] for cell in cells if cell is not None), 0)
        only = tuple(None if cell is None else cell[0] for cell in cells)
        rows.append(ScoreRow(test=name, metric=metric, n=n, cells=only))
    return [row for row in rows if not row.is_part]


def _benchmarks(run: RunRecord) -> dict[str, dict[str, tuple[Cell, int]]]:
    entries = run.benchmarks.get("benchmarks")
    found: dict[str, dict[str, tuple[Cell, int]]] = {}
    for name, entry in entries.items() if isinstance(entries, Mapping) else ():
        for metric, one in entry["metrics"].items():
            limits = one.get("interval_95")
            cell = Cell(value=float(one["value"]), interval=None if limits is None else (limits[0], limits[1]))
            found.setdefault(name, {})[metric] = cell, int(entry["n"])
    return found


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
