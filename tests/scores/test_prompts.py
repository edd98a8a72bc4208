"""Questions in LLaVA-1.5's own wording, beside those that `rows_to_scores.jsonl` follows."""

from __future__ import annotations

import pytest

from dora_vl.data.example import Example, Subtitle
from dora_vl.data.turns import Turn
from dora_vl.evaluation.scores import benchmark as prompts
from dora_vl.evaluation.scores import llava, vqa

SHORT, LETTER = prompts.SHORT, "Answer with the option's letter from the given choices directly."
HINTED = {"choices": ("red", "blue"), "extra": {"hint": "Look."}}
LINES = (Subtitle("well"), Subtitle(""), Subtitle("no"))


@pytest.mark.parametrize(
    ("prompt", "fields", "text"),
    [
        (prompts.letter, HINTED, f"Look.\nWhich?\nA. red\nB. blue\n{LETTER}"),
        (llava.scienceqa_prompt, HINTED, f"Context: Look.\nWhich?\nA. red\nB. blue\n{LETTER}"),
        (llava.letter_cn, HINTED, "Look.\nWhich?\nA. red\nB. blue\n请直接回答选项字母。"),
        (vqa.textvqa_prompt, {"extra": {"reference_ocr": "go"}}, f"Which?\nReference OCR token: go\n{SHORT}"),
        (prompts.as_is, {"images": ("a.jpg", "b.jpg")}, "<image>\n<image>\nWhich?"),
        (prompts.about_video, {"subtitles": LINES[1:2]}, "Which?"),  # subtitles without words
        (
            prompts.caption_of_video,
            {"subtitles": LINES},
            "Subtitles: well no\nProvide a one-sentence caption for the provided video.",
        ),
    ],
)
def test_wording(prompt: prompts.Prompt, fields: dict[str, object], text: str) -> None:
    assert prompts.prompt_turns(Example(id="1", question="Which?", **fields), prompt) == (Turn("user", text),)  # pyright: ignore[reportArgumentType]


def test_turns_are_asked_as_they_are_without_their_last_answer() -> None:
    turns = (Turn("user", "<image>\nWhat?"), Turn("assistant", "a cat"), Turn("user", "Why?"))
    for row in (turns, (*turns, Turn("assistant", "because"))):
        assert prompts.prompt_turns(Example(id="1", images=("a.jpg",), turns=row), prompts.short) == turns
