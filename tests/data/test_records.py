"""Records files: any legal spelling reads the same, in bounded memory; a broken file is named with its line."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_vl.data import readers
from dora_vl.data.readers import stream_records
from dora_vl.data.table import load_table
from dora_vl.data.turns import read_conversation
from dora_vl.errors import BadSample, UserError

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
RECORD = st.fixed_dictionaries(
    {
        "id": st.one_of(TEXT, st.integers()),
        "conversations": st.lists(
            st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt"]), "value": TEXT}), min_size=1, max_size=4
        ),
    },
    optional={"image": st.one_of(TEXT, st.none(), st.lists(TEXT.filter(bool))), "model": TEXT},
)


@st.composite
def spelled(draw: st.DrawFn) -> tuple[list[dict[str, object]], bytes]:
    """The same records as a list or as lines, indented or not, escaped or not, with either line end, with a BOM."""
    rows = draw(st.lists(RECORD, min_size=1, max_size=6))
    indent, escaped = draw(st.sampled_from([None, 0, 2])), draw(st.booleans())
    if draw(st.booleans()):
        text = json.dumps(rows, indent=indent, ensure_ascii=escaped)
    else:
        text = "\n".join(json.dumps(row, indent=indent, ensure_ascii=escaped) for row in rows)
    text = draw(st.sampled_from(["", "\n ", "\ufeff"])) + text + draw(st.sampled_from(["", "\n", "\r\n\r\n"]))
    if draw(st.booleans()):
        text = text.replace("\n", "\r\n")
    return rows, text.encode()


@given(spelled(), st.sampled_from([1, 3, 7, 64, 1 << 20]))
def test_every_spelling_reads_the_same(
    tmp_path: Path, case: tuple[list[dict[str, object]], bytes], chunk_bytes: int
) -> None:
    rows, content = case
    path = tmp_path / "any.json"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "CHUNK_BYTES", chunk_bytes)
        assert list(stream_records(path)) == rows


@settings(max_examples=30)
@given(st.lists(RECORD, min_size=1, max_size=6))
def test_a_table_row_is_as_good_as_its_record(tmp_path: Path, rows: list[dict[str, object]]) -> None:
    path = tmp_path / "any.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    for record, row in zip(rows, load_table(path, cache_folder=tmp_path / "cache"), strict=True):
        assert outcome(record) == outcome(row)
        assert row["length"] == sum(len(turn["value"].split()) for turn in record["conversations"])  # pyright: ignore
        assert row["is_multimodal"] == bool(record.get("image"))


def outcome(record: object) -> object:
    try:
        return read_conversation(record)  # pyright: ignore[reportArgumentType]
    except BadSample as error:
        return error.sample_id, error.reason


GOOD = {
    "id": "a",
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image> q"}, {"from": "gpt", "value": "x"}],
}
LINE = json.dumps(GOOD)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "holds no records"),
        (b"[]", "holds no records"),
        (f"[{LINE},\n{LINE}".encode(), "line 2: .*the file ends too early .*fetch or write it again"),
        (f"[{LINE},\n{LINE[:-9]}".encode(), "line 2: "),
        (f"[{LINE}\n{LINE}]".encode(), "line 2: .*expected ',' or ']'"),
        (f"[{LINE},\n]".encode(), "line 2: .*Expecting value"),
        (f"[{LINE}]\n\n{LINE}".encode(), "line 3: .*text after the end of the list"),
        (f"{LINE}\n{LINE}\n{{'id': 1}}\n".encode(), "line 3: .*Expecting property name"),
        (f"{LINE}\n[1]\n".encode(), "line 2: .*a record must be an object, found list"),
        (f'[{LINE},\n{{"id": "\x01"}}]'.encode(), "line 2: .*Invalid control character"),
        (f'[\n{{"id": {"[" * 100_000}'.encode(), "line 2: .*nested too deeply"),
        (f'{LINE}\n{{"id": "caf\u00e9"}}'.encode("latin-1"), f"byte {len(LINE) + 12}: not UTF-8"),
        (
            b'{"data": [1, 2]}',
            r"none of its 1 records is a sample; the first one: its keys \['data'\] fit no format \(conv",
        ),
    ],
)
def test_a_broken_file_is_one_clear_line(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=expected) as caught:
        load_table(path, cache_folder=tmp_path / "cache")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [left.suffix for left in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_quote_that_never_closes_does_not_read_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "MAX_RECORD_CHARACTERS", 1 << 16)
    monkeypatch.setattr(readers, "CHUNK_BYTES", 1 << 12)
    path = tmp_path / "open.json"
    path.write_text(f"[{LINE},\n" + '{"id": "' + "x" * 10_000_000)
    with pytest.raises(UserError, match=r"line 2: .*Unterminated string"):
        list(stream_records(path))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_table(tmp_path / "none.json")


NO_FORMAT = (
    "its keys ['id'] fit no format (conversations; messages; texts; prompt and completion; instruction and output; "
    "question and answer; caption and images; caption and videos); data.columns says what a column is, such as "
    "{headline: question}"
)


def test_one_misshapen_record_is_a_bad_sample_and_the_others_are_read(tmp_path: Path) -> None:
    misshapen = [{"id": 5}, {"id": "b", "conversations": [{"from": "human", "value": None}]}, {**GOOD, "image": 3}]
    half = {**GOOD, "id": "half", "conversations": [{"from": "human", "value": "\ud83d"}]}
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [GOOD, *misshapen, half, {**GOOD, "id": None}]))
    rows = load_table(path, cache_folder=tmp_path / "cache")
    assert [row["id"] for row in rows] == ["a", "5", "b", "a", "half", "record 5"]
    assert [row["problem"] is None for row in rows] == [True, False, False, False, False, True]
    assert [outcome(row) for row in rows][1:5] == [
        ("5", NO_FORMAT),
        ("b", "turn 1 must have text as 'from' and 'value', got from 'human' and value None"),
        ("a", "'images' must be a path or a list of paths, got 3"),
        ("half", "its text holds half of a surrogate pair, which is no character"),
    ]


def test_a_changed_file_is_converted_again_and_an_unchanged_one_is_not(tmp_path: Path) -> None:
    path, cache = tmp_path / "a.json", tmp_path / "cache"
    path.write_text(json.dumps([GOOD]))
    assert len(load_table(path, cache_folder=cache)) == len(load_table(path, cache_folder=cache)) == 1
    assert len(list(cache.glob("*.arrow"))) == 1
    path.write_text(json.dumps([GOOD, GOOD]))
    assert len(load_table(path, cache_folder=cache)) == 2


def test_a_killed_conversion_is_not_taken_for_whole(tmp_path: Path) -> None:
    path, cache = tmp_path / "a.json", tmp_path / "cache"
    path.write_text(json.dumps([GOOD] * 100))
    killed = textwrap.dedent(f"""
        import os, signal, itertools
        from pathlib import Path
        from dora_vl.data import record_table
        record_table.ROWS_A_BATCH = 10
        columns, batches = record_table._columns, itertools.count()
        def columns_or_death(rows, uses):
            if next(batches) == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return columns(rows, uses)
        record_table._columns = columns_or_death
        record_table.load_table(Path({str(path)!r}), cache_folder=Path({str(cache)!r}))
    """)
    assert subprocess.run([sys.executable, "-c", killed], check=False).returncode == -9
    assert len(list(cache.glob("*.partial"))) == 1
    assert len(load_table(path, cache_folder=cache)) == 100
    assert list(cache.glob("*.partial")) == []


def test_ranks_that_start_together_convert_once(tmp_path: Path) -> None:
    path, cache = tmp_path / "a.json", tmp_path / "cache"
    path.write_text(json.dumps([GOOD] * 2000))
    rank = textwrap.dedent(f"""
        import logging
        from pathlib import Path
        from dora_vl.data.table import load_table
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        assert len(load_table(Path({str(path)!r}), cache_folder=Path({str(cache)!r}))) == 2000
    """)
    ranks = [subprocess.Popen([sys.executable, "-c", rank], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = "".join(process.communicate()[1] for process in ranks)
    assert [process.returncode for process in ranks] == [0, 0, 0]
    assert said.count("records converted") == 1


def test_reading_records_and_turns_needs_the_standard_library_only() -> None:
    code = """
        import sys
        for name in ("torch", "transformers", "datasets", "pyarrow", "numpy", "PIL"):
            sys.modules[name] = None
        import dora_vl.data.readers, dora_vl.data.turns
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
