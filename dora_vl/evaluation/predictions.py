"""A model's answers as one table: predictions.jsonl, safe to resume; other tools' files; metrics.json."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from dora_vl.data.example import JSON
from dora_vl.data.text_file import json_lines, opened, stream_values, table_rows, text_lines
from dora_vl.errors import UserError, shown, shown_names
from dora_vl.files import file_sha256, json_or_nothing, whole_file, write_json

log = logging.getLogger(__name__)

PREDICTIONS, BY_TASK = "predictions.jsonl", "predictions"
"""Where a run's test leaves its predictions; of a VL-BART's tasks a file each in a folder."""
BY_SCORING = {
    "generation": PREDICTIONS,
    "likelihood": "predictions_likelihood.jsonl",
    "cloze": "predictions_cloze.jsonl",
}
"""Of commonsense sets, by `evaluation.scoring`."""
COLUMNS = ("id", "images", "question", "truth", "prediction", "kind")
"""What a line of the file holds."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A question and the model's answer to it.

    Attributes:
        question: its text without placeholders; of another tool's file its prompt.
        prediction: the model's answer; without an error empty only where it ended its answer at once.
        error: why there is no answer; in no file, like `cut_tokens`, how many the text lost.
        ids: of another tool's file, everything in the row that names a question or its picture, by field.
        is_number: that file has a whole number, which VALUE's submissions have for a choice.
    """

    id: str
    images: list[str] = field(default_factory=list)
    question: str = ""
    truth: str = ""
    prediction: str = ""
    kind: str | None = None
    error: str = ""
    cut_tokens: int = 0
    ids: Mapping[str, str] = field(default_factory=dict)
    is_number: bool = False


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The answers to a set of questions, in their order, with the hashes of what gave them.

    `joined_by` is what a file's rows and the questions had in common, `strangers` are ids that answer no question.
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


class PredictionsFile(AbstractContextManager["PredictionsFile"]):
    """Reads what an earlier run finished, without a line that was cut, then appends; in memory where there is no path.

    Predictions made with other `settings` (adapter, questions), or without any, are thrown away. A context manager.
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
                write_json(settings_file(path), settings)
        self._stream = path.open("a", encoding="utf-8")

    def add(self, prediction: Prediction) -> None:
        """Appends one line; it is in the file when `flush` returns."""
        self.done[prediction.id] = prediction
        self._stream.write(_line(prediction))

    def flush(self) -> None:
        """Hands everything to the operating system, so that a killed process loses nothing written before."""
        self._stream.flush()

    def __exit__(self, *error: object) -> None:
        self._stream.close()


def same_settings(path: Path, settings: Mapping[str, object]) -> bool:
    """Whether a predictions file is there and was made with these settings."""
    return path.exists() and json_or_nothing(settings_file(path)) == json.loads(json.dumps(dict(settings)))


def _line(prediction: Prediction) -> str:
    return json.dumps({name: getattr(prediction, name) for name in COLUMNS}, ensure_ascii=False) + "\n"


def write_in_order(path: Path, predictions: Mapping[str, Prediction], order: Sequence[str]) -> None:
    """Writes the file anew: the predictions of `order` first and in it, then the others; whole or not at all."""
    names = dict.fromkeys([*(name for name in order if name in predictions), *predictions])
    with whole_file(path) as stream:
        stream.writelines(_line(predictions[name]) for name in names)


def cut_broken_tail(path: Path) -> int:
    """Removes a line that was being written when the process died; how many bytes that were."""
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
    """Every prediction of the file by its question's id, in the file's order; of two with one id the later stands."""
    predictions: dict[str, Prediction] = {}
    try:
        for number, record in json_lines(path, "predictions"):
            name = record.get("id")
            if not isinstance(name, str) or not isinstance(record.get("prediction"), str) or record.keys() - {*COLUMNS}:
                raise UserError(f"{path}, line {number}: not a prediction (text as id and prediction, {COLUMNS} alone)")
            predictions[name] = Prediction(**record)  # pyright: ignore[reportArgumentType] - our own file
    except UserError as error:
        raise UserError(f"{error}; delete the file to start anew") from None
    return predictions


# Files of predictions that other tools write.


IDS = ("id", "question_id", "questionId", "qid", "image_id", "image", "index", "identifier", "clip_id")
"""Where a row's id stands; of several the first is its own."""
MODEL_ANSWERS = (
    *("prediction", "pred", "predict", "pred_answer", "predicted_answer"),
    *("response", "output", "model_answer", "model_output"),
)
"""Keys of what a model said, whatever stands beside them: ours, SEED-Bench's and GQA's first, then Video-LLaVA's and
other tools'. An `answer` in such a row is the true one."""
ANSWERS = ("answer", "text", "caption")
"""Where the answer stands in rows that hold none of those: VQA's; LLaVA's; COCO's."""
WANTED = "predictions; give JSON lines with an id and an answer each"
DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_rows(path: Path) -> list[Prediction]:
    """Every answer of a file of predictions, in its order; which question a row answers is `benchmark.join`'s matter.

    | form | whose |
    | --- | --- |
    | JSON lines or a list of objects with an id and an answer | this project; LLaVA; VQA, COCO, GQA, SEED-Bench |
    | JSON lines with `clip_id` and `descs` | VALUE's captions |
    | one object, id -> answer; a whole number is a choice's index | MM-Vet; VALUE's TVQA and How2QA |
    | `.csv` of an identifier and an answer, without a header | NLVR2 |
    | `.csv` or `.tsv` whose first row names the columns | MMBench |
    """
    with opened(path, WANTED) as file:
        if file.read(4) == b"PK\x03\x04":
            raise UserError(f"{path}: an .xlsx or another packed file; save the table as tab-separated text, NAME.tsv")
    delimiter = DELIMITERS.get(path.suffix.lower())
    rows = list(_json_rows(path) if delimiter is None else _table_rows(path, delimiter))
    if not rows:
        raise UserError(f"{path}: holds no predictions")
    return rows


def _json_rows(path: Path) -> Iterator[Prediction]:
    values = stream_values(path, WANTED)
    first_two = [numbered for numbered in (next(values, None), next(values, None)) if numbered is not None]
    only = first_two[0][1] if len(first_two) == 1 else None
    if isinstance(only, dict) and not any(key in only for key in (*IDS, *MODEL_ANSWERS, *ANSWERS)):
        for name, answer in only.items():
            if not is_id(answer):
                raise UserError(
                    f"{path}: an object of answers by id must hold text or a choice's index, {shown(name)} has "
                    f"{shown(answer)}"
                )
            yield Prediction(id=name, ids={"id": name}, prediction=str(answer), is_number=not isinstance(answer, str))
        return
    for numbered in (first_two, values):
        yield from (_row(value, f"{path}, line {number}") for number, value in numbered)


def _table_rows(path: Path, delimiter: str) -> Iterator[Prediction]:
    header = next((line for _, line in text_lines(path, WANTED)), "")
    names = {cell.strip('"') for cell in header.split(delimiter)}
    if names & set(IDS) and names & {*MODEL_ANSWERS, *ANSWERS}:
        for number, row in table_rows(path, WANTED, delimiter=delimiter):
            yield _row(row, f"{path}, line {number}")
        return
    for number, line in text_lines(path, WANTED):  # as NLVR2's script reads them, quotes included
        name, *answers = line.strip().split(delimiter)
        if line.strip() and not answers:
            raise UserError(f"{path}, line {number}: {shown(line)} is no identifier, {shown(delimiter)} and answer")
        if answers:
            yield Prediction(id=name, ids={"id": name}, prediction=answers[0])


def _row(record: object, where: str) -> Prediction:
    """One object's answer: what the model said; a true answer beside it is left alone."""
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: a {type(record).__name__}, not an object with an id and an answer")
    names = next((names for names in (MODEL_ANSWERS, ANSWERS) if any(key in record for key in names)), ())
    (first, answer), *others = [(key, record[key]) for key in names if record.get(key) is not None] or [("", None)]
    for other, value in others:
        if value != answer:
            raise UserError(
                f"{where}: {first} is {shown(answer)} and {other} is {shown(value)}, and either may be the model's "
                "answer; leave out or rename the one that is not"
            )
    captions = record.get("descs")  # VALUE's, of which there is one for a clip
    if answer is None and isinstance(captions, list) and len(captions) == 1 and isinstance(captions[0], Mapping):
        answer = captions[0].get("desc")
    ids = {key: str(record[key]) for key in IDS if is_id(record.get(key))}
    id_key = next((key for key in IDS if key in record), "")
    if id_key not in ids or not isinstance(answer, str):
        keys = f"an id ({', '.join(IDS)}), and {' or '.join((*MODEL_ANSWERS, *ANSWERS))} as text"
        raise UserError(f"{where}: needs {keys}; has {shown_names(record)}")
    prompt = next((value for key in ("prompt", "question") if isinstance(value := record.get(key), str)), "")
    return Prediction(id=ids[id_key], ids=ids, prediction=answer, question=prompt)


def is_id(value: object) -> bool:
    """Text, or a whole number of no more digits than an id has."""
    is_number = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 64
    return isinstance(value, str) or is_number


# metrics.json of `dora-vl evaluate`, which holds several benchmarks' numbers while they are true.


METRICS = "metrics.json"
ENTRIES, OPTIONS = "benchmarks", "asked_with"


def refuse_anothers(path: Path) -> None:
    """Keeps a training run's own metrics file, which was not written here, from being replaced."""
    if (content := json_or_nothing(path)) and not isinstance(content.get(ENTRIES), Mapping):
        raise UserError(f"{path} is not of `dora-vl evaluate`, a training run's perhaps; name another folder with --to")


def write_metrics(
    path: Path,
    origin: Mapping[str, JSON],
    entries: Mapping[str, JSON],
    *,
    evaluated: Collection[str],
    options: Mapping[str, JSON],
) -> list[str]:
    """Writes the entries, with those of before that are still true; without any there is no file. Says what went.

    Args:
        origin: what all numbers of the file are of; hashes tell an adapter from its successor at the same place.
        evaluated: every benchmark of the command; of these no entry of before stays.
        options: of the answers, by benchmark.
    """
    content = json_or_nothing(path)
    before, options_before = (
        value if isinstance(value := content.get(name), Mapping) else {} for name in (ENTRIES, OPTIONS)
    )
    header = json.loads(json.dumps(dict(origin)))
    still_true: dict[str, JSON] = {}
    if all(content.get(name) == value for name, value in header.items()):
        for name, entry in before.items():
            file = Path(str(entry.get("file")) if isinstance(entry, Mapping) else "")
            if name not in evaluated and file.is_file() and file_sha256(file) == entry.get("file_sha256"):
                still_true[name] = entry
    benchmarks = still_true | dict(entries)
    if benchmarks:
        made_with = {name: value for name, value in options_before.items() if name in still_true}
        made_with |= {name: value for name, value in options.items() if name in entries}
        write_json(path, {**header, OPTIONS: made_with, ENTRIES: benchmarks})
    else:
        path.unlink(missing_ok=True)
    lines = []
    if gone := [name for name in before if name not in benchmarks]:
        lines.append(f"{path}: no longer holds {', '.join(gone)}: of other answers, questions, --limit or --against")
    if entries:
        stayed = f", those of {', '.join(still_true)} from before" if still_true else ""
        lines.append(f"{path}: all numbers{stayed}")
    return lines
