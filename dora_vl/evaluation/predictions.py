"""A model's answers as one table, safe to resume; and other tools' files of answers."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dora_vl.data.text_file import (
    json_lines,
    likeliest_delimiter,
    stated_delimiter,
    stream_values,
    table_rows,
    text_lines,
)
from dora_vl.errors import UserError, short_names, short_repr

log = logging.getLogger(__name__)

PREDICTIONS = "predictions.jsonl"
COLUMNS = ("set", "id", "images", "videos", "question", "truth", "prediction", "kind")
BOXES = "boxes"
"""A line has this too where its question asks for boxes."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A model's answer to an example, or the error that kept it from answering.

    Attributes:
        set: the name of the test set; another tool's file names none.
        question: its text without placeholders; in another tool's file its prompt.
        prediction: the answer; it is empty without an error only where the model ended its answer at once.
        boxes: the answer's, in fractions of the picture (`data.objects`), where its question asks for some.
        error: why there is no answer. No file holds such a prediction, so that the next run asks again.
        ids: everything in a row of another tool's file that names a question or its picture, by column.
        is_number: the other tool's file has a whole number, which VALUE's submissions have for a choice.
    """

    id: str
    set: str = ""
    images: list[str] = field(default_factory=list)
    videos: list[dict[str, Any]] = field(default_factory=list)
    question: str = ""
    truth: str = ""
    prediction: str = ""
    boxes: str = ""
    kind: str | None = None
    error: str = ""
    cut_tokens: int = 0
    ids: Mapping[str, str] = field(default_factory=dict)
    is_number: bool = False


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The answers to a set of examples, in their order.

    Attributes:
        failed: why an example has no answer, by id.
        joined_by: what another tool's predictions and the questions have in common.
        strangers: ids of another tool's predictions that answer no question.
    """

    answered: Sequence[Prediction] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    answered_before: int = 0
    seconds: float = 0.0
    cut_texts: int = 0
    joined_by: str = ""
    strangers: tuple[str, ...] = ()

    @cached_property
    def answers(self) -> dict[str, str]:
        """Maps an example's id to its answer, to its boxes where these were asked for."""
        return {each.id: each.boxes or each.prediction for each in self.answered if not each.error}


def line_of(prediction: Prediction) -> str:
    """Returns the prediction as a line of the file."""
    names = (*COLUMNS, BOXES) if prediction.boxes else COLUMNS
    return json.dumps({name: getattr(prediction, name) for name in names}, ensure_ascii=False) + "\n"


def cut_broken_tail(path: Path) -> None:
    """Removes a line that was being written when the process died."""
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


def read_predictions(path: Path) -> dict[str, dict[str, Prediction]]:
    """Reads the predictions of a file by set and id, in its order; of two with one id the later counts."""
    predictions: dict[str, dict[str, Prediction]] = {}
    try:
        for number, record in json_lines(path, "predictions"):
            name, answer = record.get("id"), record.get("prediction")
            if not isinstance(name, str) or not isinstance(answer, str) or record.keys() - {*COLUMNS, BOXES}:
                raise UserError(f"{path}, line {number}: not a prediction (text as id and prediction, only {COLUMNS})")
            prediction = Prediction(**record)  # pyright: ignore[reportArgumentType] - our own file
            predictions.setdefault(prediction.set, {})[name] = prediction
    except UserError as error:
        raise UserError(f"{error}; delete the file to start anew") from None
    return predictions


# Files of predictions that other tools write.

IDS = ("id", "question_id", "questionId", "qid", "image_id", "image", "index", "identifier", "clip_id")
"""These keys hold a prediction's id; the first that a line has is its own."""
MODEL_ANSWERS = (
    *("prediction", "pred", "predict", "pred_answer", "predicted_answer"),
    *("response", "output", "model_answer", "model_output"),
)
"""These hold a model's answer: ours, SEED-Bench's and GQA's first, then Video-LLaVA's and other tools'. An `answer`
beside one of them is the true one."""
ANSWERS = ("answer", "text", "caption")
"""These keys hold the answer in lines with none of `MODEL_ANSWERS`: VQA's, LLaVA's, COCO's."""
WANTED = "predictions; give JSON lines with an id and an answer each"
TABLES = (".csv", ".tsv")
_SPELLED = {name.lower(): name for name in (*IDS, *MODEL_ANSWERS, *ANSWERS)}


def read_foreign_predictions(path: Path) -> list[Prediction]:
    """Reads the answers of another tool's file, in its order; `benchmark.join` finds their questions.

    | form | whose |
    | --- | --- |
    | JSON lines or a list of objects with an id and an answer | this project; LLaVA; VQA, COCO, GQA, SEED-Bench |
    | JSON lines with `clip_id` and `descs` | VALUE's captions |
    | one object, id -> answer; a whole number is a choice's index | MM-Vet; VALUE's TVQA and How2QA |
    | `.csv` of an identifier and an answer, without a header | NLVR2 |
    | `.csv` or `.tsv` whose first row names the columns | MMBench (its .xlsx saved as .tsv) |
    """
    predictions = list(_read_table(path) if path.suffix.lower() in TABLES else _read_json(path))
    if not predictions:
        raise UserError(f"{path}: holds no predictions")
    return predictions


def _read_json(path: Path) -> Iterator[Prediction]:
    values = stream_values(path, WANTED)
    first_two = [numbered for numbered in (next(values, None), next(values, None)) if numbered is not None]
    only = first_two[0][1] if len(first_two) == 1 else None
    if isinstance(only, dict) and not any(key in only for key in (*IDS, *MODEL_ANSWERS, *ANSWERS)):
        for name, answer in only.items():
            if not is_id(answer):
                raise UserError(
                    f"{path}: an object of answers by id must hold text or a choice's index, {short_repr(name)} has "
                    f"{short_repr(answer)}"
                )
            yield Prediction(id=name, ids={"id": name}, prediction=str(answer), is_number=not isinstance(answer, str))
        return
    for numbered in (first_two, values):
        yield from (_read_record(value, f"{path}, row {number}") for number, value in numbered)


def _read_table(path: Path) -> Iterator[Prediction]:
    lines = (line for _, line in text_lines(path, WANTED))
    header = next(lines, "")
    delimiter = stated_delimiter(header)
    if delimiter is None:
        delimiter = likeliest_delimiter(header, path.suffix.lower())
    else:
        header = next(lines, "")
    if not _SPELLED.keys().isdisjoint(cell.strip().strip('"').strip().lower() for cell in header.split(delimiter)):
        for number, row in table_rows(path, WANTED, delimiter=delimiter):
            named = {_SPELLED.get(plain := name.strip().lower(), plain): cell for name, cell in row.items()}
            yield _read_record(named, f"{path}, line {number}")
        return
    for number, line in text_lines(path, WANTED):  # as NLVR2's script reads them, quotes included
        name, *answers = line.strip().split(delimiter)
        if line.strip() and not answers:
            raise UserError(
                f"{path}, line {number}: {short_repr(line)} is not an identifier, {short_repr(delimiter)} and answer"
            )
        if answers:
            yield Prediction(id=name, ids={"id": name}, prediction=answers[0])


def _read_record(record: object, where: str) -> Prediction:
    """Reads one object's answer, which is the model's; a true answer beside it is left alone."""
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: a {type(record).__name__}, not an object with an id and an answer")
    names = next((names for names in (MODEL_ANSWERS, ANSWERS) if any(key in record for key in names)), ())
    (first, answer), *others = [(key, record[key]) for key in names if record.get(key) is not None] or [("", None)]
    for other, value in others:
        if value != answer:
            raise UserError(
                f"{where}: {first} is {short_repr(answer)} and {other} is {short_repr(value)}, and either may be "
                "the model's answer; leave out or rename the one that is not"
            )
    captions = record.get("descs")  # VALUE's, of which there is one for a clip
    if answer is None and isinstance(captions, list) and len(captions) == 1 and isinstance(captions[0], Mapping):
        answer = captions[0].get("desc")
    ids = {key: str(record[key]) for key in IDS if is_id(record.get(key))}
    id_key = next((key for key in IDS if key in record), "")
    if id_key not in ids or not isinstance(answer, str):
        keys = f"an id ({', '.join(IDS)}), and {' or '.join((*MODEL_ANSWERS, *ANSWERS))} as text"
        raise UserError(f"{where}: needs {keys}; has {short_names(record)}")
    prompt = next((value for key in ("prompt", "question") if isinstance(value := record.get(key), str)), "")
    of_set = str(record["set"]) if record.keys() - {BOXES} == {*COLUMNS} else ""
    return Prediction(id=ids[id_key], set=of_set, ids=ids, prediction=answer, question=prompt)


def is_id(value: object) -> bool:
    """Returns True for text, and for a whole number of no more digits than an id has."""
    is_number = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 64
    return isinstance(value, str) or is_number
