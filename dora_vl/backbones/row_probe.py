"""Tests whether a model computes the same for three samples in one row as for three rows.

No list says which families do. What packed rows need of a model (a mask function that can be asked, positions that can
be given, pictures found by their tokens) shows in its scores of the labelled tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from PIL import Image
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from dora_vl.backbones.base import decoder_of
from dora_vl.backbones.encoder import GREY, Encoder
from dora_vl.backbones.model import DecoderBackbone
from dora_vl.backbones.packed_attention import MASKED
from dora_vl.data.batches import Collator
from dora_vl.data.columns import RowKind
from dora_vl.data.example import Example
from dora_vl.data.samples import BOOKKEEPING, Sample
from dora_vl.data.turns import IMAGE_PLACEHOLDER, Turn
from dora_vl.errors import BadSample, one_line

QUESTIONS = (("What is it?", "A house."), ("What is red?", "The roof, I think."), ("Which?", "None"))
TIMES_NOISE = 4.0
"""Limit of the error, as a multiple of that from padding and from rounding word vectors."""
LEAST = 1e-4
"""Error that is always allowed, as a share of the scores' size."""
NOT_FOLLOWED = (AttributeError, BadSample, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""A family's own code may raise these over rows that it does not expect."""


def followed_rows(backbone: DecoderBackbone, encoder: Encoder, requested: RowKind) -> tuple[RowKind, str | None]:
    """Returns the requested kind of rows, or the next simpler one that the model computes correctly and the reason.

    From then on the encoder gives samples the positions of a family that counts along several axes.
    """
    if requested == "plain":
        return "plain", None
    encoder.take_positions_of(backbone.model)
    decoder: Any = decoder_of(backbone.model)
    kernel = str(decoder.config._attn_implementation)
    if kernel not in MASKED:
        return "plain", f"{kernel} takes no mask of such rows; set model.attn_implementation: sdpa"
    was_training, reason = backbone.training, None
    backbone.eval()
    try:
        with torch.no_grad(), _whole_weights(backbone):
            samples = _samples(encoder)
            if any(weight.is_meta for weight in backbone.parameters()):  # a skeleton gives no scores
                Collator(encoder.pad_token_id, rows=requested)(samples)
                return requested, None
            apart = torch.cat([_scores(backbone, encoder, [sample], "plain") for sample in samples])
            with _last_bits(backbone):
                noisy = torch.cat([_scores(backbone, encoder, [sample], "plain") for sample in samples])
            padded = _scores(backbone, encoder, samples, "plain")
            noise = max(float((scores - apart).norm() / apart.norm()) for scores in (noisy, padded))
            kinds: tuple[RowKind, ...] = ("trees", "packed") if requested == "trees" else ("packed",)
            for kind in kinds:
                try:
                    off = float((_scores(backbone, encoder, samples, kind) - apart).norm() / apart.norm())
                except NOT_FOLLOWED as error:
                    reason = reason or one_line(f"{type(error).__name__}: {error}", 200)
                    continue
                if off <= max(TIMES_NOISE * noise, LEAST):
                    return kind, reason
                reason = reason or f"its scores for the same samples are off by {off:.1e} of their size"
    except NOT_FOLLOWED as error:
        return "plain", one_line(f"{type(error).__name__}: {error}", 200)
    finally:
        backbone.train(was_training)
    return "plain", reason


def _samples(encoder: Encoder) -> list[Sample]:
    """Makes three samples about one picture, or of words alone."""
    pictures = [Image.new("RGB", (64, 48), GREY)] if encoder.sees_pictures else []
    placeholder = f"{IMAGE_PLACEHOLDER}\n" if pictures else ""
    samples = []
    for number, (question, answer) in enumerate(QUESTIONS):
        turns = (Turn("user", placeholder + question), Turn("assistant", answer))
        encoded = encoder.encode(Example("probe", ("probe",) * len(pictures), turns), pictures)
        samples.append(Sample(**vars(encoded), index=number))
    return samples


def _scores(backbone: DecoderBackbone, encoder: Encoder, samples: Sequence[Sample], rows: RowKind) -> Tensor:
    """Computes the scores of labelled tokens, in the order of the samples."""
    batch = Collator(encoder.pad_token_id, rows=rows)(samples)
    inputs = {name: value for name, value in batch.items() if name not in BOOKKEEPING}
    inputs = send_to_device(inputs, next(backbone.parameters()).device)
    return backbone(**inputs, keep_logits=True).logits.double().cpu()


@contextlib.contextmanager
def _last_bits(backbone: DecoderBackbone) -> Iterator[None]:
    """Changes every word's vector by up to the last bit of its dtype, at random."""
    generator = torch.Generator().manual_seed(0)

    def off(_: nn.Module, __: Any, vectors: Tensor) -> Tensor:
        chance = torch.rand(vectors.shape, generator=generator).to(vectors.device)
        return (vectors.double() * (1 + torch.finfo(vectors.dtype).eps * (2 * chance - 1))).to(vectors.dtype)

    hook = backbone.model.get_input_embeddings().register_forward_hook(off)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _whole_weights(model: nn.Module) -> Iterator[None]:
    """Gathers each module's weights while it runs under ZeRO-3; the engine that will do it is not there yet."""
    hooks: list[Any] = []
    if is_deepspeed_zero3_enabled():
        for module in model.modules():
            split = [weight for weight in module.parameters(recurse=False) if hasattr(weight, "ds_id")]
            if split:
                hooks.append(module.register_forward_pre_hook(lambda *_, split=split: split[0].all_gather(split)))
                hooks.append(module.register_forward_hook(lambda *_, split=split: split[0].partition(split)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
