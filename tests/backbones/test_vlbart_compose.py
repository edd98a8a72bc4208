"""A small VL-BART made from nothing: its vocabulary, and a visual embedding that begins with standardised features."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from dora_vl.backbones.pieces import Seq2SeqEncoder
from dora_vl.backbones.vision_store import FeatureRow, FeatureWriter
from dora_vl.backbones.vlbart import load_vlbart
from dora_vl.backbones.vlbart_compose import (
    SmallBart,
    VlBartSpec,
    compose_vlbart,
    measured,
    small_tokenizer,
    standardise,
)
from dora_vl.data.example import Answer, Example, write_examples
from dora_vl.errors import UserError

TEXTS = ("what color is the circle?", "blue", "circle")
SCALES = torch.tensor([1.0, 5.0, 0.5, 3.0])
CENTRES = torch.tensor([10.0, -2.0, 0.0, 7.0])


@pytest.fixture
def features(tmp_path: Path) -> Path:
    folder = tmp_path / "features"
    writer = FeatureWriter(folder, {"made": "here"})
    numbers = torch.randn(50, 2, 4, generator=torch.Generator().manual_seed(0)) * SCALES + CENTRES
    for number, row in enumerate(numbers):
        writer.add(FeatureRow(f"picture-{number}", row, "pillow"))
    writer.flush()
    return folder


def spec_of(tmp_path: Path, standardise: str | None = None) -> VlBartSpec:
    write_examples(tmp_path / "texts.jsonl", [Example(id="1", question=TEXTS[0], answers=(Answer(text=TEXTS[1]),))])
    small = SmallBart(
        texts=(str(tmp_path / "texts.jsonl"),), vocabulary=300, width=16, layers=1, heads=2, feedforward=8
    )
    return VlBartSpec(small=small, feature_width=4, pooled_side=None, seed=3, standardise=standardise)


def test_measured_are_the_features_own_mean_and_spread(features: Path) -> None:
    mean, spread = measured(features)
    assert torch.allclose(mean, CENTRES, atol=1.5)
    assert torch.allclose(spread / SCALES, torch.ones(4), atol=0.25)


def test_a_number_that_never_varies_is_not_blown_up(tmp_path: Path) -> None:
    writer = FeatureWriter(tmp_path / "still", {"made": "here"})
    for number in range(8):
        writer.add(FeatureRow(f"picture-{number}", torch.tensor([[float(number), 3.0]]), "pillow"))
    writer.flush()
    _, spread = measured(tmp_path / "still")
    assert spread[1] > 0.05 * spread[0]


def test_a_standardised_layer_does_with_raw_numbers_what_it_did_with_standardised_ones() -> None:
    layer, raw = nn.Linear(4, 3), torch.randn(5, 4) * SCALES + CENTRES
    expected = layer((raw - CENTRES) / SCALES).detach()
    standardise(layer, CENTRES, SCALES)
    assert torch.allclose(layer(raw), expected, atol=1e-5)


def test_a_composed_model_begins_with_standardised_features(tmp_path: Path, features: Path) -> None:
    compose_vlbart(spec_of(tmp_path), tmp_path / "plain")
    compose_vlbart(spec_of(tmp_path, standardise=str(features)), tmp_path / "standardised")
    plain, changed = (
        load_vlbart(tmp_path / name).model.model.encoder.visual_embedding.feat_embedding[0]
        for name in ("plain", "standardised")
    )
    mean, spread = measured(features)
    raw = torch.randn(5, 4) * SCALES + CENTRES
    assert torch.allclose(changed(raw), plain((raw - mean) / spread), atol=1e-5)
    assert not torch.allclose(changed(raw), plain(raw), atol=0.05)


def test_no_features_to_standardise_by_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        compose_vlbart(spec_of(tmp_path, standardise=str(tmp_path / "absent")), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_answers_word_is_the_token_that_it_is_in_a_question() -> None:
    encoder = Seq2SeqEncoder(small_tokenizer(iter(TEXTS * 3), vocabulary=320, leading_space=True))
    asked = encoder.tokenizer(TEXTS[0], add_special_tokens=False).input_ids
    assert encoder.first_token("circle") in asked
    assert encoder.decode(encoder.labels("circle", max_tokens=9)) == "circle"
