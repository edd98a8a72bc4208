"""The settings of one run: a frozen dataclass for each section of its YAML file, and what each task takes of them.

Read by `dora_vl.run.settings_parser`; the text under each field is what `--help` prints.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from dora_vl.backbones.specs import ComposeSpec, LanguageSource, PromptName, Template, TrainOn, VlBartSpec
from dora_vl.core.config import AdapterSettings, Quantisation
from dora_vl.data.columns import Columns, Mixing, Packing, TrainFile, train_name
from dora_vl.files import Kernel
from dora_vl.heads.objectives import OBJECTIVES, Kind, Objective

Decayed = Literal["matrices", "all_but_biases"]
"""Names what weight decay acts on."""
if TYPE_CHECKING:
    LossName = str
else:
    LossName = Literal[tuple(OBJECTIVES)]
Task = Literal["llava", "image_text", "commonsense", "vlbart"]
Files = str | tuple[str | TrainFile, ...]
"""This is the type of `data.train`, except in a VL-BART's run."""
FilesByTask = Mapping[str, str | tuple[str, ...]]
"""This is the type of `data.train` in a VL-BART's run."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model that is adapted, and how it is given text and pictures."""

    base: str
    """Folder or Hugging Face id of the model. With `compose` or `source`, the folder that the model is written to."""
    revision: str | None = None
    """Git revision of a Hugging Face id (a commit pins the run)."""
    compose: ComposeSpec | VlBartSpec | None = None
    """Builds `base`, if the folder is not there yet: a LLaVA from a vision tower, a new projector and a language model,
    or a VL-BART from a BART and a fresh visual embedding."""
    source: LanguageSource | None = None
    """Writes `base` from this model, such as a GGUF file, if the folder is not there yet."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Number type of the frozen weights. What trains is float32 anyway (unless adapter.method is full)."""
    quantisation: Quantisation | None = None
    """Holds the linear layers of the language model quantised while the adapter trains (QDoRA): `nf4` (4 bits, as
    QLoRA) or `int8`, by bitsandbytes. The rest of the model is not quantised."""
    attn_implementation: Kernel | Mapping[str, Kernel] | None = None
    """Attention kernel, or one for each part by its config's name ({"": eager, vision_config: sdpa}); flash_attention_2
    needs CUDA and the flash-attn package; null: transformers' choice for each part, sdpa where it can be. The adapter's
    recipe.json says which, and the model is opened so again."""
    template: Template | PromptName | None = None
    """A LLaVA's prompt format by its name; `plain` is image then caption (stage 1); `tokenizer` is the language model's
    own; null: the first of vicuna_v1, chatml and tokenizer whose special tokens its tokenizer has. Other models have
    their processor's chat template, or where it has none `question_answer` or `paligemma`. commonsense: `nvlabs` and
    `llm_adapters` reproduce the published runs' prompts to the last space (they differ in the first line of the
    training prompt), `alpaca` is Stanford's own, the same in training and test; `cloze` puts nothing around an
    instruction: question, a space, output (rows of `dora-vl prepare cloze`)."""
    image_aspect: Literal["pad", "square", "squash"] = "pad"
    """How a picture becomes a square: `pad` fills it up (LLaVA-1.5), `square` keeps its middle, `squash` resizes both
    sides."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(AdapterSettings):
    """What is trained, and how."""

    targets: tuple[str, ...] | None = None
    """Full-name patterns of the adapted modules, each must hit, or presets: language (the decoder's linears), vision,
    projector, experts (those that are one tensor), all-linear (experts too, without the output head); null: the model's
    own default, for most language; the paper's q, k, v, up and down for commonsense; queries and values for vlbart."""
    train_projector: bool = True
    """Trains the projector between vision and language (a VL-BART's visual embedding) whole, as the part `projector`,
    unless `parts` or `also_train` has one of that name, or a full run's targets hold it. It trains in float32, or
    with a full run's other weights in theirs."""
    train_biases: bool = True
    """Trains all biases of BART as well, as the published LoRA and DoRA runs do."""
    train_norm_weights: bool = False
    """Trains the weights of BART's layer norms as well, as the published image DoRA run does."""
    projector_start: Literal["random", "scaled", "answers"] | None = None
    """Where the new projector of a composed LLaVA begins. answers: at a linear map from the tower's stored outputs to
    the words of the training answers, fitted in seconds; scaled: at a random map with their mean and spread; random: as
    it was composed. null: answers where it trains for the first time and data.cache_features is on, else as the base
    has it."""
    initial: str | None = None
    """Adapter folder to start from, such as stage 1's projector; its weights are loaded before training."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training and validation data, in any format that docs/data.md lists under "Your own data"."""

    train: Files | FilesByTask
    """The training samples: a file, a folder of shards, or hub:OWNER/NAME; or a list of them or of {path, weight}. In a
    VL-BART's run {task: records file, or a list of files} for each task, which are mixed."""
    validation: str | None = None
    """The samples whose loss is measured while training, a file as in `train`."""
    validation_share: float = 0.0
    """Holds this share of the training samples out for validation instead, chosen by training.seed; samples of one
    picture stay on one side."""
    validation_size: int = 0
    """Holds this many training samples out instead, drawn as the published runs of language models do (seed 42)."""
    validation_files: Mapping[str, str] = field(default_factory=dict)
    """Records file of each task whose loss is measured while training."""
    train_on: TrainOn = "all"
    """all: prompt and output are trained on, as in the published runs; answer: only the output."""
    max_tokens: int = 2048
    """Longest sequence, image tokens included; the tail of the text beyond it is cut and reported."""
    max_bad_share: float = 0.001
    """Largest share of unusable samples (missing picture, empty answer...) that is skipped; above it the run stops, and
    a VL-BART's test does not begin."""
    workers: int = 4
    """Processes that read and prepare samples on each rank; 0 does it in the training process."""
    packing: Packing = "trees"
    """How a micro-batch's samples are laid out in its sequences. trees: one after another, with samples of the same
    pictures as branches after them, so that nothing is padded and each picture is encoded once; packed: side by side;
    plain: one padded sequence each. The loss is the same. A base that does not fit sequences of several samples takes
    plain ones, and the log says why."""
    group_by_modality_length: bool = True
    """Batches hold what fits together: samples of like length, and either all with pictures or all without; with
    `packing: trees` up to four samples of each picture, and equally many tokens in every batch."""
    streaming: bool = False
    """Reads training samples as they come, never a whole file first: for files larger than the disk's free space, and
    hub sets too large to fetch. Needs group_by_modality_length: false, and training.max_steps where a file does not
    say how many rows it has (all but Parquet and Arrow)."""
    shuffle_buffer: int = 2048
    """Streamed samples among which the next one is drawn; fewer where they hold more than 256 MiB; 1: as they come."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Says what columns of other names are, in the data and in the test: {photo_file: image, caption: question}.
    A role (image, video, question, answer, choices, hint, system, ...) or a name that docs/data.md lists for one."""
    ignore: tuple[str, ...] = ()
    """Columns, and keys inside them (messages.weight, meta.image), that are left out although they could change what is
    learned, which would end the run."""
    ask: str = ""
    """Question for every row without one, such as pictures with a class or a caption; for example: What is it?"""
    limit: int | None = None
    """Trains on the first N samples only (of several files or tasks, the first N of each)."""
    validation_limit: int | None = None
    """Validates on the first N samples only."""
    image_folder: str = "."
    """Root that the pictures' paths in the files are relative to."""
    video_folder: str | None = None
    """Root of the videos' paths; null: image_folder."""
    follow_links: bool = False
    """Reads pictures and videos that are links out of their folder, as DVC and git-annex lay them."""
    as_published: bool = False
    """Reads pictures as LLaVA's own code: not turned by EXIF, no white under transparency, 16-bit grey clipped."""
    video_frames: int = 8
    """Frames taken of each video, evenly spread over it; with video_fps the most that are taken."""
    video_fps: float | None = None
    """Frames taken of each second instead, up to video_frames in all; for bases that take videos of any length."""
    cache_features: bool = False
    """Computes what frozen vision parts give for a sample's pictures once and reads it from disk afterwards."""
    feature_cache: str | None = None
    """Folder of the outputs that cache_features stores; null: `<training.output_dir>/features`."""
    max_pixels_per_step: int | None = None
    """Most pixels of the pictures and frames of a micro-batch on one rank; a sample's share is that over
    training.per_device_train_batch_size, and pictures above it are shrunk. For models that make more tokens of a larger
    picture (Qwen2-VL, LLaVA-NeXT, ...); null: only the model's own limits."""
    features: Mapping[str, str] = field(default_factory=dict)
    """Folder of each task's picture or video features, by file name without its ending: what `python -m
    data_prep.features` of a checkout writes, VL-Adapter's Parquet or HDF5, or VALUE's .npz."""
    feature_tokens: int = 49
    """Tokens of a picture (49 for a 7x7 grid), or frames of a video: fewer are followed by zeros, more are max-pooled
    (64 in the published runs)."""
    batch_size: int = 300
    """Samples of an optimizer step, over all ranks and accumulated micro-batches; a task may take a multiple of it
    (GQA 100/60, NLVR2 20/60, captions 50/60)."""
    mixing: Mixing = "proportional"
    """proportional: each task's samples once per epoch; balanced: the same number of steps for every task."""
    input_tokens: int | None = None
    """Longest text of an input; null: each task's published length."""
    task_prompt: bool = True
    """Says which task it is in the text (`vqa: `); the published full fine-tuning runs do not."""
    subtitles_first: bool = True
    """Cuts the subtitles where an input is too long; false cuts the end of the text, question and choices with it, as
    the published video runs do."""
    replay: float = 0.0
    """Share of the samples, or of the labelled tokens where that is more, that are short chats written by the base
    itself (`dora-vl replay`), so that it keeps what it knows; each epoch draws anew. Their loss is the KL divergence
    from the model that training began with. 0: none."""
    closed_answers: Mapping[str, int | str] = field(default_factory=dict)
    """Answers a task from a list, by a head that trains with the adapter (part `answer_head`), instead of in words; of
    vqav2, gqa, short_answer. By task: N, its N most frequent training answers; or FILE: one answer per line, a JSON
    list, or the recipe.json of an adapter that has one."""

    @property
    def files(self) -> Files:
        """Returns `train` of a run on conversations."""
        assert not isinstance(self.train, Mapping), "the reader of settings has checked it by the task"
        return self.train

    @property
    def files_by_task(self) -> FilesByTask:
        """Returns `train` of a VL-BART's run."""
        assert isinstance(self.train, Mapping), "the reader of settings has checked it by the task"
        return self.train

    @property
    def held_out(self) -> str | None:
        """Names what the loss is measured on while training, for messages; None: nothing."""
        part = self.validation_size or self.validation_share
        files = self.validation or ", ".join(self.validation_files.values())
        return files or (f"{part:g} of {train_name(self.files)}" if part else None)

    @property
    def column_settings(self) -> Columns:
        """Returns what the files' columns are."""
        return Columns(self.columns, tuple(self.ignore), self.ask)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is learned: the answers, a preference between answers, or rewards for the model's own answers."""

    loss: LossName | Mapping[LossName, float] = "sft"
    """sft learns answers word by word. Rejected answers beside chosen ones take dpo, ipo, kto, bco, apo_zero; or
    simpo, cpo and orpo, which need no reference. Answers that a flag calls good or bad take kto, bco and apo_zero. A
    mapping is a weighted sum, such as {dpo: 0.8, bco: 0.2, sft: 1}; anchor in one keeps chosen answers likely. grpo,
    dr_grpo, dapo and rloo draw answers to the data's questions, and learn from the rewards that these get.
    adapter.dropout is 0 unless it is set, except with sft."""
    beta: float = 0.1
    """How close the model stays to the one that training began with; ipo takes some 0.01, simpo 2 to 10."""
    margin: float = 0.5
    """simpo: the margin by which the chosen answer must be better."""
    exchange_pictures: bool = False
    """Takes the chosen answer about another picture of the data for a further rejected answer, so that the model looks;
    with the losses {dpo: 1, anchor: 1} that is mDPO. cpo and orpo do not take it."""
    rewards: Mapping[str, float] = field(default_factory=lambda: {"exact": 1.0})
    """grpo, dr_grpo, dapo and rloo weigh the rewards so. exact, anls, relaxed and vqa compare with the data's
    answer, choice looks for its letter or text, box takes the overlap of boxes, cider compares with all captions of the
    picture, format with a pattern; FILE.py:FUNCTION or MODULE:FUNCTION is your own, called with a
    dora_vl.data.example.Example and an answer, or once a step with two lists if its first parameter is `examples`.
    evaluation.answer_after counts here too."""
    reward_threads: int = 1
    """Answers that a function of your own rewards at once, if it waits, such as for a judge; `async def` needs none."""
    reward_errors: Literal["stop", "skip"] = "stop"
    """An exception in a function of your own names its line and the sample. stop: the run then keeps the step before
    and ends; skip: the function does not apply to that answer, as if it had returned None."""
    format: str | None = None
    """Regular expression that fits all of an answer, for the reward `format`, such as <think>.*</think>.*"""
    group: int = 8
    """Answers that grpo, dr_grpo, dapo and rloo draw to each question."""
    max_new_tokens: int = 64
    """The most tokens that a drawn answer has."""
    vllm: str | None = None
    """Where a vLLM server with dora-vl's plugin draws the answers, such as http://localhost:8000, from the adapter that
    it gets before each step; docs/preferences.md says how it is started. null: the model draws them itself."""
    vllm_timeout: float = 600.0
    """Seconds that a vLLM server may be silent; answers come when they are complete, not word by word."""
    kl: float = 0.0
    """Weight of the penalty for moving away from the untrained model (KL divergence); 0 saves its pass."""

    @property
    def weights(self) -> Mapping[LossName, float]:
        """Returns the weight of each loss."""
        return {self.loss: 1.0} if isinstance(self.loss, str) else self.loss

    @property
    def losses(self) -> tuple[Objective, ...]:
        """Returns what is known of each loss."""
        return tuple(OBJECTIVES[name] for name in self.weights)

    @property
    def kind(self) -> Kind:
        """Returns what the run learns from; a sum that holds sft compares answers."""
        return OBJECTIVES[self.loss].kind if isinstance(self.loss, str) else "preference"

    @property
    def has_reference(self) -> bool:
        """Tells whether a loss compares with the model as it was when training began."""
        return self.kl > 0 if self.kind == "reward" else any(loss.needs_reference for loss in self.losses)

    @property
    def without_effect(self) -> tuple[str, str] | None:
        """Returns the first setting that is not at its default and does nothing here, and what it goes with."""
        for name, (is_used, owner) in GOES_WITH.items():
            if not is_used(self) and getattr(self, name) != getattr(ObjectiveConfig(), name):
                return name, owner
        return None


def _losses(has_effect: Callable[[Objective], bool]) -> tuple[Callable[[ObjectiveConfig], bool], str]:
    names = ", ".join(name for name, loss in OBJECTIVES.items() if has_effect(loss))
    return (lambda objective: any(map(has_effect, objective.losses))), f"objective.loss {names}"


def _has_own_reward(objective: ObjectiveConfig) -> bool:
    return objective.kind == "reward" and any(":" in name for name in objective.rewards)


GOES_WITH: Mapping[str, tuple[Callable[[ObjectiveConfig], bool], str]] = {
    "beta": _losses(lambda loss: "beta" in loss.settings),
    "margin": _losses(lambda loss: "margin" in loss.settings),
    "exchange_pictures": _losses(lambda loss: loss.exchanged != "nothing"),
    **dict.fromkeys(("rewards", "group", "max_new_tokens", "vllm", "kl"), _losses(lambda loss: loss.kind == "reward")),
    "format": (lambda objective: objective.kind == "reward" and "format" in objective.rewards, "the reward format"),
    **dict.fromkeys(
        ("reward_threads", "reward_errors"), (_has_own_reward, "a function of your own in objective.rewards")
    ),
    "vllm_timeout": (lambda objective: bool(objective.kind == "reward" and objective.vllm), "objective.vllm"),
}
"""Maps settings of the objective to where they have an effect, and to the words for it."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Learning rates by part; `training.learning_rate` is the default."""

    rates: Mapping[str, float] = field(default_factory=dict)
    """Peak learning rate by part: a name of adapter.parts or adapter.also_train, dora (adapter.targets), projector;
    magnitude, A, B: those of every part; vision.magnitude: that of one. The most specific name wins."""
    projector_learning_rate: float | None = None
    """Peak learning rate of the projector; null: training.learning_rate."""
    magnitude_learning_rate: float | None = None
    """Peak learning rate of DoRA's magnitudes; null: training.learning_rate."""
    b_learning_rate_ratio: float = 1.0
    """B's learning rate as a multiple of its part's (LoRA+; 16 is its paper's choice)."""
    loss_normalisation: Literal["micro_batch", "step_tokens"] = "micro_batch"
    """micro_batch: mean over a micro-batch's labelled tokens, then over accumulation and ranks (as LLaVA);
    step_tokens: one mean over all labelled tokens of the step."""
    weight_decay_on: Decayed = "matrices"
    """What training.weight_decay shrinks. matrices: vectors (magnitudes, norms, biases) never; all_but_biases:
    magnitudes and norm weights too, as the published VL-BART runs."""
    not_finite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is not a number is left out, named and written to faults.jsonl. stop: the run then
    saves a checkpoint and ends; skip: it goes on, unless ten steps in a row are such."""
    early_stopping: int | None = None
    """Ends training after this many validations in a row without a new lowest loss; the adapter is then that of the
    lowest (training.load_best_model_at_end: false keeps the last), so checkpoints are written with each validation."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The test after training."""

    file: str | None = None
    """Questions with answers, in any format that training reads; null: no test."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Test file of each set or task. commonsense: by LLM-Adapters' names, which say what an answer looks like (boolq,
    piqa, social_i_qa, hellaswag, winogrande, ARC-Easy, ARC-Challenge, openbookqa). vlbart: records by task. Empty: no
    test."""
    features: Mapping[str, str] = field(default_factory=dict)
    """Folder of the test's features, for tasks where it is another than data.features names."""
    image_folder: str | None = None
    """Root of the test's pictures; null: data.image_folder, and no contact sheet of a VL-BART's test."""
    answer_after: str | None = None
    """Text before the answer that is scored, in answers that reason first: ", so " in "blue circle, so no"."""
    scoring: tuple[Literal["generation", "likelihood", "cloze"], ...] = ("generation",)
    """generation: the answer is looked for in generated text, as the published scripts do; likelihood: the most
    likely of the outputs that the question's last line (`Answer format: a/b/...`) admits; cloze: the likeliest ending,
    as lm-eval scores, of records that `dora-vl prepare cloze` made."""
    rule: Literal["nvlabs", "llm_adapters"] = "nvlabs"
    """Published script whose part of the generated text is searched; they differ after a second `### Response:`."""
    choice_by_likelihood: bool = True
    """Multiple choice takes the likeliest label; false generates one, as the published runs do."""
    batch_size: int = 32
    """Questions answered at once; of a VL-BART also in a validation."""
    max_new_tokens: int = 16
    """Tokens that an answer has at most."""
    beams: int = 1
    """Beams of the search; the published scripts use 4, and no sampling."""
    limit: int | None = None
    """Asks the first N questions only (of several files, the first N of each)."""
    strength: float = 1.0
    """How much of the adapter is tested: 0 nothing of it, 1 all, beyond it more of the same."""
    forgetting: bool = True
    """Also measures what the model lost: perplexity of plain text, and answers to questions about other things, of the
    base and with the adapter."""
    other_texts: str | None = None
    """File of passages for `forgetting`, one per line; null: a few of this project's."""
    exchange_pictures: bool = True
    """Asks at most 200 questions (of each file) again about other pictures: a score that does not drop does not come
    from the pictures."""

    untrained: bool = True
    """Asks at most 200 questions of the base without the adapter too, so that the score shows what was learned."""

    @property
    def tested(self) -> str | None:
        """Names the test's file or files, for messages; None: no test."""
        return self.file or ", ".join(self.files.values()) or None


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run, as its YAML file describes it."""

    task: Task = "image_text"
    """Says what is trained, which decides the settings. llava: a LLaVA-1.5, also composed here; image_text: any
    model for pictures, videos and text; commonsense: a language model on instructions; vlbart: a VL-BART."""
    variant: str | None = None
    """Named variant of the --config file, one of its `variants`, laid over the rest of it; --section.key value wins
    over both. null: the file's own choice, or the file as it is."""
    model: ModelConfig
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    training: Mapping[str, Any] = field(default_factory=dict)
    """Any field of transformers.TrainingArguments, such as --training.max_steps 20; `deepspeed` takes a JSON
    file, or zero0, zero2, zero3, zero3_offload, the shipped ones."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    resume: str | None = None
    """`last` resumes from the run folder's last complete checkpoint; `if_stopped` does where a run was stopped before
    its end, starts one where there is none, and leaves a finished one as it is; or a checkpoint folder."""
    overwrite: bool = False
    """Removes what an earlier run left in training.output_dir; without it such a folder is refused."""
    test_only: bool = False
    """Trains nothing: tests the adapter in training.output_dir again, or resumes a test that was stopped."""
    watch: int = 4
    """Number of fixed questions, of the validation data or else of the test, that are answered at every validation
    (without one: at the start and five times more), into `watched/`, the report and training.report_to; 0: none."""
    try_largest_batch: bool | None = None
    """Takes a step over the largest micro-batch that the data can give before the first one, and undoes it, so that a
    run that does not fit into memory ends at once and says what to lower; null: where there is a GPU."""


# What each task takes of these fields.


def _fields(**sections: str) -> frozenset[str]:
    return frozenset(f"{section}.{name}" for section, names in sections.items() for name in names.split())


_TEXT = _fields(
    model="revision quantisation template",
    data="validation validation_share validation_size validation_limit max_tokens packing group_by_modality_length "
    "streaming shuffle_buffer columns ignore ask replay",
    evaluation="max_new_tokens strength forgetting other_texts",
    objective="loss beta margin rewards reward_threads reward_errors format group max_new_tokens vllm vllm_timeout kl",
)
_MEDIA = _fields(
    data="image_folder video_folder follow_links as_published video_frames video_fps cache_features feature_cache "
    "max_pixels_per_step",
    evaluation="file image_folder answer_after exchange_pictures untrained",
    objective="exchange_pictures",
)
FIELDS: Mapping[Task, frozenset[str]] = {
    "llava": _TEXT | _MEDIA | _fields(model="compose image_aspect", adapter="projector_start"),
    "image_text": _TEXT | _MEDIA,
    "commonsense": _TEXT | _fields(model="source", data="train_on", evaluation="files scoring rule beams"),
    "vlbart": _fields(
        model="compose",
        adapter="train_biases train_norm_weights",
        data="validation_files features feature_tokens batch_size mixing input_tokens task_prompt subtitles_first "
        "closed_answers",
        evaluation="files features image_folder choice_by_likelihood exchange_pictures",
    ),
}
"""Maps a task to fields that it takes and some other task does not; fields not listed here are every task's."""
DEFAULTS: Mapping[Task, Mapping[str, Any]] = {
    "llava": {},
    "image_text": {},
    "commonsense": {
        "model.template": "nvlabs",
        "data.max_tokens": 256,
        "data.group_by_modality_length": False,
        "evaluation.max_new_tokens": 32,
    },
    "vlbart": {"model.dtype": "float32", "evaluation.batch_size": 64},
}
"""Maps a task to its defaults where they differ from the dataclasses'."""
TYPES: Mapping[Task, Mapping[str, Any]] = {
    "llava": {"model.compose": ComposeSpec | None, "model.template": Template | None, "data.train": Files},
    "image_text": {"model.template": Template | None, "data.train": Files},
    "commonsense": {"model.template": PromptName, "data.train": Files},
    "vlbart": {
        "model.compose": VlBartSpec | None,
        "model.attn_implementation": Literal["sdpa", "eager"] | None,
        "data.train": FilesByTask,
    },
}
"""Maps a task to the types of those fields that have another type in another task."""


def foreign_fields(task: Task) -> frozenset[str]:
    """Returns the fields that only other tasks take."""
    return frozenset[str]().union(*FIELDS.values()) - FIELDS[task]


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Returns a run's resolved settings in JSON's types, without the fields that only other tasks take."""
    foreign, settings = foreign_fields(config.task), dict[str, Any]()
    for name, value in json.loads(json.dumps(dataclasses.asdict(config), default=str)).items():
        if not isinstance(value, dict) or not value:
            settings[name] = value
        elif fields := {key: entry for key, entry in value.items() if f"{name}.{key}" not in foreign}:
            settings[name] = fields
    return settings
