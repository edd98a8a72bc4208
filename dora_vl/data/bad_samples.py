"""Keeps account of unusable samples: each is named once, and too many of them end the run."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from dora_vl.errors import UserError, one_line, shown_text

BAD_BEFORE_EARLY_END = 10
TIMES_THE_SHARE = 10
LONGEST_ID = 120
"""Characters of an id in a line of the log."""

_log = logging.getLogger(__name__)


class BadSampleCounts(NamedTuple):
    """Occurrences on one rank or, added field by field, on all: two numbers that an all-reduce can sum."""

    seen: int = 0
    bad: int = 0


class BadSampleLedger:
    """The account of one rank; knows nothing of the others except through the counts given to `judge`.

    Two rules end a run. (1) More bad samples than `max_bad_share` of the whole set, for each pass begun over it: the
    verdict is then certain, wherever they stood. (2) At least ten bad samples that are more than ten times that
    share of what was seen (or, for a large share, more than halfway from it to all): the set is clearly
    broken, a wrong picture folder for example, and the end of the pass need not be waited for. One bad sample of
    a big set ends nothing; with a share of 0 the first one does.
    """

    def __init__(
        self, *, max_bad_share: float, total_samples: int, source: str, read_in_a_pass: int | None = None
    ) -> None:
        """Starts empty.

        Args:
            max_bad_share: in 0..1, `data.max_bad_share`.
            total_samples: in the whole set, over all ranks.
            source: what the messages call the set: its file.
            read_in_a_pass: samples that all ranks together read before the next pass begins, where they repeat some to
                have equally many; None: `total_samples`.
        """
        if not 0 <= max_bad_share <= 1:
            raise UserError(f"data.max_bad_share must be between 0 and 1, got {max_bad_share}")
        self._max_bad_share = max_bad_share
        self._total_samples = total_samples
        self._read_in_a_pass = max(1, read_in_a_pass or total_samples)
        self._source = source
        self._counts = BadSampleCounts()
        self._reasons: dict[str, str] = {}

    @property
    def counts(self) -> BadSampleCounts:
        """This rank's counts since the start of the process."""
        return self._counts

    @property
    def reasons(self) -> Mapping[str, str]:
        """Why each bad sample this rank met cannot be used, by id."""
        return self._reasons

    def carry_over(self, reasons: Mapping[str, str]) -> None:
        """Bad samples that the run named before it was resumed."""
        self._reasons = {**reasons, **self._reasons}

    def record(self, *, samples: int, skipped: Iterable[tuple[str, str]]) -> None:
        """Takes note of one batch: how many samples were usable, and (id, reason) of the others."""
        bad = list(skipped)
        self._counts = BadSampleCounts(self._counts.seen + samples + len(bad), self._counts.bad + len(bad))
        for sample_id, reason in bad:
            if sample_id not in self._reasons:
                self._reasons[sample_id] = reason
                _log.warning("skipped sample %s: %s", shown_text(sample_id, LONGEST_ID), one_line(reason))

    def judge(self, counts: BadSampleCounts | None = None) -> None:
        """Ends the run if too many samples are bad; give all ranks' sum, so that all end at the same step.

        Raises:
            UserError: one of the two rules is broken.
        """
        seen, bad = counts or self._counts
        if bad and (bad > self._allowed(seen) or self._clearly_broken(seen, bad)):
            raise UserError(self._message(seen, bad))

    def _allowed(self, seen: int) -> float:
        passes = math.ceil(seen / self._read_in_a_pass)
        return self._max_bad_share * self._total_samples * passes

    def _clearly_broken(self, seen: int, bad: int) -> bool:
        limit = min(TIMES_THE_SHARE * self._max_bad_share, (1 + self._max_bad_share) / 2)
        return bad >= BAD_BEFORE_EARLY_END and bad > limit * seen

    def _message(self, seen: int, bad: int) -> str:
        example = next((f"; for example {shown_text(key)}: {reason}" for key, reason in self._reasons.items()), "")
        return (
            f"{self._source}: {bad:,} of the {seen:,} samples read so far ({bad / seen:.2%}) cannot be used, and of all"
            f" {self._total_samples:,} at most {self._max_bad_share:.2%} may be bad{example}."
            " Repair them or raise data.max_bad_share"
        )


def write_skipped(path: Path, reasons: Mapping[str, str], *, validation: Mapping[str, str] | None = None) -> None:
    """One JSON line with id and reason for each bad sample; whole or not at all. Validation's say so (`of`)."""
    lines = [{"id": key, "reason": reason} for key, reason in reasons.items()]
    lines += [{"id": key, "reason": reason, "of": "validation"} for key, reason in (validation or {}).items()]
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines), encoding="utf-8")
    partial.replace(path)
