"""What is wrong with a run's samples, before any weight is read: their turns, their labels, and whether their files are
there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import datasets
import numpy as np
from jaxtyping import Int
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dora_vl.data.bad_samples import BadSampleCounts, BadSampleLedger
from dora_vl.data.dataset import IGNORED_LABEL, TrainedAnswer
from dora_vl.data.media import HeldPictures, MediaFolder, path_inside
from dora_vl.data.turns import read_conversation
from dora_vl.errors import BadSample, UserError, shown_text

MOST = 20_000
"""Rows that are looked at, a few seconds' worth; of more, so many at even distances."""
AT_ONCE = 1_000
FIRST = 8
"""Samples whose labels are read before the first step, and of those with pictures so many more."""
SHOWN, BEFORE = 120, 20
"""Characters of a text in a message, and of them those before where it differs from another."""


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


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A sample's labels as training takes them, and what they must say.

    Attributes:
        cut: whether its end may have been cut.
    """

    id: str
    labels: Int[Tensor, " seq"]
    answers: Sequence[TrainedAnswer]
    tokenizer: PreTrainedTokenizerBase
    cut: bool = False


def check_labels(samples: Iterable[Labelled]) -> None:
    """Refuses a run whose labels are not the answers and what closes them.

    They are read back as text. White space is not compared: tokenizers put some before a text and take some off it.

    Raises:
        UserError: with the sample's id and both texts.
    """
    for sample in samples:
        labels = sample.labels[sample.labels != IGNORED_LABEL]
        trained = _read(sample.tokenizer, labels.tolist())
        if _says(trained, sample):
            continue
        meant = "".join("".join(answer) for answer in sample.answers)
        alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(trained, meant, strict=False)))
        start = max(0, alike - BEFORE) if max(len(trained), len(meant)) > SHOWN else 0
        raise UserError(
            f"sample {shown_text(sample.id)}: its labels would train {shown_text(trained[start:], SHOWN)!r}, and its "
            f"answers with what closes them are {shown_text(meant[start:], SHOWN)!r}; the base's tokenizer or chat "
            "template does not fit: set another model.template, or take another base"
        )


def _says(trained: str, sample: Labelled) -> bool:
    """Whether a text is the sample's answers, one after another, each closed; of a cut sample their beginning."""
    rest, closing = _squashed(trained), ""
    for answer in sample.answers:
        forms = [form for text in ("".join(answer), answer.text + answer.closing) for form in _forms(text, sample)]
        closing = answer.closing
        form = next((form for form in forms if rest.startswith(form)), None)
        if form is None:
            kept = rest.removesuffix(_squashed(closing)).rstrip("\ufffd")  # of a character cut in two
            return sample.cut and any(form.startswith(kept) for form in forms)
        rest = rest[len(form) :]
    return not rest and (sample.cut or not closing.isspace() or trained[-1:].isspace())


def _forms(text: str, sample: Labelled) -> tuple[str, str]:
    """A text as it stands, and as the tokenizer gives it back, which may spell it otherwise or not know it."""
    ids = sample.tokenizer(text, add_special_tokens=False)["input_ids"]
    return _squashed(text), _squashed(_read(sample.tokenizer, ids))


def _read(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _squashed(text: str) -> str:
    return "".join(text.split())


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
