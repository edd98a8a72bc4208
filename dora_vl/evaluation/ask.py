"""Questions put to a model by all processes of a launch, each a share, able to go on after a stop."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from dora_vl.data.pictures import MediaFolder
from dora_vl.errors import UserError
from dora_vl.evaluation.asker import Asked
from dora_vl.evaluation.predictions import (
    PredictionsFile,
    cut_broken_tail,
    file_sha256,
    read_predictions,
    same_settings,
    settings_file,
    write_in_order,
)
from dora_vl.evaluation.questions import EvaluationSet, Question
from dora_vl.evaluation.scores.benchmark import FRAMES
from dora_vl.training.launch import (
    leave_process_group,
    on_first_rank,
    rank_and_ranks,
    threads_of_this_rank,
    wait_for_everyone,
)

PREDICTIONS = "predictions.jsonl"
PART = "predictions.part-{}.jsonl"
LONGEST_SHARE = timedelta(days=2)  # how long a process that is done waits for the others


@contextlib.contextmanager
def joined_launch() -> Iterator[None]:
    """Joins the other processes of a `torchrun` or `deepspeed` launch, each with its GPU; alone it does little.

    The processes only exchange text, so gloo serves with GPUs as well.
    """
    threads = threads_of_this_rank()
    if threads is not None:
        torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        torch.distributed.init_process_group("gloo", timeout=LONGEST_SHARE)
    try:
        yield
    finally:
        leave_process_group()


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How a benchmark is put to a model.

    Attributes:
        folder: receives `predictions.jsonl`.
        pictures: root of the examples' pictures and videos, and how they are read.
        sha256: what tells the model's answers from others', by what was hashed (`model_source.hashes`).
        batch_size: questions at once.
        max_new_tokens: longest answer.
        workers: processes that read pictures ahead.
        frames: how many frames of a video a model is shown that was not trained to see certain ones.
        by_likelihood: of choices the likeliest letter is taken, instead of what is generated.
        sample: digest of a sample with exchanged pictures; "" where the questions are as their file has them.

    Raises:
        UserError: no folder of pictures.
    """

    folder: Path
    pictures: Path | MediaFolder
    batch_size: int
    max_new_tokens: int
    workers: int = 0
    frames: int = FRAMES
    sha256: Mapping[str, str] = field(default_factory=dict)
    by_likelihood: bool = False
    sample: str = ""

    def __post_init__(self) -> None:
        if not MediaFolder.of(self.pictures).root.is_dir():
            raise UserError(f"picture folder {self.pictures} does not exist; name the pictures' root with --images")

    def settings(self, one: EvaluationSet) -> dict[str, object]:
        """What any model's answers depend on."""
        return {
            **{f"{name}_sha256": digest for name, digest in self.sha256.items()},
            "questions_sha256": file_sha256(one.file),
            "images": str(MediaFolder.of(self.pictures).root.resolve()),
            "max_new_tokens": self.max_new_tokens,
            **({"exchanged": self.sample} if self.sample else {}),
        }


Share = Callable[[Sequence[Question], PredictionsFile], dict[str, str]]
"""Answers questions into a file; the reason for each that could not be asked, by id."""


def ask(questions: Sequence[Question], answer_share: Share, *, folder: Path, settings: Mapping[str, object]) -> Asked:
    """Answers every question; every process of a launch calls it and gets all answers.

    Each process writes a part beside `predictions.jsonl`; the first joins them, also those of an earlier run that was
    stopped, whatever its number of processes.

    Args:
        answer_share: how this process answers its share, such as `predict` with its model.
        folder: receives `predictions.jsonl`, in the questions' order.
        settings: what the answers depend on; earlier ones with other settings are not taken.
    """
    whole, order = folder / PREDICTIONS, [question.id for question in questions]
    on_first_rank(partial(_join_parts, folder, settings, order))
    done = read_predictions(whole)
    before = sum(name in done for name in order)
    rank, ranks = rank_and_ranks()
    share = [question for question in questions if question.id not in done][rank::ranks]
    with PredictionsFile(folder / PART.format(rank), settings) as part:
        failed = answer_share(share, part)
    failed = _from_all_ranks(failed, ranks)
    on_first_rank(partial(_join_parts, folder, settings, order))
    done = read_predictions(whole)
    wait_for_everyone()
    answers = {name: done[name].prediction for name in order if name in done}
    return Asked(answers=answers, failed=failed, answered_before=before)


def _join_parts(folder: Path, settings: Mapping[str, object], order: Sequence[str]) -> None:
    """Moves every part's predictions into `predictions.jsonl`; parts made with other settings go."""
    parts = sorted(folder.glob(PART.format("*")))
    with PredictionsFile(folder / PREDICTIONS, settings) as whole:
        for part in parts:
            if same_settings(part, settings):
                cut_broken_tail(part)
                whole.done.update(read_predictions(part))
    write_in_order(folder / PREDICTIONS, whole.done, order)
    for part in parts:
        part.unlink()
        settings_file(part).unlink(missing_ok=True)


def _from_all_ranks(failed: dict[str, str], ranks: int) -> dict[str, str]:
    if ranks == 1:
        return failed
    parts: list[dict[str, str]] = [{} for _ in range(ranks)]
    torch.distributed.all_gather_object(parts, failed)
    return {name: reason for part in parts for name, reason in part.items()}
