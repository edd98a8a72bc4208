"""The rows of a file of predictions: ours, LLaVA's answer files, and what the benchmarks' official scripts take.

| form | whose |
| --- | --- |
| JSON lines or a list of objects with an id and an answer | this project; LLaVA; VQA, COCO captions, GQA, SEED-Bench |
| JSON lines with `clip_id` and `descs` | VALUE's captions |
| one object, id -> answer; a whole number is a choice's index | MM-Vet; VALUE's TVQA and How2QA |
| `.csv` of an identifier and an answer, without a header | NLVR2 |
| `.csv` or `.tsv` whose first row names the columns | MMBench |

Which question a row answers is `answer_joins`' matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dora_vl.data.records import stream_values
from dora_vl.data.text_file import opened, table_rows, text_lines
from dora_vl.errors import UserError, shown, shown_names

IDS = ("id", "question_id", "questionId", "qid", "image_id", "image", "index", "identifier", "clip_id")
"""Where a row's id stands; of several the first is its own."""
MODEL_ANSWERS = (
    "prediction",
    "pred",
    "predict",
    "pred_answer",
    "predicted_answer",
    "response",
    "output",
    "model_answer",
    "model_output",
)
"""Keys of what a model said, whatever stands beside them: ours, SEED-Bench's and GQA's first, then Video-LLaVA's and
other tools'. An `answer` in such a row is the true one."""
ANSWERS = ("answer", "text", "caption")
"""Where the answer stands in rows that hold none of those: VQA's; LLaVA's; COCO's."""
PROMPTS = ("prompt", "question")
WANTED = "predictions; give JSON lines with an id and an answer each"
DELIMITERS = {".csv": ",", ".tsv": "\t"}
ZIP = b"PK\x03\x04"


@dataclass(frozen=True, kw_only=True)
class AnswerRow:
    """One answer.

    Attributes:
        where: file and line.
        ids: everything in the row that names a question or its picture, by field; the row's own id first.
        prompt: what was asked, "" where the row does not say.
        is_number: the file has a whole number, which VALUE's submissions have for a choice.
    """

    where: str
    ids: Mapping[str, str]
    answer: str
    prompt: str = ""
    is_number: bool = False

    @property
    def id(self) -> str:
        """The row's own id."""
        return next(iter(self.ids.values()))


def read_answers(path: Path) -> dict[str, str]:
    """Answers by the rows' own ids; of two with one id the later stands, as in a run that was resumed.

    Raises:
        UserError: as `read_rows`.
    """
    return {row.id: row.answer for row in read_rows(path)}


def read_rows(path: Path) -> list[AnswerRow]:
    """Every answer of the file, in its order.

    Raises:
        UserError: no such file, none of the forms, or a row without an id or an answer, or with two that may be it; it
            names the line.
    """
    rows = list(_rows(path))
    if not rows:
        raise UserError(f"{path}: holds no predictions")
    return rows


def _rows(path: Path) -> Iterator[AnswerRow]:
    with opened(path, WANTED) as file:
        begins_as_zip = file.read(len(ZIP)) == ZIP
    if begins_as_zip:
        raise UserError(f"{path}: an .xlsx or another packed file; save the table as tab-separated text, NAME.tsv")
    if path.suffix.lower() in DELIMITERS:
        return _table(path, DELIMITERS[path.suffix.lower()])
    return _json(path)


def _json(path: Path) -> Iterator[AnswerRow]:
    values = stream_values(path, WANTED)
    line, first = next(values, (0, None))
    if line == 0:
        return
    if isinstance(first, dict) and not any(key in first for key in IDS):
        second = next(values, None)
        if second is None and _is_mapping(first):
            yield from _members(path, first)
            return
    yield _row(first, f"{path}, line {line}")
    for number, value in values:
        yield _row(value, f"{path}, line {number}")


def _is_mapping(record: Mapping[str, object]) -> bool:
    """Whether an object without an id is one of answers by id, not a row that lacks its id."""
    return not any(key in record for key in (*MODEL_ANSWERS, *ANSWERS))


def _members(path: Path, answers: Mapping[str, object]) -> Iterator[AnswerRow]:
    for name, answer in answers.items():
        if not _names(answer):
            raise UserError(
                f"{path}: an object of answers by id must hold text or a choice's index, {shown(name)} has "
                f"{shown(answer)}"
            )
        is_number = not isinstance(answer, str)
        yield AnswerRow(where=f"{path}, {shown(name)}", ids={"id": name}, answer=str(answer), is_number=is_number)


def _row(record: object, where: str) -> AnswerRow:
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: a {type(record).__name__}, not an object with an id and an answer")
    ids = {key: str(record[key]) for key in IDS if _names(record.get(key))}
    answer = _answer(record, where)
    first_id = next((key for key in IDS if key in record), None)
    if first_id not in ids or not isinstance(answer, str):
        wanted = f"an id ({', '.join(IDS)}), and {' or '.join((*MODEL_ANSWERS, *ANSWERS))} as text"
        raise UserError(f"{where}: needs {wanted}; has {shown_names(record)}")
    prompt = next((record[key] for key in PROMPTS if isinstance(record.get(key), str)), "")
    return AnswerRow(where=where, ids=ids, answer=answer, prompt=str(prompt))


def _answer(record: Mapping[str, object], where: str) -> object:
    """What the model said; a true answer beside it is left alone.

    Raises:
        UserError: two keys that may hold it say different things.
    """
    names = next((names for names in (MODEL_ANSWERS, ANSWERS) if any(key in record for key in names)), ())
    said = [(key, record[key]) for key in names if record.get(key) is not None]
    if not said:
        return _caption(record)
    (first, answer), *others = said
    for other, value in others:
        if value != answer:
            raise UserError(
                f"{where}: {first} is {shown(answer)} and {other} is {shown(value)}, and either may be the model's "
                "answer; leave out or rename the one that is not"
            )
    return answer


def _names(value: object) -> bool:
    """Whether a value can be an id: text, or a whole number of no more digits than one has."""
    is_number = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 64
    return isinstance(value, str) or is_number


def _caption(record: Mapping[str, object]) -> object:
    """VALUE's only description of a clip."""
    several = record.get("descs")
    only = several[0] if isinstance(several, list) and len(several) == 1 else None
    return only.get("desc") if isinstance(only, Mapping) else None


def _table(path: Path, delimiter: str) -> Iterator[AnswerRow]:
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
            yield AnswerRow(where=f"{path}, line {number}", ids={"id": name}, answer=answers[0])
