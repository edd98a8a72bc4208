"""Damaged publishers' files and predictions end in status 0, or 2 and one short line, with nothing half-written left.

    FUZZ_CASES=20000 OMP_NUM_THREADS=1 python -m pytest -m slow tests/fuzz/test_files.py

Each case damages one file in one to three ways and runs the command's own function in this process.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import signal
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, NoReturn

import pytest

from dora_vl.cli import main
from dora_vl.data.benchmarks.table import SOURCES
from dora_vl.data.example import iterate_examples
from dora_vl.data.text_file import stream_records
from dora_vl.errors import UserError
from dora_vl.evaluation.benchmarks import BENCHMARKS
from tests.fuzz.damage import LONGEST_LINE, damage, failures, memory_mb
from tests.fuzz.targets import Target, prediction_targets, publisher_targets

MOST_MEMORY_MB, MOST_SECONDS = 256.0, 120
LLAVA_FOLDERS = {"llava", "llava_mix665k", "llava_pretrain"}


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the disk, and captions take the tokenizer that stands in for Java's."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setenv("PATH", "")


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Target]]:
    return {"prepare": publisher_targets(), "evaluate": prediction_targets(tmp_path_factory.mktemp("records"))}


@pytest.mark.parametrize("kind", ["prepare", "evaluate"])
@pytest.mark.parametrize("count", [60, pytest.param(2_000, marks=[pytest.mark.slow, pytest.mark.timeout(3_600)])])
def test_no_damage_passes_through(kind: str, count: int, targets: dict[str, list[Target]], tmp_path: Path) -> None:
    def run(number: int) -> str:
        draw = Random(f"{kind}/{number}")
        target = draw.choice(targets[kind])
        folder = tmp_path / f"case_{number}"
        name = draw.choice(sorted(target.files))
        content, described = target.files[name], []
        for _ in range(draw.choice((1, 1, 2, 3))):
            content, change = damage(content, name, draw)
            described.append(change)
        failure = run_target(target, {name: content}, folder)
        if not failure:
            shutil.rmtree(folder)
        return failure and f"{target.name}, {name}: {'; '.join(described)}: {failure}"

    assert failures(run, count) == []


@pytest.mark.slow
def test_everything_is_read_without_damage(targets: dict[str, list[Target]], tmp_path: Path) -> None:
    assert {target.words[1] for target in targets["prepare"]} == set(SOURCES)
    assert set(BENCHMARKS) <= {target.name.strip() for target in targets["evaluate"]}
    for number, target in enumerate((*targets["prepare"], *targets["evaluate"])):
        assert run_target(target, {}, tmp_path / str(number), statuses=(0,)) == "", target.name


def run_target(target: Target, damaged: Mapping[str, bytes], folder: Path, statuses: Sequence[int] = (0, 2)) -> str:
    """What must not have happened, or ""."""
    for path, content in {**target.files, **damaged}.items():
        (folder / "files" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "files" / path).write_bytes(content)
    words = [word.format(files=folder / "files", out=folder / "out") for word in target.words]
    before = memory_mb(begin=True)
    status, printed, errors = run_command(words)
    memory = memory_mb() - before
    longest = max(map(len, (printed + errors).split("\n")))
    results = [path for path in (folder / "out").rglob("*") if path.is_file()]
    refused = status == 2
    failed = {
        f"status {status}: {errors[-300:]}": status not in statuses or "Traceback" in errors,
        f"a line of {longest} characters": longest > LONGEST_LINE,
        f"no one line: {errors[:200]!r}": refused and (errors.count("\n") != 1 or not errors.startswith("error: ")),
        f"{memory:.0f} MB of memory": memory > MOST_MEMORY_MB,
        "refused, and yet there are results": refused and words[0] == "evaluate" and bool(results),
    }
    return next((failure for failure, happened in failed.items() if happened), "") or left_behind(results)


def run_command(words: Sequence[str]) -> tuple[Any, str, str]:
    """Exit status (or the exception that passed through), what was printed and what went to stderr."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=of) for of in ("strict", "backslashreplace")]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]), time_limit():
        logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
        try:
            main(words)
            status: Any = 0
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else 1
        except Exception as error:  # noqa: BLE001 - whatever passes through is what is looked for
            status = "".join(traceback.format_exception(error)[-3:])
    for stream in streams:
        stream.seek(0)
    return status, streams[0].read(), streams[1].read()


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: object) -> NoReturn:
        raise TimeoutError(f"more than {MOST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(MOST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def left_behind(results: Sequence[Path]) -> str:
    """Files that nobody would finish, that cannot be read, or that are not what their manifest says."""
    for path in results:
        if path.name.startswith(".") and path.name != ".prepare.lock":
            return f"a hidden file is left: {path.name}"
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".jsonl" and path.with_name("manifest.json").is_file():
                entry = json.loads(path.with_name("manifest.json").read_text())["splits"][path.stem]
                llava = path.parent.name in LLAVA_FOLDERS
                ids = (
                    [row["id"] for row in stream_records(path)] if llava else [row.id for row in iterate_examples(path)]
                )
                if not len(ids) == len(set(ids)) == entry["written"]:
                    return f"{path.name}: {len(ids)} records of {len(set(ids))} ids, {entry['written']} in the manifest"
            elif path.suffix == ".jsonl":
                for line in filter(None, path.read_text(encoding="utf-8").split("\n")):
                    json.loads(line)
        except (UserError, ValueError, KeyError, RecursionError) as error:
            return f"{path.name} cannot be read back: {str(error)[:200]}"
    return ""
