"""The test after a training run: predictions, `metrics.json`, and the run's two pictures."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dora_vl.adapters.folder import WEIGHTS_FILE
from dora_vl.data.media import MediaFolder, open_image
from dora_vl.data.readers.columns import USUAL, Columns
from dora_vl.errors import UserError
from dora_vl.evaluation.asker import Asked, MediaReader, check_pictures
from dora_vl.evaluation.assistant import Assistant
from dora_vl.evaluation.predict import predict
from dora_vl.evaluation.questions import Question, read_questions
from dora_vl.evaluation.result_files import Prediction, PredictionsFile, file_sha256
from dora_vl.run.recipe import EvaluationConfig, RunConfig
from dora_vl.run.run_folder import ADAPTER, LOSS_LOG, METRICS, read_log, run_folder_of, write_json
from dora_vl.run.samples import VideoReading, check_videos, image_folder, video_folder, video_sampling
from dora_vl.scores.exact_match import Answered, ExactMatch, exact_match, final_answer
from dora_vl.vision.video import VideoReader

log = logging.getLogger(__name__)

PREDICTIONS, LOSS_CURVE, CONTACT_SHEET = "predictions.jsonl", "loss_curve.png", "contact_sheet.png"


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
    with PredictionsFile(run_folder / PREDICTIONS, settings) as file:
        asked = _ask(assistant, questions, evaluation, media=media, file=file)
        done = [file.done[name] for name in asked.answers]
    failed |= asked.failed
    answered = [_answered(prediction, evaluation.answer_after) for prediction in done]
    score = exact_match([*answered, *(_unanswered(name, questions) for name in failed)])
    metrics = {**_score_entries(score), **(numbers or {}), **_asked_entries(asked, evaluation, failed)}
    write_json(run_folder / METRICS, metrics)
    _report(score, run_folder)
    draw_run(done, score, run_folder=run_folder, pictures=media.folder, answer_after=evaluation.answer_after)
    return metrics


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
    evaluation: EvaluationConfig,
    *,
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
    score: ExactMatch,
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
    low, high = score.interval_95
    title = f"{score.accuracy:.1%} of {score.n:,} right (95 % interval {low:.1%} to {high:.1%})"
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


def _answered(prediction: Prediction, answer_after: str | None) -> Answered:
    return Answered(
        id=prediction.id,
        truth=prediction.truth,
        prediction=final_answer(prediction.prediction, answer_after),
        kind=prediction.kind,
        group="\n".join(prediction.images),
    )


def _unanswered(name: str, questions: Sequence[Question]) -> Answered:
    known = next((question for question in questions if question.id == name), None)
    if known is None:
        return Answered(id=name, truth="", prediction=None)
    return Answered(id=name, truth=known.truth, prediction=None, kind=known.kind, group="\n".join(known.images))


def _score_entries(score: ExactMatch) -> dict[str, object]:
    return {
        "accuracy": score.accuracy,
        "n": score.n,
        "interval_95": list(score.interval_95),
        "by_kind": {kind: asdict(part) for kind, part in score.by_kind.items()},
        "unanswered": score.unanswered,
        "empty_answers": score.empty,
    }


def _asked_entries(asked: Asked, evaluation: EvaluationConfig, failed: Mapping[str, str]) -> dict[str, object]:
    return {
        "evaluation_seconds": round(asked.seconds, 1),
        "answers_from_earlier_run": asked.answered_before,
        "evaluation_file": evaluation.file,
        "answer_after": evaluation.answer_after,
        "failed_questions": failed,
    }


def _report(score: ExactMatch, run_folder: Path) -> None:
    low, high = score.interval_95
    log.info("accuracy %.4f on %d questions (95 %% interval %.4f to %.4f)", score.accuracy, score.n, low, high)
    for kind, part in score.by_kind.items():
        log.info("  %-16s %.4f of %d", kind, part.accuracy, part.n)
    if score.unanswered or score.empty:
        log.warning(
            "%d questions could not be asked and %d answers are empty; both count as wrong, %s names the former",
            score.unanswered,
            score.empty,
            run_folder / METRICS,
        )
