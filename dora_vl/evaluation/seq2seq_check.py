"""What the test of an encoder-decoder's tasks will need, tried before hours of training."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path

from dora_vl.backbones.seq2seq_text import Seq2SeqEncoder
from dora_vl.data.dataset import Skipped
from dora_vl.data.example_file import ExampleFile
from dora_vl.data.examples import Example
from dora_vl.data.seq2seq import Subtask
from dora_vl.errors import UserError
from dora_vl.evaluation.choices import check_choices
from dora_vl.evaluation.seq2seq_run import Tested, asked, has_answers


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


def check_tests(tested: Sequence[Tested], encoder: Seq2SeqEncoder) -> None:
    """Looks for features and tries the scorers.

    Raises:
        BadSample: a record is misshapen.
        UserError: no example of a file can be asked, or a file cannot be scored here.
    """
    for subtask, file, reader in tested:
        examples = list(file)
        check_scoring(subtask, examples)
        first: Skipped | None = None
        for example in examples:
            item = asked(example, subtask, encoder, reader)
            if not isinstance(item, Skipped):
                break
            first = first or item
        else:
            because = "" if first is None else f"; for example {first.id}: {first.reason}"
            raise UserError(
                f"{_name(file)}: not one example can be asked{because}. Correct evaluation.files, or the features "
                f"folder of {subtask.name} (data.features or evaluation.features)"
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
    return ", ".join(str(path) for path in file.paths)
