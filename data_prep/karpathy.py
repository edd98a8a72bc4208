"""Karpathy's split of COCO's 2014 pictures (Karpathy and Fei-Fei, 2015), which captions and VL-BART's VQA share.

File: `dataset_coco.json` from the archive `caption_datasets.zip` (cs.stanford.edu/people/karpathy/deepimagesent):
123,287 pictures, of which 82,783 train, 30,504 restval, 5,000 val and 5,000 test. Everybody trains on train +
restval.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data_prep.published import Progress, Raw, json_rows

FILE = "dataset_coco.json"
SPLITS = {"train": "train", "restval": "train", "val": "validation", "test": "test"}
"""Karpathy's name of a part -> ours."""


def karpathy_rows(file: Path, split: str, progress: Progress) -> Iterator[Raw]:
    """The pictures of one of our splits; one of no known part counts as one of each, to be dropped with its reason."""
    for row in json_rows(file, progress, "images"):
        if SPLITS.get(str(row.get("split")), split) == split:
            yield row


def pictures_of_split(file: Path, split: str, progress: Progress) -> set[int]:
    """COCO's numbers of the pictures in one of our splits."""
    return {row["cocoid"] for row in karpathy_rows(file, split, progress) if "cocoid" in row}
