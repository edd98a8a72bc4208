"""Damages pictures and videos at random, reads them as training does, and sees what happens; and 200 hostile inputs.

    OMP_NUM_THREADS=1 python benchmarks/fuzz_media.py --count 20000 --seed 0 --json benchmarks/results/fuzz_media.json
    python benchmarks/fuzz_media.py --seed 0 --only 1234 --keep /tmp/case        one case again, its file kept

A third of the files are cut and nothing else (`media_case`); the others are changed in one to three ways. Hostile
inputs are written out in `hostile_pictures`, `hostile_videos` and `hostile_inputs`. A case fails when

- anything but `BadSample` is raised, or its message is no printable line of at most 500 characters;
- a picture takes more than 10 s of the processor, or a video more than the 20 s that its decoder has
  and 15 for ending it;
- this process takes 1,500 MB more than before;
- another program than the decoder is started, by this process (an audit hook) or by the decoder (its children);
- a file that was cut gives other pixels than the whole one; of containers that state no length (`streams`) no one can
  know that;
- of the hostile ones: something of a format that is not listed, or no file, is accepted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file, it is found from everywhere

from benchmarks.fuzz_case import Outcome
from benchmarks.fuzz_files import MEMORY_FOLDER, lines_of, outcomes_of, summary
from benchmarks.hostile_inputs import HOSTILE, hostile_inputs, run_hostile
from benchmarks.media_case import CUT, run_case
from benchmarks.media_files import PICTURES, STREAMS, VIDEOS
from dora_vl.errors import exit_on_user_error, positive

CUT_AND_READ = {
    PICTURES: "pictures with the pixels of the whole one",
    VIDEOS: "videos with the pixels of the whole one",
    STREAMS: "streams, of which it cannot be told",
}


@exit_on_user_error
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the cases, prints counts and the first failures, and exits with 1 where there are some."""
    options = parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="fuzz_media_") as folder:
        scratch = Path(folder)
        if options.only is not None:
            outcomes = [run_case(scratch, options.seed, options.only, options.keep)]
            print(outcomes[0].said)
        else:
            started = time.perf_counter()
            outcomes = [] if options.no_hostile else hostile_outcomes(scratch)
            outcomes += outcomes_of(partial(run_case, scratch, options.seed), options.count, options.processes)
            figures = figures_of(outcomes, seed=options.seed, seconds=time.perf_counter() - started)
            if options.json is not None:
                from benchmarks.report import write_json  # needs torch, which the cases do not

                write_json(options.json, figures)
            print("\n".join(lines_of(figures)))
    sys.exit(1 if any(outcome.failure for outcome in outcomes) else 0)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    usual = MEMORY_FOLDER if MEMORY_FOLDER.is_dir() else None
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--count", type=positive, default=20_000, help="damaged files (default: 20000)")
    made.add_argument("--seed", type=int, default=0, help="of all of them")
    made.add_argument("--processes", type=positive, default=1, help="side by side (default: this one)")
    made.add_argument("--no-hostile", action="store_true", help="damaged files alone")
    made.add_argument("--only", type=int, metavar="CASE", help="this case alone")
    made.add_argument("--keep", type=Path, metavar="FOLDER", help="with --only: where its file stays")
    made.add_argument("--folder", type=Path, default=usual, help="where files go and are removed again")
    made.add_argument("--json", help="file for the figures")
    return made


def hostile_outcomes(scratch: Path) -> list[Outcome]:
    """Of every hostile input, in this process."""
    return [run_hostile(case, scratch, number) for number, case in enumerate(hostile_inputs(scratch), start=1)]


def figures_of(outcomes: Sequence[Outcome], *, seed: int, seconds: float) -> dict[str, Any]:
    """As of the publishers' files, and what became of the cut and of the hostile ones."""
    cut = [one for one in outcomes if one.damage == CUT]
    return {
        **summary(outcomes, seed=seed, seconds=seconds),
        "damaged": sum(one.kind != HOSTILE for one in outcomes),
        "hostile": sum(one.kind == HOSTILE for one in outcomes),
        "cut": {
            **{"refused": sum(one.status == 2 for one in cut)},
            **Counter(CUT_AND_READ[one.kind] for one in cut if one.status == 0 and not one.failure),
        },
        "hostile_read": sorted(one.damage for one in outcomes if one.kind == HOSTILE and one.status == 0),
    }


if __name__ == "__main__":
    main()
