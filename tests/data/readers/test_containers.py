"""Every container gives the rows of the same table, of a folder those of its files; what is damaged is one line.

A folder of pictures is a file of rows too: by a table and by a stream, without another reader.
"""

import codecs
import contextlib
import gzip
import io
import json
import random
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dora_vl.data.check import FileCheck
from dora_vl.data.columns import Columns, TrainFile
from dora_vl.data.containers import READERS
from dora_vl.data.data_files import find_files
from dora_vl.data.example import Example
from dora_vl.data.pictures import StoredPictures
from dora_vl.data.readers import read_row
from dora_vl.data.stream import StreamSource
from dora_vl.data.table import load_rows, load_table
from dora_vl.errors import BadSample, UserError
from dora_vl.evaluation.questions import read_questions
from tests.training.own_data import (
    HOLD_PICTURES,
    WRITERS,
    items,
    write_llava,
    write_parquet,
    write_saved,
    write_webdataset,
)

MADE = items(7)
TALK = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize("name", WRITERS)
def test_each_container_gives_the_same_table_and_stream(tmp_path: Path, name: str) -> None:
    expected = load_rows(str(write_llava(tmp_path, MADE)))
    path = str(WRITERS[name](tmp_path, MADE))
    table = load_rows(path)
    streamed = [
        row for row in StreamSource(TrainFile(path=path), limit=None, seed=0).rows() if isinstance(row, Example)
    ]
    assert [replace(row, image_bytes={}) for row in streamed] == list(table)
    samples = [(row.id, row.turns) for row in streamed]
    assert samples == [(row.id, row.turns) for row in expected if isinstance(row, Example)]
    assert samples[0][1][0].text == f"<image>\n{MADE[0].question}"
    contents = [table.stored[row.images[0]] if name in HOLD_PICTURES else None for row in streamed]
    assert contents == [item.content if name in HOLD_PICTURES else None for item in MADE]
    assert [[*row.image_bytes.values()] for row in streamed] == [[content] if content else [] for content in contents]


def test_a_parquet_file_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    schema = pa.schema([("id", pa.string()), ("image", pa.binary())])
    with pq.ParquetWriter(tmp_path / "a.parquet", schema) as writer:
        for group in range(16):
            rows = [{"id": f"{group}-{row}", "image": random.Random(row).randbytes(1 << 15)} for row in range(32)]
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema))
    before, most = pa.total_allocated_bytes(), 0
    for number, _ in enumerate(READERS[".parquet"](tmp_path / "a.parquet")):
        most = max(most, pa.total_allocated_bytes() - before) if number % 32 == 0 else most
    assert 1 << 20 <= most < 6 << 20  # of 16 MiB; a group has one


def test_a_folder_is_its_shards_in_order_and_a_changed_shard_is_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, part in enumerate((MADE[:3], MADE[3:])):
        write_parquet(folder, part).rename(folder / f"part-{number}.parquet")
    assert load_table(folder)["id"][:] == [item.id for item in MADE]
    write_parquet(folder, MADE[:1]).rename(folder / "part-1.parquet")
    assert load_table(folder)["id"][:] == ["n0", "n1", "n2", "n0"]
    (folder / "more.jsonl").write_text("{}")
    with pytest.raises(UserError):
        find_files(folder)


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


QUESTION = {"question": "q", "answer": "a"}


def test_what_other_programs_put_into_an_archive_is_no_content(tmp_path: Path) -> None:
    fields = codecs.BOM_UTF8 + json.dumps(QUESTION).encode()
    path = write_tar(tmp_path / "a.tar", {"b/._a.jpg": b"of macOS", "b/a.jpg": b"pixels", "b/a.json": fields})
    assert list(find_files(path).rows()) == [{"__key__": "b/a", **QUESTION, "images": [b"pixels"]}]


def test_whole_numbers_beside_an_empty_cell_are_whole(tmp_path: Path) -> None:
    columns = {
        "answer": pa.array([3.0, 1e17, None, float("nan")], pa.float64()),
        "small": pa.array([3.0, None, 2.0, 1.0], pa.float32()),
        "half": pa.array([3.0, None, 0.5, 1.0]),
        "full": pa.array([3.0, 1.0, 2.0, 4.0]),
        "none": pa.array([None] * 4, pa.float64()),
    }
    table = pa.table(columns)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    for name in ("a.parquet", "a.arrow"):
        rows = list(find_files(tmp_path / name).rows())
        assert [str(row["answer"]) for row in rows] == ["3", "1" + "0" * 17, "None", "nan"]
        assert [str(row["small"]) for row in rows] == ["3", "None", "2", "1"]
        assert [str(row["half"]) for row in rows] == ["3.0", "None", "0.5", "1.0"]
        assert [str(row["full"]) for row in rows] == ["3.0", "1.0", "2.0", "4.0"]
        assert [row["none"] for row in rows] == [None] * 4


@pytest.mark.parametrize("ending", ["jpg", "heic", "view.BMP"])
def test_an_archive_s_pictures_of_every_format_that_is_read(tmp_path: Path, ending: str) -> None:
    for fields in (QUESTION, {"image": f"a.{ending}", "conversations": TALK}):
        path = write_tar(tmp_path / "a.tar", {f"a.{ending}": b"pixels", "a.json": json.dumps(fields).encode()})
        table = load_table(path)
        (names,) = table["images"]
        assert [StoredPictures([table])[name] for name in names] == [b"pixels"]
        assert table["problem"][:] == [None]


def test_videos_of_an_archive_are_refused_unless_the_fields_name_their_files(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.left.WEBM"):
        path = write_tar(tmp_path / "a.tar", {name: b"x", "a.json": json.dumps(QUESTION).encode()})
        (row,) = find_files(path).rows()
        with pytest.raises(BadSample):
            read_row(row)
    fields = json.dumps({**QUESTION, "video": "clips/a.mp4"}).encode()
    path = write_tar(tmp_path / "b.tar", {"a.mp4": b"x", "a.json": fields})
    assert load_table(path)[0]["videos"][0]["path"] == "clips/a.mp4"
    path = write_tar(tmp_path / "c.tar", {"a.wav": b"x", "a.json": json.dumps(QUESTION).encode()})
    with pytest.raises(UserError):
        load_table(path)


TABLE = "Image,Question ,answer\na.png,Wie groß?,größer; „so“\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", TABLE.replace(";", "").encode()),
        ("a.csv", b'Image, Question, answer\na.png, "Wie gro\xc3\x9f?", a dog\n'),
        ("a.csv", TABLE.replace(",", ";").replace("; „", " „").encode()),
        ("a.csv", TABLE.replace(",", "\t").encode()),
        ("a.csv", TABLE.encode("utf-16")),
        ("a.csv", b"sep=|\r\n" + TABLE.replace(",", "|").encode()),
        ("a.csv", TABLE.replace("; ", " ").replace(",", ";").replace("\n", ";;\n").encode("utf-16")),
        ("a.csv", TABLE.encode("cp1252")),
        ("a.csv", TABLE.encode("utf-8-sig")),
        ("a.csv.gz", gzip.compress(TABLE.encode("utf-16"), mtime=0)),
        (
            "a.jsonl.gz",
            gzip.compress(json.dumps({"image": "a.png", "question": "Wie groß?", "answer": "x"}).encode(), mtime=0),
        ),
        ("a.json", b'{"rows": [{"img": "a.png", "question": "Wie gro\\u00df?", "answer": "x"}], "version": 1}'),
    ],
)
def test_files_that_people_have_are_read_as_they_are(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    (row,) = load_table(tmp_path / name)
    assert (row["images"], row["problem"], row["turns"][0]["text"]) == (["a.png"], None, "<image>\nWie groß?")
    ((question,), _) = read_questions(tmp_path / name)
    assert (question.images, question.question) == (("a.png",), "Wie groß?")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", gzip.compress(json.dumps(QUESTION).encode(), mtime=0)[:-12]),
        ("a.csv", b"\xff\xfe" + TABLE.encode("utf-16-le")[:-1]),
        ("a.csv", b"messages\n[1\n"),
    ],
)
def test_such_files_that_are_not_whole(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError):
        load_table(tmp_path / name)


def test_a_stream_of_arrow_that_was_cut_between_two_batches_loses_no_row(tmp_path: Path) -> None:
    stream = io.BytesIO()
    batch = pa.RecordBatch.from_pylist([QUESTION] * 3)
    with pa.ipc.new_stream(stream, batch.schema) as writer:
        writer.write_batch(batch)
        cut = stream.tell()
        writer.write_batch(batch)
    (tmp_path / "a.arrow").write_bytes(stream.getvalue())
    assert len(list(find_files(tmp_path / "a.arrow").rows())) == 6
    (tmp_path / "a.arrow").write_bytes(stream.getvalue()[:cut])
    with pytest.raises(UserError):
        list(find_files(tmp_path / "a.arrow").rows())


def whole_files(folder: Path) -> dict[str, bytes]:
    arrow = io.BytesIO()
    table = pq.read_table(write_parquet(folder, MADE))
    with pa.ipc.new_stream(arrow, table.schema) as writer:
        writer.write_table(table)
    return {
        ".parquet": (folder / "table.parquet").read_bytes(),
        ".arrow": arrow.getvalue(),
        ".tar": write_webdataset(folder, MADE).read_bytes(),
        ".csv": WRITERS["csv"](folder, MADE).read_bytes(),
        ".tsv": WRITERS["tsv"](folder, MADE).read_bytes(),
        ".json": write_llava(folder, MADE).read_bytes(),
    }


@settings(max_examples=80)
@given(st.sampled_from([*READERS, ".json"]), st.data())
def test_cut_and_damaged_files_are_rows_or_one_line(tmp_path: Path, ending: str, data: st.DataObject) -> None:
    content = bytearray(whole_files(tmp_path)[ending])
    for _ in range(data.draw(st.integers(0, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)) | st.just(len(content)))
    path = tmp_path / f"damaged{ending}"
    path.write_bytes(content[:cut])
    for read in (lambda: [*find_files(path).rows()], lambda: [*load_table(path)]):
        with contextlib.suppress(UserError):
            read()


def test_a_set_of_the_hub_is_read_from_the_files_that_datasets_keeps(tmp_path, monkeypatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def load_dataset(path: str, **named: Any) -> Any:
        calls.append((path, *(named[name] for name in ("revision", "name", "split", "streaming"))))
        if path == "no/such":
            raise FileNotFoundError("no such set,\nand no network")
        return datasets.load_from_disk(str(write_saved(tmp_path, MADE)))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    table = load_table(Path("hub:own/er@v1.2:art:validation"))
    assert table["id"][:] == [item.id for item in MADE]
    with pytest.raises(UserError):
        find_files(Path("hub:no/such"))
    assert calls == [("own/er", "v1.2", "art", "validation", False), ("no/such", None, None, "train", False)]


IDS = [item.id for item in MADE]


def ids(folder: Path) -> list[object]:
    return [row["id"] for row in find_files(folder).rows()]


def write(folder: Path, *names: str) -> None:
    for name in names:
        row, path = {"id": name, "question": "q", "answer": "a"}, folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row)) if path.suffix == ".jsonl" else pq.write_table(
            pa.Table.from_pylist([row]), path
        )


def test_what_map_keeps_in_a_saved_folder_is_no_shard(tmp_path: Path) -> None:
    saved = write_saved(tmp_path, MADE)
    datasets.load_from_disk(str(saved)).map(lambda row: {"answer": row["answer"].upper()})
    assert list(saved.glob("cache-*.arrow"))
    assert ids(saved) == IDS
    (saved / "state.json").unlink()
    assert ids(saved) == IDS


@pytest.mark.parametrize("state", [None, b"{", b'{"_data_files": [1]}'])
def test_a_saved_folder_without_a_shard_or_with_another_state(tmp_path: Path, state: bytes | None) -> None:
    saved = write_saved(tmp_path, MADE)
    (saved / "data-00001-of-00002.arrow").unlink()
    if state is not None:
        (saved / "state.json").write_bytes(state)
    with pytest.raises(UserError):
        find_files(saved)


SPLITS = {
    ("train.parquet", "val.parquet"): False,
    ("test_seen-00000-of-00001.parquet", "test_unseen-00000-of-00001.parquet"): False,
    ("test-00000-of-00001.parquet", "testdev-00000-of-00001.parquet"): False,
    ("a.parquet", "b.parquet"): True,
    ("trainers-0.parquet", "tests-0.parquet", "devices.parquet"): True,
    ("gqa_train-00000-of-00001.parquet", "vqa_train-00000-of-00001.parquet"): True,
    ("extra.parquet", "train.parquet"): True,
}
"""Names of a folder's files -> whether all are of one split."""


@pytest.mark.parametrize("names", SPLITS)
def test_a_folder_of_one_split_is_read_whole_and_one_of_several_is_refused(tmp_path, names) -> None:
    write(tmp_path, *names)
    assert ids(tmp_path / names[0]) == [names[0]]
    if SPLITS[names]:
        assert ids(tmp_path) == sorted(names)
        return
    with pytest.raises(UserError):
        find_files(tmp_path)


ASKED = Columns(ask="What is it?")


def pictures(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / name)
    return folder


def answers(rows: object) -> list[tuple[str, str]]:
    return [(row.id, row.turns[-1].text) for row in rows if isinstance(row, Example)]  # type: ignore[attr-defined]


def test_a_folder_a_class_is_read_alike_by_a_table_a_stream_and_a_test(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "my", "a cat/1.png", "a cat/old/2.jpg", "dog/1.png", ".trash/dog/1.png")
    expected = [("a cat/1.png", "a cat"), ("a cat/old/2.jpg", "a cat"), ("dog/1.png", "dog")]
    assert answers(load_rows(str(folder), columns=ASKED)) == expected
    stream = StreamSource(TrainFile(path=str(folder)), limit=None, seed=0, columns=ASKED)
    assert answers(stream.first_rows) == expected
    questions, _ = read_questions(folder, columns=ASKED)
    assert [(question.id, question.question, question.answers[0].text) for question in questions] == [
        (name, "What is it?", answer) for name, answer in expected
    ]
    assert not FileCheck(folder, columns=ASKED).run().findings


def test_folders_that_give_no_row_are_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = pictures(tmp_path / "my", "cat/1.png", "dog/1.png", "dog/more/1.ppm", ".git/1.ppm", "runs/a/media/1.png")
    (folder / "runs/a/run.yaml").touch()
    assert len([*find_files(folder).rows()]) == 2
    elsewhere = pictures(tmp_path / "elsewhere", "1.png")
    for link in ("owl", "cat/old"):
        (folder / link).symlink_to(elsewhere)
    (folder / "empty").mkdir()
    for _ in range(2):
        assert len([*find_files(folder).rows()]) == 2
    first, second = (record.getMessage() for record in caplog.records if record.name.endswith("data_files"))
    assert [name in first for name in ("dog/more", "owl")] == [True, False]
    assert all(name in second for name in ("cat/old", "dog/more", ".ppm", "empty", "owl", "data.follow_links"))
    assert not any(name in second for name in (".git", "runs"))


def test_a_picture_that_is_alone_is_not_taken_for_json(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "my", "1.png")
    (folder / "1.txt").write_text("a cat")
    questions, _ = read_questions(folder)
    assert [question.answers[0].text for question in questions] == ["a cat"]


def test_a_changed_text_is_read_again(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "my", "1.png", "2.png")
    for name in ("1", "2"):
        (folder / f"{name}.txt").write_text(f"picture {name}")
    assert answers(load_rows(str(folder)))[1] == ("2.png", "picture 2")
    (folder / "2.txt").write_text("another text")
    assert answers(load_rows(str(folder)))[1] == ("2.png", "another text")


@pytest.mark.parametrize(
    ("names", "order"),
    [(("2.png", "10.png", "0.png"), (2, 0, 1)), (("1.png", "png"), (1, 0)), (("b.png", "a.png"), (0, 1))],
)
def test_pictures_of_an_archive_come_by_their_numbers_and_its_text_is_a_caption(tmp_path, names, order) -> None:
    members = {f"a/x.{name}": name.encode() for name in names} | {"a/x.txt": b"A cat.", "a/y.txt": b"\xff"}
    rows = find_files(write_tar(tmp_path / "a.tar", members)).rows()
    assert next(rows) == {"__key__": "a/x", "txt": "A cat.", "images": [names[index].encode() for index in order]}
    with pytest.raises(UserError):
        next(rows)
