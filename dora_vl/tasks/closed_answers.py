"""A task that answers from a closed list instead of in words (VL-T5's classifier form): the list, and its targets."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

from dora_vl.adapters.adapter import CLOSED_ANSWERS
from dora_vl.adapters.folder import read_json
from dora_vl.data.example_file import ExampleFile
from dora_vl.data.examples import Example
from dora_vl.data.text_file import json_object, json_of, whole_text
from dora_vl.errors import BadSample, UserError, shown_names
from dora_vl.tasks.subtask import Subtask, Target

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
