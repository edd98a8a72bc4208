"""Published records become alternating turns; placeholders follow the published rule; what is wrong is named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_vl.data.turns import Conversation, Turn, read_conversation
from dora_vl.errors import BadSample

FREE_TEXT = st.text().filter(lambda text: "<image>" not in text)
ANSWER = FREE_TEXT.filter(lambda text: text.strip() != "")


def record(*texts: str, **more: object) -> dict[str, object]:
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": "sample 7", "conversations": turns, **more}


def published_normalisation(value: str) -> str:
    """`preprocess_multimodal` of LLaVA c121f04, written out for one turn."""
    if "<image>" in value:
        value = value.replace("<image>", "").strip()
        value = "<image>\n" + value
        value = value.strip()
    return value


def test_a_two_round_sample_with_a_picture() -> None:
    found = read_conversation(record("What is it? <image>", "A cat.", " And here? ", "Yes. ", image="coco/1.jpg"))
    assert found == Conversation(
        id="sample 7",
        images=("coco/1.jpg",),
        turns=(
            Turn("user", "<image>\nWhat is it?"),
            Turn("assistant", "A cat."),
            Turn("user", " And here? "),
            Turn("assistant", "Yes. "),
        ),
    )


def test_placeholders_of_several_pictures_stay_where_they_are() -> None:
    found = read_conversation(
        record("Is <image> like <image>?", "No.", "And <image> ?", "Yes.", image=["a.png", "b.png", "c.png"])
    )
    assert [turn.text for turn in found.turns] == ["Is <image> like <image>?", "No.", "And <image> ?", "Yes."]
    assert found.images == ("a.png", "b.png", "c.png")


def test_a_first_turn_from_gpt_is_dropped() -> None:
    turns = [{"from": "gpt", "value": "Hello."}, *record("q", "a")["conversations"]]  # pyright: ignore
    assert read_conversation({"id": 1, "conversations": turns}).turns == (Turn("user", "q"), Turn("assistant", "a"))


@pytest.mark.parametrize("empty", [{}, {"image": None}, {"image": ""}, {"image": []}, {"images": [], "video": []}])
def test_no_picture_is_text_only(empty: dict[str, object]) -> None:
    assert read_conversation(record("q", "a", **empty)).images == ()


def test_an_id_may_be_a_number_or_missing() -> None:
    assert read_conversation({**record("q", "a"), "id": 12}).id == "12"
    assert read_conversation({"conversations": record("q", "a")["conversations"]}).id == "(no id)"


def said(*speakers: str) -> dict[str, object]:
    return {"id": "sample 7", "conversations": [{"from": speaker, "value": "text"} for speaker in speakers]}


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (said("human", "human"), "two turns in a row are from the user"),
        (said("human", "gpt", "gpt"), "two turns in a row are from the assistant"),
        (said("gpt", "gpt", "human"), "two turns in a row are from the assistant"),
        (said("human", "gpt", "human"), "its last question has no answer"),
        (said("gpt"), "its only turn is from 'gpt'"),
        (said("human", "system", "gpt"), "a system turn stands among the others"),
        (said("system", "system", "human", "gpt"), "a system turn stands among the others"),
        (said("system"), "its only turn is from 'gpt' or 'system'"),
        (said("system", "gpt"), "its only turn is from 'gpt' or 'system'"),
        (said("tool", "human", "gpt"), "turn 1 is from 'tool'; only 'human', 'gpt' and 'system' are known"),
        (said("human", "GPT"), "turn 2 is from 'GPT'"),
        (record("q", ""), "answer 1 of 1 is empty"),
        (record("q", "a", "q", " \n\t"), "answer 2 of 2 is empty"),
        (record("q", "<image>", image="a.png"), "answer 1 of 1 is empty"),
        (record("<image>", "a"), "1 <image> placeholders, but it names 0 pictures"),
        (record("<image><image>", "a", image="a.png"), "2 <image> placeholders, but it names 1 pictures"),
        (record("<image>", "a", image=["a.png", "b.png"]), "1 <image> placeholders, but it names 2 pictures"),
        (record("<image>", "a", image=7), "'image' must be a path or a list of paths, got 7"),
        (record("<image>", "a", image=["a.png", None]), "'image' must be a path or a list of paths"),
        (record("<video>", "a", video=["a.mp4", "b.mp4"]), "1 <video> placeholders, but it names 2 videos"),
        (record("<image>", "a", video=["a.mp4", "b.mp4"]), "1 <image> placeholders, but it names 0 pictures"),
        (record("<image> <video>", "a", video="a.mp4"), "1 <image> placeholders, but it names 0 pictures"),
        (record("q", "a", video=7), "'video' must be a path or a list of paths, got 7"),
        ({"id": "sample 7"}, "'conversations' must be a list of turns, got None"),
        ({"id": "sample 7", "conversations": "text"}, "'conversations' must be a list of turns, got 'text'"),
        ({"id": "sample 7", "conversations": []}, "'conversations' must be a list of turns, got []"),
        ({"id": "sample 7", "conversations": ["text"]}, "turn 1 must hold 'from' and 'value', got 'text'"),
        ({"id": "sample 7", "conversations": [{"from": "human"}]}, "turn 1 must have text as 'from' and 'value'"),
    ],
)
def test_what_is_wrong_is_named(broken: dict[str, object], reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        read_conversation(broken)
    assert caught.value.sample_id == "sample 7"
    assert reason in caught.value.reason


def test_a_system_turn_comes_first_and_an_answer_after_it_is_dropped() -> None:
    expected = (Turn("system", "text"), Turn("user", "text"), Turn("assistant", "text"))
    assert read_conversation(said("system", "human", "gpt")).turns == expected
    assert read_conversation(said("system", "gpt", "human", "gpt")).turns == expected


def test_pictures_without_a_place_come_before_the_first_question() -> None:
    turns = [("system", "s"), ("human", "q"), ("gpt", "a")]
    sample = {"id": 1, "conversations": [{"from": speaker, "value": text} for speaker, text in turns]}
    assert read_conversation({**sample, "image": "a.png"}).turns[1].text == "<image>\nq"
    assert read_conversation({**sample, "images": ["a.png", "b.png"]}).turns[1].text == "<image>\n<image>\nq"


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
    found = read_conversation(record(asked, "a", **media))
    assert found.turns[0].text == expected
    assert [clip.path for clip in found.videos] == [
        name for name in ("a.mp4", "b.mp4") if name in str(media.get("video", media.get("videos")))
    ]


def test_a_video_belongs_to_a_question() -> None:
    turns = [("system", "<video>"), ("human", "q"), ("gpt", "a")]
    sample = {"id": 1, "conversations": [{"from": speaker, "value": text} for speaker, text in turns]}
    with pytest.raises(BadSample, match="its system turn holds <video>; videos belong to a question"):
        read_conversation({**sample, "video": "a.mp4"})
    assert read_conversation(sample).turns[0].text == "<video>"


@given(st.lists(st.tuples(FREE_TEXT, ANSWER), min_size=1, max_size=5))
def test_free_text_is_kept_to_the_letter(rounds: list[tuple[str, str]]) -> None:
    found = read_conversation(record(*(text for pair in rounds for text in pair)))
    assert [turn.text for turn in found.turns] == [text for pair in rounds for text in pair]
    assert [turn.role for turn in found.turns] == ["user", "assistant"] * len(rounds)


@given(st.lists(st.tuples(FREE_TEXT, ANSWER), min_size=1, max_size=4), FREE_TEXT, st.data())
def test_one_picture_is_normalised_as_published(rounds: list[tuple[str, str]], tail: str, data: st.DataObject) -> None:
    texts = [text for pair in rounds for text in pair]
    at = data.draw(st.integers(0, len(texts) - 1))
    texts[at] = f"{texts[at]}<image>{tail}"
    found = read_conversation(record(*texts, image="a.png"))
    assert [turn.text for turn in found.turns] == [published_normalisation(text) for text in texts]


@given(st.lists(st.lists(FREE_TEXT, min_size=1, max_size=4), min_size=1, max_size=4), st.integers(0, 12))
def test_several_placeholders_are_all_kept_or_refused(questions: list[list[str]], pictures: int) -> None:
    """Each question is pieces joined by placeholders; with any other number of pictures it is a bad sample."""
    asked = ["<image>".join(pieces) for pieces in questions]
    placeholders = sum(text.count("<image>") for text in asked)
    names = [f"{number}.png" for number in range(pictures)]
    sample = record(*(text for question in asked for text in (question, "yes")), image=names)
    if placeholders == 0 and pictures:
        found = read_conversation(sample).turns
        assert found[0].text == (
            "<image>\n" * pictures + asked[0] if pictures > 1 else f"<image>\n{asked[0].strip()}".strip()
        )
        assert [turn.text for turn in found[2::2]] == asked[1:]
    elif placeholders != pictures:
        with pytest.raises(BadSample, match=f"{placeholders} <image> placeholders, but it names {pictures} pictures"):
            read_conversation(sample)
    elif pictures > 1:
        assert [turn.text for turn in read_conversation(sample).turns[::2]] == asked
