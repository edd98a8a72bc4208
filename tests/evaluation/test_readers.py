"""Every file that evaluation reads: any bytes give rows or one line, and no line is long whatever the file quotes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dora_vl.errors import LONGEST_MESSAGE, UserError
from dora_vl.evaluation.benchmarks import read_set
from dora_vl.evaluation.predictions import read_predictions, read_rows
from dora_vl.evaluation.questions import read_question_file, read_questions

Reader = Callable[[Path], object]

READERS: Mapping[str, Reader] = {
    "answers": read_rows,
    "predictions": read_predictions,
    "questions": read_questions,
    "question file": read_question_file,
    "evaluation set": lambda path: read_set(f"exact_match={path}", path.parent, mode=None, limit=None),
    "choices": lambda path: read_set(f"scienceqa={path}", path.parent, mode=None, limit=2),
}
ENDINGS = (".jsonl", ".json", ".csv", ".tsv")
LONG = "x" * 60_755


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


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_bytes(b'\xef\xbb\xbf{"id":"1","answers":[{"text":"x"}]}\r\n')
    (tmp_path / "p.jsonl").write_bytes(b'\xef\xbb\xbf{"id": "1", "answer": "x"}\r\n')
    assert read_set(f"exact_match={tmp_path / 'q.jsonl'}", tmp_path, mode=None, limit=None).examples[0].id == "1"
    assert [(row.id, row.prediction) for row in read_rows(tmp_path / "p.jsonl")] == [("1", "x")]
