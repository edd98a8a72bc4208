"""A model's answers as one table: predictions.jsonl, safe to resume; other tools' files; metrics.json."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from dora_vl.data.example import JSON, Example, whole_file
from dora_vl.data.text_file import json_lines
from dora_vl.errors import UserError, one_line, shown
from dora_vl.evaluation.scores.benchmark import OWN_ID, AnswerRow, Benchmark

log = logging.getLogger(__name__)

PREDICTIONS, BY_TASK = "predictions.jsonl", "predictions"
"""Where a run's test leaves its predictions; of a VL-BART's tasks a file each in a folder."""
BY_SCORING = {"generation": PREDICTIONS, "likelihood": "predictions_likelihood.jsonl"}
"""Of commonsense sets, by `evaluation.scoring`."""
COLUMNS = ("id", "images", "question", "truth", "prediction", "kind")
"""What a line of the file holds."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A question and the model's answer to it.

    Attributes:
        images: paths relative to the picture folder.
        question: the text of the last question, without placeholders.
        truth: the answer in the question file.
        prediction: the model's answer; without an error empty only where it ended its answer at once.
        kind: the question's kind, where the file has one.
        error: why there is no answer, "" where there is one; in no file.
        cut_tokens: how many the text lost; in no file.
    """

    id: str
    images: list[str] = field(default_factory=list)
    question: str = ""
    truth: str = ""
    prediction: str = ""
    kind: str | None = None
    error: str = ""
    cut_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The answers to a set of questions.

    Attributes:
        rows: the answered ones, in the questions' order.
        failed: the reason for each question that could not be asked, by id.
        answered_before: how many an earlier run had answered.
        seconds: how long it took.
        sha256: of what gave the answers: adapter and base, or a file.
        options: that they were made with; empty for a file.
        joined_by: what a file's rows and the questions had in common; "" for a model's own answers.
        strangers: ids of rows of a file that answer no question.
    """

    rows: Sequence[Prediction] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    answered_before: int = 0
    seconds: float = 0.0
    sha256: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)
    joined_by: str = ""
    strangers: tuple[str, ...] = ()

    @cached_property
    def answers(self) -> dict[str, str]:
        """By id."""
        return {row.id: row.prediction for row in self.rows if not row.error}


def settings_file(path: Path) -> Path:
    """The file beside the predictions that says what they were made with."""
    return path.with_suffix(".settings.json")


def file_sha256(path: Path) -> str:
    """The hash of a file that answers depend on, such as an adapter's weights or the questions."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


class PredictionsFile:
    """Reads what an earlier run finished, then appends; use it as a context manager.

    Predictions made with other settings (another adapter, other questions) are thrown away, not mixed in.
    A last line that was cut while being written is removed.

    Args:
        path: the predictions file; None keeps them in memory.
        settings: whatever the answers depend on, as plain JSON values; None: the file is begun anew.

    Raises:
        UserError: a line other than the last is not a prediction; it names the line.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, object] | None = None) -> None:
        self.done: dict[str, Prediction] = {}
        if path is None:
            self._stream = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - one way to write
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if settings is not None and same_settings(path, settings):
            cut_broken_tail(path)
            self.done = read_predictions(path)
        else:
            if settings is not None and path.exists():
                log.info("%s was made with another adapter, questions or settings: started anew", path)
            path.unlink(missing_ok=True)  # before the settings change, so that the two never disagree
            if settings is not None:
                scratch = settings_file(path).with_name(f".{settings_file(path).name}.part")
                scratch.write_text(json.dumps(dict(settings), indent=1) + "\n", encoding="utf-8")
                scratch.replace(settings_file(path))
        self._stream = path.open("a", encoding="utf-8")

    def add(self, prediction: Prediction) -> None:
        """Appends one line; it is in the file when `flush` returns."""
        self.done[prediction.id] = prediction
        self._stream.write(_line(prediction))

    def flush(self) -> None:
        """Hands everything to the operating system, so that a killed process loses nothing written before."""
        self._stream.flush()

    def __enter__(self) -> PredictionsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


def same_settings(path: Path, settings: Mapping[str, object]) -> bool:
    """Whether a predictions file is there and was made with these settings."""
    try:
        stated = json.loads(settings_file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return path.exists() and stated == json.loads(json.dumps(dict(settings)))


def _line(prediction: Prediction) -> str:
    return json.dumps({name: getattr(prediction, name) for name in COLUMNS}, ensure_ascii=False) + "\n"


def write_in_order(path: Path, predictions: Mapping[str, Prediction], order: Sequence[str]) -> None:
    """Writes the file anew: the predictions of `order` first and in it, then the others; whole or not at all."""
    names = dict.fromkeys([*(name for name in order if name in predictions), *predictions])
    with whole_file(path) as stream:
        stream.writelines(_line(predictions[name]) for name in names)


def cut_broken_tail(path: Path) -> int:
    """Removes what stands after the last newline: a line that was being written when the process died.

    Returns:
        The number of bytes removed.
    """
    with path.open("rb+") as stream:
        size = stream.seek(0, os.SEEK_END)
        position, tail = size, b""
        while position and b"\n" not in tail:
            position = max(0, position - 65_536)
            stream.seek(position)
            tail = stream.read(size - position)
        keep = position + tail.rfind(b"\n") + 1
        stream.truncate(keep)
    if keep < size:
        log.info("%s: removed a line of %d bytes that was cut while being written", path, size - keep)
    return size - keep


def read_predictions(path: Path) -> dict[str, Prediction]:
    """Every prediction of the file by its question's id, in the file's order; of two with one id the later stands.

    Raises:
        UserError: a line is not a prediction; it names the line.
    """
    predictions: dict[str, Prediction] = {}
    try:
        for number, record in json_lines(path, "predictions"):
            prediction = _prediction(record, f"{path}, line {number}")
            predictions[prediction.id] = prediction
    except UserError as error:
        raise UserError(f"{error}; delete the file to start anew") from None
    return predictions


def _prediction(record: Mapping[str, Any], where: str) -> Prediction:
    try:
        prediction = Prediction(**record)
    except TypeError as error:
        raise UserError(f"{where}: not a prediction ({one_line(str(error), 100)})") from None
    if not isinstance(prediction.id, str) or not isinstance(record.get("prediction"), str):
        raise UserError(f"{where}: not a prediction (id and prediction must be text)")
    return prediction


METRICS = "metrics.json"
ENTRIES, OPTIONS = "benchmarks", "asked_with"


def refuse_anothers(path: Path) -> None:
    """Keeps a training run's own metrics file from being replaced.

    Raises:
        UserError: the file is there and was not written here.
    """
    if path.is_file() and (content := _read(path)) and not isinstance(content.get(ENTRIES), Mapping):
        raise UserError(f"{path} is not of `dora-vl evaluate`, a training run's perhaps; name another folder with --to")


def write_metrics(
    path: Path,
    origin: Mapping[str, JSON],
    entries: Mapping[str, JSON],
    *,
    asked: Collection[str],
    options: Mapping[str, JSON],
) -> list[str]:
    """Writes the entries, with those of before that are still true; without any there is no file.

    Args:
        origin: what all numbers of the file are of; hashes tell an adapter from its successor at the same place.
        entries: of the benchmarks that have a score.
        asked: every benchmark of the command; of these no entry of before stays.
        options: of the answers, by benchmark; empty for a predictions file.

    Returns:
        What to say: where the numbers are, and which of before stayed and which went.
    """
    content = _read(path)
    before, options_before = (
        value if isinstance(value := content.get(name), Mapping) else {} for name in (ENTRIES, OPTIONS)
    )
    header = json.loads(json.dumps(dict(origin)))
    same = all(content.get(name) == value for name, value in header.items())
    kept = {name: entry for name, entry in before.items() if same and name not in asked and _holds(entry)}
    gone = [name for name in before if name not in kept and name not in entries]
    benchmarks = kept | dict(entries)
    if benchmarks:
        made_with = {name: value for name, value in options_before.items() if name in kept}
        made_with |= {name: value for name, value in options.items() if name in entries}
        with whole_file(path) as stream:
            stream.write(
                json.dumps({**header, OPTIONS: made_with, ENTRIES: benchmarks}, indent=1, ensure_ascii=False) + "\n"
            )
    else:
        path.unlink(missing_ok=True)
    lines = []
    if gone:
        lines.append(f"{path}: no longer holds {', '.join(gone)}: of other answers, questions, --limit or --against")
    if entries:
        stayed = f", those of {', '.join(kept)} from before" if kept else ""
        lines.append(f"{path}: all numbers{stayed}")
    return lines


def _holds(entry: JSON) -> bool:
    """Whether the benchmark's file is what it was when it was scored."""
    file = Path(str(entry.get("file")) if isinstance(entry, Mapping) else "")
    return file.is_file() and file_sha256(file) == entry.get("file_sha256")


def _read(path: Path) -> Mapping[str, JSON]:
    """What is there; nothing where there is no file, or none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, Mapping) else {}


def join(
    benchmark: Benchmark, examples: Sequence[Example], rows: Sequence[AnswerRow], *, path: Path, questions: Path
) -> Predictions:
    """Each row of another tool's file under its question's id; of two for one question the later stands.

    A row's question is found by the id, or as the benchmark's own files name it.

    Raises:
        UserError: no row has a question, or it is not clear which; with the numbers.
    """
    matches: dict[str, list[str | None]] = {}
    unclear: list[str] = []
    for way in (OWN_ID, *benchmark.joins):
        try:
            matches[way.by] = way.pairs(rows, examples)
        except UserError as error:
            unclear.append(str(error))
    counts = {by: len(rows) - names.count(None) for by, names in matches.items()}
    most = max(counts.values())
    if not most:
        raise UserError(
            f"{path}: {unclear[0]}"
            if unclear
            else f"{path} ({len(rows)} answers) and {questions} ({len(examples)} questions) have no id in common, "
            f"looked for by {'; '.join(counts)}; first ids {shown(rows[0].id, 40)} and {shown(examples[0].id, 40)}; "
            "were they made from the same questions?"
        )
    by, *others = [way for way, count in counts.items() if count == most]
    if differing := [other for other in others if matches[other] != matches[by]]:
        raise UserError(
            f"{path}: {most} of {len(rows)} answers fit a question of {questions} by {by}, and as many fit another "
            f"one by {differing[0]}; give each answer its question's id"
        )
    answers = {
        name: f"a{row.answer}" if row.is_number and benchmark.labels_choices else row.answer
        for name, row in zip(matches[by], rows, strict=True)
        if name is not None
    }
    strangers = {row.id: row.answer for name, row in zip(matches[by], rows, strict=True) if name is None}
    return Predictions(
        rows=[Prediction(id=name, prediction=answer) for name, answer in (strangers | answers).items()],
        joined_by=by,
        strangers=tuple(strangers),
    )
