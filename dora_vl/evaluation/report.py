"""Scores with their intervals as `metrics.json` and as a table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType

from dora_vl.evaluation.predictions_file import file_sha256
from dora_vl.scores.bootstrap import RESAMPLES, Difference, intervals, paired_differences
from dora_vl.scores.scored import Scored

DETAIL = "/"  # metrics of parts of a set have it in their name: they are in the file, not in the table


@dataclass(frozen=True, kw_only=True)
class Result:
    """One benchmark's score, its intervals, and the difference from another model's where that was asked for.

    Attributes:
        failed: the reason for each question without an answer, by id.
        not_scored: the reason for each record that is in no score, by id.
    """

    name: str
    file: Path
    scored: Scored
    failed: Mapping[str, str]
    not_scored: Mapping[str, str]
    ranges: Mapping[str, tuple[float, float]]
    differences: Mapping[str, Difference] = field(default_factory=dict)

    def entry(self) -> dict[str, object]:
        """What `metrics.json` holds about it."""
        scored = self.scored
        headline = next(iter(scored.metrics))
        return {
            "file": str(self.file),
            "file_sha256": file_sha256(self.file),
            "headline": headline,
            "n": scored.n,
            "metrics": {
                name: {"value": value, "interval_95": list(self.ranges[name]) if name in self.ranges else None}
                for name, value in scored.metrics.items()
            },
            "settings": scored.settings,
            "without_answer": len(scored.failed),
            "failed": dict(self.failed),
            **({"not_scored": dict(self.not_scored)} if self.not_scored else {}),
            "bootstrap": {"resamples": RESAMPLES, "units": len(scored.table.units)},
            **(
                {"difference": {name: asdict(one) for name, one in self.differences.items()}}
                if self.differences
                else {}
            ),
        }


def result(
    scored: Scored,
    *,
    name: str,
    file: Path,
    failed: Mapping[str, str],
    against: Scored | None = None,
    not_scored: Mapping[str, str] = MappingProxyType({}),
) -> Result:
    """A score with its intervals; `failed` may lack the reason for some of the ids that have no answer."""
    return Result(
        name=name,
        file=file,
        scored=scored,
        not_scored=not_scored,
        failed={one: failed.get(one, "the predictions hold no answer") for one in scored.failed},
        ranges=intervals(scored),
        differences={} if against is None else paired_differences(scored, against),
    )


def table(results: Sequence[Result], *, details: bool = False) -> list[str]:
    """One line for each metric, the benchmark's name on its first; numbers as the official scripts have them."""
    compared = any(one.differences for one in results)
    head = ["benchmark", "metric", "value", "95 % interval", "n", "no answer"]
    rows = [head + (["difference", "95 % interval"] if compared else [])]
    for one in results:
        shown = [name for name in one.scored.metrics if details or DETAIL not in name]
        for place, name in enumerate(shown):
            first = place == 0
            row = [one.name if first else "", name, f"{one.scored.metrics[name]:.2f}", _range(one.ranges.get(name))]
            row += [str(one.scored.n), str(len(one.scored.failed))] if first else ["", ""]
            if compared:
                row += _difference(one.differences.get(name))
            rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [_line(row, widths) for row in rows]


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [
        cell.ljust(width) if column < 2 else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def _range(limits: tuple[float, float] | None) -> str:
    return "" if limits is None else f"{limits[0]:.2f} to {limits[1]:.2f}"


def _difference(one: Difference | None) -> list[str]:
    return ["", ""] if one is None else [f"{one.value:+.2f}", f"{one.low:+.2f} to {one.high:+.2f}"]
