"""MMBench and MMBench-CN (Liu et al., 2023): single-choice questions, each asked in every rotation of its choices.

Files, from opencompass' download site: `mmbench_dev_20230712.tsv` (4,377 rows; LLaVA-1.5's) or
`mmbench_dev_en_20231003.tsv`, `mmbench_test_20230712.tsv` and the like, `mmbench_dev_cn_20231003.tsv`, or
VLMEvalKit's `MMBench_DEV_EN.tsv`, `MMBench_DEV_CN.tsv`, `MMBench_TEST_EN.tsv`, `MMBench_TEST_CN.tsv`. Licence:
Apache-2.0. Columns: index, question, hint, A-D, answer, category, image (base64), source, l2-category, comment,
split.

Quirks:
- rotations of a question have the same `index` modulo 1,000,000; circular evaluation wants all of them right;
- the pictures are in the table: they are written once each to `records/mmbench*/media`, which the paths are
  relative to;
- in VLMEvalKit's files a short `image` is the `index` of another row that has the picture;
- the choices end at the first that is empty, "nan" or "none", as in LLaVA's reader, so a real choice "None" and
  those after it are lost there and here; a row whose answer is lost with them is dropped and named;
- test files have no `answer`; the server takes an .xlsx with all rows.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from data_prep.fields import UNKNOWN_ID, filled, integer, kept, optional, text
from data_prep.media_files import save_picture
from data_prep.published import WANTED, Progress, Raw, Split, present
from dora_vl.data.examples import Answer, Example
from dora_vl.data.text_file import table_rows
from dora_vl.errors import BadSample, UserError, shown

FILES = {
    "mmbench_dev_20230712.tsv": ("mmbench", "validation", 4_377),
    "mmbench_dev_en_20231003.tsv": ("mmbench", "validation", 4_329),
    "MMBench_DEV_EN.tsv": ("mmbench", "validation", 4_329),
    "mmbench_test_20230712.tsv": ("mmbench", "test", 6_718),
    "mmbench_test_en_20231003.tsv": ("mmbench", "test", 6_666),
    "MMBench_TEST_EN.tsv": ("mmbench", "test", 6_666),
    "mmbench_dev_cn_20231003.tsv": ("mmbench_cn", "validation", 4_329),
    "MMBench_DEV_CN.tsv": ("mmbench_cn", "validation", 4_329),
    "mmbench_test_cn_20231003.tsv": ("mmbench_cn", "test", 6_666),
    "MMBench_TEST_CN.tsv": ("mmbench_cn", "test", 6_666),
}
LETTERS = "ABCDE"
NEEDED = ("index", "question", "A", "B", "image")
MISSING = frozenset({"", "nan", "none"})
REFERENCE_CHARACTERS = 64
"""A shorter `image` is another row's index, as VLMEvalKit decides it."""


def splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """English and Chinese, validation and test; of two files for one split the first of the list above."""
    found = present(folder, FILES)
    if not found:
        raise UserError(f"{folder}: none of {', '.join(FILES)} is in it; --from takes the folder with the files")
    taken: set[tuple[str, str]] = set()
    for file, path in found.items():
        task, name, size = FILES[file]
        if (task, name) in taken:
            continue
        taken.add((task, name))
        yield Split(
            task=task,
            name=name,
            inputs=(path,),
            rows=partial(_rows, path, NEEDED if name == "test" else (*NEEDED, "answer")),
            convert=partial(convert, task_folder=records / task, answered=name != "test"),
            published_rows=size,
            notes={"pictures": "paths are relative to this folder"},
        )


def _rows(path: Path, needed: Sequence[str], progress: Progress) -> Iterator[Raw]:
    """The rows; for an `image` that names an earlier row, that row's picture."""
    references = path.name.startswith("MMBench_")  # VLMEvalKit's; the others need no memory of pictures
    pictures: dict[str, str] = {}
    for _, row in table_rows(path, WANTED, delimiter="\t", required=needed, progress=progress):
        image = text(row, "image")
        if len(image) >= REFERENCE_CHARACTERS:
            if references:
                pictures[text(row, "index")] = image
            yield row
        else:
            yield {**row, "image": pictures.get(image, image)}


def convert(raw: Raw, *, task_folder: Path, answered: bool) -> Example:
    """One rotation of one question; writes its picture. `answered` says that its answer must be there."""
    index = integer(raw, "index")
    sample_id = str(index)
    choices = _choices(raw, sample_id)
    answer = filled(raw, "answer", sample_id) if answered else optional(raw, "answer", text, sample_id) or ""
    correct = _index(answer.strip(), len(choices), sample_id) if answer.strip() else None
    extra = {
        "index": index,
        "correct": correct,
        **kept(raw, "category", sample_id=sample_id),
        "l2_category": optional(raw, "l2-category", text, sample_id),
        **kept(raw, "source", sample_id=sample_id),
        "hint": _value(raw, "hint"),
    }
    return Example(
        id=sample_id,
        images=(save_picture(_decoded(raw, sample_id), task_folder, sample_id),),
        question=filled(raw, "question", sample_id),
        answers=() if correct is None else (Answer(text=choices[correct]),),
        choices=choices,
        extra={name: value for name, value in extra.items() if value is not None},
    )


def _index(answer: str, choices: int, sample_id: str) -> int:
    if len(answer) != 1 or answer not in LETTERS[:choices]:
        raise BadSample(sample_id, f"its answer is {shown(answer)}, but its choices are A to {LETTERS[choices - 1]}")
    return LETTERS.index(answer)


def _choices(raw: Raw, sample_id: str) -> tuple[str, ...]:
    choices: list[str] = []
    for letter in LETTERS:
        value = _value(raw, letter)
        if value is None:
            break
        choices.append(value)
    if len(choices) < 2:
        raise BadSample(sample_id, f"it has {len(choices)} choices")
    return tuple(choices)


def _value(raw: Raw, column: str) -> str | None:
    value = optional(raw, column, text, UNKNOWN_ID)
    return None if value is None or value.lower() in MISSING else value


def _decoded(raw: Raw, sample_id: str) -> bytes:
    try:
        return base64.b64decode(filled(raw, "image", sample_id), validate=True)
    except ValueError as error:  # also for characters beyond ASCII
        raise BadSample(sample_id, f"its picture is no base64: {error}") from None
