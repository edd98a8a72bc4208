"""Instructions for a plain language model, as a task that training can run: the paper's commonsense reasoning."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import TrainingArguments

from dora_vl.adapters.folder import load_adapter
from dora_vl.adapters.provenance import content_hash, local_folder, versions
from dora_vl.backbones.base import Backbone, max_positions
from dora_vl.backbones.causal_lm import PAPER_TARGETS, CausalLMBackbone, load_causal_lm, write_causal_lm
from dora_vl.backbones.image_text import skeleton_of
from dora_vl.backbones.instruction_prompt import InstructionEncoder
from dora_vl.backbones.language_source import load_tokenizer
from dora_vl.core import DoRAConfig
from dora_vl.data.collate import Collator
from dora_vl.data.instructions import InstructionDataset, load_instructions
from dora_vl.errors import UserError
from dora_vl.evaluation.commonsense_run import evaluate_commonsense, read_sets
from dora_vl.model_files import check_model_folder
from dora_vl.run.adapting import CAUSAL_LM, check_quantisation, core_config, load_base, make_base
from dora_vl.run.commonsense_recipe import CommonsenseRunConfig, InstructionDataConfig, LanguageModelConfig
from dora_vl.run.run_folder import ADAPTER, run_folder_of
from dora_vl.training.memory_estimate import Activations, decoder_activations
from dora_vl.training.task import GenerationTask, Task, TrainingData

REFERENCE_SPLIT_SEED = 42  # of LLM-Adapters' and NVlabs' `train_test_split`


class CommonsenseTask(Task):
    """Questions with one short answer each, in LLM-Adapters' form."""

    def __init__(self, config: CommonsenseRunConfig) -> None:
        self._config = config

    @property
    def name(self) -> str:
        """As `recipe.json` says it."""
        return "commonsense"

    @property
    def config(self) -> CommonsenseRunConfig:
        """The run's settings."""
        return self._config

    def prepare(self, arguments: TrainingArguments) -> None:
        """Writes the base from its source where it is not there yet.

        The test sets are read first: what is wrong with them shows now, not after hours of training.
        """
        check_quantisation(self.config.model)
        if self.config.evaluation.files:
            read_sets(self.config.evaluation)
        model = self.config.model
        make_base(write_causal_lm, model.source, model.base, arguments)

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
        """The training files' instructions, in the Trainer's random order."""
        data = self.config.data
        encoder = build_encoder(self.config, backbone)
        rows, held_out = read_rows(data)
        return TrainingData(
            train=InstructionDataset(rows, encode=encoder.encode),
            validation=None if held_out is None else InstructionDataset(held_out, encode=encoder.encode),
            collate=Collator(pad_token_id(encoder), pack=data.packing),
            samples=len(rows),
            source=", ".join(data.train),
            longest_tokens=data.max_tokens,
        )

    def loss(self, backbone: Backbone[Any]) -> GenerationTask:
        """Next-token loss."""
        return GenerationTask(backbone, step_tokens=self.config.optim.loss_normalisation == "step_tokens")

    def activations(self, backbone: Backbone[Any], arguments: TrainingArguments, *, longest_tokens: int) -> Activations:
        """The language model's."""
        return decoder_activations(backbone.model, arguments, longest_tokens=longest_tokens)

    def recipe(self) -> dict[str, Any]:
        """Base, prompt and lengths."""
        model, data = self.config.model, self.config.data
        return {
            "task": self.name,
            "backbone": CAUSAL_LM,
            "base": model.base,
            "revision": model.revision,
            "base_sha256": content_hash(local_folder(model.base, model.revision)),
            "source": None if model.source is None else dataclasses.asdict(model.source),
            "prompt": data.prompt,
            "train_on": data.train_on,
            "dtype": model.dtype,
            "quantisation": model.quantisation,
            "max_tokens": data.max_tokens,
            "training": dict(self.config.training),
            "versions": versions(),
        }

    def test(self, numbers: Mapping[str, Any]) -> dict[str, Any]:
        """Asks every set of `evaluation.files` with the saved adapter.

        The base is loaded again and the adapter folder put on it: what is tested is what was saved, whole, whatever
        ZeRO stage it was trained under.
        """
        config, run_folder = self.config, run_folder_of(self.config)
        backbone = load_backbone(config.model, beams=config.evaluation.beams)
        load_adapter(backbone.model, run_folder / ADAPTER)
        backbone.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return evaluate_commonsense(
            backbone, build_encoder(config, backbone), config.evaluation, run_folder=run_folder, numbers=numbers
        )


def load_backbone(model: LanguageModelConfig, *, beams: int) -> CausalLMBackbone:
    """The base, which will search its answers with so many beams."""
    return load_base(load_causal_lm, model, generation={"num_beams": beams})


def build_encoder(config: CommonsenseRunConfig, backbone: Backbone[Any]) -> InstructionEncoder:
    """Tokens and labels for this base and prompt; what the model has no positions for is cut as by `max_tokens`."""
    most = max_positions(backbone.model.config) or config.data.max_tokens
    return InstructionEncoder(
        load_tokenizer(config.model.base, revision=config.model.revision),
        prompt=config.data.prompt,
        train_on=config.data.train_on,
        max_tokens=min(config.data.max_tokens, most),
    )


def pad_token_id(encoder: InstructionEncoder) -> int:
    """What fills short rows; masked, so any id does where the tokenizer names none."""
    tokenizer: Any = encoder.tokenizer
    return int(tokenizer.pad_token_id or 0)


def read_rows(data: InstructionDataConfig) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Rows to train on and rows to measure the loss on, memory-mapped.

    Raises:
        UserError: no training file; two ways of validation; or fewer samples than `validation_size` leaves any of.
    """
    if not data.train:
        raise UserError("data.train names no file")
    if data.validation_file is not None and data.validation_size:
        raise UserError("set data.validation_file or data.validation_size, not both")
    rows = datasets.concatenate_datasets([load_instructions(Path(file)) for file in data.train])
    held_out = None if data.validation_file is None else load_instructions(Path(data.validation_file))
    if data.validation_size:
        if data.validation_size >= len(rows):
            raise UserError(f"data.validation_size {data.validation_size} leaves none of {len(rows)} samples")
        parts = rows.train_test_split(test_size=data.validation_size, shuffle=True, seed=REFERENCE_SPLIT_SEED)
        rows, held_out = parts["train"], parts["test"]
    return (rows if data.limit is None else rows.select(range(min(data.limit, len(rows))))), held_out
