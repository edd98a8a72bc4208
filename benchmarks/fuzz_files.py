"""Damages publishers' files and files of predictions at random, reads them as `dora-vl` does, and sees what happens.

    OMP_NUM_THREADS=1 python benchmarks/fuzz_files.py --count 20000 --seed 0 --json benchmarks/results/fuzz_files.json
    python benchmarks/fuzz_files.py --seed 0 --only 1234 --keep /tmp/case        one case again, its files kept

Publishers' files are the tests' fixtures of every source, put through `dora-vl prepare`; predictions are the right
answers to the records made of them, scored by `dora-vl evaluate` for every benchmark, in every form that it reads
(`fuzz_predictions`). Each case damages one file, answers, questions or settings, in one to three ways
(`file_mutations`) and runs the command's own function in this process. A case fails when

- the exit status is neither 0 nor 2, or an exception passes through, or an error is not one line;
- a line that is printed has more than 500 characters;
- a hidden or half-written file is left, a record cannot be read back, or a finished file is in no manifest;
- predictions are refused and yet there are results;
- the process takes 256 MiB more than before, or two minutes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file, it is found from everywhere

from benchmarks.fuzz_case import Outcome, run_case
from benchmarks.fuzz_predictions import prediction_targets
from benchmarks.fuzz_targets import PREDICTIONS, PUBLISHERS, Target, publisher_targets
from dora_vl.errors import UserError, exit_on_user_error, positive

A_CHUNK = 50
SHOWN = 10
MEMORY_FOLDER = Path("/dev/shm")  # files there cost no disk, and their flushing no time


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the cases, prints counts and the first failures, and exits with 1 where there are some."""
    options = parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="fuzz_files_") as scratch:
        targets = targets_of(options.what.split(","), Path(scratch))
        if options.only is not None:
            outcomes = [run_case(targets, Path(scratch), options.seed, options.only, options.keep)]
            print(outcomes[0].said)
        else:
            started = time.perf_counter()
            run = partial(run_case, targets, Path(scratch), options.seed)
            outcomes = list(outcomes_of(run, options.count, options.processes))
            figures = summary(outcomes, seed=options.seed, seconds=time.perf_counter() - started)
            if options.json is not None:
                from benchmarks.report import write_json  # needs torch, which the cases do not

                write_json(options.json, figures)
            print("\n".join(lines_of(figures)))
    sys.exit(1 if any(outcome.failure for outcome in outcomes) else 0)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    usual = MEMORY_FOLDER if MEMORY_FOLDER.is_dir() else None
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--count", type=positive, default=20_000, help="cases (default: 20000)")
    made.add_argument("--seed", type=int, default=0, help="of all of them")
    made.add_argument("--what", default=f"{PUBLISHERS},{PREDICTIONS}", help="publishers, predictions, or both")
    made.add_argument("--processes", type=positive, default=1, help="side by side (default: this one)")
    made.add_argument("--only", type=int, metavar="CASE", help="this case alone")
    made.add_argument("--keep", type=Path, metavar="FOLDER", help="with --only: where its files stay")
    made.add_argument("--folder", type=Path, default=usual, help="where files go and are removed again")
    made.add_argument("--json", help="file for the figures")
    return made


def targets_of(what: Iterable[str], scratch: Path) -> list[Target]:
    """What is read, of both kinds or one; each kind is drawn as often as the other.

    Raises:
        UserError: another kind.
    """
    makers = {PUBLISHERS: publisher_targets, PREDICTIONS: prediction_targets}
    targets: list[Target] = []
    for kind in what:
        if kind not in makers:
            raise UserError(f"--what {kind}: must be {PUBLISHERS}, {PREDICTIONS}, or both with a comma between")
        made = makers[kind](scratch)
        whole = sum(target.weight for target in made)
        targets += [replace(target, weight=target.weight / whole) for target in made]
    return targets


def outcomes_of(run: Callable[[int], Outcome], count: int, processes: int) -> Iterator[Outcome]:
    """Every case in order, from 1, in this process or in several."""
    chunks = [range(start, min(start + A_CHUNK, count + 1)) for start in range(1, count + 1, A_CHUNK)]
    if processes == 1:
        for chunk in chunks:
            yield from map(run, chunk)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for outcomes in pool.map(partial(_run_chunk, run), chunks):
            yield from outcomes


def _run_chunk(run: Callable[[int], Outcome], numbers: Iterable[int]) -> list[Outcome]:
    return [run(number) for number in numbers]


def summary(outcomes: Sequence[Outcome], *, seed: int, seconds: float) -> dict[str, Any]:
    """Counts by kind and target, the most memory, and the first failures."""
    failures = [outcome for outcome in outcomes if outcome.failure]
    targets: dict[str, dict[str, int]] = {}
    for outcome in outcomes:
        counts = targets.setdefault(f"{outcome.kind} {outcome.target}", {"read": 0, "refused": 0, "failed": 0})
        counts["failed" if outcome.failure else "read" if outcome.status == 0 else "refused"] += 1
    return {
        "cases": len(outcomes),
        "seed": seed,
        "seconds": round(seconds, 1),
        "failed": len(failures),
        "most_memory_mb": round(max((outcome.memory_mb for outcome in outcomes), default=0.0), 1),
        "longest_line": max((outcome.longest_line for outcome in outcomes), default=0),
        "targets": dict(sorted(targets.items())),
        "failures": dict(Counter(outcome.failure for outcome in failures).most_common()),
        "first_failures": [outcome.said for outcome in failures[:SHOWN]],
    }


def lines_of(figures: dict[str, Any]) -> Iterator[str]:
    """What is printed of the figures."""
    read, refused = (sum(counts[name] for counts in figures["targets"].values()) for name in ("read", "refused"))
    yield (
        f"{figures['cases']:,} cases in {figures['seconds']:,} s: {read:,} read, {refused:,} refused, "
        f"{figures['failed']:,} failed; most memory {figures['most_memory_mb']} MB more, longest line "
        f"{figures['longest_line']} characters"
    )
    for failure, count in figures["failures"].items():
        yield f"  {count:,}: {failure}"
    for said in figures["first_failures"]:
        yield f"  again with --seed {figures['seed']} --only {said}"


if __name__ == "__main__":
    main()
