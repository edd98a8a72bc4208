"""A run's test as single answers with their scores: what was asked, what is right, what was said, how right it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dora_vl.data.example import Answer, Clip, Example, ExampleFile
from dora_vl.errors import UserError
from dora_vl.evaluation.baselines import COMMONEST, EXCHANGED, WARNING
from dora_vl.evaluation.predictions import BY_SCORING, BY_TASK, PREDICTIONS, Prediction, read_predictions
from dora_vl.evaluation.questions import expected, has_truth, in_words
from dora_vl.evaluation.scores.commonsense import extracted
from dora_vl.evaluation.scores.commonsense import score as commonsense_score
from dora_vl.evaluation.scores.exact import final_answer, normalised
from dora_vl.evaluation.scores.exact import score as exact_match_score
from dora_vl.evaluation.scores.scored import Scored, intervals, paired_differences
from dora_vl.report.run_record import RunRecord


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
    examples = [
        Example(
            id=one.id,
            images=tuple(one.images),
            answers=(Answer(text=one.truth),),
            extra={} if one.kind is None else {"kind": one.kind},
        )
        for one in predictions.values()
    ]
    examples += [Example(id=name, answers=(Answer(text=""),)) for name in unasked]
    answers = {name: one.prediction for name, one in predictions.items()}
    scored = exact_match_score(examples, answers, answer_after=after) if examples else None
    shares = {} if scored is None else scored.per_item
    folder = evaluation.get("image_folder") or run.section("data").get("image_folder")
    return SetAnswers(
        name=set_name(evaluation.get("file")),
        items=tuple(
            _item(
                one, final_answer(one.truth, after) or "", final_answer(one.prediction, after) or "", shares.get(one.id)
            )
            for one in predictions.values()
        ),
        scored=scored,
        pictures=None if folder is None else run.path(folder),
    )


def _item(row: Prediction, truth: str, answer: str, share: float | None, example: Example | None = None) -> Item:
    """An answered question; `truth` and `answer` are what is compared, of an example's choices their labels."""
    return Item(
        id=row.id,
        question=row.question,
        truth=in_words(example, truth),
        said=in_words(example, answer),
        whole=in_words(example, row.prediction),
        label=truth,
        said_label=answer,
        kind=row.kind or "",
        share=share,
        pictures=tuple(row.images),
        clip=None if example is None else example.video,
    )


def _read_subtasks(run: RunRecord, evaluation: Mapping[str, Any]) -> tuple[list[SetAnswers], list[str]]:
    """A VL-BART's tasks: answers by id, the questions in the records that the settings name."""
    from dora_vl.evaluation import vlbart_tasks

    subtasks = {**vlbart_tasks.image_subtasks(), **vlbart_tasks.video_subtasks()}
    found: list[SetAnswers] = []
    trouble: list[str] = [] if evaluation["files"] else [f"{run.label}: its settings name no evaluation.files."]
    for task, path in evaluation["files"].items():
        try:
            path = run.folder / BY_TASK / f"{task}.jsonl"
            rows = read_predictions(path)
            answers = {name: row.prediction for name, row in rows.items()}
            examples = list(ExampleFile(run.path(path), limit=evaluation.get("limit")))
            scored = subtasks[task].score(examples, answers) if has_truth(examples) else None
        except (UserError, ImportError, KeyError) as error:
            trouble.append(f"{run.label}: the answers to {task} cannot be shown: {error}")
            continue
        shares = {} if scored is None else scored.per_item
        folder = evaluation.get("image_folder")
        found.append(
            SetAnswers(
                name=task,
                items=tuple(
                    _item(rows[one.id], expected(one), answers[one.id], shares.get(one.id), one)
                    for one in examples
                    if one.id in rows
                ),
                scored=scored,
                pictures=None if folder is None else run.path(folder),
                note="" if scored is not None else "The publisher keeps the answers of this file.",
            )
        )
    return found, trouble


def _read_commonsense(run: RunRecord, evaluation: Mapping[str, Any]) -> tuple[list[SetAnswers], list[str]]:
    """The commonsense sets, in each way that they were asked."""
    found: list[SetAnswers] = []
    trouble: list[str] = []
    for scoring in evaluation["scoring"]:
        try:
            predictions = read_predictions(run.folder / BY_SCORING[scoring])
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
    items = [
        _item(one, right[name], extracted(one.prediction, str(one.kind), rule), scored.per_item.get(name))
        for name, one in predictions.items()
    ]
    return SetAnswers(name=scoring, items=tuple(items), scored=scored)


# Scores with their intervals, run beside run with paired differences, and who was taken for whom in closed answers.


BASELINES = {COMMONEST: "each question's commonest answer", EXCHANGED: "with pictures exchanged"}
MOST_LABELS = 24
OTHER = "other"
DETAIL = "/"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run's number of a metric over `n` items; `difference` is from the first run, "" where there is none."""

    value: float
    n: int
    interval: tuple[float, float] | None
    difference: str = ""
    clear: bool = False
    """The difference's interval leaves 0 out."""


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """One metric of one set over the runs; None where a run has no such number."""

    test: str
    metric: str
    cells: tuple[Cell | None, ...]

    @property
    def n(self) -> int:
        """How many items it is over."""
        return next(cell.n for cell in self.cells if cell is not None)

    @property
    def is_part(self) -> bool:
        """Whether it is of a part of the set."""
        return DETAIL in self.metric


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """How often each right answer (a row) was answered with each (a column)."""

    title: str
    labels: tuple[str, ...]
    columns: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    def share(self, row: int, column: int) -> float:
        """Of the row's answers; what is there at all is seen."""
        counts = self.counts[row]
        return max(0.12, counts[column] / sum(counts)) if counts[column] else 0.0


def score_rows(runs: Sequence[RunRecord], tests: Sequence[Sequence[SetAnswers]]) -> tuple[list[ScoreRow], list[str]]:
    """A row for each metric of each set, and sentences about what cannot be compared.

    Args:
        tests: of each run; what cannot be scored again is as its `metrics.json` has it.
    """
    by_name = [{one.name: one for one in several if one.scored is not None} for several in tests]
    rows: list[ScoreRow] = []
    notes: list[str] = []
    recorded = [_recorded(run) for run in runs]
    for name in dict.fromkeys(name for one in (*by_name, *recorded) for name in one):
        found = [one.get(name) for one in by_name]
        cells = [
            kept.get(name, {}) | ({} if one is None else _cells(one, found[0] if place else None, notes))
            for place, (one, kept) in enumerate(zip(found, recorded, strict=True))
        ]
        rows += _rows(name, cells)
    return rows, list(dict.fromkeys(notes))


def _rows(name: str, cells: Sequence[Mapping[str, Cell]]) -> list[ScoreRow]:
    metrics = dict.fromkeys(metric for one in cells for metric in one)
    return [ScoreRow(test=name, metric=one, cells=tuple(cell.get(one) for cell in cells)) for one in metrics]


def _cells(one: SetAnswers, first: SetAnswers | None, notes: list[str]) -> dict[str, Cell]:
    scored = one.scored
    if scored is None:
        return {}
    ranges = intervals(scored)
    differences = {}
    if first is not None and first.scored is not None:
        try:
            differences = paired_differences(scored, first.scored)
        except UserError as error:
            notes.append(f"No paired difference for {one.name}: {error}.")
    found = {}
    for name, value in scored.metrics.items():
        apart = differences.get(name)
        told = "" if apart is None else f"{apart.value:+.2f} ({apart.low:+.2f} to {apart.high:+.2f})"
        clear = apart is not None and (apart.low > 0 or apart.high < 0)
        n = scored.items_of(name)
        found[name] = Cell(value=value, n=n, interval=ranges.get(name), difference=told, clear=clear)
    return found


def _recorded(run: RunRecord) -> dict[str, dict[str, Cell]]:
    """The numbers of `metrics.json` by set and metric, in percent."""
    tasks, found = run.metrics.get("tasks"), dict[str, dict[str, Cell]]()
    for name, one in tasks.items() if isinstance(tasks, Mapping) else ():
        limits = one.get("intervals_95") or {}
        own = {metric: _cell(value, one["n"], limits.get(metric)) for metric, value in one["metrics"].items()}
        found[name] = own | _baseline_cells(one)
    if "accuracy" in run.metrics and "interval_95" in run.metrics:
        limits = [100 * limit for limit in run.metrics["interval_95"]]
        own = {"accuracy": _cell(100 * run.metrics["accuracy"], run.metrics["n"], limits)}
        found[set_name(run.metrics.get("evaluation_file"))] = own | _baseline_cells(run.metrics)
    return found


def _cell(value: float, n: int, limits: Sequence[float] | None) -> Cell:
    return Cell(value=float(value), n=int(n), interval=None if limits is None else (limits[0], limits[1]))


def _baseline_cells(entry: Mapping[str, Any]) -> dict[str, Cell]:
    """What a score is compared with, by what a row of it is called."""
    known = entry.get("baselines") or {}
    return {
        title: _cell(one["value"], one["n"], one["interval_95"])
        for name, title in BASELINES.items()
        if (one := known.get(name)) is not None
    }


def blind(runs: Sequence[RunRecord]) -> list[str]:
    """A sentence for each set whose answers do not depend on its pictures."""
    said = []
    for run in runs:
        parts = [run.metrics.get("tasks"), run.benchmarks.get("benchmarks"), {"": run.metrics}]
        for name, entry in (pair for part in parts if isinstance(part, Mapping) for pair in part.items()):
            warning = (entry.get("baselines") or {}).get(WARNING)
            said += [f"{', '.join(filter(None, (run.label, name)))}: {warning}."] if warning else []
    return said


def benchmark_rows(runs: Sequence[RunRecord]) -> list[ScoreRow]:
    """What `dora-vl evaluate` wrote beside the runs: headline and other whole metrics of each benchmark."""
    found = [_benchmarks(run) for run in runs]
    names = dict.fromkeys(name for one in found for name in one)
    rows = [row for name in names for row in _rows(name, [one.get(name, {}) for one in found])]
    return [row for row in rows if not row.is_part]


def _benchmarks(run: RunRecord) -> dict[str, dict[str, Cell]]:
    entries = run.benchmarks.get("benchmarks")
    return {
        name: {metric: _cell(one["value"], one["n"], one["interval_95"]) for metric, one in entry["metrics"].items()}
        | _baseline_cells(entry)
        for name, entry in (entries.items() if isinstance(entries, Mapping) else ())
    }


def confusion(title: str, items: Sequence[Item]) -> Confusion | None:
    """The table of a set whose answers are a closed list; None where they are none: too many, or hardly repeated."""
    pairs = [(normalised(one.label), normalised(one.said_label)) for one in items if one.label]
    counts = Counter(truth for truth, _ in pairs)
    if not 2 <= len(counts) <= MOST_LABELS or len(pairs) < 2 * len(counts):
        return None
    labels = tuple(sorted(counts, key=lambda label: (-counts[label], label)))
    cells = Counter((truth, said if said in counts else OTHER) for truth, said in pairs)
    strangers = any(said not in counts for _, said in pairs)
    columns = (*labels, OTHER) if strangers else labels
    rows = tuple(tuple(cells[truth, said] for said in columns) for truth in labels)
    return Confusion(title=title, labels=labels, columns=columns, counts=rows)


def worst(items: Sequence[Item], most: int, *, is_accuracy: bool) -> list[Item]:
    """The answers with the lowest scores, of every kind in turn; of right and wrong ones those that are wrong."""
    scored = [one for one in items if one.share is not None and (one.share < 0.5 or not is_accuracy)]
    by_kind: dict[str, list[Item]] = {}
    for one in sorted(scored, key=lambda one: one.share or 0.0):
        by_kind.setdefault(one.kind, []).append(one)
    longest = max(map(len, by_kind.values()), default=0)
    in_turn = [of_kind[place] for place in range(longest) for of_kind in by_kind.values() if place < len(of_kind)]
    return in_turn[:most]
