"""Prepares generated LLaVA rows and draws the first training batch from them: speed and memory, by number of workers.

    OMP_NUM_THREADS=2 python benchmarks/prepare_rows.py --json benchmarks/results/prepare_rows.json

The rows are like LLaVA-1.5's mix: a picture's path and one to six rounds, every 16th without a picture, every 1,000th
unusable. Memory is the sum of the processes' private and shared memory that is not backed by files (`Pss_Anon`), at
its highest; the first batch is timed from the start of a new Python process, with imports, the sampler's order of the
whole epoch, 32 samples and their pictures (of zeros, for there are none).

Targets for 1,000,000 rows on 2 cores: 20,000 rows a second, under 2 GB, first batch in under 10 s, and a loader's
worker takes the same memory for few rows as for many.
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

FEW_ROWS = 10_000
LOADER_WORKERS = (0, 1, 2, 4)
MEBIBYTE = 1 << 20
WORDS = [
    "the",
    "a",
    "person",
    "bus",
    "dog",
    "street",
    "red",
    "white",
    "table",
    "sign",
    "what",
    "how",
    "many",
    "where",
    "near",
    "behind",
    "stands",
    "holds",
    "walks",
    "is",
]

FIRST_BATCH = """
import json, sys, time
started = float(sys.argv[4])
import torch
from pathlib import Path
from dora_vl.data.batches import Collator
from dora_vl.data.samples import Encoded, ConversationDataset
from dora_vl.data.table import load_rows
from dora_vl.data.order import ModalityLengthSampler, sampling_lengths

def encode(conversation):
    ids = torch.tensor([len(word) for turn in conversation.turns for word in turn.text.split()] or [1, 1])
    return Encoded(ids, ids.clone())

def picture(path):
    return torch.zeros(3, 64, 64)

torch.set_num_threads(1)
rows = load_rows(sys.argv[1], cache_folder=Path(sys.argv[2]))
lengths = sampling_lengths(rows.rows, tokens_per_image=16)
sampler = ModalityLengthSampler(
    lengths.lengths, lengths.is_multimodal, batch_size=32, world_size=1, accumulation=1, seed=0
)
loader = torch.utils.data.DataLoader(
    ConversationDataset(rows, encode=encode, picture=picture),
    batch_size=32,
    sampler=sampler,
    collate_fn=Collator(pad_token_id=0),
    num_workers=int(sys.argv[3]),
)
batches = iter(loader)
first = next(batches)
seconds = time.time() - started
for _ in range(200):
    next(batches, None)
print(json.dumps({"first_batch_seconds": seconds, "rows": len(rows), "samples": first["samples"]}), flush=True)
time.sleep(1)  # memory is looked at while every worker is alive
"""


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
    print(table(("first batch", "seconds", "memory MB", "MB a worker"), loader_rows(figures["loader"])))
    if options.json is not None:
        write_json(options.json, figures)


def measure(folder: Path, rows: int, workers: Sequence[int]) -> dict[str, Any]:
    """All figures; the files are in `folder`."""
    published = folder / "rows.json"
    generate(published, rows)
    generate(folder / "few.json", FEW_ROWS)
    prepare(folder / "few.json", folder / "few", 0)
    prepared = {str(count): prepare(published, folder / f"records{count}", count) for count in workers}
    made = folder / f"records{workers[-1]}" / "llava" / "rows.jsonl"
    files = {"few": folder / "few" / "llava" / "few.jsonl", "all": made}
    loader: dict[str, Any] = {}
    for name, file in files.items():
        loader[name] = {"first_time": first_batch(file, folder / f"cache_{name}", 0)}
        for count in LOADER_WORKERS:
            loader[name][str(count)] = first_batch(file, folder / f"cache_{name}", count)
    return {"rows": rows, "published_bytes": published.stat().st_size, "prepare": prepared, "loader": loader}


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


def first_batch(file: Path, cache: Path, workers: int) -> dict[str, Any]:
    """The loader in a process of its own, from its start to the first batch, and its memory after 200 batches."""
    run = watched([sys.executable, "-c", FIRST_BATCH, str(file), str(cache), str(workers), str(time.time())])
    figures = json.loads(run.said.splitlines()[-1])
    return {**figures, "memory_mb": run.memory_mb}


@dataclass(frozen=True)
class Run:
    """What a process said, how long it took, and the most memory that it and its children held at once."""

    said: str
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
    said = process.communicate()[0]
    done.set()
    watcher.join()
    if process.returncode:
        raise UserError(f"{' '.join(command)[:200]} ended with {process.returncode}")
    return Run(said, time.perf_counter() - started, round(most[0], 1))


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


def loader_rows(loader: Mapping[str, Mapping[str, Any]]) -> list[tuple[object, ...]]:
    """Rows of the second table; a worker's memory is what it adds to the loader without any."""
    rows: list[tuple[object, ...]] = []
    for runs in loader.values():
        for count, run in runs.items():
            workers = 0 if count == "first_time" else int(count)
            added = (run["memory_mb"] - runs["0"]["memory_mb"]) / workers if workers else 0.0
            label = f"{run['rows']:,} rows, " + ("converted first" if count == "first_time" else f"{count} workers")
            rows.append(
                (label, run["first_batch_seconds"], f"{run['memory_mb']:,.0f}", f"{added:,.0f}" if workers else "-")
            )
    return rows


if __name__ == "__main__":
    main()
