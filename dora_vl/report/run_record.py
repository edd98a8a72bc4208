"""What a run's folder holds, as far as the run has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dora_vl.adapters.files import RECIPE_FILE
from dora_vl.errors import UserError
from dora_vl.evaluation.results import SetResult, read_results
from dora_vl.files import json_or_nothing
from dora_vl.run.folder import ADAPTER, LOSS_LOG, METRICS, PLAN, SETTINGS, SKIPPED, path_in_run, read_log
from dora_vl.run.watched import Watched, read_watched

Line = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run; files that are not there yet are empty.

    Attributes:
        skipped: (id, reason) of unusable samples, and whether they are of the validation data.
    """

    label: str
    folder: Path
    settings: Line
    log: tuple[Line, ...]
    metrics: Line
    plan: Line
    recipe: Line
    skipped: tuple[tuple[str, str, bool], ...]
    watched: Watched | None

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
        return max(int(line["step"]) for line in self.log)

    @cached_property
    def benchmarks(self) -> Mapping[str, SetResult]:
        """What `dora-vl evaluate` left in the folder `evaluation`."""
        folder = self.folder / "evaluation"
        return read_results(folder) if (folder / METRICS).is_file() else {}


def read_run(folder: Path, label: str) -> RunRecord:
    """Reads a run's folder. Raises UserError: it is none, or training has not begun in it."""
    log = read_log(folder / LOSS_LOG)
    if not log:
        raise UserError(f"{folder} has no line in its {LOSS_LOG}: it is no run's folder, or its training has not begun")
    return RunRecord(
        label=label,
        folder=folder,
        settings=json_or_nothing(folder / SETTINGS),
        log=tuple(log),
        metrics=json_or_nothing(folder / METRICS),
        plan=json_or_nothing(folder / PLAN),
        recipe=json_or_nothing(folder / ADAPTER / RECIPE_FILE),
        skipped=tuple(
            (str(line.get("id")), str(line.get("reason")), line.get("of") == "validation")
            for line in read_log(folder / SKIPPED)
        ),
        watched=read_watched(folder),
    )
