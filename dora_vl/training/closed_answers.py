"""The closed answer lists of a VL-BART run: made before training, written to its folder, compared with a head's."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from dora_vl.adapters.adapter import CLOSED_ANSWERS
from dora_vl.adapters.files import read_json
from dora_vl.data.example import ExampleFile
from dora_vl.data.text_file import json_object, json_of, whole_text
from dora_vl.errors import BadSample, SettingError, UserError, shown_names
from dora_vl.evaluation.subtask import Subtask
from dora_vl.evaluation.vlbart_tasks import soft_scores

log = logging.getLogger(__name__)

SETTING = "data.closed_answers"
OUTSIDE = "outside"


def check_closed(
    lists: Mapping[str, str | int], subtasks: Mapping[str, Subtask], trained: Mapping[str, object]
) -> None:
    """Refuses a closed list for a task that does not train, or is not a question answered in words."""
    able = [name for name, task in subtasks.items() if task.answer_by == "text" and task.reads_question]
    for task in lists:
        if task not in able:
            those = f"{', '.join(able)} can have" if able else "none of this script's tasks has"
            raise SettingError(SETTING, f": {task} is no question answered in words; {those} a closed list")
        if task not in trained:
            raise SettingError(SETTING, f" names {task}, which data.train does not; its head would not train")


def make_lists(
    path: Path, choices: Mapping[str, str | int], files: Mapping[str, ExampleFile], *, same_as: Mapping[str, Path]
) -> None:
    """Writes a run's `closed_answers.json`: each task's list, and the training samples that it leaves out.

    Those train too, as in VL-T5: all their targets are 0. They are counted and logged.

    Args:
        choices: by task a file of answers, or how many of the training answers to take, the most frequent first.
        files: each task's training records.
        same_as: by the setting that names a head's weights, what says which answers its scores mean.
    """
    lists, outside = {}, {}
    for task, choice in choices.items():
        key, scores = f"{SETTING}.{task}", _scores(files[task])
        answers = _most_frequent(scores, choice) if isinstance(choice, int) else _listed(Path(choice), task)
        if len(answers) < 2:
            raise SettingError(key, f": {len(answers)} answers leave nothing to choose; at least 2 are needed")
        if len(set(answers)) < len(answers):
            twice = shown_names(answer for answer in dict.fromkeys(answers) if answers.count(answer) > 1)
            raise SettingError(key, f": the list names {twice} more than once; leave the others out")
        if isinstance(choice, int) and len(answers) < choice:
            log.warning("%s: %d answers are asked for, the training samples have %d", key, choice, len(answers))
        for setting, file in same_as.items():
            other = lists_in(file).get(task)
            if other is not None and other != answers:  # the head's scores mean others, or the same in another order
                raise SettingError(
                    setting,
                    f": {file} has another list, of {len(other):,} answers, than the {len(answers):,} of this run; set "
                    f"{key} to that file",
                )
        left_out = [name for name, of_sample in scores if not of_sample.keys() & set(answers)]
        if len(left_out) == len(scores):
            raise SettingError(
                key, f": of {len(scores):,} training samples not one has one of the {len(answers):,} answers"
            )
        if left_out:
            log.warning(
                "%s: %d of %d training samples have none of the %d answers, and teach that none of them is right: %s",
                *(key, len(left_out), len(scores), len(answers), shown_names(left_out)),
            )
        lists[task], outside[task] = answers, left_out
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {CLOSED_ANSWERS: lists, OUTSIDE: outside}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def lists_in(path: Path) -> dict[str, list[str]]:
    """The answer lists by task of a `closed_answers.json`, `recipe.json` or `config.json`; none where it has none."""
    lists = json_object(path, SETTING).get(CLOSED_ANSWERS, {})
    if not isinstance(lists, dict) or not all(isinstance(answers, list) for answers in lists.values()):
        raise UserError(f"{path}: {CLOSED_ANSWERS} is no object of lists by task; copy the file again")
    return {str(task): [str(answer) for answer in answers] for task, answers in lists.items()}


def account(path: Path) -> dict[str, dict[str, int]]:
    """How long each list of a run's `closed_answers.json` is, and how many training samples it leaves out; logged."""
    counts, outside = {}, read_json(path)[OUTSIDE]
    for task, answers in lists_in(path).items():
        counts[task] = {"answers": len(answers), "outside": len(outside[task])}
        names = f" ({shown_names(outside[task])})" if outside[task] else ""
        log.info(
            "%s: %d closed answers; %d training samples have none of them%s; %s names all",
            *(task, len(answers), len(outside[task]), names, path),
        )
    return counts


def _scores(file: ExampleFile) -> list[tuple[str, Mapping[str, float]]]:
    """Id and soft scores of every sample that can be trained on."""
    scores = []
    for index in range(len(file)):
        try:
            example = file[index]
            scores.append((example.id, soft_scores(example)))
        except BadSample:  # named and counted when the run comes to it
            continue
    return scores


def _most_frequent(scores: Sequence[tuple[str, Mapping[str, float]]], most: int) -> list[str]:
    """The answers with the largest sums of soft scores; of equals the first seen."""
    sums: defaultdict[str, float] = defaultdict(float)
    for _, of_sample in scores:
        for answer, score in of_sample.items():
            sums[answer] += score
    return sorted(sums, key=lambda answer: -sums[answer])[:most]


def _listed(path: Path, task: str) -> list[str]:
    """The answers of a file: one a line; a JSON list; or the task's in a JSON object under `closed_answers`."""
    text = whole_text(path, SETTING)
    if path.suffix != ".json":
        return [line.strip() for line in text.splitlines() if line.strip()]
    content = json_of(text, str(path))
    if isinstance(content, dict):
        lists = content.get(CLOSED_ANSWERS)
        content = lists.get(task) if isinstance(lists, dict) else None
    if not isinstance(content, list) or not all(isinstance(answer, str) for answer in content):
        raise UserError(f"{path}: neither a list of answers, nor an object whose {CLOSED_ANSWERS} holds one for {task}")
    return content
