"""Published records become alternating turns; placeholders follow the published rule; what is wrong is named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_vl.data.example import Example
from dora_vl.data.readers import read_row
from dora_vl.data.turns import Clip, Turn
from dora_vl.errors import EMPTY_ANSWER, NO_ANSWER, BadSample

FREE_TEXT = st.text().filter(lambda text: "<image" not in text)
ANSWER = FREE_TEXT.filter(lambda text: text.strip() != "")


def record(*texts: str, **more: object) -> dict[str, object]:
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": "sample 7", "conversations": turns, **more}


def said(*speakers: str) -> dict[str, object]:
    return {"id": "sample 7", "conversations": [{"from": speaker, "value": "text"} for speaker in speakers]}


def read(row: dict[str, object]) -> Example:
    return read_row(row)


def texts_of(row: dict[str, object]) -> list[str]:
    return [turn.text for turn in read(row).turns]


def published_normalisation(value: str) -> str:
    """`preprocess_multimodal` of LLaVA c121f04, written out for one turn."""
    if "<image>" in value:
        value = value.replace("<image>", "").strip()
        value = "<image>\n" + value
        value = value.strip()
    return value


def test_a_leading_answer_is_dropped_and_a_system_turn_stays_first() -> None:
    turns = (Turn("user", "text"), Turn("assistant", "text"))
    assert read(said("gpt", "human", "gpt")).turns == turns
    for speakers in (("system", "human", "gpt"), ("system", "gpt", "human", "gpt")):
        assert read(said(*speakers)).turns == (Turn("system", "text"), *turns)
    blank = [{"from": "system", "value": " "}, *record("q", "a")["conversations"]]  # pyright: ignore
    assert texts_of({"conversations": blank}) == ["q", "a"]
    placed = [{"from": "system", "value": "s"}, *record("q", "a")["conversations"]]  # pyright: ignore
    assert texts_of({"conversations": placed, "images": ["a.png", "b.png"]})[1] == "<image>\n<image>\nq"


@pytest.mark.parametrize("empty", [{}, {"image": None}, {"image": ""}, {"image": []}, {"images": [], "video": []}])
def test_no_picture_is_text_only(empty: dict[str, object]) -> None:
    assert read(record("q", "a", **empty)).images == ()


BROKEN: list[dict[str, object]] = [
    said("human", "human"),
    said("human", "gpt", "gpt"),
    said("gpt", "gpt", "human"),
    said("gpt"),
    said("system", "gpt"),
    said("human", "system", "gpt"),
    said("system", "system", "human", "gpt"),
    said("tool", "human", "gpt"),
    said("human", "GPT"),
    record("q", ""),
    record("q", "a", "q", " \n\t"),
    record("<image><image>", "a", image="a.png"),
    record("<image>", "a", image=["a.png", "b.png"]),
    record("<image>", "a", image=7),
    record("<image>", "a", image=["a.png", None]),
    record("<image>", "a", video=["a.mp4", "b.mp4"]),
    record("<image> <video>", "a", video="a.mp4"),
    record("q", "a", video=7),
    record("half \ud83d", "a"),
    {"id": "sample 7", "conversations": "text"},
    {"id": "sample 7", "conversations": []},
    {"id": "sample 7", "conversations": ["text"]},
    {"id": "sample 7", "conversations": [{"from": "human"}]},
]


@pytest.mark.parametrize(
    ("broken", "kind"),
    [
        (said("human", "gpt", "human"), NO_ANSWER),
        (record("q", "<image>", image="a.png"), EMPTY_ANSWER),
        (record("<image>", "a"), "placeholders differ from pictures"),
        (record("<video>", "a", video=["a.mp4", "b.mp4"]), "placeholders differ from videos"),
        *((broken, None) for broken in BROKEN),
    ],
)
def test_what_is_wrong_is_a_bad_sample(broken: dict[str, object], kind: str | None) -> None:
    with pytest.raises(BadSample) as caught:
        read(broken)
    assert caught.value.sample_id == "sample 7"
    assert kind in {None, caught.value.kind}


@pytest.mark.parametrize(
    ("asked", "media", "expected"),
    [
        ("q", {"video": "a.mp4"}, "<video>\nq"),
        ("q <video>", {"video": "a.mp4"}, "q <video>"),
        ("<image>\nq", {"video": "a.mp4"}, "<video>\nq"),  # as LLaVA-Video's sets write it
        ("q", {"videos": ["a.mp4", "b.mp4"], "image": "a.png"}, "<image>\n<video>\n<video>\nq"),
        ("q <image>", {"video": "a.mp4", "image": "a.png"}, "<video>\nq <image>"),
        ("q <video> and <image>?", {"video": "a.mp4", "image": "a.png"}, "q <video> and <image>?"),
        ("q <video>", {}, "q <video>"),  # HTML
        ("<video> <image>", {"image": "a.png"}, "<image>\n<video>"),
    ],
)
def test_where_videos_go(asked: str, media: dict[str, object], expected: str) -> None:
    assert texts_of(record(asked, "a", **media))[0] == expected
    system = [{"from": "system", "value": "<video>"}, *record(asked, "a")["conversations"]]  # pyright: ignore
    if any(name.startswith("video") for name in media):  # a video belongs to a question
        with pytest.raises(BadSample):
            read({"conversations": system, **media})


LATE, PART = Clip(path="a.mp4", start_seconds=1.5), Clip(path="a.mp4", start_seconds=1.5, end_seconds=3.0)


@pytest.mark.parametrize(
    ("value", "clips"),
    [
        ("a.mp4", (Clip(path="a.mp4"),)),
        (["a.mp4", "b.mp4"], (Clip(path="a.mp4"), Clip(path="b.mp4"))),
        ({"path": "a.mp4", "start_seconds": 1.5, "end_seconds": 3}, (PART,)),
        ([{"path": "a.mp4", "start_seconds": 1.5, "end_seconds": None}], (LATE,)),
        ({"type": "video", "video": "file://a.mp4", "video_start": 1.5, "video_end": 3.0}, (PART,)),
        ({"video_url": {"url": "a.mp4"}}, (Clip(path="a.mp4"),)),
    ],
)
def test_the_forms_of_a_video(value: object, clips: tuple[Clip, ...]) -> None:
    assert read(record("q", "a", videos=value)).videos == clips


@pytest.mark.parametrize(
    "value",
    [
        7,
        [["1.png", "2.png"]],
        {"bytes": b"x", "path": "a.mp4"},
        {"start_seconds": 1},
        "https://a.b/c.mp4",
        *({"path": "a.mp4", "video_end": end} for end in ("1", True, 10**400, float("nan"))),
    ],
)
def test_what_is_no_video(value: object) -> None:
    with pytest.raises(BadSample) as caught:
        read(record("q", "a", videos=value))
    assert caught.value.sample_id == "sample 7"


@given(st.lists(st.tuples(FREE_TEXT, ANSWER), min_size=1, max_size=4), FREE_TEXT, st.data())
def test_one_picture_is_normalised_as_published(rounds: list[tuple[str, str]], tail: str, data: st.DataObject) -> None:
    texts = [text for pair in rounds for text in pair]
    assert texts_of(record(*texts)) == texts  # free text is kept to the letter
    at = data.draw(st.integers(0, len(texts) - 1))
    texts[at] = f"{texts[at]}<image>{tail}"
    assert texts_of(record(*texts, image="a.png")) == [published_normalisation(text) for text in texts]


@given(st.lists(st.lists(FREE_TEXT, min_size=1, max_size=4), min_size=1, max_size=4), st.integers(0, 12))
def test_several_placeholders_are_all_kept_or_refused(questions: list[list[str]], pictures: int) -> None:
    """Each question is pieces joined by placeholders; with any other number of pictures it is a bad sample."""
    asked = ["<image>".join(pieces) for pieces in questions]
    placeholders = sum(text.count("<image>") for text in asked)
    names = [f"{number}.png" for number in range(pictures)]
    sample = record(*(text for question in asked for text in (question, "yes")), image=names)
    if placeholders == 0 and pictures:
        first = "<image>\n" * pictures + asked[0] if pictures > 1 else f"<image>\n{asked[0].strip()}".strip()
        assert texts_of(sample)[::2] == [first, *asked[1:]]
    elif placeholders != pictures:
        with pytest.raises(BadSample):
            read(sample)
    elif pictures > 1:
        assert texts_of(sample)[::2] == asked
