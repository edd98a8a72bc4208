"""Reads a data file as a stream and as a table: time to the first row, rows a second, memory.

    OMP_NUM_THREADS=1 python benchmarks/stream_rows.py --rows 200000 --json benchmarks/results.jsonl

The rows are `prepare_rows`' (LLaVA's, about 1 kB); those of Parquet and WebDataset hold a picture of 20 kB each, and
are a tenth as many. Each reading is a process of its own; memory is how much its peak resident set grows after the
imports, memory-mapped pages of the table included.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from prepare_rows import generated
from report import table, write_json

PICTURE_BYTES = 20_000
READ = """
import json, sys, time
from pathlib import Path
from dora_vl.data.table import load_table
from dora_vl.data.stream import SampleStream
from dora_vl.data.stream import StreamSource
from dora_vl.data.order import TrainFile

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


def main() -> None:
    """Measures, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000, help="how many to generate")
    parser.add_argument("--json", default=None, help="file for the figures")
    options = parser.parse_args()
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="stream_rows_") as scratch:
        for path in written(Path(scratch), options.rows):
            for how in ("stream", "table"):
                figures[f"{path.suffix[1:]}, {how}"] = {**read(how, path), "file_bytes": path.stat().st_size}
    heads = ("file, read as", "rows", "first row s", "rows/s", "memory MB")
    shown = [
        (
            name,
            f"{one['rows']:,}",
            one["first_row_seconds"],
            f"{one['rows_per_second']:,.0f}",
            f"{one['memory_mb']:.0f}",
        )
        for name, one in figures.items()
    ]
    print(table(heads, shown))
    if options.json is not None:
        write_json(options.json, figures)


def written(folder: Path, rows: int) -> list[Path]:
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


def read(how: str, path: Path) -> dict[str, Any]:
    """One reading in a process of its own."""
    command = [sys.executable, "-c", READ, how, str(path), str(path.parent / "cache")]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
