"""GQA (Hudson and Manning, 2019): questions made from scene graphs, one word or phrase each.

Files, from cs.stanford.edu/people/dorarad/gqa (`questions1.2.zip`, 1.4 GB):
`{train,val,testdev,test}_balanced_questions.json` (943,000 / 132,062 / 12,578 / 95,336) and, where present,
`val_all_questions.json`, `testdev_all_questions.json` and the folder
`train_all_questions/train_all_questions_{0..9}.json` (14,305,356). Licence: CC BY 4.0. Pictures:
`images/<imageId>.jpg` (148,854, from Visual Genome; `images.zip`, 20 GB).

VL-T5's form of the same, `{train,valid,testdev}.json` as a list of {question_id, img_id, sent, label}, is read too.

Quirks: a file is one object, question id -> question, not a list; `test` has no answers and its scores come from
the server; LLaVA-1.5 reports testdev_balanced, VL-BART trains on train + val and reports testdev. The official
script needs `types`, `entailed`, `groups` and `isBalanced` for all of its figures, so they stay in `extra` where
the file has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from data_prep.fields import filled, identifier, kept, number, optional, short, text
from data_prep.published import Progress, Raw, Split, json_rows, present, some_present
from dora_vl.data.examples import Answer, Example
from dora_vl.data.records import stream_members
from dora_vl.errors import BadSample

OFFICIAL = {
    "train_balanced_questions.json": ("train", 943_000),
    "val_balanced_questions.json": ("validation", 132_062),
    "testdev_balanced_questions.json": ("testdev", 12_578),
    "test_balanced_questions.json": ("test", 95_336),
    "val_all_questions.json": ("validation_all", 2_011_853),
    "testdev_all_questions.json": ("testdev_all", 172_174),
}
VLT5 = {"train.json": ("train", 943_000), "valid.json": ("validation", 132_062), "testdev.json": ("testdev", 12_578)}
ALL_TRAIN = [f"train_all_questions/train_all_questions_{part}.json" for part in range(10)]


def splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """Each official file as a split, and all of the unbalanced training files as one; or VL-T5's."""
    found = some_present(folder, [*OFFICIAL, *ALL_TRAIN, *VLT5])
    official = present(folder, OFFICIAL)
    for file, path in official.items():
        name, size = OFFICIAL[file]
        yield _split(name, [path], size)
    parts = list(present(folder, ALL_TRAIN).values())
    if parts:
        yield _split("train_all", parts, 14_305_356)
    if official or parts:
        return
    for file, path in found.items():
        name, size = VLT5[file]
        yield Split(
            task="gqa",
            name=name,
            inputs=(path,),
            rows=partial(json_rows, path),
            convert=convert_vlt5,
            published_rows=size,
            notes={"form": "VL-T5's files"},
        )


def _split(name: str, paths: list[Path], size: int) -> Split:
    return Split(
        task="gqa",
        name=name,
        inputs=tuple(paths),
        rows=partial(_rows, paths),
        convert=partial(convert, answered=name != "test"),
        published_rows=size,
    )


def _rows(paths: list[Path], progress: Progress) -> Iterator[Raw]:
    for path in paths:
        for question_id, row in stream_members(path, progress=progress):
            yield {"question_id": question_id, **row}


def convert(raw: Raw, *, answered: bool = True) -> Example:
    """One question of the official files.

    Args:
        answered: its answer must be there.
    """
    sample_id = identifier(raw, "question_id")
    answer = filled(raw, "answer", sample_id) if answered else optional(raw, "answer", filled, sample_id)
    entailed, groups = raw.get("entailed"), raw.get("groups")
    extra = {
        **kept(raw, "types"),
        "is_balanced": raw.get("isBalanced"),
        "entailed": list(entailed) if isinstance(entailed, (list, dict)) else None,
        "global_group": groups.get("global") if isinstance(groups, Mapping) else None,
        "full_answer": raw.get("fullAnswer"),
    }
    return Example(
        id=sample_id,
        images=(f"images/{identifier(raw, 'imageId')}.jpg",),
        question=filled(raw, "question", sample_id),
        answers=(Answer(text=answer),) if answer else (),
        extra={name: value for name, value in extra.items() if value is not None},
    )


def convert_vlt5(raw: Raw) -> Example:
    """One question of VL-T5's files."""
    sample_id = identifier(raw, "question_id")
    label = raw.get("label") or {}
    if not isinstance(label, Mapping) or not label:
        raise BadSample(sample_id, f"column 'label' must map answers to weights, got {short(label)}")
    return Example(
        id=sample_id,
        images=(f"images/{text(raw, 'img_id', sample_id)}.jpg",),
        question=filled(raw, "sent", sample_id),
        answers=tuple(
            Answer(text=answer, weight=number(weight, "label", sample_id)) for answer, weight in label.items()
        ),
    )
