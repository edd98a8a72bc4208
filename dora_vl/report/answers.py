"""A run's test as single answers with their scores: what was asked, what is right, what was said, how right it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_vl.data.example_file import ExampleFile
from dora_vl.data.examples import Answer, Clip, Example
from dora_vl.errors import UserError
from dora_vl.evaluation.result_files import Prediction, read_predictions
from dora_vl.evaluation.seq2seq_pictures import expected, in_words, media_of
from dora_vl.report.run_record import RunRecord, read_lines
from dora_vl.scores.commonsense import extracted
from dora_vl.scores.commonsense import score as commonsense_score
from dora_vl.scores.exact_match import final_answer
from dora_vl.scores.exact_match import score as exact_match_score
from dora_vl.scores.scored import Scored

PREDICTIONS = "predictions.jsonl"
BY_TASK = "predictions"
COMMONSENSE = {"generation": PREDICTIONS, "likelihood": "predictions_likelihood.jsonl"}


@dataclass(frozen=True, kw_only=True)
class Item:
    """One answered question.

    Attributes:
        truth, said: the parts that are compared, a choice in its words; `whole` is all that the model said.
        label, said_label: the same as a closed list has them: a choice's place (`a0`), else the words.
        share: its share of the headline, 1 right and 0 wrong in an accuracy; None where nothing scores it.
        pictures: paths below the test's picture folder.
    """

    id: str
    question: str
    truth: str
    said: str
    whole: str
    label: str
    said_label: str
    kind: str = ""
    share: float | None = None
    pictures: tuple[str, ...] = ()
    clip: Clip | None = None


@dataclass(frozen=True, kw_only=True)
class SetAnswers:
    """The answers to one set.

    Attributes:
        scored: None where it cannot be scored again here; `note` says why.
        pictures: root of the pictures; None: nothing names it.
    """

    name: str
    items: tuple[Item, ...]
    scored: Scored | None = None
    pictures: Path | None = None
    note: str = ""

    @property
    def is_accuracy(self) -> bool:
        """Whether an item is right or wrong."""
        return self.scored is not None and next(iter(self.scored.metrics)) in ("accuracy", "average")


def read_tests(run: RunRecord) -> tuple[list[SetAnswers], list[str]]:
    """Every set that a run was tested on, and a sentence for each that cannot be read."""
    evaluation = run.section("evaluation")
    if isinstance(evaluation.get("files"), Mapping):
        read = _read_commonsense if "scoring" in evaluation else _read_subtasks
        return read(run, evaluation)
    if not (run.folder / PREDICTIONS).is_file():
        return [], [f"{run.label}: it holds no {PREDICTIONS}; a run answers its evaluation.file after training."]
    try:
        return [_exact(run, evaluation)], []
    except UserError as error:
        return [], [f"{run.label}: {error}"]


def set_name(file: object) -> str:
    """What a set of questions is called: its file's name without the ending."""
    return Path(str(file or "test")).stem


def _exact(run: RunRecord, evaluation: Mapping[str, Any]) -> SetAnswers:
    """Short answers compared with the right one; questions that could not be asked count as wrong."""
    predictions = read_predictions(run.folder / PREDICTIONS)
    after = evaluation.get("answer_after")
    failed = run.metrics.get("failed_questions")
    unasked = [name for name in failed if name not in predictions] if isinstance(failed, Mapping) else []
    examples = [_example(one) for one in predictions.values()]
    examples += [Example(id=name, answers=(Answer(text=""),)) for name in unasked]
    answers = {name: one.prediction for name, one in predictions.items()}
    scored = exact_match_score(examples, answers, answer_after=after) if examples else None
    shares = {} if scored is None else scored.per_item
    folder = evaluation.get("image_folder") or run.section("data").get("image_folder")
    return SetAnswers(
        name=set_name(evaluation.get("file")),
        items=tuple(_exact_item(one, after, shares.get(one.id)) for one in predictions.values()),
        scored=scored,
        pictures=None if folder is None else run.path(folder),
    )


def _example(one: Prediction) -> Example:
    extra = {} if one.kind is None else {"kind": one.kind}
    return Example(id=one.id, images=tuple(one.images), answers=(Answer(text=one.truth),), extra=extra)


def _exact_item(one: Prediction, after: str | None, share: float | None) -> Item:
    said, truth = final_answer(one.prediction, after) or "", final_answer(one.truth, after) or ""
    return Item(
        id=one.id,
        question=one.question,
        truth=truth,
        said=said,
        whole=one.prediction,
        label=truth,
        said_label=said,
        kind=one.kind or "",
        share=share,
        pictures=tuple(one.images),
    )


def _read_subtasks(run: RunRecord, evaluation: Mapping[str, Any]) -> tuple[list[SetAnswers], list[str]]:
    """A VL-BART's tasks: answers by id, the questions in the records that the settings name."""
    from dora_vl.tasks import vlbart_image, vlbart_video

    subtasks = {**vlbart_image.subtasks(), **vlbart_video.subtasks()}
    found: list[SetAnswers] = []
    trouble: list[str] = [] if evaluation["files"] else [f"{run.label}: its settings name no evaluation.files."]
    for task, path in evaluation["files"].items():
        try:
            answers = _answers(run.folder / BY_TASK / f"{task}.jsonl")
            examples = list(ExampleFile(run.path(path), limit=evaluation.get("limit")))
            scored = subtasks[task].score(examples, answers) if _can_be_scored(examples) else None
        except (UserError, ImportError, KeyError) as error:
            trouble.append(f"{run.label}: the answers to {task} cannot be shown: {error}")
            continue
        shares = {} if scored is None else scored.per_item
        folder = evaluation.get("image_folder")
        found.append(
            SetAnswers(
                name=task,
                items=tuple(
                    _subtask_item(one, answers[one.id], shares.get(one.id)) for one in examples if one.id in answers
                ),
                scored=scored,
                pictures=None if folder is None else run.path(folder),
                note="" if scored is not None else "The publisher keeps the answers of this file.",
            )
        )
    return found, trouble


def _answers(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise UserError(f"{path.name} is not in the run's folder; the test comes after training")
    return {str(one["id"]): str(one["answer"]) for one in read_lines(path, []) if {"id", "answer"} <= set(one)}


def _can_be_scored(examples: Sequence[Example]) -> bool:
    return any(example.answers or "correct" in example.extra for example in examples)


def _subtask_item(example: Example, said: str, share: float | None) -> Item:
    truth = expected(example)
    return Item(
        id=example.id,
        question=example.question,
        truth=in_words(example, truth),
        said=in_words(example, said),
        whole=in_words(example, said),
        label=truth,
        said_label=said,
        kind=str(example.extra.get("kind", "")),
        share=share,
        pictures=() if example.video else tuple(media_of(example)),
        clip=example.video,
    )


def _read_commonsense(run: RunRecord, evaluation: Mapping[str, Any]) -> tuple[list[SetAnswers], list[str]]:
    """The commonsense sets, in each way that they were asked."""
    found: list[SetAnswers] = []
    trouble: list[str] = []
    for scoring in evaluation["scoring"]:
        try:
            predictions = read_predictions(run.folder / COMMONSENSE[scoring])
            found.append(_commonsense(scoring, predictions, evaluation.get("rule", "nvlabs")))
        except UserError as error:
            trouble.append(f"{run.label}: the answers by {scoring} cannot be shown: {error}")
    return found, trouble


def _commonsense(scoring: str, predictions: Mapping[str, Prediction], rule: Any) -> SetAnswers:
    right = {name: extracted(one.truth, str(one.kind), rule) for name, one in predictions.items()}
    examples = [
        Example(id=name, answers=(Answer(text=right[name]),), extra={"task": str(one.kind)})
        for name, one in predictions.items()
    ]
    answers = {name: one.prediction for name, one in predictions.items()}
    scored = commonsense_score(examples, answers, rule=rule)
    items = []
    for name, one in predictions.items():
        said = extracted(one.prediction, str(one.kind), rule)
        items.append(
            Item(
                id=name,
                question=one.question,
                truth=right[name],
                said=said,
                whole=one.prediction,
                label=right[name],
                said_label=said,
                kind=str(one.kind),
                share=scored.per_item.get(name),
            )
        )
    return SetAnswers(name=scoring, items=tuple(items), scored=scored)
