"""POPE (Li et al., 2023): is there such an object in the picture? Half of the answers are no.

Files, from github.com/RUCAIBox/POPE or AoiDragon/POPE (`output/coco`):
`coco_pope_{random,popular,adversarial}.json`, JSON lines of {question_id, image, text, label}. Licence: MIT;
pictures are COCO's val2014. LLaVA's own question file `llava_pope_test.jsonl` is not needed: it holds the same
questions with LLaVA's prompt suffix.

Quirks: there are two versions of the labels. Today's have 3,000 rows each. LLaVA-1.5's reported figures belong to
commit e3e3926: 2,910 in `random`, in another order, and "imange" for "image" in its questions. The official script
compares by position and cuts in silence; here the version is in the manifest and in each row, and ids are
"<category>-<question_id>" because the three files count from 1 each. Questions repeat: the same object is asked for
in more than one category.

Sets on other pictures (`{aokvqa,gqa}_pope_{random,popular,adversarial}.json`) become tasks `pope_aokvqa` and
`pope_gqa`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from dora_vl.data.examples import Answer, Example
from dora_vl.errors import BadSample, shown
from dora_vl.scores.pope import CATEGORIES, VERSIONS
from dora_vl.sources.fields import filled, identifier, scalar
from dora_vl.sources.published import Progress, Raw, Split, json_rows, present, some_present

SETS = {"coco": "pope", "aokvqa": "pope_aokvqa", "gqa": "pope_gqa"}
PICTURES = {"coco": "val2014", "aokvqa": "val2014", "gqa": "images"}


def splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """One test split for each set of pictures, with the categories that are there."""
    names = [f"{pictures}_pope_{category}.json" for pictures in SETS for category in CATEGORIES]
    inner = next((place for place in (folder / "coco", folder / "output" / "coco") if present(place, names)), folder)
    found = some_present(inner, names)
    for pictures, task in SETS.items():
        files = {
            category: found[name] for category in CATEGORIES if (name := f"{pictures}_pope_{category}.json") in found
        }
        if files:
            counts = tuple(_count(path) for path in files.values())
            version = VERSIONS.get(counts, f"unknown: {counts} rows")
            yield Split(
                task=task,
                name="test",
                inputs=tuple(files.values()),
                rows=partial(_rows, files),
                convert=partial(convert, pictures=PICTURES[pictures], label_version=version),
                published_rows=sum(counts) if counts in VERSIONS else 9_000,
                notes={"label_version": version, "rows": dict(zip(files, counts, strict=True))},
            )


def _count(path: Path) -> int:
    return sum(1 for _ in json_rows(path, lambda _: None))


def _rows(files: Mapping[str, Path], progress: Progress) -> Iterator[Raw]:
    for category, path in files.items():
        for row in json_rows(path, progress):
            yield {**row, "category": category}


def convert(raw: Raw, *, pictures: str, label_version: str) -> Example:
    """One question; `pictures` is the folder of its picture."""
    category = filled(raw, "category")
    sample_id = f"{category}-{identifier(raw, 'question_id')}"
    label = filled(raw, "label", sample_id)
    if label not in {"yes", "no"}:
        raise BadSample(sample_id, f"its label is {shown(label)}, which is neither 'yes' nor 'no'")
    return Example(
        id=sample_id,
        images=(f"{pictures}/{filled(raw, 'image', sample_id)}",),
        question=filled(raw, "text", sample_id),
        answers=(Answer(text=label),),
        extra={"category": category, "question_id": scalar(raw, "question_id"), "label_version": label_version},
    )
