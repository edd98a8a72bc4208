"""Which samples make the largest micro-batches: the longest by what is known, and those of the largest pictures."""

from __future__ import annotations

import io

import datasets
import numpy as np
from jaxtyping import Bool
from torch import Tensor

from dora_vl.data.media import HeldPictures, MediaFolder, path_inside
from dora_vl.data.picture_decoding import NOT_DECODED, opened_picture
from dora_vl.data.sampler import SamplingLengths
from dora_vl.errors import BadSample

HEADERS = 1_000
"""Rows whose pictures' sizes are read, less than a second's worth; of more, so many at even distances."""


def longest_places(known: SamplingLengths, count: int, among: Bool[Tensor, " samples"] | None = None) -> list[int]:
    """The places of the `count` longest samples, or of those of one kind."""
    order = known.lengths.argsort(descending=True, stable=True)
    kept = order if among is None else order[among[order]]
    return kept[:count].tolist()


def places_of_largest_pictures(
    rows: datasets.Dataset, stored: HeldPictures, folder: MediaFolder, count: int
) -> list[int]:
    """The places of `count` rows whose pictures have the most pixels; nothing is decoded.

    Args:
        rows: of `record_table.load_table`.
        stored: pictures that the file holds itself.
        folder: root of the others' paths.
    """
    places = np.linspace(0, len(rows) - 1, min(len(rows), HEADERS)).astype(np.int64)
    named = rows.select(places)["images"]
    pixels = [sum(_pixels(name, stored, folder) for name in names) for names in named]
    order = np.argsort(pixels, kind="stable")[::-1][:count]
    return [int(places[one]) for one in order if pixels[one]]


def _pixels(name: str, stored: HeldPictures, folder: MediaFolder) -> int:
    """Those that a picture's header tells of; none of one that cannot be read."""
    try:
        source = io.BytesIO(stored.read(name)) if name in stored else path_inside(folder, name)
        with opened_picture(source) as picture:
            return picture.width * picture.height
    except (BadSample, *NOT_DECODED):
        return 0
