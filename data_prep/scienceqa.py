"""ScienceQA (Lu et al., 2022): school questions with 2 to 5 choices, about half with a picture.

Files, from github.com/lupantech/ScienceQA (`data/scienceqa`): `problems.json` (21,208 questions) and
`pid_splits.json`, and the pictures as `images/{train,val,test}/<id>/image.png`. Licence: CC BY-NC-SA 4.0. Splits:
train 12,726, val 4,241, test 4,241 of which 2,017 have a picture (LLaVA's table shows those); minitrain, minival
and minitest are parts of them.

Quirks: `problems.json` is one object, id -> problem; `image` is "image.png" or null; hints may be empty. Prompts
with lecture or solution differ from paper to paper, so both stay in `extra`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from data_prep.fields import filled, identifier, index_of, integer, kept, optional, text, texts
from data_prep.joins import refusing
from data_prep.published import WANTED, Progress, Raw, Split, some_present
from dora_vl.data.examples import Answer, Example
from dora_vl.data.records import stream_members
from dora_vl.data.text_file import json_object
from dora_vl.errors import UserError

SPLITS = {"train": ("train", 12_726), "val": ("validation", 4_241), "test": ("test", 4_241)}
PROBLEMS, PARTS = "problems.json", "pid_splits.json"


def splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """Training, validation and test, of `folder` or of `folder/data/scienceqa`."""
    inner = folder / "data" / "scienceqa"
    found = some_present(inner if inner.is_dir() else folder, [PROBLEMS, PARTS])
    for needed in (PROBLEMS, PARTS):
        if needed not in found:
            raise UserError(f"{folder}: {needed} is missing; fetch both {PROBLEMS} and {PARTS}")
    members = _members(found[PARTS])
    for part, (name, size) in SPLITS.items():
        yield Split(
            task="scienceqa",
            name=name,
            inputs=(found[PROBLEMS], found[PARTS]),
            rows=partial(_rows, found[PROBLEMS], frozenset(members[part])),
            convert=partial(convert, part=part),
            published_rows=size,
        )


def _members(path: Path) -> Mapping[str, tuple[str, ...]]:
    members = json_object(path, WANTED)
    with refusing(f"{path}: not the map of splits to ids expected"):
        return {part: texts(members, part) for part in SPLITS}


def _rows(problems: Path, wanted: frozenset[str], progress: Progress) -> Iterator[Raw]:
    """The problems of one split; one that the split names but nobody has comes last, to be dropped with that reason."""
    found: set[str] = set()
    for problem_id, row in stream_members(problems, progress=progress):
        if problem_id in wanted:
            found.add(problem_id)
            yield {**row, "pid": problem_id}
    for problem_id in sorted(wanted - found):
        yield {"pid": problem_id}


def convert(raw: Raw, *, part: str) -> Example:
    """One question; `part` is the folder of its picture."""
    sample_id = identifier(raw, "pid")
    choices = texts(raw, "choices", sample_id)
    correct = index_of(integer(raw, "answer", sample_id), choices, "answer", sample_id)
    image = optional(raw, "image", text, sample_id)
    columns = ("hint", "lecture", "solution", "subject", "topic", "category", "skill", "grade", "task")
    return Example(
        id=sample_id,
        images=(f"images/{part}/{sample_id}/{image}",) if image else (),
        question=filled(raw, "question", sample_id),
        answers=(Answer(text=choices[correct]),),
        choices=choices,
        extra={"correct": correct, "split": part}
        | {name: said for name, said in kept(raw, *columns, sample_id=sample_id).items() if said},
    )
