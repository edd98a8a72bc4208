"""A stream gives the rows that a table of the same file has, each as often, in an order made of seed and epoch."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import pytest

from dora_vl.data.columns import TrainFile
from dora_vl.data.example import Example
from dora_vl.data.stream import ExampleOrBad, SampleStream, StreamOrder, StreamSource, shuffled
from dora_vl.data.turns import Clip, Turn
from dora_vl.errors import BadSample, UserError
from tests.training.own_data import WRITERS, items, lines

MADE = items(11)


def source(path: Path | str, *, weight: float = 1.0, limit: int | None = None, seed: int = 5) -> StreamSource:
    return StreamSource(TrainFile(path=str(path), weight=float(weight)), limit=limit, seed=seed)


def opened(*sources: StreamSource, buffer: int = 4, seed: int = 5) -> SampleStream:
    return SampleStream(sources, buffer=buffer, seed=seed)


def ids(rows: Iterator[ExampleOrBad]) -> list[str]:
    return [row.sample_id if isinstance(row, BadSample) else row.id for row in rows]


def examples(rows: Iterable[ExampleOrBad]) -> list[Example]:
    return [row for row in rows if isinstance(row, Example)]


def problems(rows: Iterable[ExampleOrBad]) -> dict[str, str]:
    return {row.sample_id: row.reason for row in rows if isinstance(row, BadSample)}


def question_rows(count: int, prefix: str = "q") -> list[dict[str, object]]:
    return [{"id": f"{prefix}{number}", "question": "q?", "answer": "yes"} for number in range(count)]


def test_a_set_of_the_hub_comes_as_a_stream_with_its_pictures(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    WRITERS["parquet"](tmp_path / "set", MADE)
    hub = source(f"hub:{tmp_path / 'set'}")
    rows = examples(opened(hub).rows(0))
    assert sorted(ids(iter(rows))) == sorted(item.id for item in MADE)
    contents = {item.id: item.content for item in MADE}
    assert all([*row.image_bytes.values()] == [contents[row.id]] for row in rows)
    assert hub.samples is None
    with pytest.raises(UserError):
        source(f"hub:{tmp_path / 'none'}")


def test_an_epoch_is_every_row_once_and_each_has_its_own_order(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", question_rows(50))
    stream = opened(source(path), buffer=8)
    first, second = ids(stream.rows(0)), ids(stream.rows(1))
    assert sorted(first) == sorted(second) == sorted(f"q{number}" for number in range(50))
    assert first != second
    assert first == ids(opened(source(path), buffer=8).rows(0))
    assert first != ids(opened(source(path), buffer=8, seed=6).rows(0))
    assert ids(opened(source(path), buffer=1).rows(3)) == [f"q{number}" for number in range(50)]


def test_a_buffer_reads_ahead_by_its_size_and_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def rows() -> Iterator[ExampleOrBad]:
        for number in range(100):
            taken.append(number)
            yield Example(str(number), turns=(Turn("user", "x" * 10),))

    stream = shuffled(rows(), 16, random.Random(0))
    assert int(ids(islice(stream, 1))[0]) < 16
    assert len(taken) == 16
    monkeypatch.setattr("dora_vl.data.stream.BUFFER_BYTES", 45)  # a row has 11 characters
    few = shuffled(rows(), 16, random.Random(0))
    assert sorted(map(int, ids(few))) == [*range(100)]


def test_files_are_mixed_by_their_weighted_sizes_and_each_ends(tmp_path: Path) -> None:
    small = source(lines(tmp_path / "small.jsonl", question_rows(40, "s")), weight=3)
    large = source(lines(tmp_path / "large.jsonl", question_rows(240, "l")))
    order = ids(opened(small, large, buffer=1).rows(0))
    assert Counter(Counter(order).values()) == {3: 40, 1: 240}
    half = Counter(sample_id[0] for sample_id in order[:180])
    assert 40 < half["s"] < 80  # a third of them, as of all
    assert large.estimate == pytest.approx(240, rel=0.1)


def test_a_fraction_takes_the_same_rows_in_every_epoch(tmp_path: Path) -> None:
    stream = opened(source(lines(tmp_path / "a.jsonl", question_rows(400)), weight=1.25))
    counts = [Counter(ids(stream.rows(epoch))) for epoch in (0, 1)]
    assert counts[0] == counts[1]
    twice = [name for name, times in counts[0].items() if times == 2]
    assert len(counts[0]) == 400
    assert 70 < len(twice) < 130
    other = Counter(ids(opened(source(tmp_path / "a.jsonl", weight=1.25, seed=6)).rows(0)))
    assert twice != [name for name, times in other.items() if times == 2]


def test_shards_come_in_another_order_each_epoch_and_rows_without_an_id_have_names_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    for shard in range(9):  # of six two of three orders are the same once in 240 times
        rows: list[dict[str, object]] = [{"question": f"{shard}", "answer": "yes"}] * 3
        lines(tmp_path / "shards" / f"{shard}.jsonl", rows)
    stream = opened(source(tmp_path / "shards"), buffer=1)
    orders = [[row.turns[0].text for row in examples(stream.rows(epoch))][::3] for epoch in range(3)]
    assert [sorted(order) for order in orders] == [[str(shard) for shard in range(9)]] * 3
    assert len({tuple(order) for order in orders}) == 3
    names = ids(stream.rows(0))
    assert len({*names}) == 27
    assert "2.jsonl, row 2" in names


@pytest.mark.parametrize(("name", "count"), [("parquet", 22), ("saved", 22), ("messages", None), ("webdataset", None)])
def test_samples_are_known_where_the_file_says_how_many_rows_it_has(
    tmp_path: Path, name: str, count: int | None
) -> None:
    path = WRITERS[name](tmp_path, MADE)
    assert opened(source(path, weight=2)).samples == count
    assert opened(source(path, weight=0.5)).samples is None
    assert len(StreamOrder(opened(source(path, weight=2)), total=500)) == (count or 500)
    first = source(path, limit=4)
    assert (first.samples, len(list(first.rows()))) == (count and 4, 4)


def test_rows_that_cannot_be_samples_are_named_and_none_that_can_is_one_line(tmp_path: Path) -> None:
    half = '{"id": "half", "question": "q \\ud83d", "answer": "a"}\n'
    path = lines(tmp_path / "a.jsonl", [*question_rows(2), {"id": "empty", "question": "q"}])
    path.write_text(path.read_text() + half)
    assert [*problems(source(path).rows())] == ["empty", "half"]
    with pytest.raises(UserError):
        _ = source(lines(tmp_path / "b.jsonl", [{"query": "q"}] * 90)).first_rows
    (tmp_path / "c.jsonl").write_text("")
    with pytest.raises(UserError):
        _ = source(tmp_path / "c.jsonl").first_rows


def test_a_run_of_unknown_epochs_goes_from_one_to_the_next(tmp_path: Path) -> None:
    stream = opened(source(lines(tmp_path / "a.jsonl", question_rows(10))))
    order = StreamOrder(stream, total=25)
    names = ids(iter(order))
    assert names == [*ids(stream.rows(0)), *ids(stream.rows(1)), *ids(stream.rows(2))[:5]]
    assert (len(order), order.epoch_samples) == (25, 10)
    with pytest.raises(UserError):
        list(StreamOrder(opened(source(tmp_path / "a.jsonl", weight=1e-9)), total=5))


def test_videos_stream_where_a_first_row_has_one_and_are_named_elsewhere(tmp_path: Path) -> None:
    with_video: dict[str, object] = {**question_rows(1, "v")[0], "video": {"path": "a.mp4", "start_seconds": 1.5}}
    stream = opened(source(lines(tmp_path / "first.jsonl", [with_video, *question_rows(3)])))
    (row,) = [row for row in examples(stream.rows(0)) if row.id == "v0"]
    assert row.videos == (Clip(path="a.mp4", start_seconds=1.5),)
    late = opened(source(lines(tmp_path / "late.jsonl", [*question_rows(64), with_video])))
    assert [*problems(late.rows(0))] == ["v0"]
