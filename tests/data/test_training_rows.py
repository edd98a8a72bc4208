"""Several files, their weights, and the split by picture: a function of the seed, with no picture on both sides."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_vl.data.order import TrainFile
from dora_vl.data.samples import described, held_out_places, load_rows, load_training_rows, overlap
from dora_vl.data.turns import Clip, read_conversation
from dora_vl.errors import UserError
from dora_vl.evaluation.questions import question_of


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps({"answer": "a", "question": "q", **row}) + "\n" for row in rows))
    return str(path)


PICTURES = st.lists(st.lists(st.sampled_from("abcdefghijkl"), max_size=2), min_size=6, max_size=40)


@given(PICTURES, st.floats(0.1, 0.5), st.integers(0, 5))
def test_no_picture_is_on_both_sides(images: list[list[str]], share: float, seed: int) -> None:
    ids = [str(place) for place in range(len(images))]
    try:
        held = held_out_places(ids, images, share=share, seed=seed)
    except UserError as error:
        groups = str(error)
        assert "cannot be held out" in groups
        return
    inside = set(held.tolist())
    trained = {name for place, names in enumerate(images) if place not in inside for name in names}
    assert not trained & {name for place in inside for name in images[place]}
    assert 0 < len(inside) <= max(1, round(share * len(images)))
    back = held_out_places(ids[::-1], images[::-1], share=share, seed=seed)
    assert sorted(len(images) - 1 - back) == held.tolist()


def test_the_seed_chooses_and_the_share_is_met() -> None:
    ids, images = [str(number) for number in range(300)], [[f"{number // 3}.png"] for number in range(300)]
    first, second = (held_out_places(ids, images, share=0.1, seed=seed).tolist() for seed in (0, 1))
    assert len(first) == len(second) == 30
    assert first != second
    for share in (1.0, -0.1, float("nan")):
        with pytest.raises(UserError, match=r"data.validation_share is .*; it must be above 0 and below 1"):
            held_out_places(ids, images, share=share, seed=0)
    with pytest.raises(UserError, match="the smallest group has 3"):
        held_out_places(ids[:6], images[:6], share=0.2, seed=0)


def test_ids_are_those_of_the_rows_in_order(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"id": f"n{row}"} for row in range(9)])
    assert list(load_rows(path).ids()) == [f"n{row}" for row in range(9)]
    train, _ = load_training_rows([TrainFile(path=path, weight=1.5)], seed=2)
    assert list(train.ids()) == list(train.rows["id"])
    assert len(set(train.ids())) == 9 < len(train.rows)


def test_weights_repeat_and_leave_out(tmp_path: Path) -> None:
    names = {"a": 1.0, "b": 2.5, "c": 0.5}
    files = [
        TrainFile(path=write(tmp_path / f"{name}.jsonl", [{"id": f"{name}{row}"} for row in range(8)]), weight=weight)
        for name, weight in names.items()
    ]
    train, held = load_training_rows(files, seed=1, cache_folder=tmp_path / "cache")
    assert held is None
    counts = Counter(train.rows["id"])
    assert [counts[f"a{row}"] for row in range(8)] == [1] * 8
    assert sorted(counts[f"b{row}"] for row in range(8)) == [2] * 4 + [3] * 4
    assert sorted(counts[f"c{row}"] for row in range(8)) == [0] * 4 + [1] * 4
    again, _ = load_training_rows(files, seed=1, cache_folder=tmp_path / "cache")
    other, _ = load_training_rows(files, seed=2, cache_folder=tmp_path / "cache")
    assert train.rows["id"][:] == again.rows["id"][:] != other.rows["id"][:]


def test_what_is_held_out_is_not_trained_whatever_the_weight(tmp_path: Path) -> None:
    files = [
        TrainFile(path=write(tmp_path / "a.jsonl", [{"id": f"a{row}", "image": f"{row}.png"} for row in range(8)])),
        TrainFile(
            path=write(tmp_path / "b.jsonl", [{"id": f"b{row}", "image": f"{row}.png"} for row in range(8)]), weight=3.0
        ),
    ]
    train, held = load_training_rows(files, share=0.25, seed=0, cache_folder=tmp_path / "cache")
    assert held is not None
    assert len(held.rows) == 4
    assert not set(train.pictures) & set(held.pictures)
    assert Counter(train.rows["id"]).most_common(1)[0][1] == 3
    assert len(train.rows) == 6 + 18


def test_no_video_stands_on_both_sides(tmp_path: Path) -> None:
    """Twelve samples, three parts of each of four files."""
    rows: list[dict[str, object]] = [
        {"id": f"a{row}", "video": {"path": f"{row % 4}.mp4", "start_seconds": row}} for row in range(12)
    ]
    train, held = load_training_rows(
        [TrainFile(path=write(tmp_path / "a.jsonl", rows))], share=0.25, seed=0, cache_folder=tmp_path / "cache"
    )
    assert held is not None
    paths = [{clip["path"] for clips in one.rows["video"] for clip in clips} for one in (train, held)]
    assert (len(train.rows), len(held.rows), paths[0] & paths[1]) == (9, 3, set())
    assert [one.has_videos for one in (train, held)] == [True, True]
    assert [one.has_pictures for one in (train, held)] == [False, False]
    found = read_conversation(train.rows[0])
    assert found.videos == (Clip(path=next(iter(found.videos)).path, start_seconds=float(found.id[1:])),)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_a_weight_that_is_none_is_refused(tmp_path: Path, weight: float) -> None:
    path = write(tmp_path / "a.jsonl", [{}])
    with pytest.raises(UserError, match=r"a.jsonl has the weight .*; it must be above 0"):
        load_training_rows([TrainFile(path=path, weight=weight)], cache_folder=tmp_path / "cache")
    with pytest.raises(UserError, match="names no file"):
        load_training_rows([])


def test_a_file_is_said_with_its_format_and_what_cannot_be_used(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{}, {"question": None}, {"image": 3}])
    rows = load_rows(path, cache_folder=tmp_path / "cache").rows
    assert described(TrainFile(path=path), rows)[0] == "a.jsonl: question/answer, 3 rows, 2 of them unusable"


def test_the_same_question_about_the_same_picture_is_found(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"id": "same", "image": "a.png", "question": "Is  it\nred?"},
        {"id": "other question", "image": "a.png", "question": "Is it blue?"},
        {"id": "other picture", "image": "b.png", "question": "Is it red?"},
        {"id": "no picture", "question": "Is it red?"},
    ]
    table = load_rows(write(tmp_path / "a.jsonl", rows), cache_folder=tmp_path / "cache").rows
    asked = [
        question_of({"id": "t", "image": "a.png", "question": "<image>Is it red?", "answer": "no"}),
        question_of({"id": "u", "question": "Is it red?", "answer": "no"}),
    ]
    assert overlap(table, asked) == [("same", "t")]
    assert overlap(table, asked[1:]) == []
    assert overlap(table.select([3]), asked) == []
