"""VL-BART's tasks on pictures and videos (VQAv2, GQA, NLVR2, TVQA, captions...), and the same on one's own data.

Prompts, labels, batch sizes and decoding are VL-Adapter's (arXiv 2112.06825), which the paper's runs take over. For
videos two differences from the published runs are on by default, and `metrics.json` names them: a text beyond 600
tokens loses subtitles, not its question (data.subtitles_first), and a choice is the likeliest label, not generated text
(evaluation.choice_by_likelihood). VALUE's test server is gone, so validation is what can be scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

from dora_vl.backbones.templates import Prompt
from dora_vl.data.example import Example, right_choice
from dora_vl.errors import BadSample
from dora_vl.evaluation.scores import caption, vqa
from dora_vl.evaluation.scores.exact import how2qa_score, video_score
from dora_vl.evaluation.subtask import Search, Subtask, Target

QUESTION_TOKENS, ANSWER_TOKENS, CAPTION_TOKENS = 20, 10, 40
NO_REPEAT = 3  # bart-base's own setting, which the published runs never changed
PUBLISHED_SEARCH = Search(beams=5, max_length=20, no_repeat_ngram=NO_REPEAT)

score_vqa = partial(vqa.vqa_score, version="before_2021")
"""As VL-T5's `evaluate_raw`, which the paper's numbers are made with: the script of before 2021."""
score_gqa = partial(vqa.gqa_score, conversion="vl_t5")
"""As VL-T5's `evaluate`, which the paper's numbers are made with: the generated text as it is."""


def image_subtasks(*, task_prompt: bool = True) -> Mapping[str, Subtask]:
    """Every task on pictures; without `task_prompt` the text does not say which one it is."""

    def asked(name: str) -> Callable[[Example], Prompt]:
        return partial(image_question_prompt, prefix=f"{name}: " if task_prompt else "")

    vqav2 = Subtask(
        name="vqav2",
        prompt=asked("vqa"),
        target=weighted_answer,
        input_tokens=QUESTION_TOKENS,
        target_tokens=ANSWER_TOKENS,
        search=Search(no_repeat_ngram=NO_REPEAT),
        score=score_vqa,
    )
    short_answer = Subtask(
        name="short_answer",
        prompt=asked("vqa"),
        target=one_answer,
        input_tokens=QUESTION_TOKENS * 2,
        target_tokens=QUESTION_TOKENS,
        score=score_gqa,
    )
    # Sentences that are true or false of a picture, or of two.
    nlvr = Subtask(name="nlvr", prompt=asked("nlvr"), target=truth, answer_by="pair", score=vqa.score_nlvr)
    coco_caption = Subtask(  # each of a picture's captions is an item of its own
        name="coco_caption",
        batch_share=50 / 60,
        prompt=lambda example: Prompt(text="caption: " if task_prompt else ""),
        target=own_caption,
        each_answer=True,
        input_tokens=CAPTION_TOKENS,
        target_tokens=CAPTION_TOKENS,
        normalise_by="tokens",
        search=PUBLISHED_SEARCH,
        score=caption.score,
        check_scoring=caption.check_scoring,
        reads_question=False,
    )
    tasks = (
        vqav2,
        # The prompt reads "gpa" in all published runs.
        replace(vqav2, name="gqa", batch_share=100 / 60, prompt=asked("gpa"), target=one_answer, score=score_gqa),
        short_answer,
        replace(nlvr, name="nlvr2", batch_share=20 / 60, score=vqa.nlvr2_score, images=2),
        nlvr,
        coco_caption,
    )
    return {task.name: task for task in tasks}


def image_question_prompt(example: Example, *, prefix: str) -> Prompt:
    """The task's name and the question or sentence."""
    return Prompt(text=prefix + example.question)


def weighted_answer(example: Example, answer: int | None, random: Random) -> Target:
    """VQAv2: one of the answers, each as often as its soft score says; the loss is multiplied by that score."""
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


def video_subtasks(*, task_prompt: bool = True) -> Mapping[str, Subtask]:
    """Every task on videos; without `task_prompt` the text does not say which one it is.

    What states the part of a video writes it as the set's files have it, or as `dora_vl.data.benchmarks.videos` does.
    """

    def task(name: str, text: Callable[[Example], str], target: Any, score: Any, **more: Any) -> Subtask:
        def prompt(example: Example) -> Prompt:
            # A space stands before what is said, also where nothing is, as published.
            subtitles = " " + " ".join(subtitle.text.strip() for subtitle in example.subtitles)
            ending = f" {name}: " if task_prompt else " "
            return Prompt(subtitles_before="[Subs]", subtitles=subtitles, text=text(example) + ending)

        return Subtask(name=name, prompt=prompt, target=target, score=score, input_tokens=600, target_tokens=20, **more)

    choosing: dict[str, Any] = {"answer_by": "choice", "search": PUBLISHED_SEARCH, "chooses": True}
    captioning: dict[str, Any] = {
        "each_answer": True,  # each of a clip's descriptions is an item of its own
        "search": PUBLISHED_SEARCH,
        "check_scoring": caption.check_scoring,
        "reads_question": False,
    }
    tasks = (
        task("tvqa", _choices, right_label, video_score, state_span=lambda a, b: f"{a:.10g}-{b:.10g}", **choosing),
        task(
            "how2qa",
            _choices,
            right_label,
            how2qa_score,
            state_span=lambda a, b: f"{float(a)}-{float(b)}",
            **choosing,
        ),
        task("video_choice", _choices, right_label, video_score, **choosing),
        # Without the choices: what answers in words need not learn to look them up.
        task(
            "video_words",
            lambda example: f" [Q] {example.question.strip()}",
            right_words,
            video_score,
            answer_by="words",
            chooses=True,
        ),
        task(
            "tvc",
            lambda example: f" [TS] ({example.extra.get('ts', '')})",
            own_caption,
            caption.score_value,
            state_span=lambda a, b: [float(a), float(b)],
            **captioning,
        ),
        task("yc2c", lambda _: "", own_caption, caption.score_value, **captioning),
        task("video_caption", lambda _: "", own_caption, caption.score_value, **captioning),
    )
    return {task.name: task for task in tasks}


def _choices(example: Example) -> str:
    """Question, the part that it is about and the choices; each choice ends in exactly one period."""
    choices = " ".join(f"a{index}: {choice.strip(' .')}." for index, choice in enumerate(example.choices))
    return f" [Q] {example.question.strip()} [TS] ({example.extra.get('ts', '')}) [Choices] {choices}"


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


def closed(subtask: Subtask) -> Subtask:
    """The task answered from a closed list instead of in words (VL-T5's classifier form)."""
    return replace(
        subtask,
        answer_by="closed",
        target=lambda example, answer, random: Target(text="", soft_scores=soft_scores(example)),
    )


def soft_scores(example: Example) -> dict[str, float]:
    """Each right answer's score, at most 1. Raises BadSample: none has a score above 0."""
    scores: dict[str, float] = {}
    for answer in example.answers:
        if answer.weight > 0:
            scores[answer.text] = max(scores.get(answer.text, 0.0), min(answer.weight, 1.0))
    if not scores:
        raise BadSample(example.id, "it has no answer to train on")
    return scores
