"""Any decoder of transformers as a backbone: a LLaVA, another vision-language model, or a language model.

It runs by the model's own forward, with logits only where a label or a decode step needs them.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from PIL import Image
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.models.auto.modeling_auto import AutoModelForCausalLM, AutoModelForImageTextToText

from dora_vl.adapters.adapter import local_folder
from dora_vl.adapters.base_weights import BaseWeights
from dora_vl.backbones.base import (
    Attention,
    Backbone,
    Expected,
    Features,
    config_of,
    decoder_of,
    head_of,
    is_language_model,
    model_inputs,
    model_type_of,
    sees_pictures,
)
from dora_vl.backbones.capped_head import NOT_FOLLOWED, PLACES, find_head, run_capped, whole_weights
from dora_vl.backbones.encoder import GREY, Encoder
from dora_vl.backbones.families.quirks import CROSSING, words_pass_by
from dora_vl.backbones.families.table import LLAVA, TURNED_UNDER_ZERO3
from dora_vl.backbones.frozen_outputs import FrozenParts, Outputs
from dora_vl.backbones.generation import ScoreWatch
from dora_vl.backbones.loading import check_quantised, load_pretrained, quantised_loading
from dora_vl.backbones.packed_attention import MASKED, Forest, PackedAttention
from dora_vl.core.config import Quantisation
from dora_vl.data.columns import Packing
from dora_vl.data.example import Example
from dora_vl.data.samples import BOOKKEEPING, IGNORED_LABEL, Sample
from dora_vl.data.turns import IMAGE_PLACEHOLDER, Turn
from dora_vl.errors import UserError, one_line
from dora_vl.files import NO_OWN_CODE, check_model_folder, opening
from dora_vl.heads.next_token import in_chunks, label_losses, losses_of
from dora_vl.shapes import Int

log = logging.getLogger(__name__)


class DecoderBackbone(Backbone[PreTrainedModel]):
    """Runs a model of `AutoModelForImageTextToText` or `AutoModelForCausalLM` to the positions that predict a label.

    The inputs keep the processor's names and go to the model's own forward, so that grids, tiles, positions in two
    dimensions and token types are the model's business. What is frozen outside the decoder stays in eval mode. Every
    answer uses the options of `generation`, such as `num_beams`.
    """

    def __init__(self, model: PreTrainedModel, *, generation: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.model = model
        self.generation = dict(generation or {})
        self.frozen_parts: FrozenParts | None = None
        """Replays a sample's `stored` outputs; set where a run stores some."""
        # In a causal model no token sees padding on its right, so a batch padded there needs no mask.
        self.causal = model.config.model_type == LLAVA or is_language_model(model.config.model_type)
        for module in model.modules():
            if CROSSING in dict(module.named_children()):
                module.register_forward_hook(words_pass_by, with_kwargs=True)
        self.packed_attention = PackedAttention(model, decoder_of(model))
        self.head_place = find_head(model)
        log.info("the output head %s", PLACES[self.head_place])
        self.train(model.training)

    @property
    def config(self) -> Any:
        """Returns the model's config; transformers' Trainer and DeepSpeed read sizes from it."""
        return self.model.config

    def train(self, mode: bool = True) -> DecoderBackbone:
        """Sets the mode; a frozen vision part stays in eval, so that its features never change."""
        super().train(mode)
        decoder = set(decoder_of(self.model).modules())
        for module in self.model.modules():
            holds_decoder = not decoder.isdisjoint(module.modules())
            if not holds_decoder and not any(weight.requires_grad for weight in module.parameters()):
                module.eval()
        return self

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        labels: Int[Tensor, "batch seq"] | None = None,
        layout: Mapping[str, Tensor] | None = None,
        stored: Sequence[Outputs] = (),
        keep_logits: bool = False,
        expected: Expected | None = None,
        **inputs: Any,
    ) -> Features:
        """Computes hidden states and losses at the positions that predict a label.

        Args:
            labels: the token at each position, or -100; the shift by one happens here.
            expected: what takes the place of some samples' labels.
            layout: what each token sees, and what predicts it, where sequences hold several samples (`data.batches`).
            stored: stored outputs for the pictures of each sample that has some.
            keep_logits: returns logits; otherwise those of a large vocabulary are computed in chunks.
            inputs: the processor's other inputs, by its own names.
        """
        sequences, positions, targets, samples = _predicted(labels, attention_mask, layout)
        inputs = {"input_ids": input_ids, **model_inputs(self.model, inputs), **self._attention(attention_mask, layout)}
        head: Any = head_of(self.model)
        chunked = self.head_place != "inside" and not keep_logits and in_chunks(head)
        is_sharded = isinstance(self.model, FSDPModule) or is_deepspeed_zero3_enabled()

        def losses_at(values: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
            """Applies a loss to the labels, or to what is expected in their place."""
            each = loss(values, targets)
            if expected is None:
                return each
            places = torch.isin(samples, expected.samples).nonzero()[:, 0]
            places = places[samples[places].argsort(stable=True)]  # sample by sample
            return each.index_copy(0, places, loss(values[places], expected.scores))

        with self._hooked(stored):
            if self.head_place != "open" or is_sharded:
                hidden, logits, losses = run_capped(
                    self.model, inputs, sequences, positions, losses_at, chunked=chunked
                )
            else:
                hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state[sequences, positions]
                if chunked:
                    logits, losses = None, losses_at(hidden, partial(label_losses, scores=head))
                else:
                    logits = head(hidden.unsqueeze(0)).squeeze(0)
                    losses = losses_at(logits, losses_of)
        return Features(hidden, losses, targets, samples, logits if keep_logits else None)

    @property
    def continues_prompts(self) -> bool:
        """Tells whether prompts may continue one that was read once: with plain attention, positions along one axis."""
        return self.causal and all(type(layer) is DynamicLayer for layer in DynamicCache(config=self.config).layers)

    @torch.no_grad()
    def read(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        *,
        stored: Sequence[Outputs] = (),
        **inputs: Any,
    ) -> DynamicCache:
        """Reads left-padded beginnings of prompts; returns their keys and values."""
        cache = DynamicCache(config=self.config)
        inputs = {**model_inputs(self.model, inputs), **self._attention(attention_mask, None)}
        with self._hooked(stored):
            self.model.base_model(input_ids=input_ids, use_cache=True, **inputs, **{self._cache_name: cache})
        return cache

    @property
    def _cache_name(self) -> str:
        """Returns the argument that takes a cache, which transformers has renamed."""
        return "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"

    def generate(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        *,
        max_new_tokens: int = 128,
        options: Mapping[str, Any] | None = None,
        stored: Sequence[Outputs] = (),
        cache: DynamicCache | None = None,
        **inputs: Any,
    ) -> Int[Tensor, "batch new"]:
        """Generates token ids for left-padded prompts, greedily unless `options` (of transformers' generate) differ.

        Sequences whose scores are not finite hold `NO_TOKEN`.

        Args:
            stored: what frozen parts gave for the pictures of each prompt that has some.
            cache: keys and values of the prompts' beginnings, by `read`.
        """
        watch, config = ScoreWatch(self.model), cast(Any, self.model.generation_config)
        padding, ends = config.pad_token_id, config.eos_token_id
        if padding is None:  # any id fills answers that end early, and transformers warns at every call without one
            padding = ends[0] if isinstance(ends, list) else ends
        chosen = {"do_sample": False, "pad_token_id": padding, **watch.options, **self.generation, **(options or {})}
        generating: Any = self.model  # generate is typed for a protocol that pyright cannot match to the class
        # torch multiplies a view with gaps, such as each sequence's last position, one by one: on a CPU 64 of them took
        # 8 s instead of 0.01.
        head: Any = head_of(self.model)
        together = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
        with torch.no_grad(), together, self._hooked(stored):
            tokens = generating.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                max_new_tokens=max_new_tokens,
                **model_inputs(self.model, inputs),
                **({} if cache is None else {self._cache_name: cache}),
                **chosen,
            )
        return watch.mark_broken(tokens[:, input_ids.shape[1] :])

    @contextlib.contextmanager
    def _hooked(self, stored: Sequence[Outputs]) -> Iterator[None]:
        """Replays stored outputs, and has a training pass reach back to the embeddings."""
        with contextlib.ExitStack() as hooks:
            if self.frozen_parts is not None and stored:
                hooks.enter_context(self.frozen_parts.replaying(self.model, stored))
            if self.training and torch.is_grad_enabled():
                hooks.enter_context(self.model.get_input_embeddings().register_forward_hook(_asks_for_gradients))
            yield

    def _attention(self, attention_mask: Tensor, layout: Mapping[str, Tensor] | None) -> dict[str, Tensor | None]:
        """Follows the layout; returns the mask, and positions where the model would take others."""
        forest = None if layout is None else Forest(layout["segment"], layout["steps"], layout["sees"])
        self.packed_attention.set_forest(forest)
        if layout is not None or not self.causal:
            return {"attention_mask": attention_mask}
        if bool(attention_mask[:, 0].all()):
            return {"attention_mask": None}
        return {"attention_mask": attention_mask, "position_ids": (attention_mask.cumsum(1) - 1).clamp_min(0)}


def _predicted(
    labels: Tensor | None, attention_mask: Tensor, layout: Mapping[str, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns sequence and position of each hidden state that predicts a label, the label, and its sample's number.

    Without labels these are each sequence's last token; with a `layout` the positions are its `sources`.
    """
    if labels is None:
        sequences = torch.arange(len(attention_mask), device=attention_mask.device)
        last = attention_mask.shape[1] - 1 - attention_mask.flip(1).argmax(1)
        return sequences, last, torch.full_like(sequences, IGNORED_LABEL), sequences
    if layout is None:
        sequences, positions = (labels[:, 1:] != IGNORED_LABEL).nonzero(as_tuple=True)
        return sequences, positions, labels[sequences, positions + 1], sequences
    sequences, positions = ((labels != IGNORED_LABEL) & (layout["sources"] >= 0)).nonzero(as_tuple=True)
    return (
        sequences,
        layout["sources"][sequences, positions],
        labels[sequences, positions],
        layout["samples"][sequences, positions],
    )


def _asks_for_gradients(_: nn.Module, __: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
    """Makes embeddings require a gradient; reentrant checkpointing differentiates nothing otherwise."""
    return embedded if embedded.requires_grad else embedded.detach().requires_grad_()


def open_backbone(
    base: str,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: Attention = None,
    revision: str | None = None,
    quantisation: Quantisation | None = None,
    generation: Mapping[str, Any] | None = None,
) -> DecoderBackbone:
    """Opens a folder or hub id in eval mode, weights in `dtype`; `quantisation` is of the language model's linears."""
    check_model_folder(base, revision)
    config_of(base, revision)
    if is_deepspeed_zero3_enabled():
        refuse_turned_experts(base, revision=revision)
    with opening(f"model.base {base!r} cannot be opened"):
        layers, options = quantised_loading(base, quantisation, dtype=dtype, revision=revision)
        model = load_pretrained(
            _auto_class(base, revision),
            base,
            dtype=dtype,
            attn_implementation=attn_implementation,
            revision=revision or "main",
            **options,
        )
    check_quantised(model, layers)
    return DecoderBackbone(model, generation=generation)


def skeleton_of(base: str, *, revision: str | None = None) -> DecoderBackbone:
    """Builds a backbone from only its config, on the meta device."""
    check_model_folder(base, revision)
    config = config_of(base, revision)
    with opening(f"model.base {base!r} cannot be opened as its config.json says"), torch.device("meta"):
        return DecoderBackbone(_auto_class(base, revision).from_config(config))


def _auto_class(base: str, revision: str | None) -> Any:
    return AutoModelForImageTextToText if sees_pictures(base, revision) else AutoModelForCausalLM


def refuse_turned_experts(folder_or_id: str, *, revision: str | None = None) -> None:
    """Refuses a base whose experts transformers would load transposed under ZeRO-3 (`TURNED_UNDER_ZERO3`).

    Published folders store them transposed and load rightly; `save_pretrained` does not transpose them, and the shape
    of a square matrix does not tell.
    """
    turned = TURNED_UNDER_ZERO3.get(model_type_of(folder_or_id, revision), {})
    if not turned:
        return
    text = AutoConfig.from_pretrained(folder_or_id, revision=revision or "main", **NO_OWN_CODE).get_text_config()
    own = {end: tuple(getattr(text, name) for name in names) for end, names in turned.items()}
    with BaseWeights(local_folder(folder_or_id, revision)) as weights:
        stored = [(tensor.key, tensor.shape) for tensor in weights.tensors.values()]
    for key, shape in stored:
        if any(key.endswith(end) and shape == saved_shape for end, saved_shape in own.items()):
            raise UserError(
                f"{folder_or_id}: under ZeRO-3 transformers would load {key} transposed, since the folder has it as "
                "save_pretrained writes it; set training.deepspeed: zero2, or take the published folder"
            )


def check_packing(backbone: DecoderBackbone, encoder: Encoder, requested: Packing) -> tuple[Packing, str | None]:
    """Returns the requested kind of packing, or the next simpler one that the model computes correctly and the reason.

    No list says which families compute packed sequences. What they need (a mask function that can be asked, positions
    that can be given, pictures found by their tokens) shows in the scores: three samples in one sequence and in three
    must agree.

    From then on the encoder gives samples the positions of a family that counts along several axes.
    """
    if requested == "plain":
        return "plain", None
    encoder.take_positions_of(backbone.model)
    decoder: Any = decoder_of(backbone.model)
    kernel = str(decoder.config._attn_implementation)
    if kernel not in MASKED:
        return "plain", f"{kernel} takes no mask of such sequences; set model.attn_implementation: sdpa"
    was_training, reason = backbone.training, None
    backbone.eval()
    try:
        with torch.no_grad(), whole_weights(backbone):
            samples = _samples(encoder)
            if any(weight.is_meta for weight in backbone.parameters()):  # a skeleton gives no scores
                replace(encoder.collate, packing=requested)(samples)
                return requested, None
            apart = torch.cat([_scores(backbone, encoder, [sample], "plain") for sample in samples])
            with _last_bits(backbone):
                noisy = torch.cat([_scores(backbone, encoder, [sample], "plain") for sample in samples])
            padded = _scores(backbone, encoder, samples, "plain")
            noise = max(float((scores - apart).norm() / apart.norm()) for scores in (noisy, padded))
            kinds: tuple[Packing, ...] = ("trees", "packed") if requested == "trees" else ("packed",)
            for kind in kinds:
                try:
                    off = float((_scores(backbone, encoder, samples, kind) - apart).norm() / apart.norm())
                except NOT_FOLLOWED as error:
                    reason = reason or one_line(f"{type(error).__name__}: {error}", 200)
                    continue
                if off <= max(4 * noise, 1e-4):  # rounding explains four times what padding and the last bits change
                    return kind, reason
                reason = reason or f"its scores for the same samples are off by {off:.1e} of their size"
    except NOT_FOLLOWED as error:
        return "plain", one_line(f"{type(error).__name__}: {error}", 200)
    finally:
        backbone.train(was_training)
    return "plain", reason


def _samples(encoder: Encoder) -> list[Sample]:
    """Makes three samples about one picture, or of text only."""
    pictures = [Image.new("RGB", (64, 48), GREY)] if encoder.sees_pictures else []
    placeholder = f"{IMAGE_PLACEHOLDER}\n" if pictures else ""
    samples = []
    rounds = (("What is it?", "A house."), ("What is red?", "The roof, I think."), ("Which?", "None"))
    for number, (question, answer) in enumerate(rounds):
        turns = (Turn("user", placeholder + question), Turn("assistant", answer))
        encoded = encoder.encode(Example("probe", ("probe",) * len(pictures), turns), pictures)
        samples.append(Sample(**vars(encoded), index=number))
    return samples


def _scores(backbone: DecoderBackbone, encoder: Encoder, samples: Sequence[Sample], packing: Packing) -> Tensor:
    """Computes the scores of labelled tokens, in the order of the samples."""
    batch = replace(encoder.collate, packing=packing)(samples)
    inputs = {name: value for name, value in batch.items() if name not in BOOKKEEPING}
    inputs = send_to_device(inputs, next(backbone.parameters()).device)
    return backbone(**inputs, keep_logits=True).logits.double().cpu()


@contextlib.contextmanager
def _last_bits(backbone: DecoderBackbone) -> Iterator[None]:
    """Changes every word's vector by up to the last bit of its dtype, at random."""
    generator = torch.Generator().manual_seed(0)

    def off(_: nn.Module, __: Any, vectors: Tensor) -> Tensor:
        uniform = torch.rand(vectors.shape, generator=generator).to(vectors.device)
        return (vectors.double() * (1 + torch.finfo(vectors.dtype).eps * (2 * uniform - 1))).to(vectors.dtype)

    with backbone.model.get_input_embeddings().register_forward_hook(off):
        yield
