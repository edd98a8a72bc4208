"""Subtitles in any spelling of .srt; captions; spans of TVQA's and TVC's forms; shares; options of commonsense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dora_vl.data.benchmarks.fields import Row
from dora_vl.data.benchmarks.images import coco_caption_row, read_shares, share_of
from dora_vl.data.benchmarks.videos import Subtitles, parse_srt, span, subtitles_of
from dora_vl.errors import BadSample, UserError
from tests.data.published import prepared


@pytest.mark.parametrize(
    ("content", "cue"),
    [
        ("1\n00:00:01,500 --> 00:00:02,000\nTwo\n lines.\n", ("Two lines.", 1.5, 2.0)),
        ("01:00:00.250 --> 99:59:59,999\r\nHello.\r\n\r\n", ("Hello.", 3600.25, 359_999.999)),
        ("7\nsoon --> later\nHello.", ("soon --> later Hello.", None, None)),
    ],
)
def test_cues_are_read_in_any_spelling(content: str, cue: tuple[str, float | None, float | None]) -> None:
    assert [tuple(entry.values()) for entry in parse_srt(content)] == [cue]


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
    cues = [{"text": "well", "start": 1, "end": 2}, {"text": " "}, {"start": 3}, {"text": None}, {"text": " no "}]
    lines = subtitles_of(Row({"sub": cues}))
    assert [(line.text, line.start_seconds) for line in lines] == [("well", 1.0), ("", None), ("no", None)]


def test_a_caption_keeps_what_is_inside_it() -> None:
    sentences = [{"raw": "\nA dog  runs.\nFast. "}, {"raw": " \n"}, {"raw": "A\tdog"}]
    row = {"cocoid": 7, "split": "test", "filepath": "val2014", "filename": "7.jpg", "sentences": sentences}
    assert [answer.text for answer in coco_caption_row(row).answers] == ["A dog  runs.\nFast.", "A\tdog"]


def test_subtitles_of_a_folder_of_files(tmp_path: Path) -> None:
    (tmp_path / "tvqa_subtitles").mkdir()
    (tmp_path / "tvqa_subtitles" / "a.srt").write_bytes("1\n00:00:01,000 --> 00:00:02,000\ncaf\xe9\n".encode("latin-1"))
    subtitles = Subtitles(tmp_path, ["tv_subtitles.jsonl", "tvqa_subtitles"])
    rows = list(subtitles.joined([{"vid_name": "a"}, {"vid_name": "b"}], lambda _: None))
    assert [[subtitle.text for subtitle in subtitles_of(Row(row))] for row in rows] == [["caf\xe9"], []]


SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}


def test_shares_are_about_as_large_as_asked_and_spacing_and_case_do_not_count() -> None:
    assert len({share_of(sentence, SHARES, "0") for sentence in ("A  b c", " a B C\n")}) == 1
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
