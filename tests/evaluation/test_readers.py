"""Every file that evaluation reads: any bytes give rows or one line, and no line is long whatever the file quotes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dora_vl.cli import main
from dora_vl.data.example import Answer, Example, ExampleFile, iterate_examples, write_examples
from dora_vl.errors import LONGEST_MESSAGE, UserError
from dora_vl.evaluation.benchmarks import BENCHMARKS
from dora_vl.evaluation.predictions import read_predictions, read_rows
from dora_vl.evaluation.questions import read_question_file, read_questions, read_set

Reader = Callable[[Path], object]

READERS: Mapping[str, Reader] = {
    "answers": read_rows,
    "records": lambda path: list(iterate_examples(path)),
    "records by place": lambda path: list(ExampleFile(path)),
    "predictions": read_predictions,
    "questions": read_questions,
    "question file": read_question_file,
    "evaluation set": lambda path: read_set(f"exact_match={path}", path.parent, mode=None, limit=None),
    "choices": lambda path: read_set(f"scienceqa={path}", path.parent, mode=None, limit=2),
}
ENDINGS = (".jsonl", ".json", ".csv", ".tsv")
LONG = "x" * 60_755

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)
EVALUATION_FIELDS = ["id", "question_id", "answer", "text", "prediction", "prompt", "descs", "kind", "truth", "problem"]
DATA_FIELDS = ["image", "images", "video", "question", "turns", "conversations", "answers", "choices", "extra"]
FIELDS = st.sampled_from([*EVALUATION_FIELDS, *DATA_FIELDS, "subtitles"])
RECORDS = st.dictionaries(FIELDS, JSON_VALUES, max_size=5)


def told(read: Reader, path: Path) -> None:
    """Reads; an error must be one short line."""
    said = ""
    try:
        read(path)
    except UserError as error:
        said = str(error)
    assert len(said) <= LONGEST_MESSAGE
    assert len(said.splitlines()) <= 1


@pytest.mark.parametrize("name", READERS)
@given(content=st.binary(max_size=80), ending=st.sampled_from(ENDINGS))
@example(content=b"\xff\xfe{\x00", ending=".jsonl")
@example(content=b'{"id": ' + b"[" * 100_000, ending=".jsonl")
@example(content=b'[{"id": ' + b"[" * 100_000, ending=".json")
@example(content=b'{"id": 1' + b"0" * 5000 + b', "answer": "x"}', ending=".jsonl")
@example(content=b'{"id": "\\ud800", "answer": "x"}', ending=".jsonl")
@example(content=b'{"question_id": "a", "text": "\\ud800"}', ending=".jsonl")
@example(content=b"a,b\x00\r", ending=".csv")
def test_any_bytes(tmp_path: Path, name: str, content: bytes, ending: str) -> None:
    path = tmp_path / f"any{ending}"
    path.write_bytes(content)
    told(READERS[name], path)


@pytest.mark.parametrize("name", READERS)
@given(records=st.lists(RECORDS, min_size=1, max_size=3), as_list=st.booleans())
def test_any_records(tmp_path: Path, name: str, records: list[dict[str, Any]], as_list: bool) -> None:
    path = tmp_path / "any.jsonl"
    lines = "".join(json.dumps(record) + "\n" for record in records)
    path.write_text(json.dumps(records) if as_list else lines)
    told(READERS[name], path)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    "record",
    [
        {LONG: 1},
        {"id": LONG, "answer": 1},
        {"id": [LONG]},
        {"question_id": LONG, "text": 3},
        {"id": "a", "images": LONG},
        {"id": LONG, "extra": LONG},
        {"id": "a", "choices": ["x"], "extra": {"correct": LONG}},
        {"id": "a", "conversations": [{"from": LONG, "value": "x"}]},
        {f"{number}{LONG[:50]}": "x" for number in range(2000)},
        LONG,
        [LONG],
    ],
)
def test_no_line_is_long(tmp_path: Path, name: str, record: object) -> None:
    for content in (json.dumps(record), json.dumps([record]), f"{json.dumps(record)}\n{json.dumps(record)}\n"):
        path = tmp_path / "long.jsonl"
        path.write_text(content)
        told(READERS[name], path)


def test_tvqas_solution_given_as_predictions_is_one_short_line(tmp_path: Path, capsys: Any) -> None:
    solution = {"version": "1", "solution": {show: [[f"{show}{n}", n % 5] for n in range(2000)] for show in "abc"}}
    (tmp_path / "solution.json").write_text(json.dumps(solution))
    write_examples(tmp_path / "tvqa.jsonl", [Example(id="1", choices=("a", "b"), extra={"correct": 0})])
    words = ["--benchmarks", f"tvqa={tmp_path / 'tvqa.jsonl'}", "--predictions", str(tmp_path / "solution.json")]
    with pytest.raises(SystemExit) as status:
        main(["evaluate", *words])
    error = capsys.readouterr().err
    assert status.value.code == 2
    assert len(error) <= 500
    assert "'solution' has {'a': [['a0', 0]" in error


@pytest.mark.parametrize("name", BENCHMARKS)
def test_scores_of_long_ids_and_labels_are_one_short_line(
    name: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every scorer's own complaint about a record or an answer."""
    monkeypatch.setenv("PATH", "")
    text = {"images": (LONG,), "question": LONG, "answers": (Answer(text=LONG),)}
    write_examples(tmp_path / "q.jsonl", [Example(id=LONG, **text, choices=(LONG, "b"), extra={"correct": 0})])
    rows = [{"id": LONG, "answer": LONG}, {"id": LONG + "y", "answer": LONG}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--predictions", str(tmp_path / "p.jsonl"), "--to", str(tmp_path)]
    with contextlib.suppress(SystemExit):  # some have nothing to complain about
        main(["evaluate", "--benchmarks", f"{name}={tmp_path / 'q.jsonl'}", *words])
    assert len(capsys.readouterr().err) <= 500


def test_records_twice_are_refused_by_the_command(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "q.jsonl").write_text('{"id":"1","answers":[{"text":"x"}]}\n{"id":"2"}\n{"id":"1"}\n')
    (tmp_path / "p.jsonl").write_text('{"id": "1", "answer": "x"}\n')
    words = ["--benchmarks", f"exact_match={tmp_path / 'q.jsonl'}", "--predictions", str(tmp_path / "p.jsonl")]
    with pytest.raises(SystemExit) as status:
        main(["evaluate", *words])
    assert status.value.code == 2
    assert "id '1' in lines 1 and 3" in capsys.readouterr().err


def test_a_byte_order_mark_is_accepted_everywhere(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_bytes(b'\xef\xbb\xbf{"id":"1","answers":[{"text":"x"}]}\n')
    (tmp_path / "p.jsonl").write_bytes(b'\xef\xbb\xbf{"id": "1", "answer": "x"}\r\n')
    assert len(list(iterate_examples(tmp_path / "q.jsonl"))) == len(ExampleFile(tmp_path / "q.jsonl")) == 1
    assert ExampleFile(tmp_path / "q.jsonl")[0].id == "1"
    assert [(row.id, row.prediction) for row in read_rows(tmp_path / "p.jsonl")] == [("1", "x")]
