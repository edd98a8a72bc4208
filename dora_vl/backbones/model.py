"""Any decoder of transformers as a backbone: a LLaVA, another vision-language model, or a language model.

It runs by the model's own forward, with logits only where a label or a decode step needs them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.models.auto.modeling_auto import AutoModelForCausalLM, AutoModelForImageTextToText

from dora_vl.adapters.adapter import local_folder
from dora_vl.adapters.base_weights import BaseWeights
from dora_vl.adapters.quantised_base import Quantisation
from dora_vl.backbones.base import (
    Attention,
    Backbone,
    Features,
    labelled_positions,
    layout_attention,
    new_tokens,
    output_layer_sees,
)
from dora_vl.backbones.families import (
    BYPASSED,
    CROSSING,
    LLAVA,
    PROJECTORS,
    SEES,
    TURNED_UNDER_ZERO3,
    config_of,
    is_language_model,
    model_type_of,
    sees_pictures,
)
from dora_vl.backbones.loading import quantised_loading
from dora_vl.core import DoRAConfig
from dora_vl.core.inject import adaptable
from dora_vl.core.layer import AdaptedLayer
from dora_vl.core.quantised import is_quantised
from dora_vl.errors import UserError
from dora_vl.files import NO_OWN_CODE, check_model_folder, opening


class DecoderBackbone(Backbone[PreTrainedModel]):
    """Runs a model of `AutoModelForImageTextToText` or `AutoModelForCausalLM` to the positions that predict a label.

    The inputs keep the processor's names and go to the model's own forward, so that grids, tiles, positions in two
    dimensions and token types are the model's business. What is frozen outside the decoder stays in eval mode.

    Args:
        generation: options of transformers' `generate` that every answer uses, such as `num_beams`.
    """

    def __init__(self, model: PreTrainedModel, *, generation: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.model = model
        self.generation = dict(generation or {})
        # Padding on the right is then seen by no token, so it needs no mask, and a row may hold several samples.
        self.causal = model.config.model_type == LLAVA or is_language_model(model.config.model_type)
        for module in model.modules():
            if hasattr(module, CROSSING):
                module.register_forward_hook(_words_pass_by, with_kwargs=True)
        self.train(model.training)

    @property
    def config(self) -> Any:
        """The model's config; transformers' Trainer and DeepSpeed read sizes from it."""
        return self.model.config

    def train(self, mode: bool = True) -> DecoderBackbone:
        """Sets the mode; a frozen vision part stays in eval, so that its features never change."""
        super().train(mode)
        decoder = set(self.model.get_decoder().modules())
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
        layout: Int[Tensor, "batch 3 seq"] | None = None,
        image_features: Float[Tensor, "images tokens channels"] | None = None,
        **inputs: Any,
    ) -> Features:
        """Hidden states and logits at the positions that predict a label.

        Args:
            labels: the token at each place, or -100; the shift by one happens here.
            layout: what each token sees where rows hold several samples (`data.batches`).
            image_features: a LLaVA's pictures as its frozen tower gave them.
            inputs: what else the processor gave, by its own names.
        """
        rows, places, targets = labelled_positions(labels, attention_mask)
        inputs = {**self._in_own_dtype(inputs), **self._attention(attention_mask, layout)}
        with self._differentiable_embeddings(), output_layer_sees(self.model, rows, places) as seen:
            tokens: dict[str, Any] = {"input_ids": input_ids}
            if image_features is not None:
                tokens = {"inputs_embeds": self._embeds(input_ids, image_features)}
            logits = self.model(**tokens, use_cache=False, **inputs).logits
        return Features(seen[0], logits.squeeze(0), targets, rows)

    def generate(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        *,
        max_new_tokens: int = 128,
        streamer: BaseStreamer | None = None,
        options: Mapping[str, Any] | None = None,
        image_features: Float[Tensor, "images tokens channels"] | None = None,
        **inputs: Any,
    ) -> Int[Tensor, "batch new"]:
        """New token ids of left-padded prompts, greedy unless `options` (of transformers' generate) say otherwise."""
        if image_features is not None:
            inputs["inputs_embeds"] = self._embeds(input_ids, image_features)
        return new_tokens(
            self.model,
            input_ids,
            attention_mask,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            options={**self.generation, **(options or {})},
            **self._in_own_dtype(inputs),
        )

    def _embeds(self, input_ids: Tensor, image_features: Tensor) -> Tensor:
        """Token embeddings with projected features at the picture tokens."""
        llava: Any = self.model.base_model
        projected = llava.multi_modal_projector(image_features.to(self.model.dtype))
        places = input_ids == self.config.image_token_id
        if int(places.sum()) != projected.shape[:2].numel():
            raise UserError(f"{int(places.sum())} picture tokens in the batch, but features for {projected.shape[:2]}")
        embeds: Tensor = self.model.get_input_embeddings()(input_ids)
        return embeds.masked_scatter(places.unsqueeze(-1), projected.to(embeds.dtype))

    def _attention(self, attention_mask: Tensor, layout: Tensor | None) -> dict[str, Tensor | None]:
        """Mask, and positions where the model would take others."""
        config = self.model.get_decoder().config
        if layout is not None:
            window = getattr(config, "sliding_window", None)
            if window is not None and layout.shape[2] > window:
                raise UserError(
                    f"rows of {layout.shape[2]} tokens hold several samples, but this model sees {window} tokens back "
                    "in some layers, which such rows' mask does not say; set data.packing: false"
                )
            mask = layout_attention(layout, kernel=str(config._attn_implementation), dtype=self.model.dtype)
            return {"attention_mask": mask, "position_ids": layout[:, 0]}
        if not self.causal:
            return {"attention_mask": attention_mask}
        if bool(attention_mask[:, 0].all()):
            return {"attention_mask": None}
        return {"attention_mask": attention_mask, "position_ids": (attention_mask.cumsum(1) - 1).clamp_min(0)}

    @contextlib.contextmanager
    def _differentiable_embeddings(self) -> Iterator[None]:
        """Meanwhile embeddings ask for gradients: reentrant checkpointing sees nothing to differentiate otherwise.

        Also where nothing is checkpointed: it costs one layer's share.
        """

        def differentiable(_: nn.Module, __: tuple[Tensor, ...], out: Tensor) -> Tensor:
            return out if out.requires_grad else out.detach().requires_grad_()

        if not (self.training and torch.is_grad_enabled()):
            yield
            return
        handle = self.model.get_input_embeddings().register_forward_hook(differentiable)
        try:
            yield
        finally:
            handle.remove()

    def _in_own_dtype(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs of floating numbers (pixels) in the model's dtype, as `BatchFeature.to` gives them."""
        dtype = self.model.dtype
        return {
            name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in inputs.items()
        }


def _words_pass_by(_: nn.Module, inputs: tuple[Tensor, ...], named: Mapping[str, Any], output: Tensor) -> Tensor:
    """A layer's output, and its input for the rows that see no picture, as if they did not go through it.

    Transformers leaves such layers out where no row of a batch has a picture. Where one has, it lets the others attend
    to all pictures alike.
    """
    sees = named.get(SEES)
    return output if sees is None else torch.where(sees.flatten(1).any(1)[:, None, None], output, inputs[0])


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The language model's layers.

    Raises: UserError if transformers does not know them apart from the rest.
    """
    decoder: nn.Module = model.get_decoder()
    if decoder is model or model.get_output_embeddings() is None:
        raise UserError(f"{type(model).__name__} has no decoder of its own that could be adapted; take another model")
    return decoder


def language_targets(model: PreTrainedModel) -> tuple[str, ...]:
    """Full-name patterns of every linear in the decoder's layers, one for each place in a layer.

    Raises: UserError if there is none.
    """
    decoder = decoder_of(model)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    head = model.get_output_embeddings()
    patterns: dict[str, None] = {}
    for name, module in decoder.named_modules(prefix=prefix):
        if is_adaptable_linear(name, module) and module is not head:
            patterns[".".join("*" if part.isdecimal() else part for part in name.split("."))] = None
    if not patterns:
        raise UserError(f"no linear layer was found in {prefix} of {type(model).__name__}; set adapter.targets")
    return tuple(patterns)


def weights_out_of_reach(model: PreTrainedModel) -> dict[str, int]:
    """Sizes of the decoder's matrices that no linear layer holds, by name: experts that are one tensor, convolutions.

    Embeddings, tied heads and vectors are not counted.
    """
    decoder = decoder_of(model)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    layers = [
        one for name, one in decoder.named_modules() if isinstance(one, nn.Embedding) or is_adaptable_linear(name, one)
    ]
    held = {id(weight) for one in layers for weight in one.parameters()}
    parameters = decoder.named_parameters(prefix=prefix)
    return {
        name: math.prod(weight_shape(weight))
        for name, weight in parameters
        if len(weight_shape(weight)) > 1 and id(weight) not in held
    }


def is_adaptable_linear(name: str, module: nn.Module) -> bool:
    """Whether an adapter in a linear layer would be heard: not in classes made from one, which use their weight without
    being called (Llama 4's router, the output of torch's attention), nor where a family's model does so.
    """
    if name.endswith(BYPASSED):
        return False
    if isinstance(module, AdaptedLayer) or is_quantised(module):
        return True
    return isinstance(module, nn.Linear) and adaptable(module, DoRAConfig(targets=("*",))) is not None


def weight_shape(weight: nn.Parameter) -> tuple[int, ...]:
    """A weight's shape, also where ZeRO-3 holds it in shards."""
    return tuple(vars(weight).get("ds_shape", weight.shape))


def projector_patterns(model: PreTrainedModel) -> tuple[str, ...]:
    """Full-name patterns of what stands between vision and language; nothing where no such name is known."""
    decoder = set(decoder_of(model).modules())
    names = [
        name
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in PROJECTORS and module not in decoder and any(True for _ in module.parameters())
    ]
    outer = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    return tuple(f"{name}.*" for name in outer)


def open_backbone(
    base: str,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: Attention = None,
    revision: str | None = None,
    quantisation: Quantisation | None = None,
    generation: Mapping[str, Any] | None = None,
) -> DecoderBackbone:
    """A vision-language or causal language model's folder or hub id, every weight in `dtype`, in eval mode.

    With `quantisation` the linear layers of its language model are quantised.

    Raises: UserError if it is none, some of its weights are missing, or it cannot be quantised.
    """
    check_model_folder(base)
    config_of(base, revision)
    if is_deepspeed_zero3_enabled():
        refuse_turned_experts(base, revision=revision)
    with opening(f"model.base {base!r} cannot be opened"):
        quantised = quantised_loading(base, quantisation, dtype=dtype, revision=revision)
        loaded: Any = _auto_class(base, revision).from_pretrained(
            base,
            dtype=dtype,
            attn_implementation=attn_implementation,
            revision=revision or "main",
            output_loading_info=True,
            **NO_OWN_CODE,
            **quantised.options,
        )
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{base}: {len(missing)} weights are missing, first {missing[:3]}; the folder is broken")
    quantised.finish(model)
    return DecoderBackbone(model, generation=generation)


def skeleton_of(base: str, *, revision: str | None = None) -> DecoderBackbone:
    """The same with nothing in its weights: on the meta device, made from its config alone."""
    config = config_of(base, revision)
    with opening(f"model.base {base!r} cannot be opened as its config.json says"), torch.device("meta"):
        return DecoderBackbone(_auto_class(base, revision).from_config(config))


def _auto_class(base: str, revision: str | None) -> Any:
    return AutoModelForImageTextToText if sees_pictures(base, revision) else AutoModelForCausalLM


def refuse_turned_experts(folder_or_id: str, *, revision: str | None = None) -> None:
    """Refuses a base whose experts transformers would load transposed under ZeRO-3 (`TURNED_UNDER_ZERO3`).

    Published folders store them transposed and load rightly; those of `save_pretrained` do not, and of a square matrix
    no shape tells.

    Raises: UserError; it says what to do.
    """
    turned = TURNED_UNDER_ZERO3.get(model_type_of(folder_or_id, revision), {})
    if not turned:
        return
    text = AutoConfig.from_pretrained(folder_or_id, revision=revision or "main", **NO_OWN_CODE).get_text_config()
    own = {end: tuple(getattr(text, name) for name in names) for end, names in turned.items()}
    with BaseWeights(local_folder(folder_or_id, revision)) as weights:
        stored = [(tensor.key, tensor.shape) for tensor in weights.tensors.values()]
    for key, shape in stored:
        if any(key.endswith(end) and shape == held for end, held in own.items()):
            raise UserError(
                f"{folder_or_id}: under ZeRO-3 transformers would load {key} transposed, since the folder has it as "
                "save_pretrained writes it; set training.deepspeed: zero2, or take the published folder"
            )
