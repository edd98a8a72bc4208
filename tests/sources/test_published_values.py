"""Subtitles in any spelling of .srt; captions; spans of TVQA's and TVC's forms; shares; options of commonsense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_vl.data.benchmarks.commonsense import labels_of, options_of
from dora_vl.data.benchmarks.fields import Row, soft_answers
from dora_vl.data.benchmarks.images import coco_caption_row, read_shares, share_of
from dora_vl.data.benchmarks.videos import Subtitles, parse_srt, span, subtitles_of
from dora_vl.errors import BadSample, UserError
from tests.sources.published import prepared

LINE = st.text(st.characters(categories=["L", "N", "P"], include_characters=" "), min_size=1, max_size=20).filter(
    lambda text: text.strip() and not text.strip().isdigit() and "-->" not in text
)
CUE = st.tuples(st.lists(LINE, min_size=1, max_size=3), st.integers(0, 359_999_999), st.integers(0, 99_999))


def stamp(milliseconds: int) -> str:
    seconds, thousandths = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d},{thousandths:03d}"


@settings(max_examples=60)
@given(st.lists(CUE, max_size=5), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_cues_are_read_in_any_spelling(cues: list[tuple[list[str], int, int]], end: str, numbered: bool) -> None:
    blocks = []
    for number, (lines, start, length) in enumerate(cues, start=1):
        head = [str(number)] if numbered else []
        blocks.append(end.join([*head, f"{stamp(start)} --> {stamp(start + length)}", *lines]))
    found = list(parse_srt((end * 2).join(blocks) + end))
    assert [cue["text"] for cue in found] == [" ".join(line.strip() for line in lines) for lines, _, _ in cues]
    for cue, (_, start, length) in zip(found, cues, strict=True):
        assert cue["start"] == pytest.approx(start / 1000)
        assert cue["end"] == pytest.approx((start + length) / 1000)


def test_a_cue_whose_times_cannot_be_read_keeps_its_text() -> None:
    assert list(parse_srt("7\nsoon --> later\nHello.")) == [
        {"text": "soon --> later Hello.", "start": None, "end": None}
    ]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("20.16-25.12", (20.16, 25.12)),
        ([0, 2.29], (0.0, 2.29)),
        ("nan-nan", (None, None)),
        ("NaN-NaN", (None, None)),
        (None, (None, None)),
        ("5-5", (5.0, 5.0)),
    ],
)
def test_spans(value: object, expected: tuple[float | None, float | None]) -> None:
    assert span(value) == expected


@pytest.mark.parametrize("value", ["5", "x-7", "7-5", [1, "x"], [1, 2, 3], [2, 1], {"0": 1, "1": 2}, 7, True, "nan-1"])
def test_a_span_that_cannot_be_read_is_no_question_about_the_whole_video(value: object) -> None:
    with pytest.raises(BadSample):
        span(value)


def test_subtitles_of_no_words_are_kept_and_entries_without_text_are_not() -> None:
    """VL-Adapter joins all of the file's texts by spaces, so an empty one is a second space in its prompt."""
    said = [{"text": "well", "start": 1, "end": 2}, {"text": " "}, {"start": 3}, {"text": None}, {"text": " no "}]
    found = subtitles_of(Row({"sub": said}))
    assert [(line.text, line.start_seconds) for line in found] == [("well", 1.0), ("", None), ("no", None)]


def test_a_caption_keeps_what_is_inside_it() -> None:
    said = [{"raw": "\nA dog  runs.\nFast. "}, {"raw": " \n"}, {"raw": "A\tdog"}]
    row = {"cocoid": 7, "split": "test", "filepath": "val2014", "filename": "7.jpg", "sentences": said}
    assert [answer.text for answer in coco_caption_row(row).answers] == ["A dog  runs.\nFast.", "A\tdog"]


def test_subtitles_of_a_folder_of_files(tmp_path: Path) -> None:
    (tmp_path / "tvqa_subtitles").mkdir()
    (tmp_path / "tvqa_subtitles" / "a.srt").write_bytes("1\n00:00:01,000 --> 00:00:02,000\ncaf\xe9\n".encode("latin-1"))
    found = Subtitles(tmp_path, ["tv_subtitles.jsonl", "tvqa_subtitles"])
    rows = list(found.joined([{"vid_name": "a"}, {"vid_name": "b"}], lambda _: None))
    assert [[subtitle.text for subtitle in subtitles_of(Row(row))] for row in rows] == [["caf\xe9"], []]


def test_subtitles_that_are_no_list_are_a_bad_sample(tmp_path: Path) -> None:
    (tmp_path / "tv.jsonl").write_text(json.dumps({"vid_name": "a", "sub": "text"}))
    row = next(iter(Subtitles(tmp_path, ["tv.jsonl"]).joined([{"vid_name": "a"}], lambda _: None)))
    with pytest.raises(BadSample):
        subtitles_of(Row(row))


SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}


@given(st.text(max_size=30), st.text(max_size=3))
def test_a_sentence_falls_to_one_share_however_it_is_spaced_and_cased(sentence: str, seed: str) -> None:
    name = share_of(sentence, SHARES, seed)
    assert name in SHARES
    assert share_of(f"  {'  '.join(sentence.split())} ", SHARES, seed) == name


def test_shares_are_about_as_large_as_asked() -> None:
    names = [share_of(f"There are {number} yellow boxes", SHARES, "0") for number in range(4000)]
    assert {name: names.count(name) / 4000 for name in SHARES} == pytest.approx(SHARES, abs=0.02)
    assert names != [share_of(f"There are {number} yellow boxes", SHARES, "1") for number in range(4000)]


@pytest.mark.parametrize(
    "text", ["train", "train:0.8", "train:0.8,test:0.3", "train:x,test:1", "a b:1", "train:-1,test:2"]
)
def test_shares_that_make_no_sense(text: str) -> None:
    with pytest.raises(UserError):
        read_shares(text)


def test_a_share_without_a_sentence_is_refused(tmp_path: Path) -> None:
    rows = [
        {"sentence": f"There are {number // 2} boxes", "label": "true", "identifier": f"{number}-0", "directory": "0"}
        for number in range(6)
    ]
    (tmp_path / "dev.json").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError):
        prepared("nlvr", tmp_path, tmp_path / "records", "--set", "shares=train:0.999,validation:0.001")
    assert [path.name for path in (tmp_path / "records" / "nlvr").glob("*.jsonl")] == ["train.jsonl"]
    prepared("nlvr", tmp_path, tmp_path / "records", "--set", "shares=train:0.5,validation:0.5", "--limit", "1")


OPTION = st.text(st.characters(categories=["L", "N"], include_characters=" ,'"), min_size=1, max_size=15).filter(
    lambda text: bool(text.strip())
)


@given(
    st.text(st.characters(categories=["L", "P"]), max_size=20), st.lists(OPTION, min_size=2, max_size=5), st.booleans()
)
def test_options_are_read_from_the_instruction(question: str, options: list[str], parted: bool) -> None:
    heads = [f"{'Solution' if parted else 'Answer'}{number}: {text}" for number, text in enumerate(options, start=1)]
    labels = tuple(f"{'solution' if parted else 'answer'}{number}" for number in range(1, len(options) + 1))
    body = ("\n\n" if parted else " ").join(heads)
    instruction = f"Please choose: {question}\n\n{body}\n\nAnswer format: {'/'.join(labels)}"
    assert labels_of(instruction) == labels
    assert options_of(instruction, labels) == tuple(text.strip() for text in options)


@given(st.lists(st.sampled_from(["yes", "no", "maybe", "", " "]), max_size=12))
def test_soft_answers_follow_the_ladder(answers: list[str]) -> None:
    ladder = {1: 0.3, 2: 0.6, 3: 0.9}
    found = {answer.text: answer.weight for answer in soft_answers(answers)}
    assert found == {text: ladder.get(answers.count(text), 1.0) for text in answers if text.strip()}
