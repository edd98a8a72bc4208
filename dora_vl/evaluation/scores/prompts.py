"""What a model is asked: LLaVA-1.5's own wording, to the letter, as far as benchmarks share it.

An example that holds `turns` is asked with them as they are. LLaVA's question files hold the suffixes already; records
hold the publisher's question, so they are added here. The wordings for captions and for NLVR are of this project.
"""

from __future__ import annotations

from collections.abc import Callable

from dora_vl.data.example import LETTER, Example, with_letters
from dora_vl.data.turns import IMAGE_PLACEHOLDER, Turn

SHORT = "Answer the question using a single word or phrase."
LETTER_CN = "请直接回答选项字母。"
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
YES_OR_NO = "Please answer yes or no."

Prompt = Callable[[Example], str]


def as_is(example: Example) -> str:
    """The question alone."""
    return example.question


def short(example: Example) -> str:
    """VQAv2, GQA, POPE."""
    return f"{example.question}\n{SHORT}"


def letter(example: Example) -> str:
    """SEED, MMBench: hint, question, lettered choices."""
    return f"{lettered(example)}\n{LETTER}"


def caption(_: Example) -> str:
    """COCO captions."""
    return "Provide a one-sentence caption for the provided image."


def true_or_false(example: Example) -> str:
    """NLVR and NLVR2."""
    return f"{example.question}\nIs this true or false? {SHORT}"


def about_video(example: Example) -> str:
    """TVQA, How2QA and one's own videos: what is said in the clip, the question, and lettered choices."""
    choices = with_letters(example.choices)
    return "\n".join([*_subtitles(example), example.question, *choices, *([LETTER] if choices else [])])


def caption_of_video(example: Example) -> str:
    """TVC and YC2C."""
    return "\n".join([*_subtitles(example), "Provide a one-sentence caption for the provided video."])


def _subtitles(example: Example) -> list[str]:
    """What is said in the clip as a line, without empty subtitles; none where nothing is."""
    text = " ".join(subtitle.text for subtitle in example.subtitles if subtitle.text)
    return [f"Subtitles: {text}"] if text else []


def turns_of(example: Example, prompt: Prompt) -> tuple[Turn, ...]:
    """The prompt as turns up to and with the question, one placeholder for each picture first."""
    if example.turns:
        turns = example.turns[:-1] if example.turns[-1].role == "assistant" else example.turns
        return tuple(turns)
    return (Turn("user", f"{IMAGE_PLACEHOLDER}\n" * len(example.images) + prompt(example)),)


def lettered(example: Example, before_hint: str = "") -> str:
    """Hint, question and choices, a line each."""
    hint = str(example.extra.get("hint") or "")
    return "\n".join([*([before_hint + hint] if hint else []), example.question, *with_letters(example.choices)])
