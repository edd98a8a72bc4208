"""Questions in LLaVA-1.5's own wording."""

from __future__ import annotations

from dora_vl.data.example import Example, Subtitle
from dora_vl.data.turns import Turn
from dora_vl.evaluation.scores import llava, prompts, vqa

ASKED = Example(
    id="1",
    images=("a.jpg",),
    question="Which?",
    choices=("red", "blue"),
    extra={"hint": "Look.", "reference_ocr": "stop, go"},
)


def text(prompt: prompts.Prompt) -> str:
    (turn,) = prompts.turns_of(ASKED, prompt)
    assert turn.role == "user"
    return turn.text


def test_every_suffix() -> None:
    short = "Answer the question using a single word or phrase."
    assert text(prompts.short) == f"<image>\nWhich?\n{short}"
    assert text(vqa.vizwiz_prompt) == (
        f"<image>\nWhich?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n{short}"
    )
    assert text(vqa.textvqa_prompt) == f"<image>\nWhich?\nReference OCR token: stop, go\n{short}"
    letter = "Answer with the option's letter from the given choices directly."
    assert text(prompts.letter) == f"<image>\nLook.\nWhich?\nA. red\nB. blue\n{letter}"
    assert text(llava.scienceqa_prompt) == f"<image>\nContext: Look.\nWhich?\nA. red\nB. blue\n{letter}"
    without = llava.scienceqa_prompt(Example(id="1", question="Which?", choices=("red", "blue")))
    assert without == f"Which?\nA. red\nB. blue\n{letter}"
    assert text(llava.letter_cn) == "<image>\nLook.\nWhich?\nA. red\nB. blue\n请直接回答选项字母。"
    of_mme = Example(id="1", images=("a.jpg",), question="Is it red? Please answer yes or no.")
    assert llava.mme_prompt(of_mme) == f"Is it red?\n{short}"


def test_two_pictures_and_none() -> None:
    pair = Example(id="1", images=("a.jpg", "b.jpg"), question="Both are red.")
    (turn,) = prompts.turns_of(pair, prompts.true_or_false)
    assert turn.text.startswith("<image>\n<image>\nBoth are red.\n")
    (turn,) = prompts.turns_of(Example(id="1", question="Why?"), prompts.as_is)
    assert turn.text == "Why?"


def test_turns_are_asked_as_they_are_without_their_last_answer() -> None:
    turns = (Turn("user", "<image>\nWhat?"), Turn("assistant", "a cat"), Turn("user", "Why?"))
    for given in (turns, (*turns, Turn("assistant", "because"))):
        assert prompts.turns_of(Example(id="1", images=("a.jpg",), turns=given), prompts.short) == turns


def test_subtitles_without_words_are_not_asked() -> None:
    lines = (Subtitle("well"), Subtitle(""), Subtitle("no"))
    (turn,) = prompts.turns_of(Example(id="1", subtitles=lines), prompts.caption_of_video)
    assert turn.text == "Subtitles: well no\nProvide a one-sentence caption for the provided video."
    (turn,) = prompts.turns_of(Example(id="1", question="Who?", subtitles=lines[1:2]), prompts.about_video)
    assert turn.text == "Who?"
