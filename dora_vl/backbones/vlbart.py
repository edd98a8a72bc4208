"""VL-BART for training and inference, and how its folder is made: from a BART, an original checkpoint, or small.

The published runs start from `facebook/bart-base`, whose tokens and weights are kept, with 200 new tokens and a
visual embedding drawn at random.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.bart.modeling_bart import BartForConditionalGeneration, shift_tokens_right
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dora_vl.adapters.files import read_tensors
from dora_vl.adapters.foreign_formats import ADDED_ROWS, ALIASES, EMBEDDING
from dora_vl.backbones.base import Attention, Backbone, Features, max_positions
from dora_vl.backbones.generation import ScoreWatch
from dora_vl.backbones.loading import load_pretrained, load_tokenizer, written_base
from dora_vl.backbones.pieces import Seq2SeqEncoder
from dora_vl.backbones.specs import VlBartSpec
from dora_vl.backbones.tower_sources import measured, small_tokenizer, standardise, texts_of
from dora_vl.backbones.vlbart_model import VisualNorm, VlBartConfig, VlBartForConditionalGeneration, joint_mask
from dora_vl.data.samples import IGNORED_LABEL
from dora_vl.errors import UserError, one_line
from dora_vl.files import NO_OWN_CODE, check_model_folder, opening
from dora_vl.heads.answer import AnswerHead
from dora_vl.heads.next_token import in_chunks, label_losses, losses_of
from dora_vl.shapes import Float, Int

log = logging.getLogger(__name__)

DORA_TARGETS = (
    "model.encoder.layers.*.self_attn.q_proj",
    "model.encoder.layers.*.self_attn.v_proj",
    "model.decoder.layers.*.self_attn.q_proj",
    "model.decoder.layers.*.self_attn.v_proj",
    "model.decoder.layers.*.encoder_attn.q_proj",
    "model.decoder.layers.*.encoder_attn.v_proj",
)
"""These are queries and values of every attention, 36 linears of bart-base. The paper's table 9 says queries and keys;
its code adapts queries and values, and the published shares of parameters fit both."""
KEPT_ROWS = (ADDED_ROWS,)
ANSWER_HEADS = ("answer_heads.*",)


def also_trained(config: VlBartConfig, *, biases: bool, norm_weights: bool) -> dict[str, tuple[str, ...]]:
    """Lists what trains beside the adapters, as the core takes it."""
    # The order rows do not train: they are the frozen token embedding's.
    visual = ["feat_embedding.*", "absolute_vis_pos_embedding.*", "img_order_embedding.weight"]
    if config.visual_norm == "sum":
        visual.append("layer_norm.*")
    parts = {"projector": tuple(f"model.encoder.visual_embedding.{name}" for name in visual)}
    if biases:
        parts["biases"] = ("model.*coder.layers.*.bias", "model.*coder.layernorm_embedding.bias")
    if norm_weights:
        parts["norms"] = ("model.*coder.layers.*_layer_norm.weight", "model.*coder.layernorm_embedding.weight")
    return parts


class VlBartBackbone(Backbone[VlBartForConditionalGeneration]):
    """Runs a VL-BART from token ids and features to the positions that have a label."""

    def __init__(self, model: VlBartForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)

    @property
    def config(self) -> VlBartConfig:
        """Returns the model's config."""
        return self.model.settings

    def encode(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        features: Float[Tensor, "batch images tokens channels"],
    ) -> tuple[Float[Tensor, "batch total width"], Int[Tensor, "batch total"]]:
        """Returns the encoder's output and its mask, text first."""
        hidden = self.model.model.encoder(input_ids, attention_mask, features).last_hidden_state
        return hidden, joint_mask(attention_mask, hidden.shape[1])

    def decode(
        self,
        decoder_input_ids: Int[Tensor, "batch answer"],
        encoded: Float[Tensor, "batch total width"],
        mask: Int[Tensor, "batch total"],
    ) -> Float[Tensor, "batch answer width"]:
        """Returns the decoder's hidden states; padding after an answer needs no mask, since attention is causal."""
        return self.model.model.decoder(
            input_ids=decoder_input_ids, encoder_hidden_states=encoded, encoder_attention_mask=mask, use_cache=False
        ).last_hidden_state

    def first_hidden(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        features: Float[Tensor, "batch images tokens channels"],
    ) -> Float[Tensor, "batch width"]:
        """Returns the decoder's hidden state at its start token, from which closed answers are scored."""
        encoded, mask = self.encode(input_ids, attention_mask, features)
        start = torch.full_like(input_ids[:, :1], int(self.config.decoder_start_token_id or 0))
        return self.decode(start, encoded, mask)[:, 0]

    def answer_head(self, task: str) -> AnswerHead:
        """Returns the head that scores a task's closed list of answers."""
        return cast(AnswerHead, self.model.answer_heads[task])

    def logits(self, hidden: Float[Tensor, "*places width"]) -> Float[Tensor, "*places vocab"]:
        """Scores the whole vocabulary."""
        return self.model.lm_head(hidden) + self.model.final_logits_bias.to(hidden.dtype)

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        labels: Int[Tensor, "batch answer"],
        features: Float[Tensor, "batch images tokens channels"],
        *,
        keep_logits: bool = False,
    ) -> Features:
        """Computes hidden states and losses at the positions that have a label, -100 being none.

        The decoder reads the labels one position later, so a label at t is predicted at t.
        """
        encoded, mask = self.encode(input_ids, attention_mask, features)
        hidden = self.decode(self.shifted(labels), encoded, mask)
        samples, positions = (labels != IGNORED_LABEL).nonzero(as_tuple=True)
        if len(samples) == 0:  # a batch of nothing: one position keeps ranks in step, its loss is zero
            chosen = hidden[:1, 0]
            logits = self.logits(chosen)[:0]
            return Features(chosen, logits.float().sum(1), labels.new_zeros(0), labels.new_zeros(0), logits)
        chosen, targets = hidden[samples, positions], labels[samples, positions]
        if keep_logits or not in_chunks(self.model.lm_head):
            logits = self.logits(chosen)
            return Features(chosen, losses_of(logits, targets), targets, samples, logits)
        return Features(chosen, label_losses(chosen, targets, self.logits), targets, samples)

    def shifted(self, labels: Int[Tensor, "batch answer"]) -> Int[Tensor, "batch answer"]:
        """Shifts labels to the decoder's input: its start token, then all but the last."""
        pad, start = int(self.config.pad_token_id or 0), int(self.config.decoder_start_token_id or 0)
        return shift_tokens_right(labels, pad, start)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        features: Float[Tensor, "batch images tokens channels"],
        *,
        max_length: int = 20,
        num_beams: int = 1,
        **options: Any,
    ) -> Int[Tensor, "batch answer"]:
        """Generates answers of at most `max_length` token ids, the decoder's start token included.

        What bart-base's own file would silently add (four beams, no repeated trigram, forced first and last tokens) is
        off unless `options` of transformers' generate ask for it; beam search ends with the end token, as in the
        original. Rows whose scores are not finite hold `NO_TOKEN`.
        """
        encoded, mask = self.encode(input_ids, attention_mask, features)
        model: Any = self.model
        settings = {
            "do_sample": False,
            "num_beams": num_beams,
            "max_length": min(max_length, max_positions(self.config) or max_length),
            "no_repeat_ngram_size": 0,
            "early_stopping": num_beams > 1,
            "forced_bos_token_id": None,
            "forced_eos_token_id": self.config.eos_token_id if num_beams > 1 else None,
            "min_length": 0,
            "length_penalty": 1.0,
        }
        watch = ScoreWatch(self.model)
        new = model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
            attention_mask=mask,
            **{**settings, **watch.options, **options},
        )
        return watch.mark_broken(new)

    @torch.no_grad()
    def likelihoods(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        features: Float[Tensor, "batch images tokens channels"],
        candidates: Int[Tensor, "choices answer"],
    ) -> Float[Tensor, "batch choices"]:
        """Returns candidate answers' log-probabilities, summed over tokens (-100 is none); the encoder runs once."""
        encoded, mask = self.encode(input_ids, attention_mask, features)
        batch, choices = len(input_ids), len(candidates)
        labels = candidates.to(input_ids.device).repeat(batch, 1)
        hidden = self.decode(
            self.shifted(labels), encoded.repeat_interleave(choices, 0), mask.repeat_interleave(choices, 0)
        )
        scores = self.logits(hidden).float().log_softmax(-1)
        chosen = scores.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        return chosen.masked_fill(labels == IGNORED_LABEL, 0.0).sum(-1).view(batch, choices)


def vlbart_skeleton(folder: str | Path) -> VlBartBackbone:
    """Builds a VL-BART of a folder's config on the meta device."""
    check_model_folder(folder)
    config = vlbart_config(folder)
    with _opening(folder), torch.device("meta"):
        return VlBartBackbone(VlBartForConditionalGeneration(config))


def _opening(folder: str | Path) -> AbstractContextManager[None]:
    return opening(f"model.base {str(folder)!r} cannot be opened as a VL-BART")


def vlbart_config(folder: str | Path) -> VlBartConfig:
    """Reads the config of a VL-BART's folder."""
    with _opening(folder):
        return VlBartConfig.from_pretrained(folder)


def vlbart_encoder(folder: str | Path, *, subtitles_first: bool) -> Seq2SeqEncoder:
    """Returns what encodes the texts of the VL-BART in a folder."""
    tokenizer = load_tokenizer(str(folder))
    return Seq2SeqEncoder(
        tokenizer, subtitles_first=subtitles_first, max_positions=max_positions(vlbart_config(folder))
    )


def load_vlbart(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, attn_implementation: Attention = None
) -> VlBartBackbone:
    """Opens a VL-BART folder (`compose_vlbart` writes them), every weight in `dtype`, in eval mode."""
    check_model_folder(folder)
    with _opening(folder):
        model = load_pretrained(
            VlBartForConditionalGeneration,
            folder,
            dtype=dtype,
            attn_implementation=attn_implementation,
            hint="is it a plain BART?",
        )
    return VlBartBackbone(model)


def set_answer_heads(
    model: VlBartForConditionalGeneration, lists: Mapping[str, Sequence[str]], *, seed: int = 0
) -> None:
    """Gives the model a head for each of these answer lists by task, and no other; new ones are drawn from `seed`."""
    config, heads = model.settings, model.answer_heads
    if unused := sorted(set(config.closed_answers) - set(lists)):
        log.info("%s: answered in words here; the closed list that the base has for it is not used", ", ".join(unused))
    for task in set(config.closed_answers) & set(lists):
        if list(config.closed_answers[task]) != list(lists[task]):
            raise UserError(
                f"the base answers {task} from a list of {len(config.closed_answers[task]):,} answers of its own, and "
                f"this one has {len(lists[task]):,} others; give data.closed_answers.{task} the base's config.json"
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = {
            task: AnswerHead(int(config.d_model or 0), answers).to(model.device, model.dtype)
            for task, answers in lists.items()
            if task not in heads
        }
    model.answer_heads = nn.ModuleDict({task: new[task] if task in new else heads[task] for task in lists})
    config.closed_answers = {task: list(answers) for task, answers in lists.items()}


RAW_WEIGHT = ".weight_v"  # NVlabs' DoRA keeps the frozen weight under this name


@dataclass(frozen=True)
class OriginalState:
    """A file's weights of the base, and how its visual embedding is normed."""

    tensors: dict[str, Tensor]
    visual_norm: VisualNorm
    source: str

    @property
    def feature_width(self) -> int:
        """Returns the numbers of a picture token."""
        return self.tensors[f"{EMBEDDING}.feat_embedding.0.weight"].shape[1]


def as_original(tensors: Mapping[str, Tensor], *, source: str) -> OriginalState:
    """Takes the base's weights from a file's dictionary; adapters in it are left to `dora-vl convert`."""
    own = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("module.")
        if re.search(r"\.(weight_m|lora_A|lora_B)$|\.lora_(As|Bs)\.", name):
            continue
        own[f"{name.removesuffix(RAW_WEIGHT)}.weight" if name.endswith(RAW_WEIGHT) else name] = tensor
    if f"{EMBEDDING}.feat_embedding.0.weight" not in own:
        raise UserError(
            f"{source} holds no {EMBEDDING}.feat_embedding.0.weight; it is not a VL-BART of VL-T5 or VL-Adapter"
        )
    norm: VisualNorm = "sum" if f"{EMBEDDING}.layer_norm.weight" in own else "none"
    if f"{EMBEDDING}.feat_embedding.1.weight" in own:
        norm = "each"
    return OriginalState(own, norm, source)


def load_original(model: VlBartForConditionalGeneration, state: OriginalState) -> None:
    """Loads strictly; where the file lacks a name of the shared tensor, another name's value fills it."""
    tokens = next((state.tensors[name] for name in ALIASES if name in state.tensors), None)
    aliases = {} if tokens is None else dict.fromkeys(ALIASES, tokens)
    try:
        model.load_state_dict({**aliases, **state.tensors}, strict=True)
    except RuntimeError as error:  # it names what is missing, unexpected or has another shape
        raise UserError(
            f"{one_line(f'{state.source} does not fit: {error}', 400)}; is feature_width {state.feature_width}, "
            f"visual_norm {state.visual_norm}?"
        ) from error


def compose_vlbart(spec: VlBartSpec, folder: Path | str) -> None:
    """Writes a folder that `load_vlbart` opens; it appears under its name only when it is whole."""
    with written_base(Path(folder), spec) as unfinished:
        model, tokenizer = _composed(spec)
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    log.info("composed %s: %d parameters", folder, sum(parameter.numel() for parameter in model.parameters()))


def _composed(spec: VlBartSpec) -> tuple[VlBartForConditionalGeneration, PreTrainedTokenizerBase]:
    tokenizer, shape, weights = _language(spec)
    add_picture_tokens(tokenizer)
    original = (
        None if spec.checkpoint is None else as_original(read_tensors(Path(spec.checkpoint)), source=spec.checkpoint)
    )
    norm: VisualNorm = "each" if original is None else original.visual_norm
    config = VlBartConfig(
        **shape,
        **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), spec.dropout),
        vocab_size=len(tokenizer),
        feature_width=spec.feature_width,
        pooled_side=spec.pooled_side,
        visual_norm=norm,
        boxes=spec.boxes,
        max_images=spec.max_images,
        frame_side=spec.frame_side,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = VlBartForConditionalGeneration(config)
    state = model.state_dict()
    for name, tensor in weights.items():  # the token embedding's new rows, at its end, stay as they were drawn
        filled, source = (state[name].T, tensor.T) if name == "final_logits_bias" else (state[name], tensor)
        filled[: len(source)] = source
    if original is not None:
        load_original(model, original)
    elif spec.standardise is not None:
        first: Any = model.model.encoder.visual_embedding.feat_embedding[0]
        standardise(first, *measured(Path(spec.standardise)))
    return model, tokenizer


def add_picture_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Adds the 200 tokens of VL-T5 in its order: the last row of the vocabulary is `<vis_extra_id_0>`."""
    names = [f"<{kind}extra_id_{number}>" for kind in ("", "vis_") for number in reversed(range(100))]
    tokenizer.add_special_tokens({"additional_special_tokens": names})


def _language(spec: VlBartSpec) -> tuple[PreTrainedTokenizerBase, dict[str, Any], dict[str, Tensor]]:
    """Returns tokenizer, config fields and weights of the language part; a small one has no weights."""
    if spec.small is not None:
        small = spec.small
        tokenizer = small_tokenizer(texts_of(small), vocabulary=small.vocabulary, leading_space=True)
        shape = {
            "d_model": small.width,
            "max_position_embeddings": small.max_positions,
            "init_std": small.init_std,
            **{f"{side}_layers": small.layers for side in ("encoder", "decoder")},
            **{f"{side}_attention_heads": small.heads for side in ("encoder", "decoder")},
            **{f"{side}_ffn_dim": small.feedforward for side in ("encoder", "decoder")},
        }
        return tokenizer, shape, {}
    check_model_folder(spec.bart)
    with opening(f"model.compose.bart {spec.bart!r} cannot be opened as a BART"):
        loaded: Any = AutoTokenizer.from_pretrained(spec.bart, **NO_OWN_CODE)
        bart = load_pretrained(BartForConditionalGeneration, spec.bart, dtype=torch.float32)
    # A VL-BART sets these fields itself.
    own = {"model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "dropout", "vocab_size"}
    own |= {"attention_dropout", "activation_dropout"}
    shape = {name: value for name, value in bart.config.to_dict().items() if name not in own}
    return loaded, shape, dict(bart.state_dict())
