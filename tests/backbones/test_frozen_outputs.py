"""Stored outputs of frozen vision parts give the loss and the gradients of the pictures themselves, in any family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_vl.backbones.frozen_outputs import NotStorable, OutputStore, find_parts, pictures_key, without_pixels
from dora_vl.backbones.generation import generation_loss
from dora_vl.data.batches import Collator
from dora_vl.data.samples import Sample
from tests.backbones.image_text_talks import (
    BLUE,
    RED,
    TALKS,
    adapted_backbone,
    batch_of,
    encoder_of,
    inputs_of,
    sample_of,
    talks_of,
)
from tests.backbones.tiny_families.table import FAMILIES

NOT_STORED = {
    "chameleon": "pictures are tokens of the decoder",
    "gemma4_unified": "pictures are patches of the decoder",
    "emu3": "pictures are tokens of the decoder",
    "mllama": "pictures stand by row, padded",
    "smolvlm": "a batch of mixed rows splits pictures by their padding",
}
STORED = [pytest.param(one, marks=() if one in ("qwen3_vl", "smolvlm") else pytest.mark.slow) for one in FAMILIES]


@pytest.mark.parametrize("family", STORED)
def test_loss_and_gradients_are_those_of_the_pictures(family: str, folders: Mapping[str, Path], tmp_path: Path) -> None:
    encoder, backbone = encoder_of(folders[family]), adapted_backbone(folders[family]).eval()
    talks = [TALKS[name] for name in ("one picture", "two pictures", "no picture") if name in talks_of(family)]
    alone = [{k: v for k, v in batch_of(encoder, [talk]).items() if k != "labels"} for talk in talks if talk[1]]
    pair = {k: v for k, v in batch_of(encoder, [talks[0], talks[0]]).items() if k != "labels"}
    mixed = {k: v for k, v in batch_of(encoder, talks).items() if k != "labels"}
    if family in NOT_STORED:
        with pytest.raises(NotStorable):
            find_parts(backbone.model, alone[0], pair, (mixed, alone))
        return
    parts = find_parts(backbone.model, alone[0], pair, (mixed, alone))
    store = OutputStore(tmp_path, parts, {"processor": family})
    keys = [pictures_key(talk[1]) for talk in talks if talk[1]]
    for key, inputs in zip(keys, alone, strict=True):
        store.add(key, parts.outputs_of(inputs))
    store.flush()
    again = OutputStore(tmp_path, parts, {"processor": family})
    assert all(key in again for key in keys)
    assert pictures_key([BLUE, RED]) not in again
    samples = [sample_of(encoder, talk) for talk in talks]
    batch = joined(encoder, samples)
    hollow = joined(encoder, [replace(sample, inputs=without_pixels(sample.inputs)) for sample in samples])
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]

    def step(inputs: Mapping[str, object]) -> tuple[float, list[torch.Tensor | None]]:
        features = backbone(**inputs)
        loss = generation_loss(features.logits, features.targets).loss
        return float(loss), list(torch.autograd.grad(loss, trained, allow_unused=True))

    expected, wanted = step(batch)
    outputs = [again.read(key) for key in keys]
    with parts.replaying(outputs):
        found, gradients = step(hollow)
    assert abs(found - expected) < 1e-5
    for one, other in zip(gradients, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    others = [torch.utils._pytree.tree_map_only(torch.Tensor, lambda leaf: 1 - leaf, one) for one in outputs]
    with parts.replaying(others):
        assert abs(step(hollow)[0] - expected) > 1e-6  # the pictures are felt
    assert step(batch)[0] == expected


def joined(encoder: Any, samples: list[Sample]) -> dict[str, Any]:
    return inputs_of(Collator(encoder.pad_token_id)(samples))


def test_the_sample_of_a_talk_is_what_is_batched(folders: Mapping[str, Path]) -> None:
    encoder = encoder_of(folders["qwen3_vl"])
    sample = sample_of(encoder, TALKS["one picture"])
    hollow = without_pixels(sample.inputs)
    assert hollow["pixel_values"].shape == sample.inputs["pixel_values"].shape
    assert hollow["pixel_values"].stride() == (0, 0)
    assert hollow["image_grid_thw"] is sample.inputs["image_grid_thw"]
