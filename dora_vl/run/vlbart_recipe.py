"""The settings of one VL-BART run; the text under each field is what `--help` prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dora_vl.backbones.specs import VlBartSpec
from dora_vl.data.mixture import Mixing
from dora_vl.run.recipe import AdapterConfig, OptimConfig, ResumableRun, SampleBound


@dataclass(frozen=True, kw_only=True)
class VlBartModelConfig:
    """Which model is adapted."""

    base: str
    """Folder of a VL-BART. With `compose`, the folder it is written to."""
    compose: VlBartSpec | None = None
    """Makes `base` from a BART and a fresh visual embedding, if the folder is not there yet."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number type of the frozen weights; the published runs are float32."""
    attn_implementation: Literal["sdpa", "eager"] | None = None
    """Attention kernel; null: transformers' choice."""

    @property
    def may_be_quantised(self) -> bool:
        """No: there is no such setting."""
        return False


@dataclass(frozen=True, kw_only=True)
class VlBartAdapterConfig(AdapterConfig):
    """What trains, and how. Without `targets`: queries and values of all attentions (36 linears of bart-base).

    `train_projector` is the visual embedding here. With method full and no `targets` everything trains.
    """

    train_biases: bool = True
    """Trains all biases of BART as well, as the published LoRA and DoRA runs do."""
    train_norm_weights: bool = False
    """Trains the weights of BART's layer norms as well, as the published image DoRA run does."""


@dataclass(frozen=True, kw_only=True)
class VlBartDataConfig:
    """Training and validation data: records files by task."""

    train: Mapping[str, str | tuple[str, ...]]
    """Records file of each task to train on, or several files; one task, or several mixed."""
    validation_files: Mapping[str, str] = field(default_factory=dict)
    """Records file of each task whose loss is measured while training."""
    features: Mapping[str, str]
    """Folder of each task's picture or video features, by file name without its ending: what `python -m
    data_prep.features` writes, VL-Adapter's Parquet or HDF5, or VALUE's .npz."""
    feature_tokens: int = 49
    """Tokens of a picture (49 for a 7x7 grid), or frames of a video: fewer are followed by zeros, more are max-pooled
    (64 in the published runs)."""
    batch_size: int = 300
    """Samples of an optimizer step, over all ranks and accumulated micro-batches; a task may take a multiple of it
    (GQA 100/60, NLVR2 20/60, captions 50/60)."""
    mixing: Mixing = "proportional"
    """proportional: each task's samples once an epoch; balanced: the same number of steps for every task."""
    input_tokens: int | None = None
    """Longest text of an input; null: each task's published length."""
    task_prompt: bool = True
    """Says which task it is in the text (`vqa: `); the published full fine-tuning runs do not."""
    subtitles_first: bool = True
    """Takes what does not fit from the subtitles; false cuts the end of the text, question and choices with it, as
    the published video runs do."""
    closed_answers: Mapping[str, int | str] = field(default_factory=dict)
    """Answers a task from a list, by a head that trains with the adapter (part `answer_head`), instead of in words; of
    vqav2, gqa, short_answer. By task: N, its N most frequent training answers; or FILE: one answer a line, a JSON list,
    or the recipe.json of an adapter that has one."""
    max_bad_share: float = 0.001
    """Largest share of unusable samples (missing features, no answer...) that is skipped; above it the run stops. A
    test that has more of them does not begin."""
    workers: int = 4
    """Processes that read and prepare samples on each rank; 0 does it in the training process."""
    limit: int | None = None
    """Uses only the first so many training items of each task."""

    @property
    def held_out(self) -> str | None:
        """The validation files, for messages; None: none."""
        return ", ".join(self.validation_files.values()) or None

    @property
    def step_samples(self) -> int:
        """Samples of a step."""
        return self.batch_size

    @property
    def sample_bounds(self) -> Mapping[SampleBound, int | None]:
        """Nothing to lower: features and published lengths bound a sample."""
        return {}


@dataclass(frozen=True, kw_only=True)
class VlBartEvaluationConfig:
    """The test after training."""

    files: Mapping[str, str] = field(default_factory=dict)
    """Records file of each task to test on; empty: no test."""
    features: Mapping[str, str] = field(default_factory=dict)
    """Folder of the test's features, for tasks where it is another than data.features names."""
    image_folder: str | None = None
    """Root of the test's pictures; with it a contact sheet is drawn."""
    choice_by_likelihood: bool = True
    """Multiple choice takes the likeliest label; false generates one, as the published runs do."""
    batch_size: int = 64
    """Inputs answered at once."""
    limit: int | None = None
    """Asks only the first so many of each task."""
    exchange_pictures: bool = True
    """Asks at most 200 of each again about other pictures: a score that stays as it was is not of the pictures."""

    @property
    def file(self) -> str | None:
        """The test files, for messages; None: no test."""
        return ", ".join(self.files.values()) or None


@dataclass(frozen=True, kw_only=True)
class VlBartRunConfig(ResumableRun):
    """One run: what its YAML file holds."""

    model: VlBartModelConfig
    adapter: VlBartAdapterConfig = field(default_factory=VlBartAdapterConfig)
    data: VlBartDataConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    training: Mapping[str, Any] = field(default_factory=dict)
    """Any field of transformers.TrainingArguments, such as --training.max_steps 20; `deepspeed` takes a JSON
    file, or zero0, zero2, zero3, zero3_offload, the shipped ones. Batches are data.batch_size."""
    evaluation: VlBartEvaluationConfig = field(default_factory=VlBartEvaluationConfig)
