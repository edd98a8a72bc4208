"""What is wrong with a run's samples, before any weight is read: their turns, and whether their files are there.

Nothing is decoded here: a picture that is there and broken is found when it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import datasets
import numpy as np

from dora_vl.data.bad_samples import BadSampleCounts, BadSampleLedger
from dora_vl.data.dataset import ConversationDataset, Skipped
from dora_vl.data.media import HeldPictures, MediaFolder, path_inside
from dora_vl.data.turns import read_conversation
from dora_vl.errors import BadSample, UserError

MOST = 20_000
"""Rows that are looked at, a few seconds' worth; of more, so many at even distances."""
AT_ONCE = 1_000
FIRST = 8
"""Samples that are brought into tokens as a try."""


def look_ahead(
    rows: datasets.Dataset,
    stored: HeldPictures,
    *,
    pictures: MediaFolder | None,
    videos: MediaFolder | None,
    max_bad_share: float,
    source: str,
) -> None:
    """Refuses a set of which so many samples cannot be used that a run over it would end for that.

    Args:
        rows: of `record_table.load_table`.
        stored: pictures that the file holds itself.
        pictures: root of the pictures' paths; None where samples have none, or their files are not looked for.
        videos: likewise of videos.
        source: the set's name.

    Raises:
        UserError: as `BadSampleLedger.judge`, with the first sample's reason.
    """
    bad: dict[str, str] = {}
    places = np.linspace(0, len(rows) - 1, min(len(rows), MOST)).astype(np.int64)
    for row in _rows(rows if len(places) == len(rows) else rows.select(places)):
        try:
            _check(row, stored, pictures, videos)
        except BadSample as error:
            bad[str(row["id"])] = error.reason
    ledger = BadSampleLedger(max_bad_share=max_bad_share, total_samples=len(rows), source=source)
    ledger.carry_over(bad)
    ledger.judge(BadSampleCounts(seen=len(places), bad=len(bad)))


def try_first(samples: ConversationDataset, *, source: str) -> None:
    """Brings the first few samples into tokens.

    Raises:
        UserError: none of them can be used; with the first one's reason.
    """
    reasons: list[str] = []
    for index in range(min(FIRST, len(samples))):
        found = samples[index]
        if not isinstance(found, Skipped):
            return
        reasons.append(f"{found.id}: {found.reason}")
    raise UserError(f"{source}: none of its first {len(reasons)} samples can be used; for example {reasons[0]}")


def _rows(rows: datasets.Dataset) -> Iterator[Mapping[str, object]]:
    for start in range(0, len(rows), AT_ONCE):
        columns = rows[start : start + AT_ONCE]
        yield from (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))


def _check(
    row: Mapping[str, object], stored: HeldPictures, pictures: MediaFolder | None, videos: MediaFolder | None
) -> None:
    conversation = read_conversation(row)
    if pictures is not None:
        for name in conversation.images:
            if name not in stored:
                _find(pictures, name, "picture")
    if videos is not None:
        for clip in conversation.videos:
            _find(videos, clip.path, "video")


def _find(root: MediaFolder, name: str, kind: str) -> None:
    try:
        there = path_inside(root, name, kind=kind).exists()
    except OSError:  # a name that no file system takes
        there = False
    if not there:
        raise BadSample(name, f"{kind} {name} is missing in {root}")
