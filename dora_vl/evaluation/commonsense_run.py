"""The test after training on instructions: each set asked by generation, by likelihood, or both, and scored."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dora_vl.adapters.folder import WEIGHTS_FILE
from dora_vl.backbones.encoder import Encoder
from dora_vl.backbones.prompt_table import PROMPTS
from dora_vl.data.example import Answer, Example
from dora_vl.data.samples import IGNORED_LABEL
from dora_vl.data.video import Uniform
from dora_vl.errors import UserError
from dora_vl.evaluation.asker import MediaReader
from dora_vl.evaluation.assistant import Assistant
from dora_vl.evaluation.likelihood import choose
from dora_vl.evaluation.predict import predict
from dora_vl.evaluation.predictions import PredictionsFile, file_sha256
from dora_vl.evaluation.prompt_inputs import EncoderPrompts
from dora_vl.evaluation.questions import Question, read_questions
from dora_vl.evaluation.scores.commonsense import PATTERNS, extracted, score
from dora_vl.evaluation.scores.scored import Scored, intervals
from dora_vl.training.recipe import CommonsenseEvaluationConfig
from dora_vl.training.run_folder import ADAPTER, METRICS, write_json
from dora_vl.training.run_media import VideoReading

log = logging.getLogger(__name__)

PREDICTIONS = {"generation": "predictions.jsonl", "likelihood": "predictions_likelihood.jsonl"}


def read_sets(evaluation: CommonsenseEvaluationConfig) -> tuple[list[Question], dict[str, str]]:
    """The questions of every set, of its kind, and the reason for each that cannot be read, by id (`openbookqa/17`).

    A row's `answer` is what is looked for; where it names none, what the set's pattern finds in its output.

    Raises:
        UserError: a set's name is not known, or its file is missing, malformed or empty.
    """
    if unknown := sorted(set(evaluation.files) - set(PATTERNS)):
        raise UserError(f"evaluation.files: no commonsense set {unknown[0]!r}; there are {', '.join(PATTERNS)}")
    asked: list[Question] = []
    unreadable: dict[str, str] = {}
    for task, file in evaluation.files.items():
        questions, failed = read_questions(Path(file), evaluation.limit)
        unreadable |= {f"{task}/{name}": reason for name, reason in failed.items()}
        for one in questions:
            answer = one.answer or extracted(one.truth, task, evaluation.rule)
            asked.append(replace(one, id=f"{task}/{one.id}", kind=task, answer=answer))
    if not asked:
        raise UserError(f"{evaluation.file}: no question can be asked; the first: {next(iter(unreadable.items()))}")
    return asked, unreadable


def evaluate_commonsense(
    backbone: nn.Module,
    encoder: Encoder,
    evaluation: CommonsenseEvaluationConfig,
    *,
    run_folder: Path,
    numbers: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    """Asks every set in every way that `evaluation.scoring` names and completes `metrics.json`.

    Goes on from predictions made with the same adapter file, questions and settings. One process does all of it.

    Args:
        run_folder: holds `adapter/`; receives predictions and metrics.
        numbers: more entries for `metrics.json`, such as `train_seconds`.

    Returns:
        What `metrics.json` holds: under each way's name the average over the sets, each set, 95 % intervals, counts.
    """
    asked, unreadable = read_sets(evaluation)
    backbone.eval()
    metrics: dict[str, Any] = dict(numbers or {})
    metrics["evaluation_files"] = dict(evaluation.files)
    for scoring in evaluation.scoring:
        started = time.monotonic()
        settings = {**_settings(evaluation, encoder, run_folder), "scoring": scoring}
        with PredictionsFile(run_folder / PREDICTIONS[scoring], settings) as file:
            ask = _generate if scoring == "generation" else _choose
            failed = unreadable | ask(backbone, encoder, asked, evaluation, file)
            answers = {name: one.prediction for name, one in file.done.items()}
        examples = [
            Example(id=one.id, answers=(Answer(text=one.answer),), extra={"task": str(one.kind)}) for one in asked
        ]
        scored = score(examples, answers, rule=evaluation.rule)
        metrics[scoring] = {
            **_entries(scored),
            "no_answer_found": _without_answer(asked, answers, evaluation),
            "failed_questions": failed,
            "settings": _described(scoring, evaluation, scored),
            "seconds": round(time.monotonic() - started, 1),
        }
        _report(scoring, scored)
        write_json(run_folder / METRICS, metrics)  # after each way, so that a stop loses none
    return metrics


def _generate(
    backbone: Any,
    encoder: Encoder,
    asked: Sequence[Question],
    evaluation: CommonsenseEvaluationConfig,
    file: PredictionsFile,
) -> dict[str, str]:
    assistant = Assistant(backbone, EncoderPrompts(encoder))
    return predict(
        assistant,
        asked,
        media=no_media(),
        file=file,
        decoding=assistant.decoding(batch_size=evaluation.batch_size, max_new_tokens=evaluation.max_new_tokens),
    )


def no_media() -> MediaReader:
    """What reads the pictures of questions that show nothing."""
    return MediaReader(folder=Path(), videos=VideoReading(folder=Path(), sampling=Uniform(1)))


def _choose(
    backbone: Any,
    encoder: Encoder,
    asked: Sequence[Question],
    evaluation: CommonsenseEvaluationConfig,
    file: PredictionsFile,
) -> dict[str, str]:
    def encode(question: Question, output: str) -> tuple[Tensor, int]:
        found = encoder.encode_choice(question.turns, output)
        return found.input_ids, int((found.labels != IGNORED_LABEL).int().argmax())

    return choose(backbone, encode, asked, file=file, batch_size=evaluation.batch_size)


def _entries(scored: Scored) -> dict[str, Any]:
    return {
        "accuracy": scored.metrics,
        "interval_95": {name: list(pair) for name, pair in intervals(scored).items()},
        "n": scored.n,
    }


def _without_answer(
    asked: Sequence[Question], answers: Mapping[str, str], evaluation: CommonsenseEvaluationConfig
) -> int:
    """Questions whose generated text holds nothing of the set's pattern; they count as wrong."""
    return sum(not extracted(answers[one.id], str(one.kind), evaluation.rule) for one in asked if one.id in answers)


def _described(scoring: str, evaluation: CommonsenseEvaluationConfig, scored: Scored) -> dict[str, object]:
    """How the answers came about, in words that stand beside the numbers."""
    if scoring == "likelihood":
        return {"scoring": "likelihood of the whole output, among those of `Answer format`, not divided by its length"}
    return {
        "scoring": "generation",
        **scored.settings,
        "beams": evaluation.beams,
        "max_new_tokens": evaluation.max_new_tokens,
    }


def _settings(evaluation: CommonsenseEvaluationConfig, encoder: Encoder, run_folder: Path) -> dict[str, object]:
    """What the answers depend on: the trained weights, the questions, the prompt, the search."""
    weights = run_folder / ADAPTER / WEIGHTS_FILE
    if not weights.is_file():
        raise UserError(f"{weights} is missing; the test needs the finished adapter")
    return {
        "adapter_sha256": file_sha256(weights),
        "questions_sha256": {task: file_sha256(Path(file)) for task, file in evaluation.files.items()},
        "prompt": [PROMPTS[encoder.prompts.name].test, PROMPTS[encoder.prompts.name].test_with_input],
        "beams": evaluation.beams,
        "max_new_tokens": evaluation.max_new_tokens,
    }


def _report(scoring: str, scored: Scored) -> None:
    for name, value in scored.metrics.items():
        log.info("%s: %-14s %.2f %%", scoring, name, value)
    if scored.failed:
        log.warning("%d questions have no answer and count as wrong", len(scored.failed))
