"""A VL-BART's test: a file for each task, tried before training, watched meanwhile, and scored as the task is."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from dora_vl.backbones.pieces import Seq2SeqEncoder
from dora_vl.backbones.vision_store import FeatureReader
from dora_vl.backbones.vlbart import VlBartBackbone
from dora_vl.data.example import Example, ExampleFile
from dora_vl.errors import BadSample, UserError, shown_names
from dora_vl.evaluation.ask import Asker, Decoding, media_reader
from dora_vl.evaluation.predictions import BY_TASK
from dora_vl.evaluation.questions import Question, as_question, expected, has_truth, in_words, media_of
from dora_vl.evaluation.scores.benchmark import check_choices
from dora_vl.evaluation.test import TestSet, evaluate_sets, watch_questions
from dora_vl.evaluation.vlbart_assistant import VlBartAssistant
from dora_vl.evaluation.vlbart_tasks import Subtask, check_sample, make_sample
from dora_vl.run.settings import EvaluationConfig
from dora_vl.run.watched import Watch, evenly

log = logging.getLogger(__name__)

Tested = tuple[Subtask, ExampleFile, FeatureReader]
"""A VL-BART's task, its test file, and the features of what that shows."""
READ = 64
"""Examples of a file whose features are read before training, evenly over the file, at most."""
NAMED = 3


def open_test(subtask: Subtask, path: Path, *, limit: int | None) -> ExampleFile:
    """A task's test file, each example read once, so that a long run does not end at one that cannot be scored."""
    file = ExampleFile(path, limit=limit)
    if subtask.chooses:
        check_choices(file, path, most=None)
    else:
        deque(file, maxlen=0)
    return file


def check_tests(tested: Sequence[Tested], encoder: Seq2SeqEncoder, *, max_bad_share: float) -> None:
    """Tries the scorers, looks up the features of every example, and reads those of some.

    A share of bad ones above `max_bad_share`, of all or of those that were read, is refused; others are named.
    """
    for subtask, file, reader in tested:
        examples = list(file)
        if has_truth(examples):
            check = subtask.check_scoring or (lambda examples, score=subtask.score: score(examples, {}))
            check(examples)
        bad = _reasons(examples, partial(check_sample, subtask=subtask, reader=reader))
        left = [example for example in examples if example.id not in bad]
        sample = left[:: -(-len(left) // READ)] if left else []
        unread = _reasons(sample, partial(make_sample, subtask=subtask, encoder=encoder, reader=reader, target=None))
        reasons = bad | unread
        if not reasons:
            continue
        names = ", ".join(path.name for path in file.paths)
        message = (
            f"{names:.60}: {len(bad):,} of {len(examples):,} examples cannot be asked, nor {len(unread)} of "
            f"{len(sample)} whose features were read ({shown_names(reasons, NAMED)}); the first: "
            f"{next(iter(reasons.values())):.160}. Correct evaluation.files or {subtask.name}'s folder of features"
        )
        if not left:
            raise UserError(message)
        if max(len(bad) / len(examples), len(unread) / len(sample)) > max_bad_share:
            raise UserError(f"{message}, or raise data.max_bad_share ({max_bad_share:g})")
        log.warning("%s; they will count as wrong", message)


def _reasons(examples: Sequence[Example], check: Callable[[Example], object]) -> dict[str, str]:
    """Why examples do not pass, by id."""
    bad: dict[str, str] = {}
    for example in examples:
        try:
            check(example)
        except BadSample as error:
            bad[example.id] = error.reason
    return bad


def watch_subtasks(
    backbone: VlBartBackbone,
    encoder: Seq2SeqEncoder,
    tested: Sequence[Tested],
    *,
    count: int,
    image_folder: str | None,
    source: str,
) -> Watch | None:
    """So many examples, of each task in turn, evenly over its file; None where no file holds one that can be read."""
    parts: list[tuple[Asker, Sequence[Question], Decoding]] = []
    for number, (subtask, file, reader) in enumerate(tested):
        questions: list[Question] = []
        for index in evenly(range(len(file)), len(range(number, count, len(tested)))):
            try:
                question = as_question(example := file[index])
            except BadSample:  # validation, or the test, counts and names it
                continue
            truth = in_words(example, expected(example))
            questions.append(replace(question, id=f"{subtask.name}/{example.id}", truth=truth))
        model = VlBartAssistant(
            backbone=backbone, encoder=encoder, subtasks=(subtask,), stored=reader, while_training=True
        )
        parts.append((model, questions, Decoding(batch_size=max(1, len(questions)), task=subtask.name)))
    media = None if image_folder is None else media_reader(Path(image_folder), frames=1)
    return watch_questions(parts, media, source=source)


def picture_of(example: Example, root: Path) -> Callable[[], Image.Image] | None:
    """What opens an example's pictures, or frames of its video, as one; None: it shows nothing."""
    return partial(media_reader(root, frames=1).picture, as_question(example)) if media_of(example) else None


def evaluate_subtasks(
    backbone: VlBartBackbone,
    encoder: Seq2SeqEncoder,
    tested: Sequence[Tested],
    *,
    run_folder: Path,
    evaluation: EvaluationConfig,
    settings: Mapping[str, Any],
    numbers: Mapping[str, Any],
) -> dict[str, Any]:
    """Answers and scores each task; the only one with an accuracy has its headline at the top of `metrics.json`."""
    backbone.eval()
    media, started = media_reader(Path(evaluation.image_folder or "."), frames=1), time.monotonic()
    subtasks = {subtask.name: subtask for subtask, _, _ in tested}

    def tests() -> Iterator[TestSet]:
        for subtask, file, reader in tested:
            examples = list(file)
            yield TestSet(
                name=subtask.name,
                model=VlBartAssistant(backbone=backbone, encoder=encoder, subtasks=(subtask,), stored=reader),
                questions=[*map(as_question, examples)],
                examples=examples,
                decoding=Decoding(batch_size=evaluation.batch_size, task=subtask.name),
                score=subtask.score if has_truth(examples) else None,
                path=run_folder / BY_TASK / f"{subtask.name}.jsonl",
            )

    def metrics_of(answered: Sequence[TestSet]) -> dict[str, Any]:
        tasks = {test.name: _entry(subtasks[test.name], test) for test in answered}
        accuracies = [test for test in answered if test.is_accuracy]
        top = accuracies[0].headline() if len(accuracies) == 1 else {}
        if not accuracies and len(tasks) == 1:
            top = {"n": next(iter(tasks.values()))["n"]}
        seconds = round(time.monotonic() - started, 1)
        return {**numbers, "tasks": tasks, "settings": dict(settings), "evaluation_seconds": seconds, **top}

    exchange, sheet = evaluation.exchange_pictures, evaluation.image_folder is not None
    with closing(media):
        return evaluate_sets(tests(), metrics_of, run_folder=run_folder, media=media, exchange=exchange, sheet=sheet)


def _entry(subtask: Subtask, test: TestSet) -> dict[str, Any]:
    """What `metrics.json` holds of a task."""
    predictions, scored = test.predictions, test.scored
    lost = {"failed": predictions.failed, "cut_texts": sum(bool(row.cut_tokens) for row in predictions.rows)}
    if scored is None:
        note = "the publisher keeps the answers of this file"
        return {"metrics": {}, "n": len(test.examples), **lost, "note": note}
    made_with = {"answer_by": subtask.answer_by, "beams": str(subtask.search.beams), **scored.settings}
    counts = {"metrics": scored.metrics, "n": scored.n, **lost, "intervals_95": test.limits}
    return {**counts, "settings": made_with, **({"baselines": test.baselines} if test.baselines else {})}
