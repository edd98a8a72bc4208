"""The settings of one run on instructions with a plain language model; the text under each field is `--help`'s."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from dora_vl.backbones.specs import LanguageSource, PromptName, TrainOn
from dora_vl.run.recipe import AdapterConfig, LoadedModelConfig, OptimConfig, ResumableRun, SamplesConfig
from dora_vl.scores.commonsense import Rule


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig(LoadedModelConfig):
    """Which language model is adapted."""

    base: str
    """Folder or Hugging Face id of a causal language model. With `source`, the folder it is written to."""
    source: LanguageSource | None = None
    """Writes `base` from this model, such as a GGUF file, if the folder is not there yet."""


@dataclass(frozen=True, kw_only=True)
class LanguageAdapterConfig(AdapterConfig):
    """What trains, and how. Without `targets`: q, k, v, up and down, the paper's five, as LLaMA names them."""


@dataclass(frozen=True, kw_only=True)
class InstructionDataConfig(SamplesConfig):
    """One question and its output each: LLM-Adapters' form (instruction, input, output, answer), or any other."""

    prompt: PromptName = "nvlabs"
    """What stands around an instruction: `nvlabs` and `llm_adapters` are the published runs' to the last space (they
    differ in the first line of the training prompt), `alpaca` is Stanford's own, the same in training and test."""
    train_on: TrainOn = "all"
    """all: prompt and output are trained on, as in the published runs; answer: the output alone."""
    max_tokens: int = 256
    """Longest sample, prompt and output together; what lies beyond is cut and reported."""
    packing: bool = False
    """Samples of a micro-batch stand behind each other in rows as long as the longest; each sees itself alone and
    counts its positions from 0, so the loss is the same, with hardly any padding."""
    workers: int = 2
    """Processes that read and prepare samples on each rank; 0 does it in the training process."""
    group_by_modality_length: bool = False
    """Batches hold samples of like length, instead of any in a random order."""


@dataclass(frozen=True, kw_only=True)
class CommonsenseEvaluationConfig:
    """The test after training."""

    files: Mapping[str, str] = field(default_factory=dict)
    """Test file of each set, by LLM-Adapters' name for it: boolq, piqa, social_i_qa, hellaswag, winogrande, ARC-Easy,
    ARC-Challenge, openbookqa (its name says what an answer looks like); empty: no test."""
    scoring: tuple[Literal["generation", "likelihood"], ...] = ("generation",)
    """generation: the answer is looked for in generated text, as the published scripts do; likelihood: the most
    likely of the outputs that the question's last line (`Answer format: a/b/...`) admits."""
    rule: Rule = "nvlabs"
    """Which published script's part of the generated text is searched; they differ after a second `### Response:`."""
    batch_size: int = 32
    """Questions answered at once."""
    max_new_tokens: int = 32
    """Longest answer."""
    beams: int = 1
    """Beams of the search; the published scripts use 4, and no sampling."""
    limit: int | None = None
    """Asks only the first so many questions of each set."""

    @property
    def file(self) -> str | None:
        """The test files, for messages; None: no test."""
        return ", ".join(self.files.values()) or None


@dataclass(frozen=True, kw_only=True)
class CommonsenseRunConfig(ResumableRun):
    """One run: what its YAML file holds."""

    model: LanguageModelConfig
    adapter: LanguageAdapterConfig = field(default_factory=LanguageAdapterConfig)
    data: InstructionDataConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: CommonsenseEvaluationConfig = field(default_factory=CommonsenseEvaluationConfig)
