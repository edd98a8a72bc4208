"""VL-BART's tasks on pictures and videos (VQAv2, GQA, NLVR2, TVQA, captions...), and the same on one's own data.

Prompts, labels, batch sizes and decoding are VL-Adapter's (arXiv 2112.06825), which the paper's runs take over. For
videos two differences from the published runs are on by default, and `metrics.json` names them: a text beyond 600
tokens loses subtitles, not its question (data.subtitles_first), and a choice is the likeliest label, not generated text
(evaluation.choice_by_likelihood). VALUE's test server is gone, so validation is what can be scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from random import Random
from typing import TypeAlias

from dora_vl.backbones.templates import Prompt
from dora_vl.data.example import Example, right_choice
from dora_vl.errors import BadSample
from dora_vl.evaluation.scores import caption, video, vqa
from dora_vl.evaluation.subtask import Search, Subtask, Target

QUESTION_TOKENS, ANSWER_TOKENS, CAPTION_TOKENS = 20, 10, 40
NO_REPEAT = 3  # bart-base's own setting, which the published runs never changed


def image_subtasks(*, task_prompt: bool = True) -> Mapping[str, Subtask]:
    """Every task of this file; without `task_prompt` the text does not say which one it is."""

    def asked(name: str) -> Callable[[Example], Prompt]:
        return partial(image_question_prompt, prefix=f"{name}: " if task_prompt else "")

    caption_task = image_caption_task(prefix="caption: " if task_prompt else "")
    every = (*question_tasks(asked), *statement_tasks(asked), caption_task)
    return {task.name: task for task in every}


def question_tasks(asked: Callable[[str], Callable[[Example], Prompt]]) -> Sequence[Subtask]:
    """Questions answered in words: VQAv2, GQA and those of one's own data."""
    words = Subtask(
        name="vqav2",
        prompt=asked("vqa"),
        target=weighted_answer,
        input_tokens=QUESTION_TOKENS,
        target_tokens=ANSWER_TOKENS,
        search=Search(no_repeat_ngram=NO_REPEAT),
        score=score_vqa,
    )
    return (
        words,
        # The prompt reads "gpa" in all published runs.
        replace(words, name="gqa", batch_share=100 / 60, prompt=asked("gpa"), target=one_answer, score=score_gqa),
        Subtask(
            name="short_answer",
            prompt=asked("vqa"),
            target=one_answer,
            input_tokens=QUESTION_TOKENS * 2,
            target_tokens=QUESTION_TOKENS,
            score=score_gqa,
        ),
    )


def statement_tasks(asked: Callable[[str], Callable[[Example], Prompt]]) -> Sequence[Subtask]:
    """Sentences that are true or false of a picture (NLVR) or of two (NLVR2)."""
    nlvr = Subtask(name="nlvr", prompt=asked("nlvr"), target=truth, answer_by="pair", score=vqa.score_nlvr)
    return replace(nlvr, name="nlvr2", batch_share=20 / 60, score=vqa.nlvr2_score, images=2), nlvr


def image_caption_task(*, prefix: str) -> Subtask:
    """COCO captions: each of a picture's captions is an item of its own."""
    return Subtask(
        name="coco_caption",
        batch_share=50 / 60,
        prompt=lambda example: Prompt(text=prefix),
        target=own_caption,
        each_answer=True,
        input_tokens=CAPTION_TOKENS,
        target_tokens=CAPTION_TOKENS,
        normalise_by="tokens",
        search=Search(beams=5, max_length=20, no_repeat_ngram=NO_REPEAT),
        score=caption.score,
        check_scoring=caption.check_scoring,
        reads_question=False,
    )


def image_question_prompt(example: Example, *, prefix: str) -> Prompt:
    """The task's name and the question or sentence."""
    return Prompt(text=prefix + example.question)


def weighted_answer(example: Example, answer: int | None, random: Random) -> Target:
    """VQAv2: one of the answers, each as often as its soft score says; the loss is multiplied by that score.

    Raises:
        BadSample: no answer has a score above 0.
    """
    answers = [answer for answer in example.answers if answer.weight > 0]
    if not answers:
        raise BadSample(example.id, "it has no answer to train on")
    (drawn,) = random.choices(answers, weights=[answer.weight for answer in answers])
    return Target(text=drawn.text, weight=drawn.weight)


def one_answer(example: Example, answer: int | None, random: Random) -> Target:
    """GQA: the drawn answer counts like any other."""
    return Target(text=weighted_answer(example, answer, random).text)


def truth(example: Example, answer: int | None, random: Random) -> Target:
    """NLVR2's and NLVR's labels in lower case."""
    if not example.answers:
        raise BadSample(example.id, "it has no label to train on")
    return Target(text=example.answers[0].text.lower())


def own_caption(example: Example, answer: int | None, random: Random) -> Target:
    """The caption, or description of a clip, that the item is about."""
    if not example.answers:
        raise BadSample(example.id, "it has no caption to train on")
    return Target(text=example.answers[answer or 0].text)


def score_vqa(examples: Sequence[Example], answers: Mapping[str, str]) -> vqa.Scored:
    """As VL-T5's `evaluate_raw`, which the paper's numbers are made with: the script of before 2021."""
    return vqa.vqa_score(examples, answers, version="before_2021")


def score_gqa(examples: Sequence[Example], answers: Mapping[str, str]) -> vqa.Scored:
    """As VL-T5's `evaluate`, which the paper's numbers are made with: the generated text as it is."""
    return vqa.gqa_score(examples, answers, conversion="vl_t5")


# Tasks on videos.


TEXT_TOKENS, LABEL_TOKENS = 600, 20
SpanText: TypeAlias = Callable[[float, float], object]
PUBLISHED_SEARCH = Search(beams=5, max_length=20, no_repeat_ngram=3)


def video_subtasks(*, task_prompt: bool = True) -> Mapping[str, Subtask]:
    """Every task of this file; without `task_prompt` the text does not say which one it is."""

    def suffix(name: str) -> str:
        return f"{name}: " if task_prompt else ""

    every = (
        choice_task("tvqa", video.score, suffix("tvqa"), state_span=tvqa_span),
        choice_task("how2qa", video.score_how2qa, suffix("how2qa"), state_span=how2qa_span),
        choice_task("video_choice", video.score, suffix("video_choice")),
        words_task("video_words", suffix("video_words")),
        video_caption_task("tvc", suffix("tvc"), with_times=True),
        video_caption_task("yc2c", suffix("yc2c")),
        video_caption_task("video_caption", suffix("video_caption")),
    )
    return {task.name: task for task in every}


def choice_task(
    name: str, score: Callable[..., video.Scored], suffix: str, state_span: SpanText | None = None
) -> Subtask:
    """A question with its choices; the answer is the right choice's label."""
    return Subtask(
        name=name,
        prompt=partial(video_question_prompt, suffix=suffix),
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
        score=video.score,
        chooses=True,
    )


def video_caption_task(name: str, suffix: str, *, with_times: bool = False) -> Subtask:
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
    """`ts` as `dora_vl.data.benchmarks.videos` writes it: 32.5-40.0."""
    return f"{float(start)}-{float(end)}"


def tvc_span(start: float, end: float) -> list[float]:
    """`ts` as TVC's files have it: [32.5, 40.0]."""
    return [float(start), float(end)]


def subtitle_text(example: Example) -> str:
    """All that is said, in one line; a space stands before it, also where nothing is said, as published."""
    return " " + " ".join(subtitle.text.strip() for subtitle in example.subtitles)


def video_question_prompt(example: Example, *, suffix: str) -> Prompt:
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


# A task that answers from a closed list instead of in words (VL-T5's classifier form).


def closed(subtask: Subtask) -> Subtask:
    """The task answered from a closed list."""
    return replace(subtask, answer_by="closed", target=closed_target)


def closed_target(example: Example, answer: int | None, random: Random) -> Target:
    """Every right answer, with its score."""
    return Target(text="", soft_scores=soft_scores(example))


def soft_scores(example: Example) -> dict[str, float]:
    """Each right answer's score, at most 1.

    Raises:
        BadSample: none has a score above 0.
    """
    scores: dict[str, float] = {}
    for answer in example.answers:
        if answer.weight > 0:
            scores[answer.text] = max(scores.get(answer.text, 0.0), min(answer.weight, 1.0))
    if not scores:
        raise BadSample(example.id, "it has no answer to train on")
    return scores
