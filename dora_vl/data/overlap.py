"""Samples of the training data that a test asks again: the same question about the same pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dora_vl.data.turns import IMAGE_PLACEHOLDER
from dora_vl.errors import one_line


@runtime_checkable
class QuestionAboutPictures(Protocol):
    """What is read of a test's question."""

    @property
    def id(self) -> str: ...  # noqa: D102

    @property
    def images(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def text(self) -> str: ...  # noqa: D102


def overlap(rows: datasets.Dataset, questions: Iterable[QuestionAboutPictures]) -> list[tuple[str, str]]:
    """The ids of a training sample and of the test's question that it holds, for each such sample.

    Args:
        rows: of `records.load_llava`; any of a talk's questions counts.
        questions: pictures named as in `rows`. Those without pictures are left out.
    """
    asked = {(tuple(one.images), _words(one.text)): one.id for one in questions if one.images}
    pictures = {name for names, _ in asked for name in names}
    found: list[tuple[str, str]] = []
    for own, images, turns in _rows_about(rows, pictures):
        keys = [(tuple(images), _words(turn["value"])) for turn in turns if turn["from"] != "gpt"]
        found += [(own, asked[key]) for key in dict.fromkeys(keys) if key in asked][:1]
    return found


def _rows_about(rows: datasets.Dataset, pictures: set[str]) -> Iterator[tuple[str, list[str], list[dict[str, str]]]]:
    """Those that have any of these pictures; the column is searched without making objects of it."""
    names = rows.select_columns(["images"]).with_format("arrow")[:]["images"].combine_chunks()
    known = pc.call_function("is_in", [names.flatten()], pc.SetLookupOptions(pa.array(sorted(pictures), pa.string())))
    places = np.repeat(np.arange(len(names)), np.array(names.value_lengths()))[np.array(known, bool)]
    about = rows.select(np.unique(places))
    yield from zip(about["id"], about["images"], about["conversations"], strict=True)


def _words(text: str) -> str:
    return " ".join(text.replace(IMAGE_PLACEHOLDER, " ").split())


def overlap_warning(found: Sequence[tuple[str, str]], train: str, test: str) -> str:
    """One line that counts and names them."""
    examples = "; ".join(f"{ours} is {theirs} there" for ours, theirs in found[:3])
    return one_line(f"{len(found):,} training samples of {train} are asked again in {test}: {examples}")
