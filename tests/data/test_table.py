"""Files as tables and as streams: converted once, examples as read, each as often, weights, splits, groups, overlap."""

import argparse
import json
import os
import random
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_vl.data.check import (
    CONTRADICTION,
    EMPTY_AS_TEXT,
    EMPTY_QUESTION,
    NO_PICTURE,
    SEVERAL_ANSWERS,
    FileCheck,
    add_arguments,
    run,
)
from dora_vl.data.columns import USUAL, TrainFile
from dora_vl.data.example import Example
from dora_vl.data.readers import read_row
from dora_vl.data.stream import ExampleOrBad, SampleStream, StreamOrder, StreamSource, shuffled
from dora_vl.data.table import (
    described,
    doubtful_samples,
    held_out_indices,
    load_rows,
    load_table,
    load_training_rows,
    samples_in_test,
)
from dora_vl.data.turns import Clip, Turn
from dora_vl.errors import BadSample, UserError
from dora_vl.evaluation.questions import example_of_row, last_round, read_questions
from dora_vl.evaluation.scores.exact import score
from tests.training.own_data import WRITERS, items, lines

GOOD = {
    "id": "a",
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image> q"}, {"from": "gpt", "value": "x"}],
}


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps({"answer": "a", "question": "q", **row}) + "\n" for row in rows))
    return str(path)


def test_a_row_is_stored_as_the_example_that_it_is(tmp_path: Path) -> None:
    rows = [
        {"id": "two", "question": "<image2> or <image1>?", "images": ["a.png", "b.png"]},
        {"id": "clip", "video": {"path": "a.mp4", "start_seconds": 1.5}},
        {"id": "empty", "answer": " "},
        {"image": 3},
        {"id": "half \ud83d"},
        {"id": "no \ud83d", "answer": ""},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    table = load_rows(path)
    for number, stored in enumerate(table):
        row = {"question": "q", "answer": "a", **rows[number]}
        if isinstance(stored, Example):
            assert stored == table[number] == read_row(row)
            continue
        with pytest.raises(BadSample) as caught:
            read_row(row)
        assert stored.reason == caught.value.reason
    assert [isinstance(item, Example) for item in table] == [True] * 2 + [False] * 4
    assert list(table.ids()) == ["two", "clip", "empty", "row 4", r"half \ud83d", r"no \ud83d"]
    assert described(TrainFile(path=path), table.rows)[0] == "a.jsonl: question/answer, 6 rows, 4 of them unusable"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        f"[{json.dumps(GOOD)},\n",
        '{"data": [1, 2]}',
        json.dumps([GOOD, {"id": "b", "question": "q", "answer": "a"}]),  # two formats
    ],
)
def test_a_file_that_cannot_be_used_leaves_no_table(tmp_path: Path, content: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(UserError):
        load_table(path)
    assert [left.suffix for left in (tmp_path / "cache" / "dora_vl").iterdir()] == [".lock"]
    with pytest.raises(UserError):
        load_table(tmp_path / "none.json")


def test_a_changed_file_is_converted_again_and_an_unchanged_one_is_not(tmp_path: Path) -> None:
    path, cache = tmp_path / "a.json", tmp_path / "cache" / "dora_vl"
    path.write_text(json.dumps([GOOD]))
    assert len(load_table(path)) == len(load_table(path)) == 1
    assert len(list(cache.glob("*.arrow"))) == 1
    path.write_text(json.dumps([GOOD, GOOD]))
    assert len(load_table(path)) == 2


def test_a_killed_conversion_is_not_taken_for_whole_and_ranks_convert_once(tmp_path: Path) -> None:
    path, cache = tmp_path / "a.json", tmp_path / "cache" / "dora_vl"
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache.parent)}
    path.write_text(json.dumps([GOOD] * 100))
    killed = textwrap.dedent(f"""
        import os, signal
        from pathlib import Path
        from dora_vl.data import table
        table.ROWS_A_BATCH = 10
        read = table.RowReader.read
        def read_or_die(self, record, number):
            return os.kill(os.getpid(), signal.SIGKILL) if number == 55 else read(self, record, number)
        table.RowReader.read = read_or_die
        table.load_table(Path({str(path)!r}))
    """)
    assert subprocess.run([sys.executable, "-c", killed], env=environment, check=False).returncode == -9
    assert len(list(cache.glob(".*.unfinished-*"))) == 1
    rank = textwrap.dedent(f"""
        import logging
        from pathlib import Path
        from dora_vl.data.table import load_table
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        assert len(load_table(Path({str(path)!r}))) == 100
    """)
    command: Any = {"args": [sys.executable, "-c", rank], "env": environment, "text": True}
    ranks = [subprocess.Popen(**command, stderr=subprocess.PIPE) for _ in range(2)]
    logged = "".join(process.communicate()[1] for process in ranks)
    assert [process.returncode for process in ranks] == [0, 0]
    assert logged.count("records converted") == 1
    assert list(cache.glob(".*.unfinished-*")) == []


PICTURES = st.lists(st.lists(st.sampled_from("abcdefghijkl"), max_size=2), min_size=6, max_size=40)


@given(PICTURES, st.floats(0.1, 0.5), st.integers(0, 5))
def test_no_picture_is_on_both_sides(images: list[list[str]], share: float, seed: int) -> None:
    ids = [str(number) for number in range(len(images))]
    try:
        held_out = held_out_indices(ids, images, share=share, seed=seed)
    except UserError:
        return
    inside = set(held_out.tolist())
    trained = {name for index, names in enumerate(images) if index not in inside for name in names}
    assert not trained & {name for index in inside for name in images[index]}
    assert 0 < len(inside) <= max(1, round(share * len(images)))
    back = held_out_indices(ids[::-1], images[::-1], share=share, seed=seed)
    assert sorted(len(images) - 1 - back) == held_out.tolist()


def test_weights_repeat_and_leave_out(tmp_path: Path) -> None:
    names = {"a": 1.0, "b": 2.5, "c": 0.5}
    files = [
        TrainFile(path=write(tmp_path / f"{name}.jsonl", [{"id": f"{name}{row}"} for row in range(8)]), weight=weight)
        for name, weight in names.items()
    ]
    train, validation = load_training_rows(files, seed=1)
    assert validation is None
    counts = Counter(train.ids())
    assert list(train.ids()) == list(train.rows["id"])
    assert [counts[f"a{row}"] for row in range(8)] == [1] * 8
    assert sorted(counts[f"b{row}"] for row in range(8)) == [2] * 4 + [3] * 4
    assert sorted(counts[f"c{row}"] for row in range(8)) == [0] * 4 + [1] * 4
    again, _ = load_training_rows(files, seed=1)
    other, _ = load_training_rows(files, seed=2)
    assert list(train.ids()) == list(again.ids()) != list(other.ids())
    for weight in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(UserError):
            load_training_rows([TrainFile(path=files[0].path, weight=weight)])
    with pytest.raises(UserError):
        load_training_rows([])


def test_what_is_held_out_is_not_trained_whatever_the_weight(tmp_path: Path) -> None:
    files: list[TrainFile] = []
    for name, weight in (("a", 1.0), ("b", 3.0)):
        rows: list[dict[str, object]] = [{"id": f"{name}{row}", "image": f"{row}.png"} for row in range(8)]
        files.append(TrainFile(path=write(tmp_path / f"{name}.jsonl", rows), weight=weight))
    train, validation = load_training_rows(files, share=0.25, seed=0)
    assert validation is not None
    assert len(validation) == 4
    assert not set(train.pictures) & set(validation.pictures)
    assert Counter(train.ids()).most_common(1)[0][1] == 3
    assert len(train) == 6 + 18
    parts: list[dict[str, object]] = [
        {"id": f"a{row}", "video": {"path": f"{row % 4}.mp4", "start_seconds": row}} for row in range(12)
    ]
    filmed = [TrainFile(path=write(tmp_path / "v.jsonl", parts))]
    train, validation = load_training_rows(filmed, share=0.25, seed=0)
    assert validation is not None
    paths = [{clip["path"] for clips in table.rows["videos"] for clip in clips} for table in (train, validation)]
    assert (len(train), len(validation), paths[0] & paths[1]) == (9, 3, set())
    assert [(table.has_any("videos"), table.has_any("images")) for table in (train, validation)] == [(True, False)] * 2


def test_the_same_question_about_the_same_picture_is_found(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"id": "same", "image": "a.png", "question": "Is  it\nred?"},
        {"id": "other question", "image": "a.png", "question": "Is it blue?"},
        {"id": "other picture", "image": "b.png", "question": "Is it red?"},
        {"id": "no picture", "question": "Is  it red?"},
        {"id": "a video", "video": "a.mp4", "question": "Is it red?"},
        {"id": "of another spelling", "image": "./a.png", "question": "Is it red?"},
        {"id": "after another", "question": "Is it red?", "history": [["Is it blue?", "no"]]},
    ]
    table = load_rows(write(tmp_path / "a.jsonl", rows)).rows
    examples = [
        example_of_row({"id": "t", "image": "b/../a.png", "question": "<image>Is it red?", "answer": "no"}),
        example_of_row({"id": "u", "question": "Is it red?", "answer": "no"}),
    ]
    questions = [(question.id, question.images, question.question) for question in examples]
    same = [("same", "t"), ("of another spelling", "t")]
    assert samples_in_test(table, questions) == [same[0], ("no picture", "u"), same[1]]
    assert samples_in_test(table, questions[:1]) == same
    assert samples_in_test(table, questions[1:]) == [("no picture", "u")]
    assert samples_in_test(table.select([4]), questions) == []


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "What?", "answers": ["red", "blue", "blue", "half \ud83d"]}, ["blue", "red", "half \\ud83d"]),
        ({"question": "What?", "answers": [{"text": "red", "weight": 0.5}, {"text": "blue"}]}, ["blue", "red"]),
        ({"image": "0.png", "captions": ["a dog", "two dogs"]}, ["a dog", "two dogs"]),
        *(({"question": "What?", "answers": answers}, ["red"]) for answers in (["red", " ", "red"], "red")),
        ({"instruction": "Say it.", "output": "it is red", "answer": "red"}, ["it is red"]),
    ],
)
def test_the_right_answers_are_stored_the_trained_one_first(row, expected, tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (example,) = load_rows(str(tmp_path / "a.jsonl"))
    assert isinstance(example, Example)
    assert [answer.text for answer in last_round(example).answers] == expected
    assert example.turns[-1].text == expected[0]


def test_what_is_probably_not_meant_is_counted_and_named(tmp_path: Path) -> None:
    rows = ["0.png,What?,red", "0.png,What?,red", "0.png,What?,blue", ",What?,red", "1.png,,red", "1.png,,blue"]
    rows += [*("nan,Which?,red", "2.png,Why?,NaN"), *(f"{number}.png,What?,red" for number in range(2, 9))] + [
        f"{number}.png,," for number in range(9)
    ]
    path = tmp_path / "q.csv"
    path.write_text("\n".join(["image,question,answer", *rows]))
    table = load_rows(str(path)).rows
    findings = {finding.problem: (finding.count, [*finding.examples.values()]) for finding in doubtful_samples(table)}
    assert findings == {
        NO_PICTURE: (2, [["row 4", "row 7"]]),
        EMPTY_QUESTION: (2, [["row 5", "row 6"]]),
        EMPTY_AS_TEXT: (1, [["row 8"]]),
        CONTRADICTION: (3, [["row 1", "row 2", "row 3"]]),
    }
    (unusable,) = (line for line in described(TrainFile(path=str(path)), table) if "row 17" in line)
    assert "9 samples" in unusable
    assert unusable.count("row") == 5
    check = FileCheck(path).run().findings
    assert [check[kind].count for kind in (NO_PICTURE, EMPTY_QUESTION, EMPTY_AS_TEXT, CONTRADICTION)] == [2, 2, 1, 1]


def test_words_alone_captions_and_several_answers_are_meant(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "words.csv").write_text("image,question,answer\n,What?,red\n,Why?,blue\n")
    (tmp_path / "captions.csv").write_text("image,caption\n0.png,a cat\n0.png,a dog\n")
    votes = [{"image": "0.png", "question": "What?", "answers": ["red", "red", "blue"]} for _ in range(2)]
    (tmp_path / "votes.jsonl").write_text("\n".join(map(json.dumps, votes)))
    conversations = [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}]
    conversations += [{"image": "0.png", **conversations[0]}]
    (tmp_path / "conversations.jsonl").write_text(
        "\n".join(map(json.dumps, conversations))
    )  # the first names no picture at all
    for path in sorted(tmp_path.glob("*.[cj]s*")):
        assert not doubtful_samples(load_rows(str(path)).rows), path
        assert not FileCheck(path).run().findings, path
    path = tmp_path / "votes.jsonl"
    said = SEVERAL_ANSWERS.format(2)
    assert f"  {said}" in described(TrainFile(path=str(path)), load_rows(str(path)).rows)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert f"votes.jsonl: {said}" in [*run(parser.parse_args([str(path)]))]
    stream = StreamSource(TrainFile(path=str(tmp_path / "words.csv")), limit=None, seed=0)
    assert len(list(stream.rows())) == 2
    assert not caplog.records


def test_a_stream_names_the_first_of_each_kind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "q.csv"
    path.write_text("image,question,answer\n0.png,What?,red\n,What?,red\n1.png,,red\n,What?,blue\n")
    stream = StreamSource(TrainFile(path=str(path)), limit=None, seed=0)
    for _ in range(2):
        assert len(list(stream.rows())) == 4
    assert [("row 2" in line, "row 3" in line) for line in caplog.messages] == [(True, False), (False, True)]


def test_each_class_has_its_share_and_small_sets_lose_none_to_the_test() -> None:
    classes = [*("a" * 10), *("b" * 30), *("c" * 20)]
    ids = [f"{number}" for number in range(60)]
    media = [[f"{number // 2}.png"] for number in range(60)]  # two rows a picture stay together
    held = held_out_indices(ids, media, share=0.2, seed=3, classes=classes)
    assert Counter(classes[index] for index in held) == {"a": 2, "b": 6, "c": 4}
    assert len({media[index][0] for index in held}) == 6
    assert sorted(held) != sorted(held_out_indices(ids, media, share=0.2, seed=4, classes=classes))


@pytest.mark.parametrize("form", ["record", "columns"])
def test_a_group_is_held_out_whole(tmp_path: Path, form: str) -> None:
    path = tmp_path / "train.jsonl"
    lines = []
    for number in range(60):
        row: dict[str, Any] = {"id": f"{number}", "question": f"is it {number}?"}
        about = {"group": f"scene {number % 6}", "unit": f"sentence {number % 10}"}
        if form == "record":
            row |= {"answers": [{"text": "yes"}], "images": [f"{number}.png"], "extra": about}
        else:
            row |= {"answer": "yes", "image": f"{number}.png", **about}
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))
    train, held_out = load_training_rows([TrainFile(path=str(path))], share=0.3)
    assert held_out is not None
    scenes = [{int(name) % 6 for name in part.rows["id"]} for part in (train, held_out)]
    assert scenes[0] & scenes[1] == set()
    assert scenes[0] | scenes[1] == set(range(6))
    examples, unreadable = read_questions(path, columns=USUAL)
    assert not unreadable
    scored = score(examples, dict.fromkeys((example.id for example in examples), "yes"))
    assert len(scored.units) == 10
    assert {example.extra["group"] for example in examples} == {f"scene {number}" for number in range(6)}


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
def test_samples_are_known_where_the_file_says_how_many_rows_it_has(tmp_path, name, count) -> None:
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
