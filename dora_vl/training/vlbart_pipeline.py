"""Tasks of a VL-BART, alone or mixed, as one pipeline that training can run; a task file says which there are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import SequentialSampler
from transformers import TrainingArguments
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dora_vl.adapters.adapter import CLOSED_ANSWERS
from dora_vl.adapters.files import RECIPE_FILE
from dora_vl.backbones.base import Backbone
from dora_vl.backbones.pieces import Seq2SeqEncoder
from dora_vl.backbones.shards import read_settings
from dora_vl.backbones.vision_store import FeatureReader, open_features
from dora_vl.backbones.vlbart import (
    ANSWER_HEADS,
    DORA_TARGETS,
    KEPT_ROWS,
    VlBartBackbone,
    also_trained,
    compose_vlbart,
    load_vlbart,
    set_answer_heads,
    vlbart_config,
    vlbart_encoder,
    vlbart_skeleton,
)
from dora_vl.backbones.vlbart_model import VlBartForConditionalGeneration
from dora_vl.core import DoRAConfig
from dora_vl.data.example import ExampleFile
from dora_vl.data.samples import CHECKED_SAMPLES, Labelled
from dora_vl.errors import SettingError
from dora_vl.evaluation.vlbart_tasks import Seq2SeqCollator, all_subtasks
from dora_vl.evaluation.vlbart_test import Tested, check_tests, evaluate_subtasks, open_test, watch_subtasks
from dora_vl.run.arguments import training_arguments
from dora_vl.run.base import VLBART, make_base
from dora_vl.run.folder import ADAPTER, Watch, checkpoint_of, run_folder_of
from dora_vl.run.launch import loading_in
from dora_vl.run.settings import AdapterConfig, FilesByTask, RunConfig
from dora_vl.training.parts import core_config
from dora_vl.training.pipeline import Pipeline
from dora_vl.training.seq2seq_tasks import (
    SETTING,
    MixtureDataset,
    Seq2SeqLoss,
    TaskSource,
    ValidationBatches,
    account,
    check_closed,
    check_media_names,
    check_names,
    check_same_features,
    lists_in,
    make_lists,
    with_run_settings,
)
from dora_vl.training.training_data import TrainingData

ONE_AT_A_TIME = ("per_device_train_batch_size", "per_device_eval_batch_size")
LISTS_FILE = "closed_answers.json"
"""This file of the run folder has the closed answer lists, and the training samples that have no answer on them."""


class VlBartPipeline(Pipeline):
    """Trains one task of a VL-BART, or a mixture of them."""

    kind = VLBART
    labels_shift = False

    def __init__(self, config: RunConfig) -> None:
        subtasks = all_subtasks(task_prompt=config.data.task_prompt)
        check_names(config, subtasks)
        check_closed(config.data.closed_answers, subtasks, config.data.files_by_task)
        check_same_features(config.data.features, config.evaluation.features)
        for field in ONE_AT_A_TIME:
            if config.training.get(field, 1) != 1:
                raise SettingError(f"training.{field}", " is not used here: set data.batch_size, samples of a step")
        super().__init__(config)
        self._subtasks = {task: with_run_settings(subtask, config) for task, subtask in subtasks.items()}
        self._lists_file = run_folder_of(self.config.training) / LISTS_FILE

    def arguments(self) -> TrainingArguments:
        """Says both batch sizes as 1: a loader's item is a whole micro-batch here."""
        training = {**self.config.training, **dict.fromkeys(ONE_AT_A_TIME, 1)}
        return training_arguments(dataclasses.replace(self.config, training=training))

    def prepare(self, arguments: TrainingArguments) -> None:
        """Reads the test's files, composes the base where it is not there yet, and tries what the test will need."""
        config, tests = self.config, self._test_files()
        files = self._files(config.data.files_by_task, limit=config.data.limit)
        for file in (*files.values(), *tests.values()):
            check_media_names(file)
        make_base(compose_vlbart, config.model.compose, config.model.base, arguments)
        if tests:
            tested = self._with_features(tests, self._test_features)
            check_tests(tested, self.encoder, max_bad_share=config.data.max_bad_share)
        if lists := config.data.closed_answers:
            checkpoint = checkpoint_of(config)
            folders = {"adapter.initial": config.adapter.initial, "resume": checkpoint and checkpoint / ADAPTER}
            recipes = {key: Path(folder) / RECIPE_FILE for key, folder in folders.items() if folder}
            heads = {key: recipe for key, recipe in recipes.items() if recipe.is_file()}
            make_lists(self._lists_file, lists, {task: files[task] for task in lists}, same_as=heads)

    def labelled(self, arguments: TrainingArguments) -> Iterator[Labelled]:
        """Yields the labels of each task's first samples; a sample that is answered from a closed list has none."""
        for sample, target, subtask in self._mixture(arguments).first(CHECKED_SAMPLES):
            labels, answer, tokenizer = sample.labels, self.encoder.answer(target.text), self.encoder.tokenizer
            cut = len(labels) >= subtask.target_tokens
            yield Labelled(id=sample.id, labels=labels, answers=[answer], tokenizer=tokenizer, cut=cut)

    def skeleton(self) -> VlBartBackbone:
        """Builds the VL-BART without its weights."""
        return self._with_heads(vlbart_skeleton(self.config.model.base))

    def load(self) -> VlBartBackbone:
        """Loads the VL-BART, with a head for each closed list of answers."""
        return self._with_heads(self._base())

    def _base(self) -> VlBartBackbone:
        model, dtype = self.config.model, getattr(torch, self.config.model.dtype)
        with loading_in(dtype):
            return load_vlbart(model.base, dtype=dtype, attn_implementation=model.attn_implementation)

    def _with_heads(self, backbone: VlBartBackbone) -> VlBartBackbone:
        lists = lists_in(self._lists_file) if self.config.data.closed_answers else {}
        set_answer_heads(backbone.model, lists, seed=int(self.config.training.get("seed", 42)))
        return backbone

    def dora_config(self, backbone: Backbone[Any]) -> DoRAConfig:
        """Adapts queries and values; trains the visual embedding, and BART's biases and norms as the settings say."""
        return vlbart_dora_config(self.config.adapter, backbone.model, heads=bool(self.config.data.closed_answers))

    def data(self, backbone: Backbone[Any], arguments: TrainingArguments) -> TrainingData:
        """Returns the mixture of all training files."""
        data, evaluation = self.config.data, self.config.evaluation
        train, validation = self._mixture(arguments), None
        longest = max(self._subtasks[name].input_tokens or 64 for name in data.files_by_task) + data.feature_tokens
        if data.validation_files:
            sources = self._sources(data.validation_files, limit=None)
            validation = ValidationBatches(sources, batch_size=evaluation.batch_size, ranks=arguments.world_size)
        return TrainingData(
            train=train,
            pools=lambda: [[batch] for batch in train.longest()],
            validation=validation,
            collate=Seq2SeqCollator(self.encoder.pad_token_id, (data.feature_tokens, self._width)),
            sampler=SequentialSampler(train),
            set_epoch=(train.set_epoch,),
            samples=sum(source.items for source in train.plan.sources),
            ids=lambda: chain.from_iterable(task.file.ids() for task in train.sources),
            read_in_a_pass=train.plan.items,
            source=", ".join(str(path) for file in data.files_by_task.values() for path in paths_of(file)),
            batch_tokens=-(-data.batch_size // train.plan.parts) * longest,
        )

    def _mixture(self, arguments: TrainingArguments) -> MixtureDataset:
        tasks = self._sources(self.config.data.files_by_task, limit=self.config.data.limit)
        return MixtureDataset.of(tasks, self.config.data, arguments)

    def loss(self, backbone: Backbone[Any]) -> Seq2SeqLoss:
        """Returns cross-entropy, as each task normalises it."""
        return Seq2SeqLoss(backbone)

    def watch(self, backbone: Backbone[Any], arguments: TrainingArguments) -> Watch | None:
        """Watches examples of the validation files, or else of the test's, of each task in turn."""
        data, evaluation = self.config.data, self.config.evaluation
        files = data.validation_files or evaluation.files
        read = {name: ExampleFile(paths_of(path)) for name, path in files.items()}
        return watch_subtasks(
            cast(VlBartBackbone, backbone),
            self.encoder,
            self._with_features(read, data.features if data.validation_files else self._test_features),
            count=self.config.watch,
            image_folder=evaluation.image_folder,
            source=str(data.held_out or evaluation.tested),
        )

    def reading(
        self, backbone: Backbone[Any], arguments: TrainingArguments
    ) -> tuple[PreTrainedTokenizerBase, frozenset[int]]:
        """Returns BART's tokenizer; pictures have no place among its tokens."""
        return self.encoder.tokenizer, frozenset()

    def recipe(self, arguments: TrainingArguments) -> dict[str, Any]:
        """Adds the tasks and their settings."""
        data = self.config.data
        return {
            **super().recipe(arguments),
            "tasks": list(data.files_by_task),
            "feature_tokens": data.feature_tokens,
            "features": {name: read_settings(Path(folder)) for name, folder in data.features.items()},
            "settings": self._named_settings(),
            **({CLOSED_ANSWERS: lists_in(self._lists_file)} if data.closed_answers else {}),
        }

    def _named_settings(self) -> dict[str, Any]:
        """Returns the settings by which a run may differ from the published ones, for `metrics.json`."""
        data, evaluation, optim = self.config.data, self.config.evaluation, self.config.optim
        return {
            "task_prompt": data.task_prompt,
            "subtitles_first": data.subtitles_first,
            "input_tokens": data.input_tokens,
            "choice_by_likelihood": evaluation.choice_by_likelihood,
            "mixing": data.mixing,
            "batch_size": data.batch_size,
            "weight_decay_on": optim.weight_decay_on,
        }

    def test(self, metrics: Mapping[str, Any]) -> None:
        """Answers every file of `evaluation.files` with the saved adapter on the base loaded again."""
        config, run_folder = self.config, run_folder_of(self.config.training)
        tests, lists = self._test_files(), lists_in(run_folder / ADAPTER / RECIPE_FILE)
        if set(lists) != set(config.data.closed_answers):
            trained, named = (", ".join(tasks) or "nothing" for tasks in (lists, config.data.closed_answers))
            raise SettingError(SETTING, f" names {named}; {run_folder / ADAPTER} answers {trained} from a closed list")
        backbone = self._base()
        set_answer_heads(backbone.model, lists)
        evaluate_subtasks(
            self.with_saved_adapter(backbone),
            self.encoder,
            self._with_features(tests, self._test_features),
            run_folder=run_folder,
            evaluation=config.evaluation,
            settings=self._named_settings() | ({CLOSED_ANSWERS: account(self._lists_file)} if lists else {}),
            metrics=metrics,
        )

    @cached_property
    def encoder(self) -> Seq2SeqEncoder:
        """Encodes prompts and labels, once the base is there."""
        return vlbart_encoder(self.config.model.base, subtitles_first=self.config.data.subtitles_first)

    @cached_property
    def _width(self) -> int:
        return vlbart_config(self.config.model.base).feature_width

    @property
    def _test_features(self) -> Mapping[str, str]:
        return {**self.config.data.features, **self.config.evaluation.features}

    def _with_features(self, files: Mapping[str, ExampleFile], folders: Mapping[str, str]) -> list[Tested]:
        shape = (self.config.data.feature_tokens, self._width)
        return [
            (self._subtasks[name], file, FeatureReader(open_features(Path(folders[name])), *shape))
            for name, file in files.items()
        ]

    def _test_files(self) -> dict[str, ExampleFile]:
        evaluation = self.config.evaluation
        return {
            name: open_test(self._subtasks[name], Path(path), limit=evaluation.limit)
            for name, path in evaluation.files.items()
        }

    def _files(self, files: FilesByTask, *, limit: int | None) -> dict[str, ExampleFile]:
        return {
            name: ExampleFile(paths_of(file), each_answer=self._subtasks[name].each_answer, limit=limit)
            for name, file in files.items()
        }

    def _sources(self, files: FilesByTask, *, limit: int | None) -> list[TaskSource]:
        tasks = self._with_features(self._files(files, limit=limit), self.config.data.features)
        return [TaskSource(subtask, file, reader, self.encoder) for subtask, file, reader in tasks]


def paths_of(files: str | Sequence[str]) -> tuple[Path, ...]:
    """Returns a task's records file or files."""
    return (Path(files),) if isinstance(files, str) else tuple(Path(file) for file in files)


def vlbart_dora_config(adapter: AdapterConfig, model: VlBartForConditionalGeneration, *, heads: bool) -> DoRAConfig:
    """Returns what a run adapts and trains in a VL-BART, `heads` of closed answer lists included."""
    if adapter.method == "full":
        return core_config(adapter, model, targets=("*",))
    trained = also_trained(model.settings, biases=adapter.train_biases, norm_weights=adapter.train_norm_weights)
    if not adapter.train_projector:
        del trained["projector"]
    if heads:
        trained["answer_head"] = ANSWER_HEADS
    return core_config(adapter, model, targets=DORA_TARGETS, also_train=trained, also_keep=KEPT_ROWS)
