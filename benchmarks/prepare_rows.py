"""Prepares generated LLaVA rows: speed and memory, by number of workers.

    OMP_NUM_THREADS=2 python benchmarks/prepare_rows.py --json benchmarks/results.jsonl

The rows are like LLaVA-1.5's mix: a picture's path and one to six rounds, every 16th without a picture, every 1,000th
unusable. Memory is the sum of the processes' private and shared memory that is not backed by files (`Pss_Anon`), at
its highest. Targets for 1,000,000 rows on 2 cores: 20,000 rows a second, under 2 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import table, write_json

from dora_vl.errors import UserError, exit_on_user_error

MEBIBYTE = 1 << 20
WORDS = ("the", "a", "person", "bus", "dog", "street", "red", "table", "what", "how", "near", "holds", "walks", "is")


@exit_on_user_error
def main() -> None:
    """Runs everything, prints the tables and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="how many to generate")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4], help="of dora-vl prepare")
    parser.add_argument("--folder", type=Path, default=None, help="where the files go and are removed again; 5 GB")
    parser.add_argument("--json", default=None, help="file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="prepare_rows_") as scratch:
        figures = measure(Path(scratch), options.rows, options.workers)
    print(table(("dora-vl prepare", "rows/s", "seconds", "memory MB"), figures_of(figures["prepare"])))
    if options.json is not None:
        write_json(options.json, figures)


def measure(folder: Path, rows: int, workers: Sequence[int]) -> dict[str, Any]:
    """All figures; the files are in `folder`."""
    published = folder / "rows.json"
    generate(published, rows)
    prepared = {str(count): prepare(published, folder / f"records{count}", count) for count in workers}
    return {"rows": rows, "published_bytes": published.stat().st_size, "prepare": prepared}


def generate(path: Path, rows: int) -> None:
    """Writes a JSON list as LLaVA's is, without holding it in memory."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            file.write(("[" if number == 0 else ", ") + json.dumps(generated(number, draw)))
        file.write("]")


def generated(number: int, draw: random.Random) -> dict[str, object]:
    """One row; every 1,000th has an empty answer."""
    rounds = draw.randint(1, 6)
    turns: list[dict[str, str]] = []
    for round_number in range(rounds):
        question = " ".join(draw.choices(WORDS, k=draw.randint(6, 18))) + "?"
        answer = "" if number % 1_000 == 999 else " ".join(draw.choices(WORDS, k=draw.randint(2, 50))) + "."
        with_picture = round_number == 0 and number % 16
        turns.append({"from": "human", "value": f"<image>\n{question}" if with_picture else question})
        turns.append({"from": "gpt", "value": answer})
    row: dict[str, object] = {"id": f"{number:09d}", "conversations": turns}
    return row | ({"image": f"coco/train2017/{number:012d}.jpg"} if number % 16 else {"model": ""})


def prepare(published: Path, to: Path, workers: int) -> dict[str, float]:
    """`dora-vl prepare llava-json` in a process of its own."""
    words = ["prepare", "llava-json", "--from", published, "--to", to, "--workers", workers]
    run = watched([sys.executable, "-m", "dora_vl.cli", *map(str, words)])
    manifest = json.loads((to / "llava" / "manifest.json").read_text(encoding="utf-8"))
    entry = manifest["splits"][published.stem]
    if entry["written"] + entry["dropped"] != entry["rows"] or entry["dropped"] != entry["rows"] // 1_000:
        raise UserError(f"{to}: {entry['written']} written and {entry['dropped']} dropped of {entry['rows']} rows")
    return {"rows_per_second": entry["rows"] / run.seconds, "seconds": run.seconds, "memory_mb": run.memory_mb}


@dataclass(frozen=True)
class Run:
    """How long a process took, and the most memory that it and its children held at once."""

    seconds: float
    memory_mb: float


def watched(command: Sequence[str]) -> Run:
    """Runs a command and looks at its memory five times a second.

    Raises:
        UserError: it failed.
    """
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(Path.cwd())}
    )
    most = [0.0]
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.2):
            most[0] = max(most[0], sum(anonymous_bytes(each) for each in family(process.pid)) / MEBIBYTE)

    watcher = threading.Thread(target=look)
    watcher.start()
    process.communicate()
    done.set()
    watcher.join()
    if process.returncode:
        raise UserError(f"{' '.join(command)[:200]} ended with {process.returncode}")
    return Run(time.perf_counter() - started, round(most[0], 1))


def family(process: int) -> list[int]:
    """The process and all below it."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="utf-8").split()
    except OSError:
        return []
    return [process, *(each for child in children for each in family(int(child)))]


def anonymous_bytes(process: int) -> int:
    """Memory that no file backs, shared pages counted by their share; 0 of a process that ended."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    sizes = {line.partition(":")[0]: line.split()[1] for line in lines[1:]}
    return int(sizes.get("Pss_Anon", 0)) * 1024


def figures_of(prepared: Mapping[str, Mapping[str, float]]) -> list[tuple[object, ...]]:
    """Rows of the first table."""
    return [
        (f"{count} workers", f"{run['rows_per_second']:,.0f}", run["seconds"], f"{run['memory_mb']:,.0f}")
        for count, run in prepared.items()
    ]


if __name__ == "__main__":
    main()
