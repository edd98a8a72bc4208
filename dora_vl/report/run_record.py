"""What a run's folder holds, read as far as it can be; what is damaged is named, not fatal."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dora_vl.adapters.files import RECIPE_FILE
from dora_vl.errors import UserError, shown_names
from dora_vl.evaluation.results import SetResult, read_results
from dora_vl.run.folder import ADAPTER, LOSS_LOG, METRICS, PLAN, SETTINGS, SKIPPED, path_in_run
from dora_vl.run.watched import Watched, read_watched

Line = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run; `damaged` is what cannot be read of it, a sentence each.

    Attributes:
        benchmarks: what `dora-vl evaluate` left in the folder `evaluation`.
        skipped: (id, reason) of unusable samples, and whether they are of the validation data.
    """

    label: str
    folder: Path
    settings: Line
    log: tuple[Line, ...]
    damaged: tuple[str, ...] = ()
    metrics: Line = field(default_factory=dict)
    plan: Line = field(default_factory=dict)
    recipe: Line = field(default_factory=dict)
    benchmarks: Mapping[str, SetResult] = field(default_factory=dict)
    skipped: tuple[tuple[str, str, bool], ...] = ()
    watched: Watched | None = None

    def section(self, name: str) -> Line:
        """Returns a section of the settings; empty where there is none."""
        result = self.settings.get(name)
        return result if isinstance(result, Mapping) else {}

    def path(self, stated: object) -> Path:
        """Finds a path of the settings."""
        return path_in_run(stated, self.folder, self.settings)

    @property
    def last_step(self) -> int:
        """The last step that the log knows."""
        return max((int(line["step"]) for line in self.log), default=0)


def read_run(folder: Path, label: str) -> RunRecord:
    """Reads a run's folder. Raises UserError: it is none, or training has not begun in it."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the training.output_dir of a run")
    if not (folder / LOSS_LOG).is_file():
        raise UserError(f"{folder} holds no {LOSS_LOG}: it is no run's folder, or its training has not begun")
    damaged: list[str] = []
    log = read_lines(
        folder / LOSS_LOG, damaged, usable=lambda line: type(step := line.get("step")) is int and step >= 0
    )
    if not log:
        raise UserError(f"{folder / LOSS_LOG}: not one whole line; the run has logged nothing yet, or it is damaged")
    skipped = read_lines(folder / SKIPPED, damaged) if (folder / SKIPPED).is_file() else []
    result = {name: _object(folder / name, damaged) for name in (SETTINGS, METRICS, PLAN)}
    return RunRecord(
        label=label,
        folder=folder,
        settings=result[SETTINGS],
        log=tuple(log),
        metrics=result[METRICS],
        plan=result[PLAN],
        recipe=_object(folder / ADAPTER / RECIPE_FILE, damaged),
        benchmarks=_benchmarks(folder / "evaluation", damaged),
        skipped=tuple(
            (str(item.get("id")), str(item.get("reason")), item.get("of") == "validation") for item in skipped
        ),
        watched=read_watched(folder),
        damaged=tuple(damaged),
    )


def read_lines(
    path: Path, damaged: list[str], *, usable: Callable[[Line], bool] = lambda line: True
) -> list[dict[str, Any]]:
    """Reads the usable lines of a file; the numbers of the others become one sentence in `damaged`."""
    lines: list[dict[str, Any]] = []
    bad: list[int] = []
    for number, raw in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict) and usable(value):
            lines.append(value)
        elif raw.strip():
            bad.append(number)
    if bad:
        named = shown_names(bad)
        damaged.append(f"{path.name}: {len(bad)} of {len(lines) + len(bad)} lines cannot be read (line {named})")
    return lines


def _object(path: Path, damaged: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        damaged.append(f"{path.name}: not one whole JSON object")
        return {}
    return value


def _benchmarks(folder: Path, damaged: list[str]) -> dict[str, SetResult]:
    """Reads the results of `dora-vl evaluate`, where there are any."""
    if not (folder / METRICS).is_file():
        return {}
    try:
        return read_results(folder)
    except UserError as error:
        damaged.append(str(error))
        return {}
