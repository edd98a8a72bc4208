"""MME as its calculation.py gives it: in each subtask accuracy + accuracy+ (both questions of a picture right).

Quirks kept in `said`: the answer is lower-cased, not stripped; "yes", then "no", is looked for in its first four
characters. So "know" is no, "unknown" is neither, "eyes" is yes. The script pairs questions by their position; here by
picture, and a picture that has not exactly two questions is refused. A missing answer is wrong.

Perception (ten subtasks, at most 2,000) is the headline, cognition (four, at most 800) the second; neither is in
percent. Reads `answers[0]` (Yes or No), `images[0]` and `extra["category"]`, the subtask.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from dora_vl.data.examples import Example
from dora_vl.errors import UserError
from dora_vl.scores.answer_rows import AnswerRow
from dora_vl.scores.benchmark import Benchmark, only
from dora_vl.scores.joins import REPEATED, ByKey, Key, picture_stem, plain, question_in
from dora_vl.scores.known_truth import right_answer
from dora_vl.scores.prompts import SHORT, YES_OR_NO
from dora_vl.scores.scored import Formula, Ratio, Scored, Tally, Total

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
PREFIX_CHARACTERS = 4


def said(answer: str) -> Literal["yes", "no", "other"]:
    """How the script reads an answer."""
    beginning = answer.lower()[:PREFIX_CHARACTERS]
    if "yes" in beginning:
        return "yes"
    return "no" if "no" in beginning else "other"


def score(examples: Sequence[Example], answers: Mapping[str, str]) -> Scored:
    """Perception, cognition and every subtask's score from 0 to 200.

    Raises:
        UserError: a picture of a subtask has not two questions.
    """
    right = {one.id: one.id in answers and said(answers[one.id]) == right_answer(one).lower() for one in examples}
    pictures = Counter(picture_of(one) for one in examples)
    both = Counter(picture_of(one) for one in examples if right[one.id])
    odd = [name for name, count in pictures.items() if count != 2]
    if odd:
        raise UserError(f"MME picture {odd[0][1]} of {odd[0][0]} has {pictures[odd[0]]} questions, not two")
    tally = Tally()
    for example in examples:
        task, picture = picture_of(example)
        columns = {f"right {task}": float(right[example.id]), f"asked {task}": 1.0}
        columns |= {f"both {task}": (both[task, picture] == 2) / 2, f"pictures {task}": 0.5}
        failed = example.id not in answers
        tally.add(example.id, float(right[example.id]), columns, unit=f"{task}\n{picture}", failed=failed)
    return tally.scored(_formulas({task for task, _ in pictures}))


def picture_of(example: Example) -> tuple[str, str]:
    """Its subtask and its picture, which both of a picture's questions share.

    Raises:
        UserError: it has not one picture.
    """
    if len(example.images) != 1:
        raise UserError(f"MME example {example.id} names {len(example.images)} pictures; it needs one")
    return str(example.extra.get("category", "")), example.images[0]


def _formulas(found: set[str]) -> dict[str, Formula]:
    """The two sums over the subtasks that are there, then the subtasks."""
    tasks: dict[str, Formula] = {
        task: Total((Ratio(f"right {task}", f"asked {task}"), Ratio(f"both {task}", f"pictures {task}")))
        for task in [
            *(one for one in (*PERCEPTION, *COGNITION) if one in found),
            *sorted(found - {*PERCEPTION, *COGNITION}),
        ]
    }
    sums: dict[str, Formula] = {}
    for name, members in (("perception", PERCEPTION), ("cognition", COGNITION)):
        there = tuple(tasks[task] for task in members if task in tasks)
        if there:
            sums[name] = Total(there)
    return {**sums, **tasks}


def prompt(example: Example) -> str:
    """LLaVA's wording: the own "Please answer yes or no." gives way to LLaVA's suffix."""
    return f"{example.question.replace(YES_OR_NO, '').strip()}\n{SHORT}"


def _row_key(row: AnswerRow) -> Key:
    path, question = REPEATED.sub("", row.id), question_in(row.prompt)
    return (path.partition("/")[0], picture_stem(path), question) if question else None


def _example_key(example: Example) -> Key:
    if not example.images:
        return None
    return str(example.extra.get("category")), picture_stem(example.images[0]), plain(example.question)


BENCHMARK = Benchmark(
    modes=only(score),
    prompt=prompt,
    together=picture_of,
    joins=(ByKey("subtask, picture and question", _row_key, _example_key),),
)
