"""What `dora-vl prepare` knows: one line for each source, written by hand."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import platform
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import cast

from dora_vl.data.benchmarks.fields import UNKNOWN_ID, Converted, Raw
from dora_vl.data.check import decoding_trouble
from dora_vl.data.example import JSON, Example, json_line, to_record, whole_file
from dora_vl.errors import BadSample, UserError, shown_text


@dataclass(frozen=True, kw_only=True)
class Source:
    """One published source.

    Its module is imported when it is asked for. Its function `splits(folder, options, records)` yields a `Split` for
    each published file that it finds; its docstring says where the files are published and under what licence.

    Attributes:
        options: what `--set NAME=VALUE` may choose, each with its explanation.
    """

    module: str
    summary: str
    options: Mapping[str, str] = field(default_factory=dict)
    splits: str = "splits"
    """The function's name."""


SOURCES: dict[str, Source] = {
    "llava-mix665k": Source(
        module="dora_vl.data.benchmarks.llava",
        splits="llava_mix665k_splits",
        summary="LLaVA-1.5's 665,298 instruction conversations",
    ),
    "llava-pretrain": Source(
        module="dora_vl.data.benchmarks.llava",
        splits="llava_pretrain_splits",
        summary="LLaVA-1.5's 558,128 pretraining captions",
    ),
    "llava-json": Source(
        module="dora_vl.data.benchmarks.llava",
        splits="llava_json_splits",
        summary="your own file in LLaVA's form, checked",
    ),
    "vqav2": Source(module="dora_vl.data.benchmarks.images", splits="vqav2_splits", summary="VQA v2, official splits"),
    "vqav2-karpathy": Source(
        module="dora_vl.data.benchmarks.images",
        splits="vqav2_karpathy_splits",
        summary="VQA v2 in Karpathy's split, as in VL-BART",
    ),
    "gqa": Source(
        module="dora_vl.data.benchmarks.images",
        splits="gqa_splits",
        summary="GQA, balanced and all; also VL-T5's files",
    ),
    "vizwiz": Source(module="dora_vl.data.benchmarks.llava", splits="vizwiz_splits", summary="VizWiz-VQA"),
    "textvqa": Source(
        module="dora_vl.data.benchmarks.llava", splits="textvqa_splits", summary="TextVQA 0.5.1 with OCR tokens"
    ),
    "scienceqa": Source(
        module="dora_vl.data.benchmarks.llava",
        splits="scienceqa_splits",
        summary="ScienceQA, with and without pictures",
    ),
    "pope": Source(
        module="dora_vl.data.benchmarks.llava",
        splits="pope_splits",
        summary="POPE: is there such an object? either label version",
    ),
    "mmbench": Source(
        module="dora_vl.data.benchmarks.llava", splits="mmbench_splits", summary="MMBench and MMBench-CN, all rotations"
    ),
    "mme": Source(
        module="dora_vl.data.benchmarks.llava", splits="mme_splits", summary="MME, two yes/no questions a picture"
    ),
    "seed": Source(
        module="dora_vl.data.benchmarks.llava", splits="seed_bench_splits", summary="SEED-Bench, pictures and videos"
    ),
    "llava-bench": Source(
        module="dora_vl.data.benchmarks.llava",
        splits="llava_bench_splits",
        summary="LLaVA-Bench in the wild, for a judge",
    ),
    "mmvet": Source(module="dora_vl.data.benchmarks.llava", splits="mmvet_splits", summary="MM-Vet, for a judge"),
    "nlvr": Source(
        module="dora_vl.data.benchmarks.images",
        splits="nlvr_splits",
        summary="NLVR, six orders of the boxes for each sentence",
        options={
            "shares": "divide by sentence, such as train:0.8,validation:0.1,test:0.1",
            "seed": "of that division; default 0",
        },
    ),
    "nlvr2": Source(
        module="dora_vl.data.benchmarks.images",
        splits="nlvr2_splits",
        summary="NLVR2, two photographs a sentence; also VL-T5's files",
    ),
    "coco-caption": Source(
        module="dora_vl.data.benchmarks.images",
        splits="coco_caption_splits",
        summary="COCO captions in Karpathy's split",
    ),
    "tvqa": Source(module="dora_vl.data.benchmarks.videos", splits="tvqa_splits", summary="TVQA with subtitles"),
    "how2qa": Source(
        module="dora_vl.data.benchmarks.videos",
        splits="how2qa_splits",
        summary="How2QA with subtitles; VALUE's files or the authors' CSV",
    ),
    "tvc": Source(module="dora_vl.data.benchmarks.videos", splits="tvc_splits", summary="TVC with subtitles"),
    "yc2c": Source(
        module="dora_vl.data.benchmarks.videos",
        splits="yc2c_splits",
        summary="YC2C with subtitles; VALUE's files or YouCook2's",
    ),
    "commonsense": Source(
        module="dora_vl.data.benchmarks.commonsense", summary="the eight commonsense sets and commonsense_170k"
    ),
    "hugging-face": Source(
        module="dora_vl.data.benchmarks.hugging_face",
        summary="any data set of the hub, or parquet, arrow or webdataset shards",
        options={
            "hub": "OWNER/NAME on the hub; without it the shards in --from are read",
            "config": "the set's configuration",
            "revision": "commit or tag of the set",
            "split": "which split, of the hub or by the shards' names; default train",
            "columns": "what is what, such as question:query,answers:label,images:img,extra:a+b",
            "task": "folder under records; default the set's name",
        },
    ),
}


# Raw rows to lines of JSON, in order, in this process or in several; a row that cannot be used keeps its reason.


FILE = "manifest.json"
FORMAT = 2
"""Raised when records change their meaning, so that files of an earlier form are made again."""

MEBIBYTE = 1 << 20


def read_manifest(folder: Path) -> dict[str, JSON]:
    """The task's manifest, or an empty one.

    Raises:
        UserError: the file is there but is no manifest.
    """
    path = folder / FILE
    if not path.is_file():
        return {"splits": {}}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest["splits"], dict):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: not a manifest of `dora-vl prepare`; move it away and run again") from None
    return manifest


def add_to_manifest(folder: Path, source: str, split: str, entry: Mapping[str, JSON]) -> None:
    """Writes the split's entry, keeping the other splits'."""
    splits = {**read_manifest(folder)["splits"], split: {"source": source, **entry}}
    with whole_file(folder / FILE) as file:
        json.dump({"versions": versions(), "splits": splits}, file, ensure_ascii=False, indent=1)
        file.write("\n")


def versions() -> dict[str, str]:
    """What the records were made with."""
    found = {"python": platform.python_version(), "format": str(FORMAT)}
    for package in ("dora-vl", "datasets", "pyarrow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def fingerprints(
    inputs: Sequence[Path], known: Sequence[Mapping[str, JSON]], progress: Callable[[int], object]
) -> list[dict[str, JSON]]:
    """Name, size, modification time and sha256 of each file.

    A file whose size and time are those of `known` is taken for unchanged and not read again.
    """
    before = {(entry["file"], entry["bytes"], entry["modified_ns"]): entry["sha256"] for entry in known}
    result: list[dict[str, JSON]] = []
    for path in inputs:
        stat = path.stat()
        key = (path.name, stat.st_size, stat.st_mtime_ns)
        digest = before.get(key) or file_sha256(path, progress)
        result.append({"file": path.name, "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns, "sha256": digest})
    return result


def content(entries: Sequence[Mapping[str, JSON]]) -> list[tuple[str, str]]:
    """What of fingerprints decides whether files are the same: names and hashes, not times."""
    return [(str(entry["file"]), str(entry["sha256"])) for entry in entries]


def file_sha256(path: Path, progress: Callable[[int], object] = lambda _: None) -> str:
    """The file's sha256 in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(MEBIBYTE):
            digest.update(piece)
            progress(len(piece))
    return digest.hexdigest()


ROWS_A_CHUNK = 512
CHUNKS_AHEAD = 3
"""For each worker; what is read but not yet written stays bounded, however slow the disk."""

LONGEST_SHOWN_ID, LONGEST_REASON = 80, 200
"""Characters that the manifest and messages hold of a dropped row; with the file's name they stay on a short line."""


@dataclass(frozen=True)
class Line:
    """One record of the output: its JSON in UTF-8, with the newline, and whether it holds an answer."""

    id: str
    encoded: bytes
    answered: bool = True


@dataclass(frozen=True)
class ConvertedRow:
    """What one raw row became: lines, or the reason why there are none."""

    number: int
    lines: tuple[Line, ...] = ()
    id: str = ""
    problem: str | None = None


def converted_rows(
    rows: Iterable[Raw], convert: Callable[[Raw], Converted], *, first_number: int, workers: int
) -> Iterator[list[ConvertedRow]]:
    """Yields the converted rows chunk by chunk, in the order of `rows`.

    Args:
        first_number: the number of the first row, for messages.
        workers: processes besides this one; 0 converts in this one.

    Raises:
        UserError: reading failed, a row holds what JSON cannot, or a worker died.
    """
    chunks = _chunks(rows, first_number)
    if workers == 0:
        yield from (convert_chunk(convert, chunk) for chunk in chunks)
        return
    pending: deque[Future[list[ConvertedRow]]] = deque()
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        for chunk in chunks:
            pending.append(pool.submit(convert_chunk, convert, chunk))
            if len(pending) > CHUNKS_AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError("a worker process died, perhaps of too little memory; try again with --workers 0") from None
    except RecursionError:
        raise UserError("a row is nested too deeply for a worker process; try again with --workers 0") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def convert_chunk(convert: Callable[[Raw], Converted], chunk: list[tuple[int, Raw]]) -> list[ConvertedRow]:
    """Converts numbered rows."""
    return [_converted(convert, number, row) for number, row in chunk]


def _converted(convert: Callable[[Raw], Converted], number: int, row: Raw) -> ConvertedRow:
    try:
        return ConvertedRow(number, tuple(_line(result) for result in _each(convert(row))))
    except BadSample as error:
        return ConvertedRow(
            number, id=shown_text(error.sample_id, LONGEST_SHOWN_ID), problem=shown_text(error.reason, LONGEST_REASON)
        )
    except RecursionError:
        return ConvertedRow(number, id=UNKNOWN_ID, problem="its values are nested too deeply")


def _each(result: Converted) -> Iterable[Example | Mapping[str, JSON]]:
    if isinstance(result, Example):
        return (result,)
    return (cast("Mapping[str, JSON]", result),) if isinstance(result, Mapping) else result


def _line(result: Example | Mapping[str, JSON]) -> Line:
    record = to_record(result) if isinstance(result, Example) else result
    sample_id = str(record["id"])
    answered = bool(result.answers or result.turns) if isinstance(result, Example) else True
    try:
        return Line(sample_id, json_line(record, sample_id).encode(), answered)
    except UserError as error:
        raise BadSample(sample_id, str(error).removeprefix(f"{sample_id}: ")) from None


def _chunks(rows: Iterable[Raw], first_number: int) -> Iterator[list[tuple[int, Raw]]]:
    numbered = enumerate(rows, start=first_number)
    while chunk := list(islice(numbered, ROWS_A_CHUNK)):
        yield chunk


# Pictures that publishers keep inside their tables, as files: named by content, written once, whole or not at all.


FOLDER = "media"
"""In the task's folder of records, which is then the root of the pictures' paths."""

_BEGINNINGS = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG\r\n\x1a\n": ".png",
    b"GIF87a": ".gif",
    b"GIF89a": ".gif",
    b"BM": ".bmp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
}


def save_picture(data: bytes, task_folder: Path, sample_id: str) -> str:
    """Writes an encoded picture, unless it is there, and returns its path relative to the task's folder.

    It is decoded whole first: a table that was cut inside a picture holds one that begins well, and one that is damaged
    in its middle ends well too. That takes 4 ms for a photograph of 500 x 375, once for each distinct picture.

    Raises:
        BadSample: the bytes do not begin as a picture does, or are not all of one.
        UserError: the disk is full, or the folder cannot be written.
    """
    ending = picture_ending(data)
    if ending is None:
        raise BadSample(sample_id, f"its picture begins with {data[:8]!r}, which is no known picture format")
    relative = f"{FOLDER}/{hashlib.sha256(data).hexdigest()[:32]}{ending}"
    target = task_folder / relative
    if target.is_file() and target.stat().st_size == len(data):
        return relative
    trouble = decoding_trouble(io.BytesIO(data))
    if trouble is not None:
        raise BadSample(sample_id, f"its picture is {trouble.kind.removesuffix(' media')}: {trouble.detail}")
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(target)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"{target}: cannot be written ({error.strerror or error}); free some space") from error
        raise
    return relative


def picture_ending(data: bytes) -> str | None:
    """The file name's ending for an encoded picture, by its first bytes; None for anything else."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ".webp"
    return next((ending for beginning, ending in _BEGINNINGS.items() if data.startswith(beginning)), None)
