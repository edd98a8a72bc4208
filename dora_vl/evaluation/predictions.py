"""`predictions.jsonl`, one answered question a line, safe to resume; `metrics.json`, all numbers of one model."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from dora_vl.data.example import JSON, Example, whole_file
from dora_vl.data.text_file import json_lines
from dora_vl.errors import UserError, one_line, shown
from dora_vl.evaluation.scores.benchmark import OWN_ID, AnswerRow, Benchmark

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One line of the file.

    Attributes:
        images: paths relative to the picture folder.
        question: the text of the last question, without placeholders.
        truth: the answer in the question file.
        prediction: the model's answer; may be empty only when the model ended its answer at once.
        kind: the question's kind, where the file has one.
    """

    id: str
    images: list[str]
    question: str
    truth: str
    prediction: str
    kind: str | None = None


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
        path: the predictions file.
        settings: whatever the answers depend on, as plain JSON values; compared for equality.

    Raises:
        UserError: a line other than the last is not a prediction; it names the line.
    """

    def __init__(self, path: Path, settings: Mapping[str, object]) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.done = self._take_over(json.loads(json.dumps(dict(settings))))
        self._stream = path.open("a", encoding="utf-8")

    def _take_over(self, settings: dict[str, object]) -> dict[str, Prediction]:
        """The earlier predictions, if they were made with the same settings; else starts the file anew."""
        beside = settings_file(self._path)
        if self._path.exists() and same_settings(self._path, settings):
            cut_broken_tail(self._path)
            return read_predictions(self._path)
        if self._path.exists():
            log.info("%s was made with another adapter, questions or settings: started anew", self._path)
            self._path.unlink()  # before the settings change, so that the two never disagree
        scratch = beside.with_name(f".{beside.name}.part")
        scratch.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        scratch.replace(beside)
        return {}

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
    """Whether a predictions file was made with these settings."""
    beside = settings_file(path)
    return beside.exists() and _read_settings(beside) == json.loads(json.dumps(dict(settings)))


def _line(prediction: Prediction) -> str:
    return json.dumps(asdict(prediction), ensure_ascii=False) + "\n"


def _read_settings(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None  # unreadable settings equal no settings: the predictions are made again


def write_in_order(path: Path, predictions: Mapping[str, Prediction], order: Sequence[str]) -> None:
    """Writes the file anew: the predictions of `order` first and in it, then the others; whole or not at all."""
    names = dict.fromkeys([*(name for name in order if name in predictions), *predictions])
    scratch = path.with_name(f".{path.name}.part")
    with scratch.open("w", encoding="utf-8") as stream:
        stream.writelines(_line(predictions[name]) for name in names)
    scratch.replace(path)


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
    if not isinstance(prediction.id, str) or not isinstance(prediction.prediction, str):
        raise UserError(f"{where}: not a prediction (id and prediction must be text)")
    return prediction


METRICS = "metrics.json"
ENTRIES, ASKED_WITH = "benchmarks", "asked_with"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What all numbers of a file are of; hashes tell an adapter from its successor at the same place.

    Attributes:
        answers_sha256: by what was hashed: adapter and base, or predictions.
    """

    answers_of: str
    answers_sha256: Mapping[str, str]
    against: str | None = None
    against_sha256: Mapping[str, str] | None = None
    limit: int | None = None


def refuse_anothers(path: Path) -> None:
    """Keeps a training run's own metrics file from being replaced.

    Raises:
        UserError: the file is there and was not written here.
    """
    if path.is_file() and (there := _read(path)) and not isinstance(there.get(ENTRIES), Mapping):
        raise UserError(f"{path} is not of `dora-vl evaluate`, a training run's perhaps; name another folder with --to")


def write_metrics(
    path: Path,
    origin: Origin,
    entries: Mapping[str, JSON],
    *,
    asked: Sequence[str],
    asked_with: Mapping[str, JSON],
) -> list[str]:
    """Writes the entries, with those of before that are still true; without any there is no file.

    Args:
        entries: of the benchmarks that have a score.
        asked: every benchmark of the command; of these no entry of before stays.
        asked_with: the options of the answers, by benchmark; empty for a predictions file.

    Returns:
        What to say: where the numbers are, and which of before stayed and which went.
    """
    there = _read(path)
    before = _object(there, ENTRIES)
    header = json.loads(json.dumps(vars(origin)))
    same = all(there.get(name) == value for name, value in header.items())
    kept = {name: one for name, one in before.items() if same and name not in asked and _holds(one)}
    gone = [name for name in before if name not in kept and name not in entries]
    asked_before = {name: one for name, one in _object(there, ASKED_WITH).items() if name in kept}
    asked_now = {name: one for name, one in asked_with.items() if name in entries}
    benchmarks = kept | dict(entries)
    if benchmarks:
        with whole_file(path) as stream:
            content = {**header, ASKED_WITH: asked_before | asked_now, ENTRIES: benchmarks}
            stream.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    else:
        path.unlink(missing_ok=True)
    return _result_files_said(path, entries=list(entries), kept=list(kept), gone=gone)


def _result_files_said(path: Path, *, entries: Sequence[str], kept: Sequence[str], gone: Sequence[str]) -> list[str]:
    lines = []
    if gone:
        lines.append(f"{path}: no longer holds {', '.join(gone)}: of other answers, questions, --limit or --against")
    if entries:
        stayed = f", those of {', '.join(kept)} from before" if kept else ""
        lines.append(f"{path}: all numbers{stayed}")
    return lines


def _holds(entry: Mapping[str, JSON]) -> bool:
    """Whether the benchmark's file is what it was when it was scored."""
    file = Path(str(entry.get("file")) if isinstance(entry, Mapping) else "")
    return file.is_file() and file_sha256(file) == entry.get("file_sha256")


def _object(content: Mapping[str, JSON], name: str) -> Mapping[str, JSON]:
    value = content.get(name, {})
    return value if isinstance(value, Mapping) else {}


def _read(path: Path) -> Mapping[str, JSON]:
    """What is there; nothing where there is no file, or none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, Mapping) else {}


# Which question each row of a predictions file answers: by the id, or as the benchmark's own files name it.


@dataclass(frozen=True, kw_only=True)
class Joined:
    """A file's answers by the ids of their questions.

    Attributes:
        by: what the two had in common.
        strangers: the answers of rows that answer no question here, by the rows' own ids.
    """

    answers: dict[str, str]
    by: str
    strangers: dict[str, str]


def join(
    benchmark: Benchmark, examples: Sequence[Example], rows: Sequence[AnswerRow], *, path: Path, questions: Path
) -> Joined:
    """Each row's answer under its question's id; of two for one question the later stands.

    Raises:
        UserError: no row has a question, or it is not clear which; with the numbers.
    """
    tried: dict[str, list[str | None]] = {}
    unclear: list[str] = []
    for one in (OWN_ID, *benchmark.joins):
        try:
            tried[one.by] = one.pairs(rows, examples)
        except UserError as error:
            unclear.append(str(error))
    counts = {by: len(rows) - found.count(None) for by, found in tried.items()}
    most = max(counts.values())
    if not most:
        raise UserError(_nothing_common(path, questions, rows, examples, list(counts), unclear))
    first, *others = [by for by, count in counts.items() if count == most]
    differing = [by for by in others if tried[by] != tried[first]]
    if differing:
        raise UserError(
            f"{path}: {most} of {len(rows)} answers fit a question of {questions} by {first}, and as many fit another "
            f"one by {differing[0]}; give each answer its question's id"
        )
    found = tried[first]
    answers = {one: _answer_joins_said(row, benchmark) for one, row in zip(found, rows, strict=True) if one is not None}
    strangers = {row.id: row.answer for one, row in zip(found, rows, strict=True) if one is None}
    return Joined(answers=answers, by=first, strangers=strangers)


def _answer_joins_said(row: AnswerRow, benchmark: Benchmark) -> str:
    return f"a{row.answer}" if row.is_number and benchmark.labels_choices else row.answer


def _nothing_common(
    path: Path,
    questions: Path,
    rows: Sequence[AnswerRow],
    examples: Sequence[Example],
    tried: Sequence[str],
    unclear: Sequence[str],
) -> str:
    if unclear:
        return f"{path}: {unclear[0]}"
    return (
        f"{path} ({len(rows)} answers) and {questions} ({len(examples)} questions) have no id in common, looked for by "
        f"{'; '.join(tried)}; first ids {shown(rows[0].id, 40)} and {shown(examples[0].id, 40)}; were they made from "
        "the same questions?"
    )
