"""A run's test: its questions are asked after training, the answers scored, compared with baselines and drawn."""

from __future__ import annotations

import importlib.util
import logging
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image
from torch import nn

from dora_vl.adapters.files import WEIGHTS_FILE
from dora_vl.backbones.encoder import Encoder
from dora_vl.backbones.templates import PROMPTS
from dora_vl.data.columns import USUAL, Columns
from dora_vl.data.example import Answer, Example
from dora_vl.data.pictures import open_image
from dora_vl.data.video import VideoReader
from dora_vl.errors import UserError
from dora_vl.evaluation.ask import (
    Asker,
    Assistant,
    Decoding,
    EncoderPrompts,
    MediaReader,
    ask,
    check_pictures,
    media_reader,
)
from dora_vl.evaluation.baselines import Exchange, compared, digest, exchanged, right_text
from dora_vl.evaluation.pictures import write_contact_sheet, write_loss_curve
from dora_vl.evaluation.predictions import BY_SCORING, PREDICTIONS, Prediction, Predictions
from dora_vl.evaluation.questions import (
    Question,
    as_question,
    examples_of,
    expected,
    in_words,
    media_of,
    read_questions,
)
from dora_vl.evaluation.scores.commonsense import PATTERNS, extracted
from dora_vl.evaluation.scores.commonsense import score as commonsense_score
from dora_vl.evaluation.scores.exact import final_answer
from dora_vl.evaluation.scores.exact import score as exact_match
from dora_vl.evaluation.scores.scored import PERCENT, Scored, intervals
from dora_vl.files import file_sha256
from dora_vl.run.base import VideoReading, check_videos, image_folder, video_folder, video_sampling
from dora_vl.run.folder import ADAPTER, LOSS_LOG, METRICS, read_log, run_folder_of, write_json
from dora_vl.run.settings import CommonsenseEvaluationConfig, EvaluationConfig, RunConfig

log = logging.getLogger(__name__)

EXCHANGED, LOSS_CURVE, CONTACT_SHEET = "predictions_exchanged.jsonl", "loss_curve.png", "contact_sheet.png"
ACCURACY, OF_KIND = "accuracy", "kind/"
TITLE_CHARACTERS = 100


def evaluate_run(
    model: Asker,
    evaluation: EvaluationConfig,
    *,
    run_folder: Path,
    media: MediaReader,
    numbers: Mapping[str, object] = MappingProxyType({}),
    columns: Columns = USUAL,
) -> dict[str, Any]:
    """Answers the test questions with the trained model and writes everything that shows how the run went.

    Goes on from a `predictions.jsonl` made with the same adapter file and questions. One process does all of it.

    Args:
        run_folder: holds `adapter/` and `log.jsonl`; receives the predictions, metrics and pictures.
        numbers: more entries for `metrics.json`, such as `train_seconds`.

    Returns:
        What `metrics.json` holds.
    """
    questions, unreadable = read_test(evaluation, columns)
    settings: dict[str, object] = {
        "adapter_sha256": adapter_sha256(run_folder),
        "questions_sha256": file_sha256(Path(str(evaluation.file))),
        "max_new_tokens": evaluation.max_new_tokens,
    }
    if any(question.videos for question in questions):
        settings["frames"] = repr(media.videos.sampling)
    decoding = Decoding(batch_size=evaluation.batch_size, max_new_tokens=evaluation.max_new_tokens)
    predictions = ask(model, questions, media, decoding, path=run_folder / PREDICTIONS, settings=settings)
    examples, after = examples_of(questions, unreadable), evaluation.answer_after
    score = partial(exact_match, answer_after=after)
    scored = score(examples, predictions.answers)
    low, high = intervals(scored)[ACCURACY]
    kinds = {name.removeprefix(OF_KIND): name for name in scored.metrics if name.startswith(OF_KIND)}
    metrics: dict[str, Any] = {
        "accuracy": scored.metrics[ACCURACY] / PERCENT,
        "n": scored.n,
        "interval_95": [low / PERCENT, high / PERCENT],
        "by_kind": {
            kind: {"accuracy": scored.metrics[name] / PERCENT, "n": scored.items_of(name)}
            for kind, name in kinds.items()
        },
        "unanswered": len(scored.failed),
        "empty_answers": sum(not answer.strip() for answer in predictions.answers.values()),
        **numbers,
        "evaluation_seconds": round(predictions.seconds, 1),
        "answers_from_earlier_run": predictions.answered_before,
        "evaluation_file": evaluation.file,
        "answer_after": after,
        "failed_questions": {**unreadable, **predictions.failed},
    }
    write_json(run_folder / METRICS, metrics)
    log.info(
        "accuracy %.2f %% of %d questions (95 %% interval %.2f to %.2f)", scored.metrics[ACCURACY], scored.n, low, high
    )
    for kind, name in kinds.items():
        log.info("  %-16s %.2f %% of %d", kind, scored.metrics[name], scored.items_of(name))
    if scored.failed or metrics["empty_answers"]:
        log.warning(
            "%d questions could not be asked and %d answers are empty; both count as wrong, %s names the former",
            len(scored.failed),
            metrics["empty_answers"],
            run_folder / METRICS,
        )
    title = f"{scored.metrics[ACCURACY]:.1f}% of {scored.n:,} right (95 % interval {low:.1f}% to {high:.1f}%)"
    draw(
        predictions.rows,
        lambda row: open_image(media.folder, row.images[0]),
        title,
        scored.per_item,
        run_folder=run_folder,
    )
    exchange = None
    if evaluation.exchange_pictures:
        sample, by_id = exchanged(examples, predictions.answers), {question.id: question for question in questions}
        others = [replace(by_id[example.id], images=example.images, videos=example.videos) for example in sample]
        again = {**settings, "exchanged": digest(sample)}
        path = run_folder / EXCHANGED
        answers = ask(model, others, media, decoding, path=path, settings=again).answers if sample else {}
        exchange = Exchange(examples=sample, answers=answers)
    metrics["baselines"], lines = compared(
        scored,
        examples,
        predictions.answers,
        score,
        says=lambda example: final_answer(right_text(example), after) or "",
        exchange=exchange,
    )
    for line in lines:
        log.info("%s", line)
    write_json(run_folder / METRICS, metrics)
    return metrics


def adapter_sha256(run_folder: Path) -> str:
    """The hash of the adapter that is tested."""
    weights = run_folder / ADAPTER / WEIGHTS_FILE
    if not weights.is_file():
        raise UserError(f"{weights} is missing; the test needs the finished adapter")
    return file_sha256(weights)


def run_test(assistant: Assistant, config: RunConfig, *, numbers: Mapping[str, object]) -> dict[str, Any]:
    """The test of a run whose adapter is saved, by the model with that adapter; see `evaluate_run`."""
    with VideoReader() as reader:
        media = media_of_run(config, assistant, of_test=True, reader=reader)
        return evaluate_run(
            assistant,
            config.evaluation,
            run_folder=run_folder_of(config.training),
            media=media,
            numbers=numbers,
            columns=config.data.contract,
        )


def media_of_run(
    config: RunConfig, assistant: Assistant, *, of_test: bool, reader: VideoReader | None = None
) -> MediaReader:
    """Reads what the questions of a run show.

    Args:
        of_test: those of `evaluation.file`; else the run's own samples.
        reader: of its videos; None starts one where there are any.
    """
    data = config.data
    folder = image_folder(data, config.evaluation.image_folder if of_test else None)
    same = data.video_frames if assistant.prompts.encoder.videos_of_one_length else None
    root = folder if of_test and config.evaluation.image_folder else video_folder(data)
    videos = VideoReading(
        folder=root, sampling=video_sampling(data), frames=same, reader=VideoReader() if reader is None else reader
    )
    return MediaReader(folder=folder, videos=videos)


def read_test(evaluation: EvaluationConfig, columns: Columns = USUAL) -> tuple[list[Question], dict[str, str]]:
    """The questions of `evaluation.file`, and the reason for each that cannot be read, by id."""
    if evaluation.file is None:
        raise UserError("evaluation.file is not set; give a file of questions with answers")
    return read_questions(Path(evaluation.file), evaluation.limit, columns)


def check_test(config: RunConfig) -> list[Question]:
    """The questions of a run's test, before it trains: what is wrong with them shows now, not after hours."""
    questions, _ = read_test(config.evaluation, config.data.contract)
    images = (path for question in questions for path in question.images)
    root = image_folder(config.data, config.evaluation.image_folder).root
    check_pictures(images, root, setting="evaluation.image_folder (or data.image_folder)")
    if any(question.videos for question in questions):
        check_videos(config.data)
    return questions


# Of instructions: each commonsense set by generation, by likelihood, or both.


def read_sets(evaluation: CommonsenseEvaluationConfig) -> tuple[list[Question], dict[str, str]]:
    """The questions of every set, of its kind, and the reason for each that cannot be read, by id (`openbookqa/17`).

    A row's `answer` is what is looked for; where it names none, what the set's pattern finds in its output.
    """
    if unknown := sorted(set(evaluation.files) - set(PATTERNS)):
        raise UserError(f"evaluation.files: no commonsense set {unknown[0]!r}; there are {', '.join(PATTERNS)}")
    questions: list[Question] = []
    unreadable: dict[str, str] = {}
    for task, file in evaluation.files.items():
        of_set, failed = read_questions(Path(file), evaluation.limit)
        unreadable |= {f"{task}/{name}": reason for name, reason in failed.items()}
        for question in of_set:
            answer = question.answer or extracted(question.truth, task, evaluation.rule)
            questions.append(replace(question, id=f"{task}/{question.id}", kind=task, answer=answer))
    if not questions:
        raise UserError(f"{evaluation.file}: no question can be asked; the first: {next(iter(unreadable.items()))}")
    return questions, unreadable


def evaluate_commonsense(
    backbone: nn.Module,
    encoder: Encoder,
    evaluation: CommonsenseEvaluationConfig,
    *,
    run_folder: Path,
    numbers: Mapping[str, object] = MappingProxyType({}),
) -> dict[str, Any]:
    """Asks every set in every way that `evaluation.scoring` names and completes `metrics.json`.

    Goes on from predictions made with the same adapter file, questions and settings. One process does all of it.

    Args:
        run_folder: holds `adapter/`; receives predictions and metrics.
        numbers: more entries for `metrics.json`, such as `train_seconds`.

    Returns:
        What `metrics.json` holds: under each way's name the average over the sets, each set, 95 % intervals, counts.
    """
    questions, unreadable = read_sets(evaluation)
    examples = [
        Example(id=question.id, answers=(Answer(text=question.answer),), extra={"task": str(question.kind)})
        for question in questions
    ]
    backbone.eval()
    model = Assistant(backbone, EncoderPrompts(encoder))
    decoding = Decoding(batch_size=evaluation.batch_size, max_new_tokens=evaluation.max_new_tokens)
    prompt = PROMPTS[encoder.prompts.name]
    depends_on = {
        "adapter_sha256": adapter_sha256(run_folder),
        "questions_sha256": {task: file_sha256(Path(file)) for task, file in evaluation.files.items()},
        "prompt": [prompt.test, prompt.test_with_input],
        "beams": evaluation.beams,
        "max_new_tokens": evaluation.max_new_tokens,
    }
    way = {"beams": evaluation.beams, "max_new_tokens": evaluation.max_new_tokens}
    metrics: dict[str, Any] = {**numbers, "evaluation_files": dict(evaluation.files)}
    for scoring in evaluation.scoring:
        by_likelihood = scoring == "likelihood"
        predictions = ask(
            model,
            questions,
            media_reader(Path(), frames=1),
            replace(decoding, by="outputs") if by_likelihood else decoding,
            path=run_folder / BY_SCORING[scoring],
            settings={**depends_on, "scoring": scoring},
        )
        if by_likelihood and not predictions.rows:
            name, reason = next(iter(predictions.failed.items()))
            raise UserError(f"no question can be scored by likelihood; {name}: {reason}")
        scored = commonsense_score(examples, predictions.answers, rule=evaluation.rule)
        metrics[scoring] = {
            "accuracy": scored.metrics,
            "interval_95": {name: list(pair) for name, pair in intervals(scored).items()},
            "n": scored.n,
            "no_answer_found": sum(
                not extracted(row.prediction, str(row.kind), evaluation.rule) for row in predictions.rows
            ),
            "failed_questions": {**unreadable, **predictions.failed},
            "settings": {
                "scoring": "likelihood of the whole output, among those of `Answer format`, not divided by its length"
            }
            if by_likelihood
            else {"scoring": "generation", **scored.settings, **way},
            "seconds": round(predictions.seconds, 1),
        }
        for name, value in scored.metrics.items():
            log.info("%s: %-14s %.2f %%", scoring, name, value)
        if scored.failed:
            log.warning("%d questions have no answer and count as wrong", len(scored.failed))
        write_json(run_folder / METRICS, metrics)  # after each way, so that a stop loses none
    return metrics


def draw(
    predictions: Sequence[Prediction],
    open_picture: Callable[[Prediction], Image.Image] | None,
    title: str,
    shares: Mapping[str, float],
    *,
    run_folder: Path,
    subtitles: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Writes the loss curve and the contact sheet; without matplotlib it says so and leaves them out.

    Args:
        open_picture: None: nothing says where the pictures are, and there is no sheet.
    """
    if importlib.util.find_spec("matplotlib") is None:
        log.warning("no loss curve and contact sheet: matplotlib is not installed (pip install 'dora-vl[demo]')")
        return
    entries = read_log(run_folder / LOSS_LOG)
    if any("loss" in entry for entry in entries):
        write_loss_curve(entries, run_folder / LOSS_CURVE)
    if open_picture is None:
        return
    if not predictions:
        log.warning("no contact sheet: no question about a picture or a video was answered")
        return
    sheet = run_folder / CONTACT_SHEET
    write_contact_sheet(predictions, open_picture, sheet, title=title, shares=shares, subtitles=subtitles)


def draw_tasks(
    tasks: Sequence[tuple[str, Sequence[Example], Predictions, Scored | None]],
    *,
    run_folder: Path,
    image_folder: str | None,
) -> None:
    """The pictures of several tasks; ids begin with the task, since two may share them."""
    rows: list[Prediction] = []
    titles: list[str] = []
    shares: dict[str, float] = {}
    by_id: dict[str, Example] = {}
    for task, examples, predictions, scored in tasks:
        by_id |= {f"{task}/{example.id}": example for example in examples}
        for row in predictions.rows:
            example = by_id[f"{task}/{row.id}"]
            if media := media_of(example):
                words = [in_words(example, text) for text in (expected(example), row.prediction)]
                rows.append(replace(row, id=f"{task}/{row.id}", images=media, truth=words[0], prediction=words[1]))
        # what could not be asked counts as wrong in the title too, as metrics.json has it
        metric, value = ("", 0.0) if scored is None else next(iter(scored.metrics.items()))
        if scored is None:
            titles.append(f"{task}: {len(predictions.rows):,} answers, not scored")
        elif metric == ACCURACY:
            titles.append(f"{task}: {value / PERCENT:.1%} of {scored.n:,} right")
        else:
            titles.append(f"{task}: {metric} {value:.1f} of {scored.n:,}")
        if scored is not None and ACCURACY in scored.metrics:
            shares |= {f"{task}/{name}": share for name, share in scored.per_item.items()}
    title = "\n".join(textwrap.wrap(", ".join(titles), TITLE_CHARACTERS, max_lines=2))
    media = media_reader(Path(image_folder or "."), frames=1)

    def open_medium(row: Prediction) -> Image.Image:
        example = by_id[row.id]  # its own clip: other questions are about other parts of the same video
        return media.picture(as_question(replace(example, images=example.images[:1])))

    opened = None if image_folder is None else open_medium
    subtitles = {row.id: " ".join(line.text for line in by_id[row.id].subtitles) for row in rows}
    draw(rows, opened, title, shares, run_folder=run_folder, subtitles=subtitles)
    media.close()
