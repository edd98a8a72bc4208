"""A split is made once, in the publisher's order; what stops it never looks whole."""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dora_vl.cli import main
from dora_vl.data import prepare as prepare_module
from dora_vl.data.benchmarks.fields import Raw, Split
from dora_vl.data.example import Answer, Example, iterate_examples
from dora_vl.errors import BadSample, UserError
from dora_vl.files import locked
from tests.data.published import FIXTURES, manifest, prepared


def row(number: int, **changes: object) -> dict[str, object]:
    conversations = [{"from": "human", "value": f"Question {number}?"}, {"from": "gpt", "value": f"Answer {number}."}]
    return {"id": f"r{number}", "conversations": conversations, **changes}


def published(path: Path, count: int, **changed: dict[str, object]) -> Path:
    rows = [row(number, **changed.get(f"r{number}", {})) for number in range(count)]
    path.write_text(json.dumps(rows))
    return path


def prepare(file: Path, to: Path, *options: str) -> list[str]:
    return prepared("llava-json", file, to, *options)


def ids(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".prepare.lock")


def test_the_manifest_accounts_for_every_row(tmp_path: Path) -> None:
    no_answer = {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": " "}]}
    file = published(tmp_path / "a.json", 9, r3=no_answer, r5={"id": "r1"}, r7=no_answer)
    lines = prepare(file, tmp_path / "records")
    content = manifest(tmp_path / "records" / "llava", "a")
    assert ids(tmp_path / "records" / "llava" / "a.jsonl") == ["r0", "r1", "r2", "r4", "r1#2", "r6", "r8"]
    assert (content["rows"], content["written"], content["renamed_ids"], content["dropped"]) == (9, 7, 1, 2)
    ((reason, count),) = content["reasons"].items()
    dropped = [{"row": row, "id": name, "reason": reason} for row, name in ((4, "r3"), (8, "r7"))]
    assert (count, content["dropped_rows"]) == (2, dropped)
    assert content["inputs"][0]["file"] == "a.json"
    assert content["inputs"][0]["bytes"] == file.stat().st_size
    assert lines[0].endswith("7 records of 9 rows, written")


def test_a_finished_split_is_left_alone_until_something_changes(tmp_path: Path) -> None:
    file = published(tmp_path / "a.json", 5)
    records = tmp_path / "records"
    prepare(file, records)
    path = records / "llava" / "a.jsonl"
    before = path.stat().st_mtime_ns
    assert prepare(file, records) == [f"{path}: 5 records of 5 rows, already there"]
    os.utime(file)  # another time, the same content
    assert "already there" in prepare(file, records)[0]
    assert path.stat().st_mtime_ns == before
    path.write_text(path.read_text()[:-10])
    assert prepare(file, records)[0].endswith("written")
    assert prepare(file, records, "--limit", "3")[0].endswith("3 records of 3 rows, written")
    published(file, 6)
    assert prepare(file, records)[0].endswith("6 records of 6 rows, written")


def test_what_stops_a_split_leaves_nothing_that_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = published(tmp_path / "a.json", 2000)
    add, calls = prepare_module.Records.add, itertools.count()

    def full(records: prepare_module.Records, row: Raw) -> None:
        if next(calls) == 1500:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(records, row)

    monkeypatch.setattr(prepare_module.Records, "add", full)
    with pytest.raises(UserError):
        prepare(file, tmp_path / "records")
    assert left_over(tmp_path / "records" / "llava") == []
    monkeypatch.undo()
    assert prepare(file, tmp_path / "records")[0].endswith("2,000 records of 2,000 rows, written")
    assert left_over(tmp_path / "records" / "llava") == ["a.jsonl", "manifest.json"]


@pytest.mark.parametrize(
    "words",
    [
        ["popee", "--from", "."],
        ["pope", "--from", ".", "--set", "seed=1"],
        ["nlvr", "--from", str(FIXTURES / "nlvr"), "--set", "orders=12"],
        ["pope", "--from", ".", "--limit", "0"],
        ["llava-json", "--from", "a.json", "--splits", "a,test"],
        ["llava-json", "--from", "a.json", "--to", "a.json"],
    ],
)
def test_the_command_exits_with_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    published(Path("a.json"), 2)
    with pytest.raises(SystemExit) as left:
        main(["prepare", *words])
    assert left.value.code == 2


def split_of(rows: Callable[[], Iterator[Raw]], convert: Callable[[Raw], Any]) -> Split:
    return Split(task="t", name="s", inputs=(), rows=rows, convert=convert)


def numbers() -> Iterator[Raw]:
    yield from ({"n": number} for number in range(3))


def run(split: Split, folder: Path) -> prepare_module.Prepared:
    return prepare_module.prepare_split(split, folder, source="own", limit=None)


def test_ids_that_a_publisher_repeats_are_refused(tmp_path: Path) -> None:
    split = split_of(numbers, lambda raw: Example(id=str(raw["n"] % 2), question="q", answers=(Answer(text="a"),)))
    with pytest.raises(UserError):
        run(split, tmp_path)
    assert left_over(tmp_path) == []


def test_a_row_that_json_cannot_hold_is_dropped_with_its_reason(tmp_path: Path) -> None:
    split = split_of(numbers, lambda raw: Example(id=str(raw["n"]), question="half \ud83d" if raw["n"] == 1 else "q"))
    prepared = run(split, tmp_path)
    assert [example.id for example in iterate_examples(prepared.path)] == ["0", "2"]
    assert prepared.entry["dropped_rows"][0]["id"] == "1"
    assert "surrogates not allowed" in prepared.entry["dropped_rows"][0]["reason"]


def test_a_file_of_other_rows_is_refused_long_before_its_end(tmp_path: Path) -> None:
    read = 0

    def endless() -> Iterator[Raw]:
        nonlocal read
        while True:
            read += 1
            yield {"n": read}

    def unusable(raw: Raw) -> Example:
        raise BadSample(str(raw["n"]), "it is no question")

    with pytest.raises(UserError):
        run(split_of(endless, unusable), tmp_path)
    assert read < 3000


def test_two_commands_do_not_write_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "records" / "llava"
    folder.mkdir(parents=True)
    with locked(folder / ".prepare.lock"), pytest.raises(UserError):
        prepare(published(tmp_path / "a.json", 2), tmp_path / "records")
