"""What the test of an encoder-decoder's tasks will need, tried before hours of training."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from dora_vl.backbones.pieces import Seq2SeqEncoder
from dora_vl.backbones.vision_store import FeatureReader
from dora_vl.data.example import Example, ExampleFile
from dora_vl.data.samples import Skipped
from dora_vl.errors import BadSample, UserError
from dora_vl.evaluation.scores.benchmark import check_choices
from dora_vl.evaluation.seq2seq_run import Tested, asked, has_answers
from dora_vl.training.seq2seq_tasks import Subtask, check_sample

log = logging.getLogger(__name__)

READ = 64
"""Examples of a file whose features are read before training, evenly over the file, at most."""
NAMED = 3


def open_test(subtask: Subtask, path: Path, *, limit: int | None) -> ExampleFile:
    """A task's test file, each example read once, so that a long run does not end at one that cannot be scored.

    Raises:
        UserError: a question of a task that chooses has no choices, or does not say which is right.
        BadSample: a record is misshapen.
    """
    file = ExampleFile(path, limit=limit)
    if subtask.chooses:
        check_choices(file, path, most=None)
    else:
        deque(file, maxlen=0)
    return file


def check_tests(tested: Sequence[Tested], encoder: Seq2SeqEncoder, *, max_bad_share: float) -> None:
    """Tries the scorers, looks up the features of every example, and reads those of some.

    Args:
        max_bad_share: largest share of examples that cannot be asked, of all by the features' index and of those that
            were read; they are named and count as wrong in the test.

    Raises:
        BadSample: a record is misshapen.
        UserError: more than that of a file, or all of it, cannot be asked, or a file cannot be scored here.
    """
    for subtask, file, reader in tested:
        examples = list(file)
        check_scoring(subtask, examples)
        bad = _bad_by_the_index(examples, subtask, reader)
        left = [example for example in examples if example.id not in bad]
        if not left:
            raise UserError(_told(subtask, file, bad, f"not one of {len(examples):,} examples can be asked"))
        sample = left[:: -(-len(left) // READ)]
        read = _bad_by_their_content(sample, subtask, encoder, reader)
        if not bad and not read:
            continue
        told = [f"{len(bad):,} of {len(examples):,} examples cannot be asked"] if bad else []
        told += [f"{len(read)} of {len(sample)} whose features were read cannot be asked"] if read else []
        message = _told(subtask, file, bad | read, ", and ".join(told))
        if max(len(bad) / len(examples), len(read) / len(sample)) > max_bad_share:
            raise UserError(f"{message}, or raise data.max_bad_share ({max_bad_share:g})")
        log.warning("%s; they will count as wrong", message)


def _bad_by_the_index(examples: Sequence[Example], subtask: Subtask, reader: FeatureReader) -> dict[str, str]:
    """Reason by id of all that cannot be asked, as far as it shows without reading features."""
    bad: dict[str, str] = {}
    for example in examples:
        try:
            check_sample(example, subtask, reader)
        except BadSample as error:
            bad[example.id] = error.reason
    return bad


def _bad_by_their_content(
    sample: Sequence[Example], subtask: Subtask, encoder: Seq2SeqEncoder, reader: FeatureReader
) -> dict[str, str]:
    """The same of examples that are put together as for the test."""
    items = (asked(example, subtask, encoder, reader) for example in sample)
    return {item.id: item.reason for item in items if isinstance(item, Skipped)}


def _told(subtask: Subtask, file: ExampleFile, bad: Mapping[str, str], what: str) -> str:
    """Which file, how many, the first of them, why, and what to do; one line that is short enough to be read."""
    names = ", ".join(f"{name:.24}" for name in list(bad)[:NAMED])
    return (
        f"{_name(file):.60}: {what} ({names}{', ...' if len(bad) > NAMED else ''}); the first: "
        f"{next(iter(bad.values())):.160}. Correct evaluation.files or {subtask.name}'s folder of features"
    )


def check_scoring(subtask: Subtask, examples: Sequence[Example]) -> None:
    """Scores examples as if none had an answer, or asks the task's own check where that would take long.

    Raises:
        UserError: what the scorer says.
    """
    if not has_answers(examples):
        return
    if subtask.check_scoring is None:
        subtask.score(examples, {})
    else:
        subtask.check_scoring(examples)


def _name(file: ExampleFile) -> str:
    return ", ".join(path.name for path in file.paths)
