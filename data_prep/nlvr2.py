"""NLVR2 (Suhr et al., 2019): is the sentence true of the two photographs?

Files, from github.com/lil-lab/nlvr (`nlvr2/data`): `{train,dev,test1,test2}.json`, JSON lines (86,373 / 6,982 /
6,967 / 6,970 rows); test1 is the public test set. Licence: CC BY 4.0. The photographs are given on request; they
are named after the row: `images/dev/dev-850-0-img0.png` (left) and `-img1.png`, in training
`images/train/<directory>/train-10171-0-img0.png`.

VL-T5's form of the same, `{train,valid,test}.json` with {identifier, img0, img1, sent, label 0/1}, is read too.

Quirks: labels are "True" and "False" here and "true"/"false" in NLVR; consistency counts a sentence (the identifier
without its last field) when all of its rows are right; the submission is "identifier,True".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from data_prep.fields import filled, given, identifier, integer, kept, optional, scalar
from data_prep.published import Raw, Split, json_rows, present, some_present
from dora_vl.data.examples import Answer, Example
from dora_vl.errors import BadSample, shown

FILES = {
    "train.json": ("train", 86_373),
    "dev.json": ("validation", 6_982),
    "test1.json": ("test", 6_967),
    "test2.json": ("test2", 6_970),
}
VLT5_FILES = {"train.json": ("train", 86_373), "valid.json": ("validation", 6_982), "test.json": ("test", 6_967)}


def splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """The splits that are in `folder` or in `folder/data`."""
    names = [*FILES, *VLT5_FILES]
    found = present(folder / "data", names) or some_present(folder, names)
    table = VLT5_FILES if "valid.json" in found else FILES | VLT5_FILES
    for file, path in found.items():
        if file in table:
            name, size = table[file]
            yield Split(
                task="nlvr2",
                name=name,
                inputs=(path,),
                rows=partial(json_rows, path),
                convert=convert,
                published_rows=size,
            )


def convert(raw: Raw) -> Example:
    """One sentence and its two photographs, in either form."""
    sample_id = identifier(raw, "identifier")
    vlt5 = given(raw, "img0") is not None
    label = {0: "False", 1: "True"}.get(integer(raw, "label", sample_id), "") if vlt5 else str(scalar(raw, "label"))
    if label not in {"True", "False"}:
        raise BadSample(sample_id, f"its label is {shown(given(raw, 'label'))}, which is neither True nor False")
    pair = sample_id.rsplit("-", 1)[0]
    names = [identifier(raw, "img0"), identifier(raw, "img1")] if vlt5 else [f"{pair}-img0", f"{pair}-img1"]
    part = sample_id.split("-", 1)[0]
    directory = optional(raw, "directory", identifier, sample_id)
    inner = "" if directory is None else f"{directory}/"
    return Example(
        id=sample_id,
        images=tuple(f"images/{part}/{inner}{name}.png" for name in names),
        question=filled(raw, "sent" if vlt5 else "sentence", sample_id),
        answers=(Answer(text=label),),
        extra=kept(raw, "synset", "writer", "uid", sample_id=sample_id),
    )
