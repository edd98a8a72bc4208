"""A VL-BART's test: a file for each task, tried before training, watched meanwhile, and scored as the task is."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from dora_vl.backbones.pieces import Seq2SeqEncoder
from dora_vl.backbones.vision_store import FeatureReader
from dora_vl.backbones.vlbart import VlBartBackbone
from dora_vl.data.example import Example, ExampleFile
from dora_vl.errors import BadSample, UserError
from dora_vl.evaluation.ask import Asker, Decoding, ask, media_reader
from dora_vl.evaluation.baselines import Exchange, compared, exchanged
from dora_vl.evaluation.predictions import BY_TASK, Predictions
from dora_vl.evaluation.questions import Question, as_question, expected, has_truth, in_words, media_of
from dora_vl.evaluation.scores.benchmark import check_choices
from dora_vl.evaluation.scores.scored import PERCENT, Scored, intervals
from dora_vl.evaluation.subtask import Subtask, check_sample, make_sample
from dora_vl.evaluation.test import ACCURACY, draw_tasks
from dora_vl.evaluation.vlbart_assistant import VlBartAssistant
from dora_vl.evaluation.watch import watch_questions
from dora_vl.run.folder import METRICS, write_json
from dora_vl.run.settings import VlBartEvaluationConfig
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

    Args:
        max_bad_share: largest share of examples that cannot be asked, of all by the features' index and of those that
            were read; they are named and count as wrong in the test.
    """
    for subtask, file, reader in tested:
        examples = list(file)
        if has_truth(examples):
            check = subtask.check_scoring or (lambda examples, score=subtask.score: score(examples, {}))
            check(examples)
        bad = _reasons(examples, partial(check_sample, subtask=subtask, reader=reader))
        left = [example for example in examples if example.id not in bad]
        sample = left[:: -(-len(left) // READ)] if left else []
        make = partial(make_sample, subtask=subtask, encoder=encoder, reader=reader, target=None)
        unread = _reasons(sample, make)
        if not bad and not unread:
            continue
        counts = [f"{len(bad):,} of {len(examples):,} examples cannot be asked"] if bad else []
        counts += [f"{len(unread)} of {len(sample)} whose features were read cannot be asked"] if unread else []
        reasons = bad | unread
        names = ", ".join(f"{name:.24}" for name in list(reasons)[:NAMED])
        message = (
            f"{', '.join(path.name for path in file.paths):.60}: {', and '.join(counts)} ({names}"
            f"{', ...' if len(reasons) > NAMED else ''}); the first: {next(iter(reasons.values())):.160}. Correct "
            f"evaluation.files or {subtask.name}'s folder of features"
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
    evaluation: VlBartEvaluationConfig,
    settings: Mapping[str, Any],
    numbers: Mapping[str, Any],
) -> dict[str, Any]:
    """Answers and scores each task; writes `predictions/<task>.jsonl`, `metrics.json` and pictures of the run.

    `metrics.json` is written after each task. Where one task alone is scored by accuracy, its headline stands at the
    top as `accuracy` (a share) and `n`, with `by_kind` where examples name their kind, and the contact sheet shows that
    task; else the sheet shows all.
    """
    backbone.eval()
    media = media_reader(Path(evaluation.image_folder or "."), frames=1)
    started, tasks = time.monotonic(), dict[str, dict[str, Any]]()
    done: list[tuple[Subtask, Callable[..., Predictions], list[Example], Predictions, Scored | None]] = []
    headlines: dict[str, dict[str, Any]] = {}
    metrics: dict[str, Any] = {}
    for subtask, file, reader in tested:
        model = VlBartAssistant(backbone=backbone, encoder=encoder, subtasks=(subtask,), stored=reader)
        decoding = Decoding(batch_size=evaluation.batch_size, task=subtask.name)
        ask_task = partial(ask, model, media=media, decoding=decoding)
        examples = list(file)
        predictions = ask_task([*map(as_question, examples)], path=run_folder / BY_TASK / f"{subtask.name}.jsonl")
        scored = subtask.score(examples, predictions.answers) if has_truth(examples) else None
        done.append((subtask, ask_task, examples, predictions, scored))
        losses = {"failed": predictions.failed, "cut_texts": sum(bool(row.cut_tokens) for row in predictions.rows)}
        entry = tasks[subtask.name] = {"metrics": {}, "n": len(examples), **losses}
        if scored is None:
            entry["note"] = "the publisher keeps the answers of this file"
        else:
            made_with = {"answer_by": subtask.answer_by, "beams": str(subtask.search.beams), **scored.settings}
            entry |= {"metrics": scored.metrics, "n": scored.n, "intervals_95": intervals(scored)}
            entry["settings"] = made_with
        if scored is not None and ACCURACY in scored.metrics:
            headlines[subtask.name] = _headline(examples, scored)
        log.info("%s: %s", subtask.name, {k: round(v, 3) for k, v in entry["metrics"].items()})
        alone = next(iter(headlines.values())) if len(headlines) == 1 else {"n": entry["n"]} if len(tasks) == 1 else {}
        metrics = {
            **dict(numbers),
            "tasks": tasks,
            "settings": dict(settings),
            "evaluation_seconds": round(time.monotonic() - started, 1),
            **alone,
        }
        write_json(run_folder / METRICS, metrics)  # now: an error in a later task shall not cost this one's score
    of_sheet = [
        (subtask.name, examples, predictions, scored)
        for subtask, _, examples, predictions, scored in done
        if len(headlines) != 1 or subtask.name in headlines
    ]
    draw_tasks(of_sheet, run_folder=run_folder, image_folder=evaluation.image_folder)
    for subtask, ask_task, examples, predictions, scored in done:
        if scored is None:
            continue
        exchange = None
        if evaluation.exchange_pictures:
            sample = exchanged(examples, predictions.answers)
            exchange = Exchange(examples=sample, answers=ask_task([*map(as_question, sample)]).answers)
        baselines, lines = compared(
            scored, examples, predictions.answers, subtask.score, says=expected, exchange=exchange
        )
        tasks[subtask.name]["baselines"] = baselines
        for line in lines:
            log.info("%s: %s", subtask.name, line)
    write_json(run_folder / METRICS, metrics)
    return metrics


def _headline(examples: Sequence[Example], scored: Scored) -> dict[str, Any]:
    """The accuracy as a share, over all and by `extra["kind"]`."""
    kinds: dict[str, list[float]] = {}
    for example in examples:
        if "kind" in example.extra and example.id in scored.per_item:
            kinds.setdefault(str(example.extra["kind"]), []).append(scored.per_item[example.id])
    by_kind = {
        kind: {"accuracy": sum(shares) / len(shares), "n": len(shares)} for kind, shares in sorted(kinds.items())
    }
    return {"accuracy": scored.metrics[ACCURACY] / PERCENT, "n": scored.n, "by_kind": by_kind}
