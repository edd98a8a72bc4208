"""A VL-BART's test: a file for each task, tried before training, watched meanwhile, and scored as the task is."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dora_vl.backbones.pieces import Seq2SeqEncoder
from dora_vl.backbones.vision_store import FeatureReader
from dora_vl.backbones.vlbart import VlBartBackbone
from dora_vl.data.example import Example, ExampleFile
from dora_vl.errors import BadSample, UserError, short_names
from dora_vl.evaluation.predictor import Decoding, Predictor, media_reader
from dora_vl.evaluation.questions import has_truth
from dora_vl.evaluation.scores.benchmark import check_choices
from dora_vl.evaluation.scores.caption import clip_of
from dora_vl.evaluation.test import adapter_settings, evaluate_and_draw, watch_questions
from dora_vl.evaluation.test_sets import TestSet
from dora_vl.evaluation.vlbart_assistant import VlBartAssistant
from dora_vl.evaluation.vlbart_tasks import Subtask, check_sample, make_sample
from dora_vl.files import file_sha256
from dora_vl.run.folder import Watch, evenly
from dora_vl.run.settings import EvaluationConfig

log = logging.getLogger(__name__)

Tested = tuple[Subtask, ExampleFile, FeatureReader]
"""Joins a VL-BART's task, its test file, and the features of the file's pictures."""
READ = 64
"""The features of at most this many examples of a file, evenly spread, are read before training."""
NAMED = 3


def open_test(subtask: Subtask, path: Path, *, limit: int | None) -> ExampleFile:
    """Opens a task's test file and reads each example, so that a long run does not end at a bad one."""
    file = ExampleFile(path, limit=limit)
    if subtask.chooses:
        check_choices(file, path, max_choices=None)
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
        sample = evenly(left, READ)
        unread = _reasons(sample, partial(make_sample, subtask=subtask, encoder=encoder, reader=reader, target=None))
        reasons = bad | unread
        if not reasons:
            continue
        names = ", ".join(path.name for path in file.paths)
        message = (
            f"{names:.60}: {len(bad):,} of {len(examples):,} examples cannot be asked, nor {len(unread)} of "
            f"{len(sample)} whose features were read ({short_names(reasons, NAMED)}); the first: "
            f"{next(iter(reasons.values())):.160}. Correct evaluation.files or {subtask.name}'s folder of features"
        )
        if not left:
            raise UserError(message)
        if max(len(bad) / len(examples), len(unread) / len(sample)) > max_bad_share:
            raise UserError(f"{message}, or raise data.max_bad_share ({max_bad_share:g})")
        log.warning("%s; they will count as wrong", message)


def _reasons(examples: Sequence[Example], check: Callable[[Example], object]) -> dict[str, str]:
    """Returns why examples do not pass, by id."""
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
    """Watches `count` examples, of each task in turn; None where no file holds one that can be read."""
    parts: list[tuple[Predictor, Sequence[Example], Decoding]] = []
    model = assistant_of(backbone, encoder, tested, while_training=True)
    for number, (subtask, file, _) in enumerate(tested):
        examples: list[Example] = []
        for index in evenly(range(len(file)), len(range(number, count, len(tested)))):
            with contextlib.suppress(BadSample):  # validation, or the test, counts and names it
                examples.append(replace(example := file[index], id=f"{subtask.name}/{example.id}"))
        parts.append((model, examples, Decoding(batch_size=max(1, len(examples)), task=subtask.name)))
    media = None if image_folder is None else media_reader(Path(image_folder), frames=1)
    return watch_questions(parts, media, source=source)


def assistant_of(
    backbone: VlBartBackbone, encoder: Seq2SeqEncoder, tested: Sequence[Tested], *, while_training: bool = False
) -> VlBartAssistant:
    """Returns the model with the stored features of every task."""
    return VlBartAssistant(
        backbone=backbone,
        encoder=encoder,
        subtasks=tuple(subtask for subtask, _, _ in tested),
        stored={subtask.name: reader for subtask, _, reader in tested},
        while_training=while_training,
    )


def evaluate_subtasks(
    backbone: VlBartBackbone,
    encoder: Seq2SeqEncoder,
    tested: Sequence[Tested],
    *,
    run_folder: Path,
    evaluation: EvaluationConfig,
    settings: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> None:
    """Answers and scores each task, a test set each."""
    backbone.eval()
    depends_on = adapter_settings(run_folder)
    media, sets = media_reader(Path(evaluation.image_folder or "."), frames=1), []
    for subtask, file, reader in tested:
        examples = list(file)
        made_with = {"answer_by": subtask.answer_by, "beams": subtask.search.beams}
        is_scored, is_caption = has_truth(examples), not subtask.reads_question
        questions = {path.name: file_sha256(path) for path in file.paths}
        about = {"files": [*map(str, file.paths)], "asked_with": made_with}
        sets.append(
            TestSet(
                name=subtask.name,
                examples=examples,
                decoding=Decoding(batch_size=evaluation.batch_size, task=subtask.name),
                media=media,
                score=subtask.score if is_scored else None,
                settings={
                    **{**depends_on, **settings, **made_with, "questions_sha256": questions},
                    "features": str(reader.source.folder.resolve()),
                },
                together=clip_of if is_caption else None,
                item=clip_of if is_caption else lambda example: example.id,
                about=about if is_scored else {**about, "note": "the publisher keeps the answers of this file"},
            )
        )
    with closing(media):
        evaluate_and_draw(
            sets,
            assistant_of(backbone, encoder, tested),
            run_folder,
            header={**metrics, "settings": dict(settings)},
            exchange=evaluation.exchange_pictures,
            sheet=None if evaluation.image_folder is None else media,
        )
