"""Instructions for a plain language model, as a pipeline that training can run: the paper's commonsense reasoning."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from transformers import TrainingArguments

from dora_vl.backbones.base import Backbone, max_positions
from dora_vl.backbones.causal_lm import PAPER_TARGETS, CausalLMBackbone, load_causal_lm, write_causal_lm
from dora_vl.backbones.image_text import config_of, skeleton_of
from dora_vl.backbones.loading import load_tokenizer
from dora_vl.backbones.prompt_table import InstructionEncoder
from dora_vl.core import DoRAConfig
from dora_vl.data.batches import Collator
from dora_vl.data.pictures import HeldPictures, StoredPictures
from dora_vl.data.samples import ConversationDataset, Examples
from dora_vl.errors import UserError
from dora_vl.evaluation.asker import MediaReader
from dora_vl.evaluation.assistant import Assistant
from dora_vl.evaluation.commonsense_run import evaluate_commonsense, no_media, read_sets
from dora_vl.evaluation.open_model import with_adapter
from dora_vl.evaluation.prompt_inputs import InstructionPrompts
from dora_vl.evaluation.questions import Question
from dora_vl.files import check_model_folder, check_place
from dora_vl.training.adapting import CAUSAL_LM, check_quantisation, core_config, load_base, make_base
from dora_vl.training.assembly import base_record, pad_token_id
from dora_vl.training.instruct_data import InstructPipeline, MakeDataset
from dora_vl.training.pipeline import TrainingData
from dora_vl.training.recipe import CommonsenseRunConfig, LanguageModelConfig
from dora_vl.training.run_folder import ADAPTER, run_folder_of


class CommonsensePipeline(InstructPipeline[CommonsenseRunConfig]):
    """One question and its output each, by a published prompt."""

    def __init__(self, config: CommonsenseRunConfig) -> None:
        super().__init__(config, name="commonsense")

    def prepare(self, arguments: TrainingArguments) -> None:
        """Writes the base from its source where it is not there yet.

        All data is read first, and the test sets: what is wrong with them shows now, not after hours of training.
        """
        check_quantisation(self.config.model)
        if self.config.evaluation.files:
            read_sets(self.config.evaluation)
        samples = self._samples(arguments)
        samples.describe()
        samples.look_ahead()
        model = self.config.model
        make_base(write_causal_lm, model.source, model.base, arguments)
        check_place(model.base)

    def _labelling(self, arguments: TrainingArguments) -> tuple[MakeDataset, InstructionEncoder]:
        encoder = build_encoder(self.config)
        return partial(_spoken, encoder=encoder), encoder

    def skeleton(self) -> Backbone[Any]:
        """The language model without its weights."""
        check_model_folder(self.config.model.base)
        return CausalLMBackbone(skeleton_of(self.config.model.base, revision=self.config.model.revision))

    def load(self) -> Backbone[Any]:
        """The language model."""
        return load_backbone(self.config.model, beams=self.config.evaluation.beams)

    def dora_config(self, backbone: Backbone[Any]) -> DoRAConfig:
        """The paper's five linears, unless the settings say otherwise.

        Raises:
            UserError: full training without saying of what.
        """
        adapter = self.config.adapter
        if adapter.method == "full" and adapter.targets is None:
            raise UserError(
                "adapter.method: full needs adapter.targets, the modules whose weights train, such as "
                '["model*", "lm_head"]'
            )
        return core_config(adapter, backbone.model, targets=PAPER_TARGETS)

    def data(self, backbone: Backbone[Any], arguments: TrainingArguments) -> TrainingData:
        """The training files' instructions, in the Trainer's random order unless the settings say otherwise."""
        data = self.config.data
        encoder = build_encoder(self.config)
        found = self._samples(arguments).training_data(
            partial(_spoken, encoder=encoder), collate=Collator(pad_token_id(encoder), pack=data.packing)
        )
        return dataclasses.replace(found, longest_tokens=data.max_tokens)  # words would not count the prompt's tokens

    def _assistant(self, backbone: Backbone[Any]) -> Assistant:
        return Assistant(backbone, InstructionPrompts(build_encoder(self.config)), while_training=True)

    def _places(self, backbone: Backbone[Any]) -> frozenset[int]:
        return frozenset()

    def _test_questions(self) -> list[Question]:
        return read_sets(self.config.evaluation)[0]

    def _media(
        self,
        backbone: Backbone[Any],
        arguments: TrainingArguments,
        questions: Sequence[Question],
        stored: StoredPictures | None,
    ) -> MediaReader:
        return no_media()

    def recipe(self) -> dict[str, Any]:
        """Base, prompt and lengths."""
        model, data = self.config.model, self.config.data
        return {
            **base_record(model, self.name, max_tokens=data.max_tokens, training=self.config.training),
            "backbone": CAUSAL_LM,
            "source": None if model.source is None else dataclasses.asdict(model.source),
            "prompt": data.prompt,
            "train_on": data.train_on,
        }

    def test(self, numbers: Mapping[str, Any]) -> dict[str, Any]:
        """Asks every set of `evaluation.files` with the saved adapter.

        The base is loaded again and the adapter folder put on it: what is tested is what was saved, whole, whatever
        ZeRO stage it was trained under.
        """
        config, run_folder = self.config, run_folder_of(self.config)
        backbone, _ = with_adapter(load_backbone(config.model, beams=config.evaluation.beams), run_folder / ADAPTER)
        return evaluate_commonsense(
            backbone, build_encoder(config), config.evaluation, run_folder=run_folder, numbers=numbers
        )


def load_backbone(model: LanguageModelConfig, *, beams: int) -> CausalLMBackbone:
    """The base, which will search its answers with so many beams."""
    return load_base(load_causal_lm, model, generation={"num_beams": beams})


def build_encoder(config: CommonsenseRunConfig) -> InstructionEncoder:
    """Tokens and labels for this base and prompt; what the model has no positions for is cut as by `max_tokens`."""
    most = max_positions(config_of(config.model.base, config.model.revision)) or config.data.max_tokens
    return InstructionEncoder(
        load_tokenizer(config.model.base, revision=config.model.revision),
        prompt=config.data.prompt,
        train_on=config.data.train_on,
        max_tokens=min(config.data.max_tokens, most),
    )


def _spoken(rows: Examples, stored: HeldPictures, *, encoder: InstructionEncoder) -> ConversationDataset:
    """Samples of text; a top-level function, so that worker processes can receive it."""
    return ConversationDataset(rows, encode=encoder.encode)
