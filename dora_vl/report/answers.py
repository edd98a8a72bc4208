"""A run's test as single answers with their scores: what was asked, what is right, what was said, how right it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from dora_vl.data.example import Answer, Clip, Example, ExampleFile
from dora_vl.errors import UserError
from dora_vl.evaluation.baselines import COMMONEST, EXCHANGED, WARNING
from dora_vl.evaluation.predictions import BY_SCORING, BY_TASK, PREDICTIONS, Prediction, read_predictions
from dora_vl.evaluation.questions import expected, has_truth, in_words
from dora_vl.evaluation.scores.benchmark import Scorer
from dora_vl.evaluation.scores.exact import commonsense_score, extracted, final_answer, normalised
from dora_vl.evaluation.scores.exact import score as exact_match_score
from dora_vl.evaluation.scores.scored import Difference, Scored, intervals, paired_differences
from dora_vl.report.run_record import RunRecord


@dataclass(frozen=True, kw_only=True)
class Item:
    """One answered question.

    Attributes:
        truth, prediction: the parts that are compared, a choice in its words; `whole` is all that the model said.
        label, prediction_label: the same as a closed list has them: a choice's place (`a0`), else the words.
        share: its share of the headline; None where nothing scores it.
    """

    id: str
    question: str
    truth: str
    prediction: str
    whole: str
    label: str
    prediction_label: str
    kind: str = ""
    share: float | None = None
    pictures: tuple[str, ...] = ()
    clip: Clip | None = None


@dataclass(frozen=True, kw_only=True)
class SetAnswers:
    """The answers to one set; `note` says why it cannot be `scored` again, `pictures` is their root, if known."""

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
    """Every set that a run was tested on, scored again, and a sentence for each that cannot be read."""
    evaluation = run.section("evaluation")
    files, scorings = evaluation.get("files"), evaluation.get("scoring")
    if not isinstance(files, Mapping) and not (run.folder / PREDICTIONS).is_file():
        return [], [f"{run.label}: it holds no {PREDICTIONS}; a run answers its evaluation.file after training."]
    readers: dict[str, Callable[[], SetAnswers]] = {}
    if not isinstance(files, Mapping):
        readers[set_name(evaluation.get("file"))] = partial(_exact, run, evaluation)
    elif scorings is not None:
        readers = {scoring: partial(_commonsense, run, evaluation, scoring) for scoring in scorings}
    else:
        readers = {task: partial(_task, run, evaluation, task, run.path(file)) for task, file in files.items()}
    sets: list[SetAnswers] = []
    trouble = [] if readers else [f"{run.label}: its settings name no evaluation.files."]
    for name, read in readers.items():
        try:
            sets.append(read())
        except (UserError, ImportError, KeyError) as error:
            trouble.append(f"{run.label}: the answers to {name} cannot be shown: {error}")
    return sets, trouble


def set_name(file: object) -> str:
    """What a set of questions is called: its file's name without the ending."""
    return Path(str(file or "test")).stem


def _exact(run: RunRecord, evaluation: Mapping[str, Any]) -> SetAnswers:
    """Short answers compared with the right one; questions that could not be asked count as wrong."""
    rows = read_predictions(run.folder / PREDICTIONS)
    after, failed = evaluation.get("answer_after"), run.metrics.get("failed_questions")
    unasked = [name for name in failed if name not in rows] if isinstance(failed, Mapping) else []
    examples = [
        Example(id=row.id, answers=(Answer(text=row.truth),), images=tuple(row.images), extra=_kind(row))
        for row in (*rows.values(), *(Prediction(id=name) for name in unasked))
    ]
    folder = evaluation.get("image_folder") or run.section("data").get("image_folder")
    return _answered(
        set_name(evaluation.get("file")),
        rows.values(),
        examples,
        partial(exact_match_score, answer_after=after) if examples else None,
        lambda row: (final_answer(row.truth, after), final_answer(row.prediction, after)),
        pictures=None if folder is None else run.path(folder),
    )


def _kind(row: Prediction) -> dict[str, Any]:
    return {} if row.kind is None else {"kind": row.kind}


def _task(run: RunRecord, evaluation: Mapping[str, Any], task: str, records: Path) -> SetAnswers:
    """A VL-BART's task: answers by id, the questions in the records that the settings name."""
    from dora_vl.evaluation import vlbart_tasks

    rows = read_predictions(run.folder / BY_TASK / f"{task}.jsonl")
    subtask = vlbart_tasks.all_subtasks()[task]
    examples = list(ExampleFile(records, limit=evaluation.get("limit")))
    by_id, folder = {example.id: example for example in examples}, evaluation.get("image_folder")
    return _answered(
        task,
        [rows[name] for name in by_id if name in rows],
        examples,
        subtask.score if has_truth(examples) else None,
        lambda row: (expected(by_id[row.id]), row.prediction),
        pictures=None if folder is None else run.path(folder),
        note="" if has_truth(examples) else "The publisher keeps the answers of this file.",
    )


def _commonsense(run: RunRecord, evaluation: Mapping[str, Any], scoring: str) -> SetAnswers:
    """The commonsense sets, in one of the ways that they were asked."""
    rule: Any = evaluation.get("rule", "nvlabs")
    rows = read_predictions(run.folder / BY_SCORING[scoring]).values()

    def compared(row: Prediction) -> tuple[str, str]:
        truth, answer = (extracted(text, str(row.kind), rule) for text in (row.truth, row.prediction))
        return truth, answer

    examples = [
        Example(id=row.id, answers=(Answer(text=compared(row)[0]),), extra={"task": str(row.kind)}) for row in rows
    ]
    return _answered(scoring, rows, examples, partial(commonsense_score, rule=rule), compared)


def _answered(
    name: str,
    rows: Collection[Prediction],
    examples: Sequence[Example],
    score: Scorer | None,
    compared: Callable[[Prediction], tuple[str, str]],
    *,
    pictures: Path | None = None,
    note: str = "",
) -> SetAnswers:
    """A set's answers with their score; `compared` gives what of a row is, the right answer and the model's."""
    scored = None if score is None else score(examples, {row.id: row.prediction for row in rows})
    by_id = {example.id: example for example in examples}
    items: list[Item] = []
    for row in rows:
        example, (truth, answer) = by_id[row.id], compared(row)
        items.append(
            Item(
                id=row.id,
                question=row.question,
                truth=in_words(example, truth),
                prediction=in_words(example, answer),
                whole=in_words(example, row.prediction),
                label=truth,
                prediction_label=answer,
                kind=row.kind or "",
                share=None if scored is None else scored.per_item.get(row.id),
                pictures=tuple(row.images),
                clip=example.video,
            )
        )
    return SetAnswers(name=name, items=tuple(items), scored=scored, pictures=pictures, note=note)


BASELINES = {COMMONEST: "each question's commonest answer", EXCHANGED: "with pictures exchanged"}
MOST_LABELS = 24
OTHER = "other"
DETAIL = "/"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A run's number of a metric over `n` items; its `difference` from the first run is `clear` if not maybe 0."""

    value: float
    n: int
    interval: tuple[float, float] | None
    difference: str = ""
    clear: bool = False


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
    """A row for each metric of each set, scored again or else as `metrics.json` has it, and what cannot be compared."""
    by_run, notes = [_recorded(run) for run in runs], dict[str, None]()
    firsts = {answers.name: answers.scored for answers in tests[0]}
    for number, (sets, answered) in enumerate(zip(by_run, tests, strict=True)):
        for answers in answered:
            if answers.scored is None:
                continue
            try:
                first = firsts.get(answers.name) if number else None
                differences = {} if first is None else paired_differences(answers.scored, first)
            except UserError as error:
                differences = {}
                notes[f"No paired difference for {answers.name}: {error}."] = None
            sets[answers.name] = sets.get(answers.name, {}) | _cells(answers.scored, differences)
    return _rows(by_run), [*notes]


def _rows(by_run: Sequence[Mapping[str, Mapping[str, Cell]]]) -> list[ScoreRow]:
    """A row for each metric of each set that a run has numbers of."""
    rows: list[ScoreRow] = []
    for name in dict.fromkeys(name for sets in by_run for name in sets):
        cells = [sets.get(name, {}) for sets in by_run]
        for metric in dict.fromkeys(metric for of_run in cells for metric in of_run):
            rows.append(ScoreRow(test=name, metric=metric, cells=tuple(of_run.get(metric) for of_run in cells)))
    return rows


def _cells(scored: Scored, differences: Mapping[str, Difference]) -> dict[str, Cell]:
    ranges, cells = intervals(scored), dict[str, Cell]()
    for name, value in scored.metrics.items():
        apart = differences.get(name)
        difference = "" if apart is None else f"{apart.value:+.2f} ({apart.low:+.2f} to {apart.high:+.2f})"
        clear = apart is not None and (apart.low > 0 or apart.high < 0)
        n = scored.items_of(name)
        cells[name] = Cell(value=value, n=n, interval=ranges.get(name), difference=difference, clear=clear)
    return cells


def _recorded(run: RunRecord) -> dict[str, dict[str, Cell]]:
    """The numbers of `metrics.json` by set and metric, in percent."""
    tasks, sets = run.metrics.get("tasks"), dict[str, dict[str, Cell]]()
    for name, task in tasks.items() if isinstance(tasks, Mapping) else ():
        limits = task.get("intervals_95") or {}
        cells = {metric: _cell(value, task["n"], limits.get(metric)) for metric, value in task["metrics"].items()}
        sets[name] = cells | _baseline_cells(task)
    if "accuracy" in run.metrics and "interval_95" in run.metrics:
        limits = [100 * limit for limit in run.metrics["interval_95"]]
        cells = {"accuracy": _cell(100 * run.metrics["accuracy"], run.metrics["n"], limits)}
        sets[set_name(run.metrics.get("evaluation_file"))] = cells | _baseline_cells(run.metrics)
    return sets


def _cell(value: float, n: int, limits: Sequence[float] | None) -> Cell:
    return Cell(value=float(value), n=int(n), interval=None if limits is None else (limits[0], limits[1]))


def _baseline_cells(entry: Mapping[str, Any]) -> dict[str, Cell]:
    """What a score is compared with, by what a row of it is called."""
    numbers = entry.get("baselines") or {}
    return {
        title: _cell(number["value"], number["n"], number["interval_95"])
        for name, title in BASELINES.items()
        if (number := numbers.get(name)) is not None
    }


def blind(runs: Sequence[RunRecord]) -> list[str]:
    """A sentence for each set whose answers do not depend on its pictures."""
    sentences = []
    for run in runs:
        parts = [run.metrics.get("tasks"), run.benchmarks.get("benchmarks"), {"": run.metrics}]
        for name, entry in (pair for part in parts if isinstance(part, Mapping) for pair in part.items()):
            if warning := (entry.get("baselines") or {}).get(WARNING):
                sentences.append(f"{', '.join(filter(None, (run.label, name)))}: {warning}.")
    return sentences


def benchmark_rows(runs: Sequence[RunRecord]) -> list[ScoreRow]:
    """What `dora-vl evaluate` wrote beside the runs: headline and other whole metrics of each benchmark."""
    by_run: list[dict[str, dict[str, Cell]]] = []
    for run in runs:
        benchmarks, cells = run.benchmarks.get("benchmarks"), dict[str, dict[str, Cell]]()
        for name, entry in benchmarks.items() if isinstance(benchmarks, Mapping) else ():
            metrics = entry["metrics"].items()
            cells[name] = {key: _cell(entry["value"], entry["n"], entry["interval_95"]) for key, entry in metrics}
            cells[name] |= _baseline_cells(entry)
        by_run.append(cells)
    return [row for row in _rows(by_run) if not row.is_part]


def confusion(title: str, items: Sequence[Item]) -> Confusion | None:
    """The table of a set whose answers are a closed list; None where they are none: too many, or hardly repeated."""
    pairs = [(normalised(item.label), normalised(item.prediction_label)) for item in items if item.label]
    counts = Counter(truth for truth, _ in pairs)
    if not 2 <= len(counts) <= MOST_LABELS or len(pairs) < 2 * len(counts):
        return None
    labels = tuple(sorted(counts, key=lambda label: (-counts[label], label)))
    cells = Counter((truth, prediction if prediction in counts else OTHER) for truth, prediction in pairs)
    strangers = any(prediction not in counts for _, prediction in pairs)
    columns = (*labels, OTHER) if strangers else labels
    rows = tuple(tuple(cells[truth, prediction] for prediction in columns) for truth in labels)
    return Confusion(title=title, labels=labels, columns=columns, counts=rows)


def worst(items: Sequence[Item], most: int, *, is_accuracy: bool) -> list[Item]:
    """The answers with the lowest scores, of every kind in turn; of right and wrong ones those that are wrong."""
    scored = [item for item in items if item.share is not None and (item.share < 0.5 or not is_accuracy)]
    by_kind: dict[str, list[Item]] = {}
    for item in sorted(scored, key=lambda item: item.share or 0.0):
        by_kind.setdefault(item.kind, []).append(item)
    in_turn = [item for items in zip_longest(*by_kind.values()) for item in items if item is not None]
    return in_turn[:most]
