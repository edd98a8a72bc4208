"""The test after a training run: predictions, `metrics.json`, and the run's two pictures."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dora_vl.adapters.folder import WEIGHTS_FILE
from dora_vl.data.columns import USUAL, Columns
from dora_vl.data.example import Answer, Example
from dora_vl.data.pictures import MediaFolder, open_image
from dora_vl.data.video import VideoReader
from dora_vl.errors import UserError
from dora_vl.evaluation.asker import Asked, MediaReader, check_pictures
from dora_vl.evaluation.assistant import Assistant
from dora_vl.evaluation.baselines import Exchange, compared, digest, exchanged, right_text
from dora_vl.evaluation.predict import predict
from dora_vl.evaluation.predictions import Prediction, PredictionsFile, file_sha256
from dora_vl.evaluation.questions import Question, example_of, read_questions
from dora_vl.evaluation.scores.exact import final_answer
from dora_vl.evaluation.scores.exact import score as exact_match
from dora_vl.evaluation.scores.scored import PERCENT, Scored, intervals
from dora_vl.training.recipe import EvaluationConfig, RunConfig
from dora_vl.training.run_folder import ADAPTER, LOSS_LOG, METRICS, read_log, run_folder_of, write_json
from dora_vl.training.run_media import VideoReading, check_videos, image_folder, video_folder, video_sampling

log = logging.getLogger(__name__)

PREDICTIONS, EXCHANGED, LOSS_CURVE, CONTACT_SHEET = (
    "predictions.jsonl",
    "predictions_exchanged.jsonl",
    "loss_curve.png",
    "contact_sheet.png",
)
ACCURACY, OF_KIND = "accuracy", "kind/"


def evaluate_run(
    assistant: Assistant,
    evaluation: EvaluationConfig,
    *,
    run_folder: Path,
    media: MediaReader,
    numbers: Mapping[str, object] | None = None,
    columns: Columns = USUAL,
) -> dict[str, Any]:
    """Answers the test questions with the trained model and writes everything that shows how the run went.

    Goes on from a `predictions.jsonl` made with the same adapter file and questions. One process does all of it.

    Args:
        run_folder: holds `adapter/` and `log.jsonl`; receives the predictions, metrics and pictures.
        media: reads the questions' pictures and videos; the contact sheet draws from its folder.
        columns: what the columns of `evaluation.file` are.
        numbers: more entries for `metrics.json`, such as `train_seconds`.

    Returns:
        What `metrics.json` holds.

    Raises:
        UserError: `evaluation.file` is not set, missing, or holds no question.
    """
    questions, failed = read_test(evaluation, columns)
    settings = _settings(evaluation, run_folder)
    if any(question.videos for question in questions):
        settings["frames"] = repr(media.videos.sampling)
    ask = partial(_ask, assistant, evaluation=evaluation, media=media)
    with PredictionsFile(run_folder / PREDICTIONS, settings) as file:
        asked = ask(questions, file=file)
        done = [file.done[name] for name in asked.answers]
    failed |= asked.failed
    examples = [*map(example_of, questions)]
    known = {question.id for question in questions}
    examples += [Example(id=name, answers=(Answer(text=""),)) for name in failed if name not in known]
    after = evaluation.answer_after
    score = partial(exact_match, answer_after=after)
    scored = score(examples, asked.answers)
    metrics = {**_score_entries(scored, asked), **(numbers or {}), **_asked_entries(asked, evaluation, failed)}
    write_json(run_folder / METRICS, metrics)
    _report(scored, asked, run_folder)
    draw_run(done, scored, run_folder=run_folder, pictures=media.folder, answer_after=after)
    exchange = (
        _exchange(questions, examples, asked, ask, run_folder, settings) if evaluation.exchange_pictures else None
    )
    baselines = compared(
        scored,
        examples,
        asked.answers,
        score,
        says=lambda example: final_answer(right_text(example), after) or "",
        exchange=exchange,
    )
    for line in baselines.lines():
        log.info("%s", line)
    metrics["baselines"] = baselines.entry()
    write_json(run_folder / METRICS, metrics)
    return metrics


def _exchange(
    questions: Sequence[Question],
    examples: Sequence[Example],
    asked: Asked,
    ask: Callable[..., Asked],
    run_folder: Path,
    settings: Mapping[str, object],
) -> Exchange:
    """A sample of the questions asked again, about others' pictures."""
    sample, by_id = exchanged(examples, asked.answers), {question.id: question for question in questions}
    if not sample:
        return Exchange(examples=(), answers={})
    about_others = [replace(by_id[one.id], images=one.images, videos=one.videos) for one in sample]
    with PredictionsFile(run_folder / EXCHANGED, {**settings, "exchanged": digest(sample)}) as file:
        return Exchange(examples=sample, answers=ask(about_others, file=file).answers)


def run_test(
    assistant: Assistant,
    config: RunConfig,
    *,
    numbers: Mapping[str, object],
    features: Callable[[str], Tensor] | None = None,
) -> dict[str, Any]:
    """The test of a run whose adapter is saved, by the model with that adapter; see `evaluate_run`.

    Args:
        features: a picture's stored features by its path, where the run keeps some.
    """
    with VideoReader() as reader:
        media = replace(media_of_run(config, assistant, of_test=True, reader=reader), features=features)
        return evaluate_run(
            assistant,
            config.evaluation,
            run_folder=run_folder_of(config),
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
    folder = pictures_of_test(config) if of_test else image_folder(data)
    same = data.video_frames if assistant.prompts.videos_of_one_length else None
    root = folder if of_test and config.evaluation.image_folder else video_folder(data)
    videos = VideoReading(
        folder=root, sampling=video_sampling(data), frames=same, reader=VideoReader() if reader is None else reader
    )
    return MediaReader(folder=folder, videos=videos)


def pictures_of_test(config: RunConfig) -> MediaFolder:
    """Root of the test's pictures."""
    return image_folder(config.data, config.evaluation.image_folder)


def read_test(evaluation: EvaluationConfig, columns: Columns = USUAL) -> tuple[list[Question], dict[str, str]]:
    """The questions of `evaluation.file`, and the reason for each that cannot be read, by id.

    Raises:
        UserError: it is not set, missing, malformed or empty.
    """
    if evaluation.file is None:
        raise UserError("evaluation.file is not set; give a file of questions with answers")
    return read_questions(Path(evaluation.file), evaluation.limit, columns)


def check_test(config: RunConfig) -> list[Question]:
    """The questions of a run's test, before it trains: what is wrong with them shows now, not after hours.

    Raises:
        UserError: as `read_test`; the picture folder is none, or holds none of their pictures; or nothing decodes their
            videos.
    """
    questions, _ = read_test(config.evaluation, config.data.contract)
    check_pictures(questions, pictures_of_test(config).root, setting="evaluation.image_folder (or data.image_folder)")
    if any(question.videos for question in questions):
        check_videos(config.data)
    return questions


def _ask(
    assistant: Assistant,
    questions: Sequence[Question],
    *,
    evaluation: EvaluationConfig,
    media: MediaReader,
    file: PredictionsFile,
) -> Asked:
    decoding = assistant.decoding(batch_size=evaluation.batch_size, max_new_tokens=evaluation.max_new_tokens)
    started = time.monotonic()
    answered_before = len(file.done)
    failed = predict(assistant, questions, media=media, file=file, decoding=decoding)
    answers = {one.id: file.done[one.id].prediction for one in questions if one.id in file.done}
    return Asked(
        answers=answers,
        failed=failed,
        answered_before=min(answered_before, len(answers)),
        seconds=time.monotonic() - started,
    )


def draw_run(
    predictions: Sequence[Prediction],
    scored: Scored,
    *,
    run_folder: Path,
    pictures: Path | MediaFolder,
    answer_after: str | None = None,
) -> None:
    """Writes the loss curve and the contact sheet; without matplotlib it says so and leaves them out."""
    if importlib.util.find_spec("matplotlib") is None:
        log.warning("no loss curve and contact sheet: matplotlib is not installed (pip install 'dora-vl[demo]')")
        return
    from dora_vl.evaluation.pictures import write_contact_sheet, write_loss_curve

    entries = read_log(run_folder / LOSS_LOG)
    if any("loss" in entry for entry in entries):
        write_loss_curve(entries, run_folder / LOSS_CURVE)
    low, high = intervals(scored)[ACCURACY]
    title = f"{scored.metrics[ACCURACY]:.1f}% of {scored.n:,} right (95 % interval {low:.1f}% to {high:.1f}%)"
    if predictions:
        sheet = run_folder / CONTACT_SHEET
        write_contact_sheet(predictions, partial(open_image, pictures), sheet, title=title, answer_after=answer_after)


def _settings(evaluation: EvaluationConfig, run_folder: Path) -> dict[str, object]:
    """What the answers depend on: the trained weights, the questions and the decoding, but not how many are asked."""
    weights = run_folder / ADAPTER / WEIGHTS_FILE
    if not weights.is_file():
        raise UserError(f"{weights} is missing; the test needs the finished adapter")
    return {
        "adapter_sha256": file_sha256(weights),
        "questions_sha256": file_sha256(Path(str(evaluation.file))),
        "max_new_tokens": evaluation.max_new_tokens,
    }


def _score_entries(scored: Scored, asked: Asked) -> dict[str, object]:
    """Accuracies as shares of 1."""
    kinds = {name.removeprefix(OF_KIND): name for name in scored.metrics if name.startswith(OF_KIND)}
    return {
        "accuracy": scored.metrics[ACCURACY] / PERCENT,
        "n": scored.n,
        "interval_95": [limit / PERCENT for limit in intervals(scored)[ACCURACY]],
        "by_kind": {
            kind: {"accuracy": scored.metrics[name] / PERCENT, "n": scored.items_of(name)}
            for kind, name in kinds.items()
        },
        "unanswered": len(scored.failed),
        "empty_answers": sum(not answer.strip() for answer in asked.answers.values()),
    }


def _asked_entries(asked: Asked, evaluation: EvaluationConfig, failed: Mapping[str, str]) -> dict[str, object]:
    return {
        "evaluation_seconds": round(asked.seconds, 1),
        "answers_from_earlier_run": asked.answered_before,
        "evaluation_file": evaluation.file,
        "answer_after": evaluation.answer_after,
        "failed_questions": failed,
    }


def _report(scored: Scored, asked: Asked, run_folder: Path) -> None:
    low, high = intervals(scored)[ACCURACY]
    log.info(
        "accuracy %.2f %% of %d questions (95 %% interval %.2f to %.2f)", scored.metrics[ACCURACY], scored.n, low, high
    )
    for name, value in scored.metrics.items():
        if name.startswith(OF_KIND):
            log.info("  %-16s %.2f %% of %d", name.removeprefix(OF_KIND), value, scored.items_of(name))
    empty = sum(not answer.strip() for answer in asked.answers.values())
    if scored.failed or empty:
        log.warning(
            "%d questions could not be asked and %d answers are empty; both count as wrong, %s names the former",
            len(scored.failed),
            empty,
            run_folder / METRICS,
        )
