"""Of a folder's files those are read that its rows are in: not what `datasets` keeps beside them, nor another split."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dora_vl.data.containers import by_split, find_files, meaning
from dora_vl.errors import UserError
from tests.training.own_data import as_dataset, items, write_saved

MADE = items(7)
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


def test_a_shard_of_a_saved_folder_that_is_gone(tmp_path: Path) -> None:
    saved = write_saved(tmp_path, MADE)
    (saved / "data-00001-of-00002.arrow").rename(tmp_path / "other.arrow")
    with pytest.raises(UserError):
        find_files(saved)


@pytest.mark.parametrize(
    "state", [b"{", b'{"_data_files": [1]}', b"\xff", b'{"_data_files": [{"filename": "../other.arrow"}]}']
)
def test_a_state_that_cannot_be_read_or_leads_elsewhere(tmp_path: Path, state: bytes) -> None:
    saved = write_saved(tmp_path, MADE)
    (saved / "data-00000-of-00002.arrow").rename(tmp_path / "other.arrow")
    (saved / "state.json").write_bytes(state)
    with pytest.raises(UserError):
        find_files(saved)


def test_another_programs_state_decides_nothing(tmp_path: Path) -> None:
    saved = write_saved(tmp_path, MADE)
    (saved / "state.json").write_text('{"step": 3}')
    assert ids(saved) == IDS


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"),
        ("train.parquet", "val.parquet"),
        ("my_set-Train-0.parquet", "my_set-dev-0.parquet"),
        ("test_seen-00000-of-00001.parquet", "test_unseen-00000-of-00001.parquet"),
        ("test-00000-of-00001.parquet", "testdev-00000-of-00001.parquet"),
        ("train.jsonl", "test.jsonl"),
    ],
)
def test_a_folder_of_several_splits_is_refused_and_names_them(tmp_path: Path, names: tuple[str, str]) -> None:
    write(tmp_path, *names)
    with pytest.raises(UserError):
        find_files(tmp_path)
    assert ids(tmp_path / names[0]) == [names[0]]


@pytest.mark.parametrize(
    "names",
    [
        ("a.parquet", "b.parquet"),
        ("trainers-0.parquet", "tests-0.parquet", "devices.parquet"),
        ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet"),
        ("gqa_train.parquet", "vqa_train.parquet"),
        ("gqa_train-00000-of-00001.parquet", "vqa_train-00000-of-00001.parquet"),
        ("extra.parquet", "train.parquet"),
        ("gqa-00000-of-00001.parquet", "vqa-00000-of-00001.parquet"),
    ],
)
def test_a_folder_of_one_split_is_read_whole(tmp_path: Path, names: tuple[str, ...]) -> None:
    write(tmp_path, *names)
    assert ids(tmp_path) == sorted(names)


def test_splits_are_found_in_names_of_files_and_of_folders(tmp_path: Path) -> None:
    names = ["data/train-00000-of-00001.parquet", "eval sets/x.parquet", "val/0.parquet", "val/test.parquet"]
    write(tmp_path, *names)
    splits = by_split(tmp_path, [tmp_path / name for name in names])
    found = {split: [str(file.relative_to(tmp_path)) for file in files] for split, files in splits.items()}
    assert found == {"train": names[:1], "eval": names[1:2], "val": names[2:3], "test": names[3:]}
    write(tmp_path, "more.parquet")
    with pytest.raises(UserError):
        by_split(tmp_path, [tmp_path / name for name in (*names, "more.parquet")])


def test_splits_that_datasets_saved_are_its_folders(tmp_path: Path) -> None:
    one = as_dataset(MADE)
    datasets.DatasetDict({"clean": one, "noisy": one}).save_to_disk(str(tmp_path / "both"))
    assert set(by_split(tmp_path / "both", sorted((tmp_path / "both").rglob("*.arrow")))) == {"clean", "noisy"}


@pytest.mark.parametrize(
    ("name", "means"),
    [("val", "validation"), ("test_seen", "test"), ("train.clean.100", "train"), ("testdev", None), ("", None)],
)
def test_what_names_of_splits_mean(name: str, means: str | None) -> None:
    assert meaning(name) == means
