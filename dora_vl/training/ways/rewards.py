"""Rewards: the model draws answers, functions reward them, and better ones become more probable."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import TrainingArguments
from transformers.integrations.deepspeed import deepspeed_config

from dora_vl.backbones.base import Backbone
from dora_vl.backbones.output_store import OutputStore
from dora_vl.data.batches import Collator
from dora_vl.data.columns import train_name
from dora_vl.data.example import Example
from dora_vl.data.samples import Sample, Skipped
from dora_vl.errors import SettingError
from dora_vl.evaluation.assistant import Assistant
from dora_vl.evaluation.questions import last_round
from dora_vl.evaluation.rewards import Reward, check_truths, rewards_of
from dora_vl.heads.rewards import divergence
from dora_vl.run.arguments import zero_stage
from dora_vl.run.folder import run_folder_of
from dora_vl.run.launch import on_first_rank
from dora_vl.shapes import Float
from dora_vl.training.extras.vllm import VllmAnswers, server_of
from dora_vl.training.opened import AnswersEncoder, Opened
from dora_vl.training.pipeline import LossModel
from dora_vl.training.run_samples import RunSamples
from dora_vl.training.training_data import TrainingData
from dora_vl.training.ways.rollouts import ModelAnswers, Rollouts, with_answers
from dora_vl.training.ways.supervised import NextTokenLoss
from dora_vl.training.ways.way import Reference, Way


class Rewards(Way):
    """Learns from answers that the model draws, by itself or through a vLLM server."""

    def check(self, samples: RunSamples, arguments: TrainingArguments) -> None:
        """Refuses what a run that draws its answers cannot do, and truths that no answer can earn."""
        config, objective = self.config, self.config.objective
        if any(samples.judgements):
            what = "rejected answers" if samples.judgements[1] else "answers that a flag calls good or bad"
            reason = "it draws its own answers; dpo and the like learn from the file's"
            raise SettingError("objective.loss", f" is {objective.loss}, and {samples.name} has {what}: {reason}")
        if config.data.streaming:
            raise SettingError(
                "data.streaming", " is not for rewards, which look a question's right answer up; set it false"
            )
        if arguments.fsdp or (arguments.deepspeed and zero_stage(deepspeed_config()) == 3):
            raise SettingError(
                "training.fsdp" if arguments.fsdp else "training.deepspeed",
                " shards the weights, which answers are drawn with; take zero2",
            )
        self._rewards()
        examples = map(last_round, samples.examples())
        after = config.evaluation.answer_after
        check_truths(objective.rewards, examples, train_name(config.data.files), answer_after=after)
        if objective.vllm is not None:
            if samples.has_videos:
                raise SettingError(
                    "objective.vllm", " draws answers about pictures and texts, not videos; leave it out"
                )
            on_first_rank(partial(server_of(config).check, config.model.base))

    def sample_encoder(self, opened: Opened, outputs: OutputStore | None = None) -> AnswersEncoder:
        """Takes the last answer alone, in whose place others are drawn."""
        return AnswersEncoder(encoder=opened.encoder, **opened.media(outputs))

    def collation(self) -> dict[str, bool]:
        """Keeps a batch's samples, whose questions are asked."""
        return {"keeps_samples": True}

    def with_room(self, data: TrainingData, arguments: TrainingArguments) -> TrainingData:
        """Gives the largest samples as many and as long answers as may be drawn."""
        group, longest = self.config.objective.group, self.config.objective.max_new_tokens

        def pools() -> list[list[Sample | Skipped]]:
            return [[with_answers(item, group, longest) for item in pool] for pool in data.pools()]

        tokens = data.batch_tokens + arguments.per_device_train_batch_size * group * longest
        return dataclasses.replace(data, pools=pools, batch_tokens=tokens)

    def loss(self, backbone: Backbone[Any]) -> LossModel:
        """Makes the loss of drawn answers."""
        kl = self.config.objective.kl
        return RewardLoss(backbone, kl=kl, reference=Reference(backbone.model) if kl else None)

    def rollouts(self, opened: Opened, backbone: Backbone[Any], data: TrainingData, never: frozenset[int]) -> Rollouts:
        """Draws by the model that trains, or by a vLLM server that gets its adapter."""
        config, objective, arguments = self.config, self.config.objective, opened.arguments
        policy = objective.losses[0].policy
        assert policy is not None, "the table has one for each loss of rewards"
        half = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
        if objective.vllm is None:
            source = ModelAnswers(
                assistant=Assistant(backbone, opened.encoder, while_training=True),
                autocast=None if arguments.deepspeed else half,
                max_new_tokens=objective.max_new_tokens,
                never=never,
            )
        else:
            source = VllmAnswers.of(opened, backbone, never)
        return Rollouts(
            source=source,
            encoder=opened.encoder,
            device=arguments.device,
            collate=cast(Collator, data.collate),
            example_of=opened.samples.example_of,
            loss=policy,
            rewards=self._rewards(opened.samples.examples),
            weights=objective.rewards,
            group=objective.group,
            max_new_tokens=objective.max_new_tokens,
            seed=arguments.seed,
            run_folder=run_folder_of(config.training),
            keeps_all=objective.kl > 0,
        )

    def _rewards(self, examples: Callable[[], Iterable[Example]] = tuple) -> dict[str, Reward]:
        objective = self.config.objective
        return rewards_of(
            objective.rewards,
            answer_format=objective.format,
            answer_after=self.config.evaluation.answer_after,
            examples=examples,
            threads=objective.reward_threads,
            skips_errors=objective.reward_errors == "skip",
        )


class RewardLoss(NextTokenLoss):
    """Raises the log-probability of drawn answers by their advantage; see `heads.rewards`.

    Batches of validation hold the data's own answers, and get their next-token loss. `kl` is the weight of the
    divergence from `reference`, the model as it was when training began.
    """

    def __init__(self, backbone: Backbone[Any], *, kl: float, reference: Reference | None) -> None:
        super().__init__(backbone, step_tokens=True, reference=reference)
        self.kl = kl

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        num_items_in_batch: Tensor | int | None = None,
        weights: Float[Tensor, " samples"] | None = None,
        token_weights: Float[Tensor, " samples"] | None = None,
        drawn_log_probs: Float[Tensor, " samples"] | None = None,
        **inputs: Any,
    ) -> dict[str, Tensor]:
        """Returns `loss` to go backward from, `labelled_tokens`, and how far the model is from rollout and reference.

        `weights` are advantages times `token_weights`.
        """
        if weights is None or token_weights is None or drawn_log_probs is None:
            return super().forward(num_items_in_batch=num_items_in_batch, **inputs)
        before, noted = torch.zeros(()), dict[str, Tensor]()
        if self.reference is not None:
            with self.reference.in_place():
                before = -self.backbone(**inputs).losses
        features = self.backbone(**inputs)
        log_probs = -features.losses
        # A ratio of 1, so that the loss is of the advantages' size; its gradient is that of the log-probability.
        each = -weights[features.samples] * (log_probs - log_probs.detach()).exp()
        if self.reference is not None:
            kl = divergence(log_probs, before)
            each = each + self.kl * token_weights[features.samples] * kl
            noted["log_probs/kl"] = kl.detach().mean()
        drawn = drawn_log_probs.float()  # DeepSpeed's bfloat16 engine casts what goes in
        of_answers = torch.zeros_like(drawn).index_add(0, features.samples, log_probs.detach().float())
        noted["log_probs/gap"] = (of_answers - drawn).abs().mean()
        count = torch.tensor(len(log_probs), device=log_probs.device)
        divisor = 1 if num_items_in_batch is None else num_items_in_batch
        return {"loss": each.sum() / divisor, "labelled_tokens": count, **noted}
