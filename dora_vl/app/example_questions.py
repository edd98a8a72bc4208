"""Questions that a run's own folder has at hand, for whoever opens the page: of its test, else those it watched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from PIL import Image

from dora_vl.data.media import MediaFolder, open_image
from dora_vl.errors import BadSample, UserError
from dora_vl.evaluation.result_files import Prediction, read_predictions
from dora_vl.report.answers import PREDICTIONS
from dora_vl.report.run_record import RunRecord, read_run
from dora_vl.run.watched import evenly

MOST_EXAMPLES = 6
LOOKED_AT = 5
"""So many times as many are looked at for pictures that are still there and questions that differ."""


@dataclass(frozen=True)
class ExampleQuestion:
    """A question about a picture; what is right is for the test, not for the page."""

    question: str
    picture: Image.Image
    truth: str


def example_questions(adapter: Path, most: int = MOST_EXAMPLES) -> tuple[ExampleQuestion, ...]:
    """A few questions with one picture each from the run that an adapter is of; none where that run is not there."""
    for folder in adapter.resolve().parents[:2]:  # an adapter is in its run's folder, or in a checkpoint's
        try:
            run = read_run(folder, folder.name)
        except UserError:
            continue
        return _first(_of_test(run, most), most) or _first(_watched(run), most)
    return ()


def _first(found: Iterator[ExampleQuestion], most: int) -> tuple[ExampleQuestion, ...]:
    """The first so many, each question once."""
    chosen: dict[str, ExampleQuestion] = {}
    for one in found:
        if one.question not in chosen:
            chosen[one.question] = one
        if len(chosen) == most:
            break
    return tuple(chosen.values())


def _of_test(run: RunRecord, most: int) -> Iterator[ExampleQuestion]:
    folder = run.section("evaluation").get("image_folder") or run.section("data").get("image_folder")
    path = run.folder / PREDICTIONS
    if folder is None or not path.is_file():
        return
    try:
        asked = [one for one in read_predictions(path).values() if len(one.images) == 1]
    except UserError:
        return
    for one in _kind_by_kind(asked, LOOKED_AT * most):
        yield from _opened(run.path(folder), one.images, one.question, one.truth)


def _kind_by_kind(asked: Sequence[Prediction], most: int) -> Iterator[Prediction]:
    """One of each kind of question, then the next of each, evenly from the whole test."""
    kinds: dict[str | None, list[Prediction]] = {}
    for one in asked:
        kinds.setdefault(one.kind, []).append(one)
    rounds = zip_longest(*(evenly(alike, most) for alike in kinds.values()))
    return (one for of_each in rounds for one in of_each if one is not None)


def _watched(run: RunRecord) -> Iterator[ExampleQuestion]:
    for one in run.watched.questions if run.watched is not None else ():
        if run.watched is not None and one.picture:
            yield from _opened(run.watched.folder, [one.picture], one.question, one.truth)


def _opened(folder: Path, images: Sequence[str], question: str, truth: str) -> Iterator[ExampleQuestion]:
    """The example, where its picture can be opened."""
    try:
        yield ExampleQuestion(question, open_image(MediaFolder(folder, follow_links=True), images[0]), truth)
    except BadSample:
        return
