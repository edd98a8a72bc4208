"""Prepares generated LLaVA rows, and reads such files as a stream and as a table: speed and memory.

    OMP_NUM_THREADS=2 python benchmarks/prepare_rows.py --json benchmarks/results.jsonl
    OMP_NUM_THREADS=1 python benchmarks/prepare_rows.py --read --rows 200000 --json benchmarks/results.jsonl

The rows are like LLaVA-1.5's mix: a picture's path and one to six rounds, every 16th without a picture, every 1,000th
unusable. Memory is the sum of the processes' private and shared memory that is not backed by files (`Pss_Anon`), at
its highest. Targets for 1,000,000 rows on 2 cores: 20,000 rows a second, under 2 GB.

`--read`: those of Parquet and WebDataset hold a picture of 20 kB each, and are a tenth as many. Each reading is a
process of its own; memory is how much its peak resident set grows after the imports, mapped pages included.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from report import table, write_json

from dora_vl.errors import UserError, exit_on_user_error

MEBIBYTE = 1 << 20
WORDS = ("the", "a", "person", "bus", "dog", "street", "red", "table", "what", "how", "near", "holds", "walks", "is")
PICTURE_BYTES = 20_000
READ = """
import json, sys, time
from pathlib import Path
from dora_vl.data.table import load_table
from dora_vl.data.stream import SampleStream
from dora_vl.data.stream import StreamSource
from dora_vl.data.columns import TrainFile

how, path, cache = sys.argv[1:]
def peak():  # of this program alone: getrusage's counts what it was before it was this one
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
before, started = peak(), time.perf_counter()
if how == "table":
    found = load_table(Path(path), cache_folder=Path(cache))
    rows = (found[number] for number in range(len(found)))
else:
    rows = SampleStream([StreamSource(TrainFile(path=path), limit=None, seed=0)], buffer=2048, seed=0).rows(0)
next(rows)
first = time.perf_counter() - started
count = 1 + sum(1 for _ in rows)
seconds = time.perf_counter() - started
print(json.dumps({"rows": count, "first_row_seconds": first, "rows_per_second": count / seconds,
                  "memory_mb": peak() - before}))
"""


@exit_on_user_error
def main() -> None:
    """Runs everything, prints the tables and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="how many to generate")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4], help="of dora-vl prepare")
    parser.add_argument("--folder", type=Path, default=None, help="where the files go and are removed again; 5 GB")
    parser.add_argument("--json", default=None, help="file for the figures")
    parser.add_argument("--read", action="store_true", help="reads files as a stream and as a table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="prepare_rows_") as scratch:
        folder = Path(scratch)
        if options.read:
            figures = readings(folder, options.rows)
        else:
            generate(folder / "rows.json", options.rows)
            prepared = {
                count: prepare(folder / "rows.json", folder / f"records{count}", count) for count in options.workers
            }
            heads = ("dora-vl prepare", "rows/s", "seconds", "memory MB")
            rows = [(f"{count} workers", *run.values()) for count, run in prepared.items()]
            print(table(heads, rows))
            size = (folder / "rows.json").stat().st_size
            figures = {"rows": options.rows, "published_bytes": size, "prepare": prepared}
    if options.json is not None:
        write_json(options.json, figures, name="stream_rows" if options.read else "prepare_rows")


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
    seconds, memory_mb = watched([sys.executable, "-m", "dora_vl.cli", *map(str, words)])
    manifest = json.loads((to / "llava" / "manifest.json").read_text(encoding="utf-8"))
    entry = manifest["splits"][published.stem]
    if entry["written"] + entry["dropped"] != entry["rows"] or entry["dropped"] != entry["rows"] // 1_000:
        raise UserError(f"{to}: {entry['written']} written and {entry['dropped']} dropped of {entry['rows']} rows")
    return {"rows_per_second": entry["rows"] / seconds, "seconds": seconds, "memory_mb": memory_mb}


def watched(command: Sequence[str]) -> tuple[float, float]:
    """Seconds that a command took, and the most MB that it and its children held at once, by looks five times a second.

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
    return time.perf_counter() - started, round(most[0], 1)


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


def readings(folder: Path, rows: int) -> dict[str, dict[str, Any]]:
    """Every file in both ways; prints the table."""
    figures: dict[str, dict[str, Any]] = {}
    for path in containers(folder, rows):
        for how in ("stream", "table"):
            command = [sys.executable, "-c", READ, how, str(path), str(path.parent / "cache")]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            figures[f"{path.suffix[1:]}, {how}"] = {
                **json.loads(output.splitlines()[-1]), "file_bytes": path.stat().st_size,
            }  # fmt: skip
    heads = ("file, read as", "rows", "first row s", "rows/s", "memory MB", "file bytes")
    print(table(heads, [(name, *reading.values()) for name, reading in figures.items()]))
    return figures


def containers(folder: Path, rows: int) -> list[Path]:
    """The same rows in three containers; those with pictures a tenth as many."""
    draw = random.Random(0)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(generated(number, draw)) + "\n" for number in range(rows))
    with (
        tarfile.open(folder / "rows.tar", "w") as archive,
        pq.ParquetWriter(folder / "rows.parquet", _SCHEMA) as parquet,
    ):
        for start in range(0, rows // 10, 1000):
            illustrated = [_illustrated(number, draw) for number in range(start, min(start + 1000, rows // 10))]
            parquet.write_batch(pa.RecordBatch.from_pylist(illustrated, _SCHEMA))
            for row in illustrated:
                _add(archive, f"{row['id']}.jpg", row["image"])
                _add(archive, f"{row['id']}.json", json.dumps({**row, "image": None}).encode())
    return [folder / f"rows.{ending}" for ending in ("jsonl", "parquet", "tar")]


_TURN = pa.struct([("from", pa.string()), ("value", pa.string())])
_SCHEMA = pa.schema([("id", pa.string()), ("image", pa.binary()), ("conversations", pa.list_(_TURN))])


def _illustrated(number: int, draw: random.Random) -> dict[str, Any]:
    row: dict[str, Any] = generated(number, draw)
    return {"id": row["id"], "image": draw.randbytes(PICTURE_BYTES), "conversations": row["conversations"]}


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    main()
