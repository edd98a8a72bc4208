"""VL-BART's tasks on pictures: VQAv2, GQA, NLVR2, COCO captions, NLVR, short answers of one's own.

Prompts, labels, batch sizes and decoding are VL-Adapter's (arXiv 2112.06825), which the paper's runs take over.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import TypeAlias

from dora_vl.adapters.adapter import CLOSED_ANSWERS
from dora_vl.adapters.folder import read_json
from dora_vl.backbones.templates import Prompt
from dora_vl.data.example import Example, ExampleFile, right_choice
from dora_vl.data.text_file import json_object, json_of, whole_text
from dora_vl.errors import BadSample, UserError, shown_names
from dora_vl.evaluation.scores import caption, video, vqa
from dora_vl.evaluation.subtask import Search, Subtask, Target

QUESTION_TOKENS, ANSWER_TOKENS, CAPTION_TOKENS = 20, 10, 40
NO_REPEAT = 3  # bart-base's own setting, which the published runs never changed


def image_subtasks(*, task_prompt: bool = True) -> Mapping[str, Subtask]:
    """Every task of this file; without `task_prompt` the text does not say which one it is."""

    def asked(name: str) -> Callable[[Example], Prompt]:
        return partial(image_question_prompt, prefix=f"{name}: " if task_prompt else "")

    every = (
        *question_tasks(asked),
        *statement_tasks(asked),
        image_caption_task(prefix="caption: " if task_prompt else ""),
    )
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
    nlvr = Subtask(name="nlvr", prompt=asked("nlvr"), target=truth, answer_by="pair", score=vqa.score_nlvr)
    return replace(nlvr, name="nlvr2", batch_share=20 / 60, score=vqa.nlvr2_score, images=2), nlvr


def image_caption_task(*, prefix: str) -> Subtask:
    """COCO captions: each of a picture's captions is an item of its own."""
    return Subtask(
        name="coco_caption",
        batch_share=50 / 60,
        prompt=lambda example: Prompt(text=prefix),
        target=own_image_caption,
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


def own_image_caption(example: Example, answer: int | None, random: Random) -> Target:
    """The caption that the item is about."""
    if not example.answers:
        raise BadSample(example.id, "it has no caption to train on")
    return Target(text=example.answers[answer or 0].text)


def score_vqa(examples: Sequence[Example], answers: Mapping[str, str]) -> vqa.Scored:
    """As VL-T5's `evaluate_raw`, which the paper's numbers are made with: the script of before 2021."""
    return vqa.vqa_score(examples, answers, version="before_2021")


def score_gqa(examples: Sequence[Example], answers: Mapping[str, str]) -> vqa.Scored:
    """As VL-T5's `evaluate`, which the paper's numbers are made with: the generated text as it is."""
    return vqa.gqa_score(examples, answers, conversion="vl_t5")


# VL-BART's tasks on videos: TVQA, How2QA, TVC and YC2C of VALUE, questions and captions of one's own clips.
#
# Texts are VL-Adapter's. Two differences from the published runs are on by default, and `metrics.json` names them: a
# text beyond 600 tokens loses subtitles, not its question (data.subtitles_first), and a choice is the likeliest
# label, not
# generated text (evaluation.choice_by_likelihood). VALUE's test server is gone, so validation is what can be scored.


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
    return {one.name: one for one in every}


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
        target=own_video_caption,
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


def own_video_caption(example: Example, answer: int | None, random: Random) -> Target:
    """The description that the item is about."""
    if not example.answers:
        raise BadSample(example.id, "it has no description to train on")
    return Target(text=example.answers[answer or 0].text)


# A task that answers from a closed list instead of in words (VL-T5's classifier form): the list, and its targets.


log = logging.getLogger(__name__)

SETTING = "data.closed_answers"
OUTSIDE = "outside"


def closed(subtask: Subtask) -> Subtask:
    """The task answered from a closed list."""
    return replace(subtask, answer_by="closed", target=_target)


def check_closed(
    wanted: Mapping[str, str | int], subtasks: Mapping[str, Subtask], trained: Mapping[str, object]
) -> None:
    """Refuses a closed list for a task that does not train, or is not a question answered in words.

    Raises:
        UserError: it names the task, and those that can have one.
    """
    able = [name for name, one in subtasks.items() if one.answer_by == "text" and one.reads_question]
    for task in wanted:
        if task not in able:
            known = f"{', '.join(able)} can have" if able else "none of this script's tasks has"
            raise UserError(f"{SETTING}: {task} is no question answered in words; {known} a closed list")
        if task not in trained:
            raise UserError(f"{SETTING} names {task}, which data.train does not; its head would not train")


def make_lists(
    path: Path, wanted: Mapping[str, str | int], files: Mapping[str, ExampleFile], *, same_as: Mapping[str, Path]
) -> None:
    """Writes a run's `closed_answers.json`: each task's list, and the training samples that it leaves out.

    Those train too, as in VL-T5: all their targets are 0. They are counted and logged.

    Args:
        wanted: by task a file of answers, or how many of the training answers to take, the most frequent first.
        files: each task's training records.
        same_as: by the setting that names a head's weights, what says which answers its scores mean.

    Raises:
        UserError: the file cannot be read, its answers are fewer than two or named twice, no training sample has one
            of them, or the list is another than one of `same_as`.
    """
    lists, outside = {}, {}
    for task, choice in wanted.items():
        where, file = f"{SETTING}.{task}", files[task]
        lists[task] = _most_frequent(file, choice) if isinstance(choice, int) else _listed(Path(choice), task)
        _check_list(lists[task], where)
        if isinstance(choice, int) and len(lists[task]) < choice:
            log.warning("%s: %d answers are asked for, the training samples have %d", where, choice, len(lists[task]))
        for setting, other in same_as.items():
            _check_same(lists[task], lists_in(other).get(task), f"{setting}: {other}", where)
        outside[task] = _outside(file, frozenset(lists[task]), where)
    content = {CLOSED_ANSWERS: lists, OUTSIDE: outside}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def lists_in(path: Path) -> dict[str, list[str]]:
    """The answer lists by task of a `closed_answers.json`, `recipe.json` or `config.json`; none where it has none.

    Raises:
        UserError: no such file, or no lists of answers by task in it.
    """
    found = json_object(path, SETTING).get(CLOSED_ANSWERS, {})
    if not isinstance(found, dict) or not all(isinstance(one, list) for one in found.values()):
        raise UserError(f"{path}: {CLOSED_ANSWERS} is no object of lists by task; copy the file again")
    return {str(task): [str(answer) for answer in answers] for task, answers in found.items()}


def account(path: Path) -> dict[str, dict[str, int]]:
    """How long each list of a run's `closed_answers.json` is, and how many training samples it leaves out; logged."""
    lists, outside = lists_in(path), read_json(path)[OUTSIDE]
    found = {task: {"answers": len(one), "outside": len(outside[task])} for task, one in lists.items()}
    for task, one in found.items():
        log.info(
            "%s: %d closed answers; %d training samples have none of them%s; %s names all",
            *(task, one["answers"], one["outside"], f" ({shown_names(outside[task])})" if outside[task] else "", path),
        )
    return found


def _most_frequent(file: ExampleFile, most: int) -> tuple[str, ...]:
    """The answers with the largest sums of soft scores; of equals the first seen."""
    sums: Counter[str] = Counter()
    for _, scores in _scores(file):
        for answer, score in scores.items():
            sums[answer] += score  # pyright: ignore[reportArgumentType] (a Counter adds any number)
    return tuple(answer for answer, _ in sums.most_common(most))


def _outside(file: ExampleFile, answers: frozenset[str], where: str) -> list[str]:
    """The ids of the samples without an answer on the list."""
    samples = [(name, answers.isdisjoint(scores)) for name, scores in _scores(file)]
    outside = [name for name, left_out in samples if left_out]
    if len(outside) == len(samples):
        raise UserError(
            f"{where}: of {len(samples):,} training samples not one has one of the {len(answers):,} answers"
        )
    if outside:
        log.warning(
            "%s: %d of %d training samples have none of the %d answers, and teach that none of them is right: %s",
            *(where, len(outside), len(samples), len(answers), shown_names(outside)),
        )
    return outside


def _scores(file: ExampleFile) -> Iterator[tuple[str, Mapping[str, float]]]:
    """Id and soft scores of every sample that can be trained on."""
    for index in range(len(file)):
        try:
            example = file[index]
            yield example.id, soft_scores(example)
        except BadSample:  # named and counted when the run comes to it
            continue


def soft_scores(example: Example) -> dict[str, float]:
    """Each right answer's score, at most 1.

    Raises:
        BadSample: none has a score above 0.
    """
    scores: dict[str, float] = {}
    for answer in example.answers:
        scores[answer.text] = max(scores.get(answer.text, 0.0), min(answer.weight, 1.0))
    scores = {text: score for text, score in scores.items() if score > 0}
    if not scores:
        raise BadSample(example.id, "it has no answer to train on")
    return scores


def _target(example: Example, answer: int | None, random: Random) -> Target:
    return Target(text="", soft_scores=soft_scores(example))


def _listed(path: Path, task: str) -> tuple[str, ...]:
    """The answers of a file: one a line; a JSON list; or the task's in a JSON object under `closed_answers`."""
    text = whole_text(path, SETTING)
    if path.suffix != ".json":
        return tuple(line.strip() for line in text.splitlines() if line.strip())
    content = json_of(text, str(path))
    if isinstance(content, dict):
        lists = content.get(CLOSED_ANSWERS)
        content = lists.get(task) if isinstance(lists, dict) else None
    if not isinstance(content, list) or not all(isinstance(one, str) for one in content):
        raise UserError(f"{path}: neither a list of answers, nor an object whose {CLOSED_ANSWERS} holds one for {task}")
    return tuple(str(one) for one in content)


def _check_list(answers: Sequence[str], where: str) -> None:
    if len(answers) < 2:
        raise UserError(f"{where}: {len(answers)} answers leave nothing to choose; at least 2 are needed")
    twice = [answer for answer, times in Counter(answers).items() if times > 1]
    if twice:
        raise UserError(f"{where}: the list names {shown_names(twice)} more than once; leave the others out")


def _check_same(answers: Sequence[str], other: Sequence[str] | None, named: str, where: str) -> None:
    """Refuses weights of a head whose scores mean other answers, or the same in another order."""
    if other is not None and list(other) != list(answers):
        raise UserError(
            f"{named} has another list, of {len(other):,} answers, than the {len(answers):,} of this run; set {where} "
            "to that file"
        )
