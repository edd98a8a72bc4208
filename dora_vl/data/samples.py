"""Turns examples into samples that a backbone can batch; names unusable ones, and ends a run with too many."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dora_vl.data.example import Example
from dora_vl.data.objects import Size
from dora_vl.data.pictures import MediaFolder, path_inside
from dora_vl.data.table import ExampleTable
from dora_vl.data.turns import Clip, Turn
from dora_vl.errors import BadSample, UserError, one_line, short_text
from dora_vl.files import write_json_lines
from dora_vl.shapes import Int

BOOKKEEPING = ("samples", "sample_ids", "padding_tokens", "skipped", "cut", "shrunk", "made_of")
"""A batch holds counts, messages and its samples under these names; all else goes to the model."""
ALIGNED = ("attention_mask", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids", "cross_attention_mask")
"""These tensors of a processor hold an entry a token, and are cut and padded as the ids are."""
IGNORED_LABEL = -100
"""Labels a position that is not trained, as `torch.nn.functional.cross_entropy` has it."""


class TrainedAnswer(NamedTuple):
    """Holds what labels say of one answer: its text, what opens it and is trained too, and what closes it."""

    opening: str
    text: str
    closing: str


@dataclass(frozen=True)
class Encoded:
    """An example in tokens. `labels[t]` is the token at `t` where it is trained, else -100.

    `cut_tokens` counts what the length limit removed at the end, `lost_pixels` what the pixel budget took of its
    pictures; `inputs` are a processor's further tensors, by its own names, each with this example as its only row (or
    its pictures as rows), and `stored` what frozen vision parts gave for its pictures (`backbones.frozen_outputs`).
    `media_end` is the first position after the tokens of all its pictures and videos, and `positions` are those of a
    family that counts along several axes. `media` says which pictures and videos it shows, `answers` the numbers of
    those that it trains; `others` train the rest, each a row of the same conversation as it was when it was asked, or
    are other answers to the same question. `weight` says how much its labels count; an answer below 0 is rejected, and
    one that is `exchanged` is the preferred one under other pictures. `sizes` are those of its pictures, and
    `written` its turns as the family writes the boxes in them, where they hold any.
    """

    input_ids: Int[Tensor, " seq"]
    labels: Int[Tensor, " seq"]
    cut_tokens: int = 0
    inputs: Mapping[str, Any] = field(default_factory=dict)
    lost_pixels: int = 0
    stored: tuple[Any, ...] = ()
    media_end: int = 0
    positions: Int[Tensor, "axes seq"] | None = None
    media: tuple[str | Clip, ...] = ()
    answers: tuple[int, ...] = ()
    others: tuple[Encoded, ...] = ()
    weight: float = 1.0
    exchanged: bool = False
    sizes: tuple[Size, ...] = ()
    written: tuple[Turn, ...] = ()

    def own_positions(self) -> Int[Tensor, "axes seq"]:
        """Returns the position of each token: the family's own, else its place."""
        return torch.arange(len(self.input_ids))[None] if self.positions is None else self.positions


@dataclass(frozen=True)
class Sample(Encoded):
    """One usable sample, at its place in the data."""

    index: int = -1
    id: str = ""

    def texts(self) -> list[Sample]:
        """Returns the sample and its `others`, a text each."""
        return [self, *(Sample(**{**vars(other), "index": self.index, "id": self.id}) for other in self.others)]


@dataclass(frozen=True)
class Skipped:
    """A sample that cannot be used, and why."""

    index: int
    id: str
    reason: str


Examples: TypeAlias = ExampleTable | Sequence[Example | BadSample]


def sample_random(seed: int, epoch: int, index: int) -> random.Random:
    """Returns the generator of one sample in one epoch: the same on any rank, in any worker, after any resume."""
    return random.Random(f"{seed}/{epoch}/{index}")


class ConversationDataset(torch.utils.data.Dataset["Sample | Skipped"]):
    """Encodes one example at a time; `encode` is the backbone's, and raises `BadSample` for a broken picture."""

    def __init__(self, examples: Examples, *, encode: Callable[[Example], Encoded]) -> None:
        self._examples = examples
        self._encode = encode

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Sample | Skipped:
        example = self._examples[index]
        if isinstance(example, BadSample):
            return Skipped(index, example.sample_id, example.reason)
        try:
            encoded = self._encode(example)
        except BadSample as error:
            return Skipped(index, example.id, error.reason)
        # The first position has nothing before it to be predicted from, so its label cannot train.
        if not bool((encoded.labels[1:] != IGNORED_LABEL).any()):
            reason = f"nothing is left to train on in its {len(encoded.labels)} tokens"
            return Skipped(index, example.id, f"{reason} after {encoded.cut_tokens} were cut; raise data.max_tokens")
        return Sample(**vars(encoded), index=index, id=example.id)


_log = logging.getLogger(__name__)


class BadSampleCounts(NamedTuple):
    """Counts on one rank or, added field by field, on all: two numbers that an all-reduce can sum."""

    seen: int = 0
    bad: int = 0


class BadSampleLedger:
    """Counts one rank's bad samples; knows of other ranks only by the counts given to `judge`.

    Two rules end a run. (1) The bad samples seen exceed `max_bad_share` of the whole set, for each pass begun: the
    outcome is then certain. (2) At least ten samples are bad, and they exceed ten times that share of the samples seen
    so far (for a large share: more than halfway from it to 1): the set is clearly broken, for example by a wrong
    picture folder. One bad sample of a big set ends nothing; with a share of 0 the first one does.

    Args:
        read_in_a_pass: samples that all ranks together read before the next pass begins, where they repeat some to
            have equally many; None: `total_samples`.
    """

    def __init__(
        self, *, max_bad_share: float, total_samples: int, source: str, read_in_a_pass: int | None = None
    ) -> None:
        if not 0 <= max_bad_share <= 1:
            raise UserError(f"data.max_bad_share must be between 0 and 1, got {max_bad_share}")
        self._max_bad_share = max_bad_share
        self._total_samples = total_samples
        self._read_in_a_pass = max(1, read_in_a_pass or total_samples)
        self._source = source
        self.counts = BadSampleCounts()
        """Counts this rank's samples since the start of the process."""
        self.reasons: dict[str, str] = {}
        """Maps the id of each bad sample that this rank met to the reason."""

    def carry_over(self, reasons: Mapping[str, str]) -> None:
        """Takes over the bad samples that the run named before it was resumed."""
        self.reasons = {**reasons, **self.reasons}

    def record(self, *, samples: int, skipped: Sequence[tuple[str, str]]) -> None:
        """Records one batch: how many samples were usable, and (id, reason) of the others."""
        self.counts = BadSampleCounts(self.counts.seen + samples + len(skipped), self.counts.bad + len(skipped))
        for sample_id, reason in skipped:
            if sample_id not in self.reasons:
                self.reasons[sample_id] = reason
                _log.warning("skipped sample %s: %s", short_text(sample_id, 120), one_line(reason))

    def judge(self, counts: BadSampleCounts | None = None) -> None:
        """Ends the run if too many samples are bad; give all ranks' sum, so that all end at the same step."""
        seen, bad = counts or self.counts
        allowed = self._max_bad_share * self._total_samples * math.ceil(seen / self._read_in_a_pass)
        broken_share = min(10 * self._max_bad_share, (1 + self._max_bad_share) / 2)
        if bad <= allowed and (bad < 10 or bad <= broken_share * seen):
            return
        example = next((f"; for example {short_text(key)}: {reason}" for key, reason in self.reasons.items()), "")
        raise UserError(
            f"{self._source}: {bad:,} of the {seen:,} samples read so far ({bad / seen:.2%}) cannot be used, and of all"
            f" {self._total_samples:,} at most {self._max_bad_share:.2%} may be bad{example}."
            " Repair them or raise data.max_bad_share"
        )


def write_skipped(path: Path, reasons: Mapping[str, str], *, validation: Mapping[str, str] | None = None) -> None:
    """Writes a JSON line of id and reason for each bad sample, whole or not at all; validation's say so (`of`)."""
    lines = [{"id": key, "reason": reason} for key, reason in reasons.items()]
    lines += [{"id": key, "reason": reason, "of": "validation"} for key, reason in (validation or {}).items()]
    write_json_lines(path, lines)


LOOK_AHEAD_ROWS = 20_000  # rows, at even distances, that are looked at before a run: a few seconds' worth
CHECKED_SAMPLES = 8  # samples, and as many with pictures, whose labels are read before the first step
SHOWN_CHARACTERS = 120  # of a text in a message
CONTEXT_CHARACTERS = 20  # of these, those before it differs from another


def check_files_early(
    table: ExampleTable, *, pictures: MediaFolder | None, videos: MediaFolder | None, max_bad_share: float, source: str
) -> None:
    """Refuses a set with so large a share of unusable samples that a run over it would end.

    `pictures` and `videos` are the roots of their paths; None where their files are not looked for.
    """
    bad: dict[str, str] = {}
    indices = np.linspace(0, len(table) - 1, min(len(table), LOOK_AHEAD_ROWS)).astype(np.int64)
    for example in table if len(indices) == len(table) else table.select(indices):
        if isinstance(example, BadSample):
            bad[example.sample_id] = example.reason
            continue
        shown = (*example.images, *example.rejected_images)
        files = [(pictures, name, "picture") for name in shown if name not in table.stored]
        files += [(videos, clip.path, "video") for clip in example.videos]
        problems = (_missing_reason(root, name, kind) for root, name, kind in files if root is not None)
        if problem := next(filter(None, problems), None):
            bad[example.id] = problem
    ledger = BadSampleLedger(max_bad_share=max_bad_share, total_samples=len(table), source=source)
    ledger.carry_over(bad)
    ledger.judge(BadSampleCounts(seen=len(indices), bad=len(bad)))


def _missing_reason(root: MediaFolder, name: str, kind: str) -> str | None:
    try:
        if path_inside(root, name, kind=kind).exists():
            return None
    except BadSample as error:
        return error.reason
    except OSError:  # a name that no file system takes
        pass
    return f"{kind} {name} is missing in {root}"


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Holds a sample's labels as training takes them, and what they must say; with `cut` its end may be missing."""

    id: str
    labels: Int[Tensor, " seq"]
    answers: Sequence[TrainedAnswer]
    tokenizer: PreTrainedTokenizerBase
    cut: bool = False

    def read(self, ids: list[int]) -> str:
        """Decodes tokens, special ones too."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def check_labels(samples: Iterable[Labelled]) -> None:
    """Refuses a run whose labels are not the answers with their end tokens.

    They are read back as text. White space is not compared: tokenizers put some before a text and take some off it.
    """
    for sample in samples:
        labels = sample.labels[sample.labels != IGNORED_LABEL]
        trained = sample.read(labels.tolist())
        if _labels_match(trained, sample):
            continue
        meant = "".join("".join(answer) for answer in sample.answers)
        alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(trained, meant, strict=False)))
        start = max(0, alike - CONTEXT_CHARACTERS) if max(len(trained), len(meant)) > SHOWN_CHARACTERS else 0
        raise UserError(
            f"sample {short_text(sample.id)}: its labels read back as "
            f"{short_text(trained[start:], SHOWN_CHARACTERS)!r}, but its answers with their end tokens are "
            f"{short_text(meant[start:], SHOWN_CHARACTERS)!r}; the base's tokenizer or chat template does not fit: "
            "set another model.template, or take another base"
        )


def _labels_match(trained: str, sample: Labelled) -> bool:
    """Tells whether a text is the sample's answers, one after another, each closed; of a cut sample their beginning."""
    rest, closing = _without_whitespace(trained), ""
    for answer in sample.answers:
        # Each as it is, and as the tokenizer gives it back, which may spell it differently or not know it.
        forms = [
            _without_whitespace(form)
            for text in ("".join(answer), answer.text + answer.closing)
            for form in (text, sample.read(sample.tokenizer(text, add_special_tokens=False)["input_ids"]))
        ]
        closing = answer.closing
        form = next((form for form in forms if rest.startswith(form)), None)
        if form is None:
            beginning = rest.removesuffix(_without_whitespace(closing)).rstrip("\ufffd")  # of a character cut in two
            return sample.cut and any(form.startswith(beginning) for form in forms)
        rest = rest[len(form) :]
    return not rest and (sample.cut or not closing.isspace() or trained[-1:].isspace())


def _without_whitespace(text: str) -> str:
    return "".join(text.split())
