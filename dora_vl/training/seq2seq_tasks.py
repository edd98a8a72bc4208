"""Batches of tasks for an encoder-decoder that reads text and stored features, and its closed answer lists."""

from __future__ import annotations

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainingArguments

from dora_vl.adapters.adapter import CLOSED_ANSWERS
from dora_vl.backbones.base import Backbone
from dora_vl.backbones.pieces import Seq2SeqEncoder
from dora_vl.backbones.shards import first_difference, read_settings
from dora_vl.backbones.vision_store import FeatureReader
from dora_vl.backbones.vlbart import VlBartBackbone
from dora_vl.data.example import ExampleFile
from dora_vl.data.samplers import MixturePlan, MixtureTask
from dora_vl.data.samples import IGNORED_LABEL, Skipped, sample_random
from dora_vl.data.text_file import json_object, json_of, whole_text
from dora_vl.errors import BadSample, SettingError, UserError, short_names
from dora_vl.evaluation.vlbart_tasks import (
    ClosedBatch,
    MicroBatch,
    NormaliseBy,
    Seq2SeqSample,
    Subtask,
    Target,
    closed,
    make_sample,
    soft_scores,
    with_input_tokens,
)
from dora_vl.files import read_json, write_json
from dora_vl.heads.answer import answer_loss
from dora_vl.run.arguments import order_seed
from dora_vl.run.settings import DataConfig, RunConfig
from dora_vl.shapes import Float, Int
from dora_vl.training.pipeline import LossModel

logger = logging.getLogger(__name__)

SETTING, OUTSIDE = "data.closed_answers", "outside"


@dataclass(frozen=True)
class TaskSource:
    """Makes samples of one task's examples."""

    subtask: Subtask
    file: ExampleFile
    reader: FeatureReader
    encoder: Seq2SeqEncoder

    def item(self, index: int, rng: Random, answer: int | None) -> Seq2SeqSample | Skipped:
        """Makes an item's sample, or says why it has none; its label is the answer number `answer`, or a drawn one."""
        name = f"{self.subtask.name}:{index}"
        try:
            example = self.file[index]
            name = example.id
            target = self.subtask.target(example, answer, rng)
            return make_sample(example, self.subtask, encoder=self.encoder, reader=self.reader, target=target)
        except BadSample as error:
            return Skipped(index, name, error.reason)


class MixtureDataset(Dataset[MicroBatch]):
    """An epoch's micro-batches in the plan's order; random choices are a function of (seed, epoch, task, item)."""

    def __init__(self, plan: MixturePlan, sources: Sequence[TaskSource], *, seed: int) -> None:
        self.plan = plan
        self.sources = tuple(sources)
        self._seed = seed
        # Shared memory: persistent workers keep a copy of this object and would not see a plain attribute.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    @classmethod
    def of(cls, tasks: Sequence[TaskSource], data: DataConfig, arguments: TrainingArguments) -> MixtureDataset:
        """Plans a run's mixture."""
        sources = [
            MixtureTask(
                name=task.subtask.name,
                items=len(task.file),
                batch_size=max(1, int(data.batch_size * task.subtask.batch_share)),
            )
            for task in tasks
        ]
        parts = arguments.world_size * arguments.gradient_accumulation_steps
        plan = MixturePlan(sources, parts=parts, mixing=data.mixing, seed=order_seed(arguments))
        return cls(plan, tasks, seed=arguments.seed)

    def __len__(self) -> int:
        return len(self.plan)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that the order and the random choices of all workers depend on."""
        self._epoch.fill_(epoch)

    def first(self, count: int) -> Iterator[tuple[Seq2SeqSample, Target, Subtask]]:
        """Yields each task's first samples whose label is a text, and what they are trained on."""
        epoch = int(self._epoch)
        for number, source in enumerate(self.plan.sources):
            for index in range(min(count, source.items)):
                sample = self._item(number, index, epoch)
                if isinstance(sample, Seq2SeqSample) and sample.soft_scores is None:
                    task = self.sources[number]
                    rng = sample_random(self._seed, epoch, index)
                    target = task.subtask.target(task.file[index], task.file.answer_of(index), rng)
                    yield sample, target, task.subtask

    def longest(self) -> list[MicroBatch]:
        """Returns the largest micro-batch of each task among evenly spread samples."""
        epoch = int(self._epoch)
        batches = []
        for number, source in enumerate(self.plan.sources):
            count = -(-source.batch_size // self.plan.parts)
            looked_at = max(256, 2 * count)
            indices = range(0, source.items, max(1, source.items // looked_at))
            items = [self._item(number, index, epoch) for index in indices]
            usable = [sample for sample in items if isinstance(sample, Seq2SeqSample)]
            longest = sorted(usable, key=lambda sample: -(len(sample.input_ids) + len(sample.labels)))[:count]
            batches.append(MicroBatch(self.sources[number].subtask, [*longest]))
        return batches

    def __getitem__(self, number: int) -> MicroBatch:
        epoch = int(self._epoch)
        part = self.plan.part(number, epoch=epoch)
        items = [self._item(part.source, index, epoch) for index in part.indices]
        return MicroBatch(self.sources[part.source].subtask, items)

    def _item(self, source: int, index: int, epoch: int) -> Seq2SeqSample | Skipped:
        task = self.sources[source]
        return task.item(index, sample_random(self._seed, epoch, index), task.file.answer_of(index))


class ValidationBatches(Dataset[MicroBatch]):
    """Batches each task's samples in the file's order, with first answers, then empty ones until ranks are even."""

    def __init__(self, sources: Sequence[TaskSource], *, batch_size: int, ranks: int) -> None:
        self._parts = [
            (source, range(start, min(start + batch_size, len(source.file))))
            for source in sources
            for start in range(0, len(source.file), batch_size)
        ]
        self._parts += [(sources[0], range(0))] * (-len(self._parts) % ranks)

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, number: int) -> MicroBatch:
        source, indices = self._parts[number]
        items = [source.item(index, Random(index), source.file.answer_of(index) or 0) for index in indices]
        return MicroBatch(source.subtask, items)


class Seq2SeqLoss(LossModel):
    """Computes the loss of one task's micro-batch, normalised over the whole step of all ranks."""

    backbone: VlBartBackbone

    def __init__(self, backbone: Backbone[Any]) -> None:
        super().__init__(backbone, step_tokens=True)

    def forward(
        self,
        labels: Int[Tensor, "batch answer"],
        features: Float[Tensor, "batch images tokens channels"],
        sample_weights: Float[Tensor, " batch"],
        normalise_by: NormaliseBy = "samples",
        num_items_in_batch: Tensor | int | None = None,
        closed: ClosedBatch | None = None,
        **text: Int[Tensor, "batch seq"],
    ) -> dict[str, Tensor]:
        """Returns `loss` and `labelled_tokens`.

        Args:
            sample_weights: each sample's weight over the number of usable samples of the step (`samples`).
            normalise_by: `samples`: a sample's mean over its tokens times its weight, added up; `tokens`: all tokens
                alike, over `num_items_in_batch`, the labelled tokens of the step.
            closed: the list that is scored instead, and each sample's right answers; None: words are said.
            text: `input_ids` and `attention_mask`.
        """
        if closed is not None:
            hidden, head = self.backbone.first_hidden(**text, features=features), self.backbone.answer_head(closed.task)
            targets = head.targets(closed.soft_scores).to(hidden.device)
            loss = answer_loss(head(hidden), targets, sample_weights)
            count = (labels != IGNORED_LABEL).sum()
            return {"loss": self._with_idle_heads(loss, hidden, closed), "labelled_tokens": count}
        output = self.backbone(**text, labels=labels, features=features)
        each = output.losses
        count = each.new_tensor(len(each)).detach()
        if normalise_by == "tokens":
            divisor = count.clamp_min(1) if num_items_in_batch is None else num_items_in_batch
            loss = each.sum() / divisor
        else:
            tokens = output.samples.bincount(minlength=len(labels)).clamp_min(1)
            weights = (sample_weights / tokens).to(each.dtype)
            loss = (each * weights[output.samples]).sum()
        return {"loss": self._with_idle_heads(loss, output.hidden, closed), "labelled_tokens": count}

    def _with_idle_heads(
        self, loss: Float[Tensor, ""], hidden: Float[Tensor, "positions width"], closed: ClosedBatch | None
    ) -> Float[Tensor, ""]:
        """Adds zero times every other head to the loss: under ZeRO-3 all that trains must have a gradient."""
        for task, head in self.backbone.model.answer_heads.items():
            if closed is None or task != closed.task:
                loss = loss + 0.0 * head(hidden[:1].detach()).float().sum()
        return loss


# What a run says of its tasks.


def with_run_settings(subtask: Subtask, config: RunConfig) -> Subtask:
    """Returns a task as the run answers it: by text, by choice or from its closed list, with the run's input length."""
    answer_by = subtask.answer_by
    if answer_by == "choice" and not config.evaluation.choice_by_likelihood:
        answer_by = "text"
    if subtask.name in config.data.closed_answers:
        subtask, answer_by = closed(subtask), "closed"
    return dataclasses.replace(with_input_tokens(subtask, config.data.input_tokens), answer_by=answer_by)


def check_names(config: RunConfig, subtasks: Mapping[str, Subtask]) -> None:
    """Refuses settings that name a task that is not in `subtasks`, one without features, or none to train."""
    data, evaluation = config.data, config.evaluation
    if not data.train:
        raise SettingError("data.train", " names no task; give a records file for one of " + ", ".join(subtasks))
    tested_features = {**data.features, **evaluation.features}
    for key, files, features in (
        ("data.train", data.files_by_task, data.features),
        ("data.validation_files", data.validation_files, data.features),
        ("evaluation.files", evaluation.files, tested_features),
    ):
        if unknown := sorted(set(files) - set(subtasks)):
            raise SettingError(key, f": no task {unknown[0]!r} here; there are {', '.join(subtasks)}")
        if without := sorted(set(files) - set(features)):
            raise SettingError(key, f" names {without[0]}, but data.features has no folder for it")


def check_same_features(trained: Mapping[str, str], tested: Mapping[str, str]) -> None:
    """Refuses test features that were computed differently from those of training, where both say how."""
    for task, folder in tested.items():
        before = read_settings(Path(trained[task])) if task in trained else None
        now = read_settings(Path(folder))
        if before is None or now is None or (name := first_difference(before, now)) is None:
            continue
        raise SettingError(
            "evaluation.features",
            f": {task} is to be tested on {folder}, whose {name} is {now.get(name)!r}, and is trained on "
            f"{trained[task]}, with {before.get(name)!r}; compute both with the same settings",
        )


def check_media_names(file: ExampleFile) -> None:
    """Refuses two pictures or videos of one records file with one name: their stored features would be the same."""
    first: dict[tuple[Path, str], str] = {}
    for records, path in file.media_paths():
        before = first.setdefault((records, Path(path).stem), path)
        if before != path:
            raise UserError(
                f"{records}: {before} and {path} have one name, by which stored features are found; rename one of "
                "them, there too, and compute the features again"
            )


# Closed answer lists: made before training, written to the run's folder, compared with a head's.


def check_closed(
    lists: Mapping[str, str | int], subtasks: Mapping[str, Subtask], trained: Mapping[str, object]
) -> None:
    """Refuses a closed list for a task that does not train, or is not a question answered in words."""
    able = [name for name, task in subtasks.items() if task.answer_by == "text" and task.reads_question]
    for task in lists:
        if task not in able:
            choices = f"{', '.join(able)} can have" if able else "none of these tasks has"
            raise SettingError(SETTING, f": {task} is not a question answered in words; {choices} a closed list")
        if task not in trained:
            raise SettingError(SETTING, f" names {task}, which data.train does not; its head would not train")


def make_lists(
    path: Path, choices: Mapping[str, str | int], files: Mapping[str, ExampleFile], *, same_as: Mapping[str, Path]
) -> None:
    """Writes a run's `closed_answers.json`: each task's list, and the training samples that it leaves out.

    Those train too, as in VL-T5: all their targets are 0. They are counted and logged. `choices` has by task a file of
    answers, or how many of the training answers to take, the most frequent first; `files` has the training records;
    `same_as`, by the setting that names a head's weights, what says which answers its scores mean.
    """
    lists, outside = {}, {}
    for task, choice in choices.items():
        key, scores = f"{SETTING}.{task}", _scores(files[task])
        answers = _most_frequent(scores, choice) if isinstance(choice, int) else _listed(Path(choice), task)
        if len(answers) < 2:
            raise SettingError(key, f": {len(answers)} answers leave nothing to choose; at least 2 are needed")
        if len(set(answers)) < len(answers):
            twice = short_names(answer for answer in dict.fromkeys(answers) if answers.count(answer) > 1)
            raise SettingError(key, f": the list names {twice} more than once; leave the others out")
        if isinstance(choice, int) and len(answers) < choice:
            logger.warning("%s: %d answers are asked for, the training samples have %d", key, choice, len(answers))
        for setting, file in same_as.items():
            other = lists_in(file).get(task)
            if other is not None and other != answers:  # the head's scores mean others, or the same in another order
                raise SettingError(
                    setting,
                    f": {file} has another list, of {len(other):,} answers, than the {len(answers):,} of this run; set "
                    f"{key} to that file",
                )
        left_out = [name for name, of_sample in scores if not of_sample.keys() & set(answers)]
        if len(left_out) == len(scores):
            raise SettingError(
                key, f": of {len(scores):,} training samples not one has one of the {len(answers):,} answers"
            )
        if left_out:
            logger.warning(
                "%s: %d of %d training samples have none of the %d answers, and teach that none of them is right: %s",
                *(key, len(left_out), len(scores), len(answers), short_names(left_out)),
            )
        lists[task], outside[task] = answers, left_out
    write_json(path, {CLOSED_ANSWERS: lists, OUTSIDE: outside})


def lists_in(path: Path) -> dict[str, list[str]]:
    """Reads the answer lists by task of a `closed_answers.json`, `recipe.json` or `config.json`, if it has any."""
    lists = json_object(path, SETTING).get(CLOSED_ANSWERS, {})
    if not isinstance(lists, dict) or not all(isinstance(answers, list) for answers in lists.values()):
        raise UserError(f"{path}: {CLOSED_ANSWERS} is not an object of lists by task; copy the file again")
    return {str(task): [str(answer) for answer in answers] for task, answers in lists.items()}


def account(path: Path) -> dict[str, dict[str, int]]:
    """Returns and logs the length of each list of a `closed_answers.json`, and the number of samples outside it."""
    counts, outside = {}, read_json(path)[OUTSIDE]
    for task, answers in lists_in(path).items():
        counts[task] = {"answers": len(answers), "outside": len(outside[task])}
        names = f" ({short_names(outside[task])})" if outside[task] else ""
        logger.info(
            "%s: %d closed answers; %d training samples have none of them%s; %s names all",
            *(task, len(answers), len(outside[task]), names, path),
        )
    return counts


def _scores(file: ExampleFile) -> list[tuple[str, Mapping[str, float]]]:
    """Yields id and soft scores of every sample that can be trained on."""
    scores = []
    for index in range(len(file)):
        try:
            example = file[index]
            scores.append((example.id, soft_scores(example)))
        except BadSample:  # named and counted when the run comes to it
            continue
    return scores


def _most_frequent(scores: Sequence[tuple[str, Mapping[str, float]]], limit: int) -> list[str]:
    """Returns the answers with the largest sums of soft scores; of equals the first seen."""
    sums = defaultdict[str, float](float)
    for answer, score in (pair for _, of_sample in scores for pair in of_sample.items()):
        sums[answer] += score
    return sorted(sums, key=lambda answer: -sums[answer])[: max(0, limit)]


def _listed(path: Path, task: str) -> list[str]:
    """Reads a file's answers: one per line; a JSON list; or the task's in a JSON object under `closed_answers`."""
    text = whole_text(path, SETTING)
    if path.suffix != ".json":
        return [line.strip() for line in text.splitlines() if line.strip()]
    content = json_of(text, str(path))
    if isinstance(content, dict):
        lists = content.get(CLOSED_ANSWERS)
        content = lists.get(task) if isinstance(lists, dict) else None
    if not isinstance(content, list) or not all(isinstance(answer, str) for answer in content):
        raise UserError(f"{path}: neither a list of answers, nor an object whose {CLOSED_ANSWERS} holds one for {task}")
    return content
