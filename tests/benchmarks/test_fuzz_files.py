"""Damaged files end in status 0 or 2 and one short line; and the fuzzing sees each thing that must not happen."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from benchmarks import fuzz_case
from benchmarks.file_mutations import mutate
from benchmarks.fuzz_case import Run, judged, left_behind, run_case, run_command, write_files
from benchmarks.fuzz_files import lines_of, main, summary, targets_of
from benchmarks.fuzz_predictions import JAVA_WEIGHT, prediction_targets
from benchmarks.fuzz_targets import PREDICTIONS, PUBLISHERS, Target, publisher_targets
from dora_vl.data.benchmarks.table import SOURCES
from dora_vl.evaluation.benchmarks import BENCHMARKS

POPE = "pope"


@pytest.fixture(autouse=True)
def no_flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole files are waited for on disk, which takes longer than all else here."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def pope(tmp_path: Path) -> list[Target]:
    return [target for target in publisher_targets(tmp_path) if target.name == POPE]


def test_no_damage_to_a_publishers_file_passes_through(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--count", "200", "--seed", "1", "--what", PUBLISHERS, "--folder", str(tmp_path)])
    printed = capsys.readouterr().out
    assert left.value.code == 0, printed
    assert printed.startswith("200 cases in ")
    assert list(tmp_path.iterdir()) == []


def test_what_is_damaged_is_read_whole_without_the_damage(tmp_path: Path) -> None:
    targets = [*publisher_targets(tmp_path), *prediction_targets(tmp_path)]
    assert {target.words[1] for target in targets if target.kind == PUBLISHERS} == set(SOURCES)
    predictions = {target.name for target in targets if target.kind == PREDICTIONS}
    assert len(predictions) == sum(target.kind == PREDICTIONS for target in targets)
    assert set(BENCHMARKS) < predictions
    assert {"nlvr2 server's file", "tvqa server's file", "mme LLaVA's answers", "pope LLaVA's questions"} < predictions
    for number, target in enumerate(targets):
        if target.name.endswith("with Java"):
            continue  # half a minute; the scorers' own tests run it
        folder = tmp_path / str(number)
        write_files(target.files, folder / "files")
        words = [word.format(files=folder / "files", out=folder / "out") for word in target.words]
        run = run_command(words, java=target.java)
        assert run.status == 0, (target.name, run)
        assert left_behind(folder / "out", target.kind) == ("", "")


def test_each_kind_is_drawn_as_often_as_the_other(tmp_path: Path) -> None:
    targets = targets_of([PUBLISHERS, PREDICTIONS], tmp_path)
    shares = [sum(target.weight for target in targets if target.kind == kind) for kind in (PUBLISHERS, PREDICTIONS)]
    assert shares == pytest.approx([1.0, 1.0])
    weights = {target.name: target.weight for target in targets if target.kind == PREDICTIONS}
    assert weights["tvc with Java"] == pytest.approx(JAVA_WEIGHT * weights["tvc"])


def test_what_no_pipe_in_utf8_takes_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_case, "main", lambda words: sys.stdout.write("caf\u00e9"))
    assert run_case(pope(tmp_path), tmp_path, 0, 1).failure == ""
    monkeypatch.setattr(fuzz_case, "main", lambda words: sys.stdout.write("half \ud83d"))
    assert run_case(pope(tmp_path), tmp_path, 0, 1).failure.startswith("exception: UnicodeEncodeError")


def test_a_case_is_the_same_whenever_it_is_run(tmp_path: Path) -> None:
    targets = publisher_targets(tmp_path)
    for number in (1, 7, 20):
        first, second = (run_case(targets, tmp_path, 3, number) for _ in range(2))
        assert (first.target, first.damage, first.status) == (second.target, second.damage, second.status)


def test_a_kept_case_holds_the_damaged_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "5", "--what", PUBLISHERS, "--folder", str(tmp_path), "--keep", str(tmp_path / "kept")])
    assert capsys.readouterr().out.startswith(f"5: {PUBLISHERS} ")
    assert list((tmp_path / "kept" / "files").iterdir())


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.tsv", "a.txt"])
@pytest.mark.parametrize(
    "content", [b"", b"{}", b'{"a": [1, {"b": null}]}', b'{"a": 1}\n{"a": 2}\n', b"a,b\tc\n1,2\t3\n"]
)
def test_any_content_can_be_damaged_again_and_again(name: str, content: bytes) -> None:
    draw, changed = Random(0), 0
    for _ in range(150):
        mutated = mutate(content, name, draw)
        for _ in range(2):
            mutated = mutate(mutated.content, name, draw)
        assert mutated.said.isprintable()
        changed += mutated.content != content
    assert changed > 120


def raising(error: BaseException) -> Callable[..., Any]:
    def broken(words: object) -> None:
        raise error

    return broken


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (TypeError("unhashable type: 'list'"), "exception: TypeError in test_fuzz_files.py"),
        (MemoryError(), "exception: MemoryError"),
        (RecursionError("too deep"), "exception: RecursionError"),
        (SystemExit(1), "exit status 1"),
        (SystemExit("said"), "exit status 1"),
        (SystemExit(2), "an error is not one line"),
    ],
)
def test_what_passes_through_a_command_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, failure: str
) -> None:
    monkeypatch.setattr(fuzz_case, "main", raising(error))
    outcome = run_case(pope(tmp_path), tmp_path, 0, 1)
    assert outcome.failure.startswith(failure)
    figures = summary([outcome], seed=0, seconds=1.0)
    assert figures["failed"] == 1
    assert any(line.startswith("  again with --seed 0 --only 1: publishers pope") for line in lines_of(figures))


def test_a_hang_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(words: object) -> None:
        while True:
            pass

    monkeypatch.setattr(fuzz_case, "main", endless)
    monkeypatch.setattr(fuzz_case, "MOST_SECONDS", 1)
    assert run_case(pope(tmp_path), tmp_path, 0, 1).failure.startswith("exception: TimeoutError")


@pytest.mark.parametrize(
    ("run", "memory", "failure"),
    [
        (Run(0, "x" * 501, ""), 0.0, "a line of more than 500 characters"),
        (Run(2, "", "error: " + "x" * 600 + "\n"), 0.0, "a line of more than 500 characters"),
        (Run(0, "", "Traceback (most recent call last):\n"), 0.0, "a traceback is printed"),
        (Run(2, "", "error: a\nb\n"), 0.0, "an error is not one line"),
        (Run(2, "", "usage: x\n"), 0.0, "an error is not one line"),
        (Run(0, "", ""), 300.0, "more than 256 MB of memory"),
        (Run(0, "fine\n", ""), 0.0, ""),
        (Run(2, "", "error: a\n"), 0.0, ""),
    ],
)
def test_what_is_printed_is_judged(tmp_path: Path, run: Run, memory: float, failure: str) -> None:
    assert judged(run, tmp_path, PUBLISHERS, memory)[0] == failure


@pytest.mark.parametrize(
    ("name", "content", "failure"),
    [
        (".a.jsonl.partial", "", "a hidden file is left"),
        ("a.jsonl", '{"id": "1"}\n', "a file is not what its manifest says"),
        ("a.json", "{", "a file that was written cannot be read back"),
        (".prepare.lock", "", ""),
    ],
)
def test_what_is_left_is_judged(tmp_path: Path, name: str, content: str, failure: str) -> None:
    (tmp_path / name).write_text(content)
    assert left_behind(tmp_path, PUBLISHERS)[0] == failure


def test_refused_predictions_leave_no_results(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("{}")
    refused = Run(2, "", "error: a\n")
    assert judged(refused, tmp_path, PREDICTIONS, 0.0)[0] == "refused, and yet there are results"
    assert judged(refused, tmp_path, PUBLISHERS, 0.0)[0] == ""  # a split before the one that is refused stays
    assert judged(Run(0, "", ""), tmp_path, PREDICTIONS, 0.0)[0] == ""


@pytest.mark.parametrize(("ids", "failed"), [(["1", "2"], False), (["1"], True), (["1", "1"], True)])
def test_records_are_as_many_as_the_manifest_says(tmp_path: Path, ids: list[str], failed: bool) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"id": each}) + "\n" for each in ids))
    (tmp_path / "manifest.json").write_text(json.dumps({"splits": {"a": {"written": 2}}}))
    assert bool(left_behind(tmp_path, PUBLISHERS)[0]) == failed
