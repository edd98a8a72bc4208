"""The pipeline of decoders that learn conversations: a LLaVA, any other vision-language model, or a language model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations.deepspeed import deepspeed_config

from dora_vl.backbones.base import Backbone, sees_pictures
from dora_vl.backbones.encoder import Encoder, open_encoder
from dora_vl.backbones.frozen_outputs import OutputStore, PictureReader
from dora_vl.backbones.model import (
    DecoderBackbone,
    check_packing,
    language_targets,
    open_backbone,
    projector_patterns,
    skeleton_of,
)
from dora_vl.backbones.pieces import PieceProcessor
from dora_vl.backbones.target_presets import names_projector
from dora_vl.backbones.tower_sources import compose_llava, has_new_projector, write_language_model
from dora_vl.backbones.towers import ImagePreparation
from dora_vl.core import DoRAConfig
from dora_vl.core.strength import checked_strength
from dora_vl.data.batches import Collator
from dora_vl.data.columns import Packing, train_name
from dora_vl.data.example import Example
from dora_vl.data.samples import Labelled, Sample, Skipped
from dora_vl.errors import SettingError
from dora_vl.evaluation.assistant import Assistant, EncoderPrompts
from dora_vl.evaluation.baselines import ComparisonAnswers, right_text
from dora_vl.evaluation.forgetting import Abilities, compare_abilities, forgetting_lines, try_measure
from dora_vl.evaluation.open_model import adapter_recipe
from dora_vl.evaluation.predictor import Decoding
from dora_vl.evaluation.questions import last_round, text_asked
from dora_vl.evaluation.rewards import Reward, check_truths, rewards_of
from dora_vl.evaluation.test import (
    MOST_NEW_TOKENS,
    ask_untrained,
    check_test,
    evaluate_commonsense,
    media_of_run,
    read_sets,
    run_test,
    watch_questions,
)
from dora_vl.heads.preferences import Hyperparameters
from dora_vl.report.batch import TokenText
from dora_vl.run.arguments import order_seed, zero_stage
from dora_vl.run.base import (
    DECODER,
    VideoReading,
    check_base,
    check_base_takes_videos,
    check_pixels,
    check_quantisation,
    check_videos,
    check_window,
    image_folder,
    load_base,
    make_base,
    video_folder,
    video_sampling,
)
from dora_vl.run.folder import ADAPTER, PROJECTOR_START, REPLAY, run_folder_of
from dora_vl.run.launch import on_first_rank
from dora_vl.run.settings import foreign_fields
from dora_vl.run.watched_questions import Watch, evenly
from dora_vl.training.closed_form import MOST_SAMPLES, Form, probe, projector_inputs, start_projector
from dora_vl.training.losses import LossModel, NextTokenLoss, PreferenceLoss, Reference, RewardLoss, draws_in_training
from dora_vl.training.parts import adapt, core_config
from dora_vl.training.pipeline import Pipeline, TrainingData
from dora_vl.training.replay import check_base_writes, check_replay, copy_chats
from dora_vl.training.rollouts import ModelAnswers, Rollouts, with_answers
from dora_vl.training.run_samples import RowEncoder, RunSamples, stored_outputs
from dora_vl.training.vllm_rollouts import VllmAnswers, VllmServer, start_command

logger = logging.getLogger(__name__)

PAPER_TARGETS = tuple(
    f"model.layers.*.{name}"
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
)
"""They are the five of the paper's commonsense runs (table 8), as LLaMA 1, 2, 3 and their like name them."""


class DecoderPipeline(Pipeline):
    """Trains on conversations about pictures and videos, or on text alone."""

    kind = DECODER
    _samples: RunSamples | None = None

    @cached_property
    def encoder(self) -> Encoder:
        """Makes samples and prompts, once the base is there; a test alone asks as the adapter was trained."""
        model, data = self.config.model, self.config.data
        thinking = None if self._samples is None else self._samples.has_thoughts
        if self.config.test_only:
            thinking = adapter_recipe(run_folder_of(self.config.training) / ADAPTER).get("thinking")
        return open_encoder(
            model.base,
            template=model.template,
            train_on=data.train_on,
            aspect=model.image_aspect,
            max_tokens=data.max_tokens,
            revision=model.revision,
            thinking=thinking,
        )

    def prepare(self, arguments: TrainingArguments) -> None:
        """Composes the base, or writes it from its source, where it is not there yet.

        All data and the test's questions are read first, so that what is wrong with them shows now, not after hours.
        """
        config = self.config
        if config.model.compose is None and config.model.source is None:
            check_base(config)
        check_quantisation(config.model)
        check_replay(config)
        samples = self.samples(arguments)
        samples.describe()
        samples.check_count()
        samples.check_objective(config.objective)
        if config.objective.kind == "reward":
            self._check_rewards(arguments)
        if config.evaluation.file is not None:
            samples.warn_of_overlap(check_test(config), config)
        elif config.evaluation.files:
            read_sets(config.evaluation)
        has_videos = samples.has_videos and self._sees_pictures
        if has_videos and config.data.cache_features:
            raise SettingError("data.cache_features", " is for pictures, and there are videos; set it false")
        if has_videos:
            check_videos(config.data)
        folders = (image_folder(config.data), video_folder(config.data)) if self._sees_pictures else (None, None)
        samples.check_files_early(*folders)
        make_base(compose_llava, config.model.compose, config.model.base, arguments)
        make_base(write_language_model, config.model.source, config.model.base, arguments)
        self._projector_start()
        check_window(config.model.base, self.encoder, config.model.revision)
        check_pixels(config.model.base, self.encoder, self._most_pixels(arguments))
        if config.data.replay:
            check_base_writes(config, self.encoder)
        if has_videos:
            check_base_takes_videos(config.model.base, self.encoder, config.data, pictures=samples.has_pictures)

    def _check_rewards(self, arguments: TrainingArguments) -> None:
        """Refuses what a run that draws its answers cannot do."""
        objective = self.config.objective
        if self.config.data.streaming:
            raise SettingError(
                "data.streaming", " is not for rewards, which look a question's right answer up; set it false"
            )
        if arguments.fsdp or (arguments.deepspeed and zero_stage(deepspeed_config()) == 3):
            raise SettingError(
                "training.fsdp" if arguments.fsdp else "training.deepspeed",
                " shards the weights, which answers are drawn with; take zero2",
            )
        self._rewards()
        examples = map(last_round, self.samples(arguments).examples())
        after = self.config.evaluation.answer_after
        check_truths(objective.rewards, examples, train_name(self.config.data.files), answer_after=after)
        if objective.vllm is not None:
            if self.samples(arguments).has_videos:
                raise SettingError(
                    "objective.vllm", " draws answers about pictures and texts, not videos; leave it out"
                )
            on_first_rank(partial(self._vllm().check, self.config.model.base))

    @property
    def _sees_pictures(self) -> bool:
        """Returns True where the base, which need not be there yet, has a vision part."""
        model = self.config.model
        return model.compose is not None or (model.source is None and sees_pictures(model.base, model.revision))

    def _most_pixels(self, arguments: TrainingArguments) -> int | None:
        """Returns a sample's share of `data.max_pixels_per_step`; None: no limit."""
        config = self.config
        lists = (
            1 + self.samples(arguments).has_other_pictures(config.objective)
        ) * arguments.per_device_train_batch_size
        return None if (most := config.data.max_pixels_per_step) is None else most // lists

    def samples(self, arguments: TrainingArguments) -> RunSamples:
        """Returns the run's data, read at the first call."""
        if self._samples is None:
            self._samples = RunSamples(self.config.data, arguments)
        return self._samples

    def labelled(self, arguments: TrainingArguments) -> Iterator[Labelled]:
        """Yields the labels that the run's encoder makes."""
        return self.samples(arguments).labelled(self._rows(arguments))

    def skeleton(self) -> DecoderBackbone:
        """Builds the model without its weights."""
        return skeleton_of(self.config.model.base, revision=self.config.model.revision)

    def load(self) -> DecoderBackbone:
        """Loads the model; one of instructions will search its answers with `evaluation.beams`."""
        config = self.config
        search = {"num_beams": config.evaluation.beams} if config.task == "commonsense" else None
        return load_base(open_backbone, config.model, generation=search)

    def assistant(self, backbone: Backbone[Any]) -> Assistant:
        """Wraps the model for asking questions."""
        return Assistant(backbone, EncoderPrompts(self.encoder))

    def write_replay(self, backbone: Backbone[Any], arguments: TrainingArguments) -> None:
        """Puts the chats of `data.replay` into the run's folder; a base that has none yet writes them."""
        if self.config.data.replay:
            on_first_rank(partial(copy_chats, self.config, self.assistant(backbone), arguments.device))

    def dora_config(self, backbone: Backbone[Any]) -> DoRAConfig:
        """Adapts every linear of the decoder and trains the projector, unless the settings say otherwise."""
        adapter, model = self.config.adapter, backbone.model
        if adapter.method == "full" and adapter.targets is None:
            raise SettingError(
                "adapter.targets", " must name the modules whose weights train with adapter.method: full"
            )
        targets, also_train = self._places(model)
        return core_config(adapter, model, targets=targets, also_train=also_train)

    def _places(self, model: PreTrainedModel) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
        """Returns the default targets, none where `adapter.targets` names some, and what trains beside them."""
        adapter, base = self.config.adapter, self.config.model
        if self.config.task == "commonsense":
            return PAPER_TARGETS, {}
        targets = language_targets(model) if adapter.targets is None else ()
        if not adapter.train_projector or {"projector"} & {*adapter.parts, *adapter.also_train}:
            return targets, {}
        if patterns := projector_patterns(model):
            in_targets = adapter.method == "full" and names_projector(model, adapter.targets or ())
            return targets, {} if in_targets else {"projector": patterns}
        if sees_pictures(base.base, base.revision):
            logger.warning(
                "no projector is known in a %s, so none trains; adapter.train_projector: false says that it is meant",
                type(model).__name__,
            )
        return targets, {}

    def data(self, backbone: Backbone[Any], arguments: TrainingArguments) -> TrainingData:
        """Returns the training file's conversations, grouped by modality and length."""
        data, encoder, samples = self.config.data, self.encoder, self.samples(arguments)
        packing = self._packing(backbone)
        # Rows that take a batch through the vision part as other ranks' batches may be taken: a picture's, a video's.
        videos = encoder.sees_pictures and samples.has_videos and encoder.no_videos_reason is None
        pictures = encoder.sees_pictures and (samples.has_pictures or (samples.has_videos and not videos))
        dummy, outputs = encoder.dummy() if pictures else None, None
        if data.cache_features and samples.has_pictures:
            decoder, reader = cast(DecoderBackbone, backbone), self._picture_reader(arguments)
            form = self._projector_start(decoder)
            outputs, dummy = stored_outputs(self.config, decoder, reader, samples.pictures, arguments)
            if form is not None:
                rounds, file = samples.rounds(MOST_SAMPLES), run_folder_of(self.config.training) / PROJECTOR_START
                seen = projector_inputs(decoder.config, outputs, reader, [names for names, _, _ in rounds])
                start_projector(decoder.model.base_model, encoder.tokenizer, rounds, seen, form, file)
        objective = self.config.objective
        collate = replace(
            encoder.collate,
            dummy=dummy,
            dummy_video=encoder.dummy_video() if videos else None,
            packing=packing,
            compares=objective.kind == "preference",
            unmatched=any(loss.needs_unmatched for loss in objective.losses),
            keeps_samples=objective.kind == "reward",
        )
        replay = None
        if data.replay:
            replay = samples.replay(run_folder_of(self.config.training) / REPLAY, encoder)
            collate = replace(collate, chats_from=replay.first_index)
        made = samples.training_data(self._rows(arguments, outputs), collate, replay)
        if objective.kind != "reward":
            return made
        group, longest = objective.group, objective.max_new_tokens

        def pools() -> list[list[Sample | Skipped]]:
            """Gives the largest samples as many and as long answers as may be drawn."""
            return [[with_answers(item, group, longest) for item in pool] for pool in made.pools()]

        tokens = made.batch_tokens + arguments.per_device_train_batch_size * group * longest
        return replace(made, pools=pools, batch_tokens=tokens)

    def _picture_reader(self, arguments: TrainingArguments) -> PictureReader:
        folder, most = image_folder(self.config.data), self._most_pixels(arguments)
        stored = self.samples(arguments).stored
        return PictureReader(encoder=self.encoder, folder=folder, stored=stored, most_pixels=most)

    def readable(self) -> dict[str, str]:
        """Returns by id the answers to the test's questions that a linear map of the base's pictures gives."""
        arguments, backbone = self.arguments(), self.load()
        adapt(backbone.model, self.dora_config(backbone))  # so that the run finds the outputs that are stored here
        test = [example for example in check_test(self.config) if example.images]
        questions = [(example.images, text_asked(example), right_text(example)) for example in test]
        rounds, reader = self.samples(arguments).rounds(MOST_SAMPLES), self._picture_reader(arguments)
        pictures = [names for names, _, _ in (*rounds, *questions)]
        outputs, _ = stored_outputs(self.config, backbone, reader, pictures, arguments)
        read = probe(rounds, questions, projector_inputs(backbone.config, outputs, reader, pictures))
        return {example.id: answer for example, answer in zip(test, read, strict=True) if answer is not None}

    def _projector_start(self, backbone: DecoderBackbone | None = None) -> Form | None:
        """Returns the form that the projector's start takes, None where it has no place; one that is set is refused.

        Before the model is there, it tells by the settings and the base's folder alone.
        """
        config, trouble = self.config, None
        form, base = config.adapter.projector_start, Path(config.model.base)
        if form == "random" or config.task != "llava":
            return None
        if not config.data.cache_features:
            trouble = "is computed from stored outputs; set data.cache_features: true"
        elif config.adapter.initial is not None:
            trouble = "and adapter.initial both say where the projector begins; leave one out"
        elif not has_new_projector(base):
            trouble = (
                f"is for a new projector, and {base} has one that was trained, or composed elsewhere; leave it out"
            )
        elif backbone is not None:
            llava: Any = backbone.model.base_model
            whole = all(weight.requires_grad for weight in llava.multi_modal_projector.parameters())
            if not whole or any(weight.requires_grad for weight in llava.vision_tower.parameters()):
                trouble = "needs a projector that trains whole, and a tower that does not; leave it out"
        if trouble is not None and form is not None:
            raise SettingError("adapter.projector_start", f" {trouble}")
        return None if trouble is not None else form or "answers"

    def _packing(self, backbone: Backbone[Any]) -> Packing:
        """Returns `data.packing`, as far as the model follows it."""
        kind, reason = check_packing(cast(DecoderBackbone, backbone), self.encoder, self.config.data.packing)
        if reason is not None:
            logger.warning("data.packing: %s instead of %s: %s", kind, self.config.data.packing, reason)
        return kind

    def _rows(self, arguments: TrainingArguments, outputs: OutputStore | None = None) -> RowEncoder:
        data = self.config.data
        objective = self.config.objective
        compares = objective.kind != "supervised"
        if not self.encoder.sees_pictures:
            return RowEncoder(encoder=self.encoder, compares=compares)
        same = self.samples(arguments).has_videos and self.encoder.videos_of_one_length
        return RowEncoder(
            encoder=self.encoder,
            folder=image_folder(data),
            videos=VideoReading(
                folder=video_folder(data), sampling=video_sampling(data), frames=data.video_frames if same else None
            ),
            most_pixels=self._most_pixels(arguments),
            outputs=outputs,
            compares=compares,
            exchange=order_seed(arguments) if objective.exchange_pictures else None,
        )

    def loss(self, backbone: Backbone[Any]) -> LossModel:
        """Makes the next-token loss, or one of preferences or rewards."""
        objective = self.config.objective
        if objective.kind == "reward":
            return RewardLoss(backbone, kl=objective.kl, reference=Reference(backbone.model) if objective.kl else None)
        if objective.kind == "preference":
            return PreferenceLoss(
                backbone,
                losses=objective.weights,
                hyperparameters=Hyperparameters(beta=objective.beta, margin=objective.margin),
                reference=Reference(backbone.model) if objective.has_reference else None,
                keeps=not self.config.data.streaming and not draws_in_training(backbone.model),
            )
        reference = Reference(backbone.model) if self.config.data.replay else None
        by_tokens = self.config.optim.loss_normalisation == "step_tokens"
        return NextTokenLoss(backbone, step_tokens=by_tokens, reference=reference)

    def rollouts(self, backbone: Backbone[Any], arguments: TrainingArguments, data: TrainingData) -> Rollouts | None:
        """Draws answers where the loss learns from rewards."""
        objective, samples = self.config.objective, self.samples(arguments)
        policy = objective.losses[0].policy
        if policy is None:
            return None
        half = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
        drawn: dict[str, Any] = {
            "max_new_tokens": objective.max_new_tokens,
            "never": self.reading(backbone).placeholder_ids,
        }
        if objective.vllm is None:
            assistant = Assistant(backbone, EncoderPrompts(self.encoder), while_training=True)
            source = ModelAnswers(assistant=assistant, autocast=None if arguments.deepspeed else half, **drawn)
        else:
            model, reader, preparation = self.config.model, None, None
            if self.encoder.sees_pictures:
                reader = self._picture_reader(arguments)
                if isinstance(self.encoder.processor, PieceProcessor):
                    preparation = ImagePreparation.from_folder(
                        model.base, aspect=model.image_aspect, revision=model.revision
                    )
            source = VllmAnswers(
                server=self._vllm(),
                backbone=backbone,
                encoder=self.encoder,
                example_of=samples.example_of,
                reader=reader,
                preparation=preparation,
                base=model.base,
                **drawn,
            )
        return Rollouts(
            source=source,
            device=arguments.device,
            collate=cast(Collator, data.collate),
            example_of=samples.example_of,
            loss=policy,
            rewards=self._rewards(samples.examples),
            weights=objective.rewards,
            group=objective.group,
            max_new_tokens=objective.max_new_tokens,
            seed=arguments.seed,
            run_folder=run_folder_of(self.config.training),
            keeps_all=objective.kl > 0,
        )

    def _vllm(self) -> VllmServer:
        objective, start = self.config.objective, start_command(self.config.model.base, self.config.adapter.rank)
        return VllmServer(str(objective.vllm), start, objective.vllm_timeout)

    def _rewards(self, examples: Callable[[], Iterable[Example]] = tuple) -> dict[str, Reward]:
        objective, after = self.config.objective, self.config.evaluation.answer_after
        return rewards_of(
            objective.rewards,
            answer_format=objective.format,
            answer_after=after,
            examples=examples,
            threads=objective.reward_threads,
            skips_errors=objective.reward_errors == "skip",
        )

    def watch(self, backbone: Backbone[Any], arguments: TrainingArguments) -> Watch | None:
        """Watches questions of the validation samples, or else of the test."""
        held_out, config = self.samples(arguments).held_out, self.config
        if held_out is not None:
            rows, source = (
                (held_out[index] for index in evenly(range(len(held_out)), config.watch)),
                config.data.held_out,
            )
            questions = [last_round(row) for row in rows if isinstance(row, Example)]  # validation names others
        elif config.evaluation.tested is not None:
            test, source = config.evaluation, config.evaluation.tested
            examples = read_sets(test)[0] if test.files else check_test(config)
            questions = evenly(examples, config.watch)
        else:
            return None
        assistant = Assistant(backbone, EncoderPrompts(self.encoder), while_training=True)
        media = media_of_run(config, assistant, of_test=held_out is None)
        media = replace(media, stored=None if held_out is None else held_out.stored)
        tokens = min(config.evaluation.max_new_tokens, MOST_NEW_TOKENS)
        decoding = Decoding(batch_size=max(1, len(questions)), max_new_tokens=tokens)
        return watch_questions([(assistant, questions, decoding)], media, source=str(source))

    def reading(self, backbone: Backbone[Any]) -> TokenText:
        """Reads tokens by the encoder's tokenizer."""
        config, tokenizer = backbone.model.config.to_dict(), self.encoder.tokenizer
        names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
        placeholder_ids = [config[name] for name in names if isinstance(config.get(name), int)]
        token = vars(self.encoder.processor).get("image_token")
        if not placeholder_ids and isinstance(token, str):
            placeholder_ids = [tokenizer.convert_tokens_to_ids(token)]
        return TokenText(tokenizer, frozenset(placeholder_ids))

    def recipe(self) -> dict[str, Any]:
        """Adds the wording, and how pictures and videos are read."""
        model, data, foreign = self.config.model, vars(self.config.data), foreign_fields(self.config.task)
        of_the_data = ("as_published", "video_frames", "video_fps", "train_on")
        return {
            **super().recipe(),
            "revision": model.revision,
            "template": self.encoder.prompts.name,
            "thinking": self.encoder.prompts.thinking,
            "quantisation": model.quantisation,
            "image_aspect": model.image_aspect,
            "max_tokens": data["max_tokens"],
            **{name: data[name] for name in of_the_data if f"data.{name}" not in foreign},
        }

    def test(self, numbers: Mapping[str, Any]) -> None:
        """Answers the test's file, or every set of `evaluation.files`, with the saved adapter."""
        (assistant, lost, untrained), evaluation = self._tested(), self.config.evaluation
        numbers = {**numbers, **lost}
        if not evaluation.files:
            run_test(assistant, self.config, numbers=numbers, untrained=untrained)
        else:
            folder = run_folder_of(self.config.training)
            evaluate_commonsense(assistant.backbone, self.encoder, evaluation, run_folder=folder, numbers=numbers)
        for name, line in forgetting_lines(lost.get("forgetting")).items():
            logger.info("%s: %s", name, line)

    def _tested(self) -> tuple[Assistant, dict[str, Any], ComparisonAnswers | None]:
        """Returns the model with its saved adapter, what it forgot, and the base's answers to the test."""
        base, evaluation = self.load(), self.config.evaluation
        strength = checked_strength(evaluation.strength)
        base.to(torch.device("cuda" if torch.cuda.is_available() else "cpu")).eval().requires_grad_(False)
        assistant = self.assistant(base)
        untrained = ask_untrained(assistant, self.config) if evaluation.untrained and evaluation.file else None
        texts = None if evaluation.other_texts is None else Path(evaluation.other_texts)
        if evaluation.forgetting:
            logger.info("measuring what the model has forgotten")
        before = try_measure(assistant, texts) if evaluation.forgetting else ""
        assistant = replace(assistant, backbone=self.with_saved_adapter(base, strength))
        if not evaluation.forgetting:
            return assistant, {}, untrained
        after = try_measure(assistant, texts, before if isinstance(before, Abilities) else None)
        if isinstance(before, str) or isinstance(after, str):
            return assistant, {"forgetting": {"reason": before if isinstance(before, str) else after}}, untrained
        return assistant, {"forgetting": compare_abilities(before, after)}, untrained
