"""Any Hugging Face data set, from the hub or from local parquet, arrow or webdataset (tar) shards, read as a stream."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dora_vl.data.benchmarks.fields import UNKNOWN_ID, Progress, Raw, Row, Split, soft_answers
from dora_vl.data.containers import by_split, class_names, counted, meaning, of_the_set, with_class_names
from dora_vl.data.example import JSON, Answer, Example, correct_choice, listed_choices
from dora_vl.data.names import ROLES
from dora_vl.data.pictures import save_picture
from dora_vl.data.readers import read_conversations
from dora_vl.errors import BadSample, UserError, shown, shown_names, shown_text

BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
NAMES: Mapping[str, tuple[str, ...]] = {
    "id": ROLES["id"],
    "images": ROLES["images"],
    "question": (*ROLES["question"], "json.question", "sentence"),
    "answers": (*ROLES["answers"], *ROLES["answer"], *ROLES["caption"], "json.answers", "json.answer"),
    "choices": (*ROLES["choices"], "json.choices"),
    "correct": ("correct",),
    "turns": ("conversations", "json.conversations"),
}
"""The columns that a field is looked for under, in this order."""
ROW_NUMBER = "row number"


def hugging_face(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """The split that was asked for, of any data set.

    `--from` takes a folder or a file of shards, or with `--set hub=OWNER/NAME` the folder of the cache (any existing
    folder). Licence: the set's own; its card says so. Options:

    - `hub`, `config`, `revision`: what to load from the hub; `split`: which of the splits (default train), there or by
      the names of files and folders; shards whose names say no split are all of one, and `split` is what to call it;
    - `columns`: what is what, `field:column,...`, such as `question:query,answers:label,images:img`. Fields are id,
      images, question, answers, choices, correct, turns; a column may lead inside ("json.question"). What is not said
      is looked for under the field's own name and the usual others (`image`, `answer`, `__key__`, `conversations`...).
      `extra:a+b` keeps further columns;
    - `task`: the folder under records; default the set's or the folder's name.

    An answer may be text, a list of text, a list of objects that hold `answer` (as in VQA v2), or of a choice what
    `example.correct_choice` says. Pictures, whether bytes or paths, are taken undecoded and written once to
    `records/<task>/media`. Conversations are taken in LLaVA's form.

    Quirks: rows without an id are numbered. A row group, not a row, is what parquet reads at once: sets with pictures
    in one huge group need that much memory. A stream from the hub has no length, so progress shows no time left.
    """
    name = options.get("split", "train")
    columns = read_columns(options.get("columns", ""))
    hub = options.get("hub")
    shards = () if hub else tuple(_of_split(folder, _shards(folder), name, requested="split" in options))
    task = options.get("task") or (hub.rpartition("/")[2] if hub else folder.stem)
    source = {"path": hub, "name": options.get("config"), "revision": options.get("revision"), "split": name}
    yield Split(
        task,
        name,
        shards,
        partial(_rows, source if hub else None, shards),
        partial(convert, columns=columns, task_folder=records / task),
        settings={"hub": hub, **{option: options.get(option) for option in ("config", "revision", "columns")}},
        ids_by_place=True,
        notes={"pictures": "paths are relative to this folder"},
    )


def read_columns(option: str) -> dict[str, str]:
    """`question:query,answers:label` as a map."""
    columns: dict[str, str] = {}
    for part in filter(None, option.split(",")):
        field, _, column = part.partition(":")
        if not column or field not in {*NAMES, "extra"}:
            fields = ", ".join(NAMES)
            raise UserError(
                f"--set columns={shown_text(option, 100)}: must be FIELD:COLUMN,... with the fields {fields}, extra"
            )
        columns[field] = column
    return columns


def _shards(folder: Path) -> list[Path]:
    below = () if folder.is_file() else sorted(path for path in folder.rglob("*") if path.suffix in BUILDERS)
    shards = [folder] if folder.is_file() else of_the_set(below)
    kinds = sorted({path.suffix for path in shards})
    if not shards or not set(kinds) <= BUILDERS.keys():
        raise UserError(f"{folder}: no {', '.join(BUILDERS)} shards; for a set of the hub add --set hub=OWNER/NAME")
    if len(kinds) > 1:
        raise UserError(f"{folder}: shards of several kinds ({', '.join(kinds)}); give a folder of one kind")
    return shards


def _of_split(folder: Path, shards: Sequence[Path], name: str, *, requested: bool) -> Sequence[Path]:
    """The shards of the split of that name, or else of the only one that means it, as `val` means validation."""
    if folder.is_file():
        return shards
    splits = by_split(folder, shards)
    if name in splits:
        return splits[name]
    (first, *others), canonical = splits, meaning(name)
    if not others and (not requested or canonical is None or meaning(first) in (None, canonical)):
        return shards  # of one split, which `split` may call something else
    same = [files for split, files in splits.items() if canonical is not None and meaning(split) == canonical]
    if len(same) != 1:
        raise UserError(
            f"{folder}: no split {shown_text(name)} in it, but {counted(splits)}; name one, --set split=NAME"
        )
    return same[0]


def _rows(hub: Mapping[str, Any] | None, shards: Sequence[Path], progress: Progress) -> Iterator[Raw]:
    import datasets

    datasets.logging.set_verbosity(logging.CRITICAL)  # what it logs comes as an exception too, and is said once
    files = {"data_files": [str(shard) for shard in shards], "split": "train"}
    try:
        stream: Any = datasets.load_dataset(**(hub or {"path": BUILDERS[shards[0].suffix], **files}), streaming=True)
        stream = stream.decode(False)  # which is the training's business
        names = class_names(stream)
        for number, row in enumerate(stream, start=1):
            contents = [value["bytes"] for value in row.values() if isinstance(value, dict) and value.get("bytes")]
            progress(16 * len(row) + sum(map(len, contents)))  # roughly how many bytes of the shards the row was
            yield {**with_class_names(row, names), ROW_NUMBER: number}
    except UserError:
        raise
    except Exception as error:
        where = hub["path"] if hub else shards[0].parent
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{where}: cannot be read by `datasets`: {reason}") from error


def convert(raw: Raw, *, columns: Mapping[str, str], task_folder: Path) -> Example:
    """One row; writes its pictures."""
    fields = {field: _column(raw, field, columns) for field in NAMES}
    row = Row({**raw, "id": fields["id"]})
    row.id = str(row.integer(ROW_NUMBER)) if fields["id"] is None else row.identifier("id")
    images = tuple(_picture(value, task_folder, row) for value in _listed(fields["images"]))
    extra_columns = columns["extra"].split("+") if "extra" in columns else ()
    extra = {name: raw[name] for name in extra_columns if raw.get(name) is not None}
    if fields["turns"] is not None:
        talk = read_conversations({"images": list(images), "conversations": fields["turns"]}, row.id)
        return Example(id=row.id, images=images, turns=talk.turns, extra=extra)
    choices = fields["choices"]
    if isinstance(choices, str):
        choices = listed_choices(choices, row.id)
    choices = tuple(_text(choice, "choice", row) for choice in _listed(choices))
    correct = _correct(fields, choices, columns, row) if choices else None
    answers = () if correct is None else (Answer(text=choices[correct]),)
    if not choices:
        entries = fields["answers"] if fields["correct"] is None else fields["correct"]
        texts = [_text(entry, "answer", row) for entry in _entries(entries)]
        several = len(set(texts)) < len(texts)
        answers = soft_answers(texts) if several else tuple(Answer(text=text) for text in texts if text.strip())
    question = fields["question"]
    if question is not None and not isinstance(question, str):
        raise row.bad(f"its question must be text, got {shown(question)}")
    if not answers and not question:
        raise row.bad(f"it has neither question nor answer; its columns are {_names(raw)}")
    extra |= {} if correct is None else {"correct": correct}
    return Example(id=row.id, images=images, question=question or "", answers=answers, choices=choices, extra=extra)


def _column(raw: Raw, field: str, columns: Mapping[str, str]) -> JSON:
    if field not in columns:
        return next((value for name in NAMES[field] if (value := _inside(raw, name)) is not None), None)
    value = _inside(raw, columns[field])
    if value is None and columns[field].partition(".")[0] not in raw:
        raise BadSample(UNKNOWN_ID, f"no column {columns[field]!r}; the row has {_names(raw)}")
    return value


def _names(raw: Raw) -> str:
    return shown_names(name for name in raw if name != ROW_NUMBER)


def _inside(raw: Raw, name: str) -> JSON:
    if name in raw:
        return raw[name]
    outer, dot, inner = name.partition(".")
    around = raw.get(outer) if dot else None
    return _inside(around, inner) if isinstance(around, Mapping) else None


def _listed(value: JSON) -> Sequence[JSON]:
    if value is None:
        return ()
    return value if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else (value,)


def _entries(value: JSON) -> list[JSON]:
    return [entry.get("answer") if isinstance(entry, Mapping) else entry for entry in _listed(value)]


def _text(value: JSON, what: str, row: Row) -> str:
    """Text, or a number as text."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise row.bad(f"its {what} must be text, got {shown(value)}")
    return str(value)


def _picture(value: JSON, task_folder: Path, row: Row) -> str:
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return save_picture(value, task_folder, row.id)
    if not isinstance(value, str) or not value:
        raise row.bad(f"its picture is neither bytes nor a path: {shown(value)}")
    return value


def _correct(fields: Raw, choices: Sequence[str], columns: Mapping[str, str], row: Row) -> int | None:
    """The right choice; of several people's answers the one that all give."""
    numbered = fields["correct"] is not None
    reading = "place" if numbered else "text" if "answers" in columns else "either"
    entries = _entries(fields["correct"] if numbered else fields["answers"])
    indices = {correct_choice(entry, choices, row.id, reading) for entry in entries} - {None}
    if len(indices) > 1:
        raise row.bad(f"its {len(entries)} answers are {len(indices)} of its choices; one may be right")
    return next(iter(indices), None)
