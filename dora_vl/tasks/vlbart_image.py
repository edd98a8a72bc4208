"""VL-BART's tasks on pictures: VQAv2, GQA, NLVR2, COCO captions, NLVR, short answers of one's own.

Prompts, labels, batch sizes and decoding are VL-Adapter's (arXiv 2112.06825), which the paper's runs take over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from random import Random

from dora_vl.backbones.seq2seq_prompt import Prompt
from dora_vl.data.examples import Example
from dora_vl.errors import BadSample
from dora_vl.scores import caption, gqa, nlvr2, vqa
from dora_vl.tasks.subtask import Search, Subtask, Target

QUESTION_TOKENS, ANSWER_TOKENS, CAPTION_TOKENS = 20, 10, 40
NO_REPEAT = 3  # bart-base's own setting, which the published runs never changed


def subtasks(*, task_prompt: bool = True) -> Mapping[str, Subtask]:
    """Every task of this file; without `task_prompt` the text does not say which one it is."""

    def asked(name: str) -> Callable[[Example], Prompt]:
        return partial(question_prompt, prefix=f"{name}: " if task_prompt else "")

    every = (*question_tasks(asked), *statement_tasks(asked), caption_task(prefix="caption: " if task_prompt else ""))
    return {one.name: one for one in every}


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
    nlvr = Subtask(name="nlvr", prompt=asked("nlvr"), target=truth, answer_by="pair", score=nlvr2.score_nlvr)
    return replace(nlvr, name="nlvr2", batch_share=20 / 60, score=nlvr2.score, images=2), nlvr


def caption_task(*, prefix: str) -> Subtask:
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


def question_prompt(example: Example, *, prefix: str) -> Prompt:
    """The task's name and the question or sentence."""
    return Prompt(text=prefix + example.question)


def drawn_answer(example: Example, random: Random) -> Target:
    """One of the answers, each as often as its soft score says, with that score.

    Raises:
        BadSample: no answer has a score above 0.
    """
    known = [answer for answer in example.answers if answer.weight > 0]
    if not known:
        raise BadSample(example.id, "it has no answer to train on")
    (chosen,) = random.choices(known, weights=[answer.weight for answer in known])
    return Target(text=chosen.text, weight=chosen.weight)


def weighted_answer(example: Example, answer: int | None, random: Random) -> Target:
    """VQAv2: the loss is multiplied by the drawn answer's soft score."""
    return drawn_answer(example, random)


def one_answer(example: Example, answer: int | None, random: Random) -> Target:
    """GQA: the drawn answer counts like any other."""
    return Target(text=drawn_answer(example, random).text)


def truth(example: Example, answer: int | None, random: Random) -> Target:
    """NLVR2's and NLVR's labels in lower case."""
    if not example.answers:
        raise BadSample(example.id, "it has no label to train on")
    return Target(text=example.answers[0].text.lower())


def own_caption(example: Example, answer: int | None, random: Random) -> Target:
    """The caption that the item is about."""
    if not example.answers:
        raise BadSample(example.id, "it has no caption to train on")
    return Target(text=example.answers[answer or 0].text)


def score_vqa(examples: Sequence[Example], answers: Mapping[str, str]) -> vqa.Scored:
    """As VL-T5's `evaluate_raw`, which the paper's numbers are made with: the script of before 2021."""
    return vqa.score(examples, answers, version="before_2021")


def score_gqa(examples: Sequence[Example], answers: Mapping[str, str]) -> gqa.Scored:
    """As VL-T5's `evaluate`, which the paper's numbers are made with: the generated text as it is."""
    return gqa.score(examples, answers, conversion="vl_t5")
