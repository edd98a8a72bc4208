"""Kills training runs with SIGKILL, resumes them, and compares each with the run that was never killed, bit by bit.

    python -m benchmarks.kills --count 100 --json benchmarks/results/kills.json
    python -m benchmarks.kills --count 20 --change --json benchmarks/results/kills_changed.json

Runs without DeepSpeed, with ZeRO-2 and ZeRO-3, on one and two ranks, of a LLaVA, a VL-BART and a streamed data set take
turns. Of every five kills two come at a file operation inside a save or a removal, or up to 30 ms after it; the others
at any moment. A kill takes one rank, and then the others, as a launcher would. What is compared: the losses of all
steps, the adapter's tensors, and the numbers of `metrics.json` but for those of time. With `--change` a run goes on
with another number of ranks or another engine: losses equal to 1e-4 (there is no dropout then), every sample once an
epoch.

Each kill follows from --seed and its number alone. What the JSON holds already is not done again, so a run that was
interrupted goes on; exit status 1 says that a run ended otherwise than the one that was never killed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from tqdm import tqdm

from benchmarks.kill_case import (
    CASES,
    ENGINES,
    RANKS,
    Case,
    Ended,
    Kill,
    settings_file,
    start,
    write_material,
)
from benchmarks.kill_compared import closely, exactly, once_an_epoch

OF_FIVE = 2
"""So many of five kills come inside a save or a removal."""
LATER = 0.03
TRIES = 10
DROPOUT = 0.2


def main() -> None:
    """Kills, resumes, compares; prints a line for each kind of run and writes the JSON after every kill."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="kills in all, those in the JSON included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], help="kinds of runs by parts of their names: llava, zero3, 2")
    parser.add_argument("--change", action="store_true", help="resume on other ranks or another engine")
    parser.add_argument("--minutes", type=float, default=None, help="begin no kill after so long")
    parser.add_argument("--folder", default=None, help="for runs: those that are never killed are kept there for later")
    parser.add_argument("--json", default=None, help="file for the figures; what it holds is not done again")
    options = parser.parse_args()
    cases = [one for one in CASES if all(part in one.name.split("-") for part in options.only)]
    if not cases:
        parser.error(f"--only: no run has all of {options.only}; there are {', '.join(one.name for one in CASES)}")
    _import_everything()
    path = None if options.json is None else Path(options.json)
    kills = [] if path is None or not path.is_file() else json.loads(path.read_text(encoding="utf-8"))["kills"]
    done = {one["number"] for one in kills}
    until = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as scratch:
        killer = Killer(Path(options.folder or scratch).resolve(), changes=options.change)
        numbers = [number for number in range(options.count) if number not in done]
        for number in tqdm(numbers, initial=len(done), total=options.count, unit="kill", dynamic_ncols=True):
            if until is not None and time.monotonic() > until:
                break
            case, draws = cases[number % len(cases)], Random(f"{options.seed}/{number}")
            row = killer.one(case, draws, in_files=number % 5 < OF_FIVE)
            kills.append({"number": number, **row})
            if path is not None:
                _write(path, options, kills)
    for line in summary(kills)["lines"]:
        print(line)
    sys.exit(any(one["outcome"] != "same" for one in kills))


class Killer:
    """Kills runs; the one that is never killed is trained once for each kind.

    Args:
        folder: for runs.
        changes: whether a run goes on in another shape.
    """

    def __init__(self, folder: Path, *, changes: bool) -> None:
        self._folder = folder
        self._changes = changes
        self._dropout = 0.0 if changes else DROPOUT
        self._whole: dict[Case, tuple[Path, Ended]] = {}
        if not (folder / "material").is_dir():
            _in_a_process(lambda: write_material(folder / "material"))

    def one(self, case: Case, draws: Random, *, in_files: bool) -> dict[str, Any]:
        """One kill, the resume and the comparison, as a row of the JSON."""
        begun = time.monotonic()
        reference, whole = self._reference(case)
        folder = self._folder / f"{case.name}-killed"
        _in_a_process(lambda: _remove(folder))
        ended, phase = self._killed(case, folder, whole, draws, in_files=in_files)
        then = self._other(case, draws) if self._changes else case
        row: dict[str, Any] = {"run": case.name, "phase": phase, "killed": ended.killed}
        row |= {"resumed_as": then.name} if self._changes else {}
        if ended.error is not None:
            return row | {"outcome": f"failed before the kill: {ended.error}"}
        resumed = self._start(then, folder, "resumed", resume=self._resume(folder))
        row["outcome"] = resumed.error or self._compared(case, reference, folder)
        row["seconds"] = round(time.monotonic() - begun, 2)
        if row["outcome"] == "same":
            _in_a_process(lambda: _remove(folder))
        else:
            for one in (folder, folder.with_name(f"{folder.name}-notes")):  # to be looked at, where --folder is kept
                one.rename(one.with_name(f"{one.name}-{int(time.time())}"))
        return row

    def _reference(self, case: Case) -> tuple[Path, Ended]:
        if case not in self._whole:
            folder = self._folder / f"{case.name}-whole{'' if self._dropout else '-plain'}"
            account = folder.with_suffix(".json")
            if account.is_file():
                ended = Ended.read(account)
            else:
                _in_a_process(lambda: _remove(folder))
                ended = self._start(case, folder, "whole")
                if ended.error is not None:
                    raise RuntimeError(f"{case.name} fails by itself: {ended.error}")
                ended.write(account)
            self._whole[case] = folder, ended
        return self._whole[case]

    def _start(self, case: Case, folder: Path, part: str, **how: Any) -> Ended:
        settings = settings_file(case, self._folder / "material", folder, dropout=self._dropout)
        return start(case, settings, folder.with_name(f"{folder.name}-notes") / part, **how)

    def _killed(self, case: Case, folder: Path, whole: Ended, draws: Random, *, in_files: bool) -> tuple[Ended, str]:
        """A run that was killed; one that ended before the kill came is drawn again."""
        for _ in range(TRIES):
            kill, phase = self._drawn(whole, draws, in_files=in_files)
            ended = self._start(case, folder, "killed", kill=kill)
            if ended.killed or ended.error is not None:
                return ended, phase
            _in_a_process(lambda: _remove(folder))
        raise RuntimeError(f"{case.name} ended {TRIES} times before it could be killed")

    def _drawn(self, whole: Ended, draws: Random, *, in_files: bool) -> tuple[Kill, str]:
        inside = [one for one in whole.operations if one.phase != "steps" and one.number > 0]
        if in_files and inside:
            at = draws.choice(inside)
            later = draws.choice((0.0, draws.uniform(0, LATER)))
            return Kill(at.rank, later, at.number), at.phase
        rank = draws.randrange(1 + max(one.rank for one in whole.operations))
        return Kill(rank, draws.uniform(0.05, 0.95) * whole.seconds), "any moment"

    def _resume(self, folder: Path) -> list[str]:
        if not self._changes:
            return ["--resume", "if_stopped"]
        there = any(one.is_dir() for one in folder.glob("checkpoint-*"))
        return ["--resume", "last"] if there else ["--overwrite", "true"]

    @staticmethod
    def _other(case: Case, draws: Random) -> Case:
        return draws.choice(
            [
                Case(case.kind, engine, ranks)
                for engine in ENGINES
                for ranks in RANKS
                if (engine, ranks) != (case.engine, case.ranks)
            ]
        )

    def _compared(self, case: Case, reference: Path, folder: Path) -> str:
        if self._changes:
            return closely(reference, folder) or once_an_epoch(folder, case) or "same"
        return exactly(reference, folder) or "same"


# ---- what is told


def summary(kills: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts over all kills, by kind of run, and as lines."""
    by_run = {name: [one for one in kills if one["run"] == name] for name in sorted({one["run"] for one in kills})}
    same = sum(one["outcome"] == "same" for one in kills)
    killed, inside = [sum(map(bool, found)) for found in zip(*map(_of, kills), strict=True)] if kills else (0, 0)
    lines = [f"{name}: {sum(one['outcome'] == 'same' for one in rows)} of {len(rows)}" for name, rows in by_run.items()]
    lines.append(f"all: {same} of {len(kills)} the same; {killed} were killed, {inside} in a save or a removal")
    return {"same": same, "of": len(kills), "killed": killed, "in_a_save_or_removal": inside, "lines": lines}


def _of(kill: Mapping[str, Any]) -> tuple[bool, bool]:
    return kill["killed"], kill["killed"] and kill["phase"] in ("save", "removal")


def _write(path: Path, options: argparse.Namespace, kills: list[dict[str, Any]]) -> None:
    from benchmarks.report import write_json

    counts = {name: value for name, value in summary(kills).items() if name != "lines"}
    write_json(path, {"seed": options.seed, "change": options.change, **counts, "kills": kills})


def _import_everything() -> None:
    """What every run needs, once; its processes are copies of this one. Nothing may have computed in it before."""
    import accelerate
    import datasets
    import deepspeed
    import transformers

    import dora_vl.training.image_text_pipeline
    import dora_vl.training.run
    import dora_vl.training.vlbart_pipeline
    import tests.training.tiny_vlbart_run

    modules = (
        accelerate,
        datasets,
        deepspeed,
        transformers,
        dora_vl.training.image_text_pipeline,
        dora_vl.training.vlbart_pipeline,
    )
    assert all((*modules, dora_vl.training.run, tests.training.tiny_vlbart_run))


def _in_a_process(action: Any) -> None:
    child = os.fork()
    if not child:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("what a kill needs could not be written")


def _remove(folder: Path) -> None:
    import shutil

    for one in (folder, folder.with_name(f"{folder.name}-notes")):
        if one.is_dir():
            shutil.rmtree(one)


if __name__ == "__main__":
    main()
