"""Karpathy's split of COCO's 2014 pictures (Karpathy and Fei-Fei, 2015), which captions and VL-BART's VQA share.

File: `dataset_coco.json` from the archive `caption_datasets.zip` (cs.stanford.edu/people/karpathy/deepimagesent):
123,287 pictures, of which 82,783 train, 30,504 restval, 5,000 val and 5,000 test. Everybody trains on train +
restval.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_prep.fields import filled, identifier, if_text
from data_prep.joins import numbered, refusing
from data_prep.published import Progress, Raw, json_rows
from dora_vl.errors import UserError, shown

FILE = "dataset_coco.json"
SPLITS = {"train": "train", "restval": "train", "val": "validation", "test": "test"}
"""Karpathy's name of a part -> ours."""


def karpathy_rows(file: Path, split: str, progress: Progress) -> Iterator[Raw]:
    """The pictures of one of our splits; one of no known part counts as one of each, to be dropped with its reason."""
    for row in json_rows(file, progress, "images"):
        part = if_text(row, "split")
        if part is None or SPLITS.get(part, split) == split:
            yield row


def split_of_pictures(file: Path, progress: Progress) -> dict[str, str]:
    """COCO's numbers of the pictures, as text -> our split.

    Raises:
        UserError: a picture without a number or of no known part; it names the row.
    """
    found: dict[str, str] = {}
    for where, row in numbered(file, json_rows(file, progress, "images")):
        with refusing(where):
            picture, part = identifier(row, "cocoid"), filled(row, "split")
        if part not in SPLITS:
            raise UserError(f"{where}: its part is {shown(part)}, which is not one of {', '.join(SPLITS)}")
        found[picture] = SPLITS[part]
    return found
