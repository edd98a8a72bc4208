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

from dora_vl.data.examples import Answer, Example
from dora_vl.data.records import stream_members
from dora_vl.errors import BadSample
from dora_vl.sources.fields import filled, given, identifier, kept, mapping, optional, scalar, text, texts, weights
from dora_vl.sources.published import Progress, Raw, Split, json_rows, present, some_present

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
            yield {**row, "question_id": question_id}


def convert(raw: Raw, *, answered: bool = True) -> Example:
    """One question of the official files.

    Args:
        answered: its answer must be there.
    """
    sample_id = identifier(raw, "question_id")
    answer = filled(raw, "answer", sample_id) if answered else optional(raw, "answer", filled, sample_id)
    groups = optional(raw, "groups", mapping, sample_id) or {}
    extra = {
        **kept(raw, "types", sample_id=sample_id, take=_types),
        "is_balanced": optional(raw, "isBalanced", scalar, sample_id),
        "entailed": optional(raw, "entailed", _entailed, sample_id),
        "global_group": optional(groups, "global", text, sample_id),
        "full_answer": optional(raw, "fullAnswer", text, sample_id),
    }
    return Example(
        id=sample_id,
        images=(f"images/{identifier(raw, 'imageId', sample_id)}.jpg",),
        question=filled(raw, "question", sample_id),
        answers=(Answer(text=answer),) if answer else (),
        extra={name: value for name, value in extra.items() if value is not None},
    )


def _types(raw: Raw, column: str, sample_id: str) -> dict[str, object]:
    found = mapping(raw, column, sample_id)
    return kept(found, *found, sample_id=sample_id)


def _entailed(raw: Raw, column: str, sample_id: str) -> list[str]:
    """Ids of questions: a list, or the names of an object."""
    if isinstance(given(raw, column), Mapping):
        return list(mapping(raw, column, sample_id))
    return list(texts(raw, column, sample_id))


def convert_vlt5(raw: Raw) -> Example:
    """One question of VL-T5's files."""
    sample_id = identifier(raw, "question_id")
    label = weights(raw, "label", sample_id)
    if not label:
        raise BadSample(sample_id, "it has no answer: 'label' holds none")
    return Example(
        id=sample_id,
        images=(f"images/{filled(raw, 'img_id', sample_id)}.jpg",),
        question=filled(raw, "sent", sample_id),
        answers=tuple(Answer(text=answer, weight=weight) for answer, weight in label.items()),
    )
