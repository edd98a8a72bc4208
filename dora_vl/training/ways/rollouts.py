"""Draws a model's own answers while it trains, rewards them, and makes batches to learn from."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from dora_vl.backbones.encoder import Encoder
from dora_vl.backbones.generation import TokenDrawer, end_tokens
from dora_vl.data.batches import Collator, with_answer
from dora_vl.data.example import Example
from dora_vl.data.objects import Size, asks_for_boxes
from dora_vl.data.samples import BOOKKEEPING, IGNORED_LABEL, Sample, Skipped, sample_random
from dora_vl.errors import BadSample, UserError
from dora_vl.evaluation.assistant import Assistant, cut_prompt
from dora_vl.evaluation.questions import last_round
from dora_vl.evaluation.rewards import Reward
from dora_vl.heads.rewards import PolicyGradient, spread
from dora_vl.run.folder import DRAWN, read_log
from dora_vl.run.launch import gather_from_ranks, rank_and_ranks
from dora_vl.shapes import Float, Int

logger = logging.getLogger(__name__)

MOST_ALIKE = 20
"""A run warns after this many steps in a row in which no group's rewards differed."""
ALIKE_ADVICE = (
    "Look at drawn.jsonl: if no answer is right, train on the answers first (objective.loss: sft) or take a reward "
    "that also pays parts; if all are, take harder questions"
)
LoggedNumbers = dict[str, Float[Tensor, ""]]


def with_answers(item: Sample | Skipped, group: int, tokens: int) -> Sample | Skipped:
    """Gives a sample the largest group that can be drawn to its question."""
    if isinstance(item, Skipped):
        return item
    answer = with_answer(item, item.labels[item.labels != IGNORED_LABEL][:1].repeat(tokens))
    return replace(answer, others=(answer,) * (group - 1))


@dataclass(frozen=True, kw_only=True)
class DrawnAnswer:
    """One answer as it was drawn.

    Attributes:
        log_prob: the sum over its tokens.
        entropy: the mean over its tokens.
        is_cut: it has as many tokens as it may, and no end.
    """

    ids: Int[Tensor, " tokens"]
    text: str
    log_prob: float
    entropy: float
    is_cut: bool


DRAWN_BATCH_ENTRIES = ("padding_tokens", "made_of")
"""A batch of drawn answers has its own values of these; all other bookkeeping is that of the questions."""
Group = list[DrawnAnswer]
"""Holds the answers to one question."""


def _with_drawn_answers(sample: Sample, group: Group) -> Sample:
    first, *others = [with_answer(sample, answer.ids) for answer in group]
    return replace(first, others=tuple(others))


class AnswerSource(Protocol):
    """Draws answers by the model that trains."""

    def update_weights(self) -> None:
        """Draws by the model's present weights from now on; every rank must call it before a step's answers."""
        ...

    def draw(self, samples: Sequence[Sample], group: int, seed: int) -> list[Group]:
        """Draws `group` answers to each sample's question."""
        ...


def prompt_of(sample: Sample) -> Sample:
    """Returns a sample up to where its answer begins."""
    start = int((sample.labels != IGNORED_LABEL).int().argmax())
    # All but the last token is what a prompt's answers begin with.
    return replace(cut_prompt(sample, stop=start), media_end=start - 1, others=())


@dataclass(frozen=True, kw_only=True)
class ModelAnswers:
    """Draws by the model itself. A prompt and its pictures are read once for all answers, where it can go on from them.

    Attributes:
        never: these tokens are not drawn: they are placeholders of pictures and videos.
        autocast: the number type of the drawing passes; None leaves that of the weights.
    """

    assistant: Assistant
    max_new_tokens: int
    never: Collection[int]
    autocast: torch.dtype | None

    def update_weights(self) -> None:
        """Does nothing: they are the model's own."""

    def draw(self, samples: Sequence[Sample], group: int, seed: int) -> list[Group]:
        """See `AnswerSource`."""
        device, encoder, backbone = self.assistant.device, self.assistant.encoder, self.assistant.backbone
        draws = TokenDrawer(torch.Generator(device).manual_seed(seed), self.never)
        prompts = [prompt for sample in samples for prompt in [prompt_of(sample)] * group]
        training = backbone.training
        backbone.eval()
        try:
            with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
                batch = self.assistant.begin_batch(prompts)
                new = self.assistant.new_ids(batch, max_new_tokens=self.max_new_tokens, options=draws.options)
        finally:
            backbone.train(training)
        ends = torch.isin(new, torch.tensor(sorted(end_tokens(backbone.model))))
        is_cut = ~ends.any(1)
        lengths = torch.where(is_cut, new.shape[1], ends.int().argmax(1) + 1)
        inside = torch.arange(new.shape[1]) < lengths[:, None]
        log_probs = (torch.stack(draws.log_probs, 1).cpu() * inside).sum(1)
        entropies = (torch.stack(draws.entropies, 1).cpu() * inside).sum(1) / lengths
        columns = (lengths.tolist(), log_probs.tolist(), entropies.tolist(), is_cut.tolist())
        answers = [
            DrawnAnswer(
                ids=ids[:length], text=encoder.decode(ids[:length]), log_prob=log_prob, entropy=entropy, is_cut=cut
            )
            for ids, length, log_prob, entropy, cut in zip(new, *columns, strict=True)
        ]
        return [answers[start : start + group] for start in range(0, len(answers), group)]


@dataclass(kw_only=True)
class Rollouts:
    """Draws answers to a step's questions, and makes batches of them.

    A prompt and its answers are one tree in the update. The seed of what is drawn depends on the run's, step, rank and
    micro-batch only, so that a resumed run draws the same.

    Attributes:
        encoder: reads the boxes of answers.
        example_of: finds a training sample's example by its index.
        rewards: functions by name; `weights` says how much each counts.
        group: the number of answers drawn to each question.
        keeps_all: groups whose rewards are all alike are learned from too, by their divergence from the reference.
    """

    source: AnswerSource
    encoder: Encoder
    device: torch.device
    collate: Collator
    example_of: Callable[[int], Example | BadSample]
    loss: PolicyGradient
    rewards: Mapping[str, Reward]
    weights: Mapping[str, float]
    group: int
    max_new_tokens: int
    seed: int
    run_folder: Path
    keeps_all: bool
    alike_in_a_row: int = 0
    """Counts the last steps in which no group's rewards differed, since the process began."""

    def draw_batches(
        self, batches: Sequence[Mapping[str, Any]], *, step: int
    ) -> tuple[list[dict[str, Any]], Int[Tensor, ""], LoggedNumbers]:
        """Replaces the data's answers in the micro-batches of a step by drawn ones.

        Every rank must call it; an error of one is raised on all. Returns the batches, what their losses are divided
        by, and the numbers that people watch.
        """
        self.source.update_weights()
        samples: list[list[Sample]] = [batch["made_of"] for batch in batches]
        examples = [
            last_round(cast(Example, self.example_of(sample.index)))
            for batch_samples in samples
            for sample in batch_samples
        ]
        groups, points, error = list[Group](), dict[str, Tensor](), None
        try:
            groups = [group for number, items in enumerate(samples) for group in self._drawn(items, step, number)]
            points = self._points(examples, groups, [sample.sizes for items in samples for sample in items])
        except UserError as mistake:
            error = mistake
        if errors := [message for message in gather_from_ranks(error and str(error)) if message is not None]:
            raise error or UserError(errors[0])  # on every rank
        applies = torch.stack([value.isfinite() for name, value in points.items() if self.weights[name]]).any(0)
        rewards = torch.stack([self.weights[name] * value for name, value in points.items()]).nansum(0)
        rewards = rewards.where(applies, torch.nan)
        differ = spread(rewards) > 0
        any_differ = any(gather_from_ranks(bool(differ.any())))
        self.alike_in_a_row = 0 if any_differ else self.alike_in_a_row + 1
        if rank_and_ranks()[0] == 0:
            self._write(step, examples, groups, rewards, differ, any_differ)

        tokens = torch.tensor([[len(answer.ids) for answer in group] for group in groups]).view(-1, self.group)
        token_weights = self.loss.weights(tokens, self.max_new_tokens)
        weights = self.loss.advantages(rewards) * token_weights
        learned, start = [], 0
        for source, batch_samples in zip(batches, samples, strict=True):
            indices = range(start, start + len(batch_samples))
            kept = [index for index in indices if self.keeps_all or bool(differ[index])]
            batch = self.collate([_with_drawn_answers(batch_samples[index - start], groups[index]) for index in kept])
            log_probs = [answer.log_prob for index in kept for answer in groups[index]]
            batch |= {"weights": weights[kept].flatten(), "token_weights": token_weights[kept].flatten()}
            batch |= {"drawn_log_probs": torch.tensor(log_probs)}
            batch |= {name: source[name] for name in BOOKKEEPING if name in source and name not in DRAWN_BATCH_ENTRIES}
            learned.append(batch)
            start += len(batch_samples)

        answers = [answer for group in groups for answer in group]
        numbers = {
            "rewards/mean": rewards.nanmean(),
            "rewards/spread": spread(rewards).mean(),
            "rewards/alike": (~differ).float().mean(),
            "answers/tokens": tokens.float().mean(),
            "answers/cut": torch.tensor([float(answer.is_cut) for answer in answers]).mean(),
            "answers/entropy": torch.tensor([answer.entropy for answer in answers]).mean(),
        }
        if len(points) > 1:
            numbers |= {f"rewards/{name}": value.nanmean() for name, value in points.items()}
        divisor = sum(gather_from_ranks(self.loss.divisor(tokens)))
        return learned, torch.tensor(max(1, divisor), device=self.device), numbers

    def _drawn(self, samples: Sequence[Sample], step: int, number: int) -> list[Group]:
        if not samples:
            return []
        rank, ranks = rank_and_ranks()
        seed = sample_random(self.seed, step, number * ranks + rank).getrandbits(63)
        return self.source.draw(samples, self.group, seed)

    def _points(
        self, examples: Sequence[Example], groups: Sequence[Group], sizes: Sequence[Sequence[Size]]
    ) -> dict[str, Float[Tensor, "prompts group"]]:
        """Gives all answers of the step their rewards, by name; NaN where one does not apply."""
        asked = [example for example, group in zip(examples, groups, strict=True) for _ in group]
        texts = [
            self.encoder.with_places(answer.text, of_pictures) if asks_for_boxes(example) else answer.text
            for example, group, of_pictures in zip(examples, groups, sizes, strict=True)
            for answer in group
        ]
        return {name: torch.tensor(reward(asked, texts)).view(-1, self.group) for name, reward in self.rewards.items()}

    def _write(
        self,
        step: int,
        examples: Sequence[Example],
        groups: Sequence[Group],
        rewards: Tensor,
        differ: Tensor,
        any_differ: bool,
    ) -> None:
        """Writes one question of the step with its answers and rewards, the first whose rewards differ."""
        if self.alike_in_a_row == MOST_ALIKE:
            logger.warning(
                "step %s: %s steps in which all answers to a question had the same reward, so nothing is learned. %s",
                *(step + 1, MOST_ALIKE, ALIKE_ADVICE),
            )
        index = int(differ.int().argmax()) if examples else 0
        if index < len(examples):
            example, group = examples[index], groups[index]
            values = [None if value != value else value for value in rewards[index].tolist()]
            answers = [{"text": answer.text, "reward": value} for answer, value in zip(group, values, strict=True)]
            question = {"id": example.id, "question": example.question, "truth": example.answers[0].text}
            line = {"step": step + 1, "differ": any_differ, **question, "answers": answers}
            with (self.run_folder / DRAWN).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def steps_alike(run_folder: Path, steps: int) -> int:
    """Counts the steps in which no group's rewards differed; warns of `MOST_ALIKE` in a row, or all."""
    lines = read_log(run_folder / DRAWN)
    alike = [len([*run]) for differ, run in groupby(line["differ"] for line in lines) if not differ]
    if max(alike, default=0) >= min(MOST_ALIKE, max(1, steps)):
        logger.warning(
            "in %s of %s steps all answers to a question had the same reward, so nothing was learned from them. %s",
            *(sum(alike), steps, ALIKE_ADVICE),
        )
    return sum(alike)
