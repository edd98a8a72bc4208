"""VL-BART's tasks on videos: TVQA, How2QA, TVC and YC2C of VALUE, questions and captions of one's own clips.

Texts are VL-Adapter's. Two differences from the published runs are on by default, and `metrics.json` names them: a text
beyond 600 tokens loses subtitles, not its question (data.subtitles_first), and a choice is the likeliest label, not
generated text (evaluation.choice_by_likelihood). VALUE's test server is gone, so validation is what can be scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from random import Random
from typing import TypeAlias

from dora_vl.backbones.seq2seq_prompt import Prompt
from dora_vl.data.examples import Example
from dora_vl.data.right_choice import right_choice
from dora_vl.errors import BadSample
from dora_vl.scores import caption, video_qa
from dora_vl.tasks.subtask import Search, Subtask, Target

TEXT_TOKENS, LABEL_TOKENS = 600, 20
SpanText: TypeAlias = Callable[[float, float], object]
PUBLISHED_SEARCH = Search(beams=5, max_length=20, no_repeat_ngram=3)


def subtasks(*, task_prompt: bool = True) -> Mapping[str, Subtask]:
    """Every task of this file; without `task_prompt` the text does not say which one it is."""

    def suffix(name: str) -> str:
        return f"{name}: " if task_prompt else ""

    every = (
        choice_task("tvqa", video_qa.score, suffix("tvqa"), state_span=tvqa_span),
        choice_task("how2qa", video_qa.score_how2qa, suffix("how2qa"), state_span=how2qa_span),
        choice_task("video_choice", video_qa.score, suffix("video_choice")),
        words_task("video_words", suffix("video_words")),
        caption_task("tvc", suffix("tvc"), with_times=True),
        caption_task("yc2c", suffix("yc2c")),
        caption_task("video_caption", suffix("video_caption")),
    )
    return {one.name: one for one in every}


def choice_task(
    name: str, score: Callable[..., video_qa.Scored], suffix: str, state_span: SpanText | None = None
) -> Subtask:
    """A question with its choices; the answer is the right choice's label."""
    return Subtask(
        name=name,
        prompt=partial(question_prompt, suffix=suffix),
        target=right_label,
        input_tokens=TEXT_TOKENS,
        target_tokens=LABEL_TOKENS,
        answer_by="choice",
        search=PUBLISHED_SEARCH,
        score=score,
        chooses=True,
        state_span=state_span,
    )


def words_task(name: str, suffix: str) -> Subtask:
    """A question without its choices; the answer is the right choice in words."""
    return Subtask(
        name=name,
        prompt=partial(open_prompt, suffix=suffix),
        target=right_words,
        input_tokens=TEXT_TOKENS,
        target_tokens=LABEL_TOKENS,
        answer_by="words",
        score=video_qa.score,
        chooses=True,
    )


def caption_task(name: str, suffix: str, *, with_times: bool = False) -> Subtask:
    """A description of the clip; each of its descriptions is an item of its own."""
    return Subtask(
        name=name,
        prompt=partial(caption_prompt, suffix=suffix, with_times=with_times),
        target=own_caption,
        each_answer=True,
        input_tokens=TEXT_TOKENS,
        target_tokens=LABEL_TOKENS,
        search=PUBLISHED_SEARCH,
        score=caption.score_value,
        check_scoring=caption.check_scoring,
        reads_question=False,
        state_span=tvc_span if with_times else None,
    )


def tvqa_span(start: float, end: float) -> str:
    """`ts` as TVQA's files have it: 32.5-40."""
    return f"{start:.10g}-{end:.10g}"


def how2qa_span(start: float, end: float) -> str:
    """`ts` as `dora_vl.sources.how2qa` writes it: 32.5-40.0."""
    return f"{float(start)}-{float(end)}"


def tvc_span(start: float, end: float) -> list[float]:
    """`ts` as TVC's files have it: [32.5, 40.0]."""
    return [float(start), float(end)]


def subtitle_text(example: Example) -> str:
    """All that is said, in one line; a space stands before it, also where nothing is said, as published."""
    return " " + " ".join(subtitle.text.strip() for subtitle in example.subtitles)


def question_prompt(example: Example, *, suffix: str) -> Prompt:
    """Subtitles, question, the span it is about and the choices; each choice ends in exactly one period."""
    choices = " ".join(f"a{index}: {choice.strip(' .')}." for index, choice in enumerate(example.choices))
    return Prompt(
        subtitles_before="[Subs]",
        subtitles=subtitle_text(example),
        text=f" [Q] {example.question.strip()} [TS] ({example.extra.get('ts', '')}) [Choices] {choices} {suffix}",
    )


def open_prompt(example: Example, *, suffix: str) -> Prompt:
    """Subtitles and question without the choices: what answers in words need not learn to look them up."""
    text = f" [Q] {example.question.strip()} {suffix}"
    return Prompt(subtitles_before="[Subs]", subtitles=subtitle_text(example), text=text)


def caption_prompt(example: Example, *, suffix: str, with_times: bool) -> Prompt:
    """Subtitles and, for TVC, the clip's times as Python writes a list of numbers."""
    times = f" [TS] ({example.extra.get('ts', '')})" if with_times else ""
    return Prompt(subtitles_before="[Subs]", subtitles=subtitle_text(example), text=f"{times} {suffix}")


def right_label(example: Example, answer: int | None, random: Random) -> Target:
    """The right choice's label, such as `a2`."""
    return Target(text=f"a{_right_index(example)}")


def right_words(example: Example, answer: int | None, random: Random) -> Target:
    """The right choice itself."""
    return Target(text=example.choices[_right_index(example)])


def _right_index(example: Example) -> int:
    if "correct" not in example.extra:
        raise BadSample(example.id, "nothing says which of its choices is right, so it cannot be trained on")
    return right_choice(example.extra["correct"], example.choices, example.id)


def own_caption(example: Example, answer: int | None, random: Random) -> Target:
    """The description that the item is about."""
    if not example.answers:
        raise BadSample(example.id, "it has no description to train on")
    return Target(text=example.answers[answer or 0].text)
