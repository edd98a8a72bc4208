"""Towers of every library give the features that their library gives itself; settings travel whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPVisionModel

from dora_vl.backbones.feature_encoder import FeatureEncoder, FeatureSettings, merged
from dora_vl.backbones.specs import TowerSpec
from dora_vl.backbones.towers import ImagePreparation, Preparation
from dora_vl.data.example import Clip
from dora_vl.data.video import EverySeconds, Uniform, VideoReader
from dora_vl.errors import UserError
from tests.backbones.conftest import small_clip
from tests.data.video_files import write_video

TIMM = TowerSpec(library="timm", name="tf_efficientnet_lite0", weights="random", image_size=64)


def picture(width: int = 90, height: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def test_squashing_equals_open_clips_own() -> None:
    import open_clip  # takes seconds

    values = ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    transform = open_clip.transform.image_transform(
        32, is_train=False, mean=values[0], std=values[1], resize_mode="squash", interpolation="bicubic"
    )
    ours = ImagePreparation(Preparation(image_size=32, mean=values[0], std=values[1]), aspect="squash")
    torch.testing.assert_close(ours.prepare(picture()), transform(picture()), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kept", "merge", "shape"), [("grid", 1, (2, 4, 112)), ("grid", 2, (2, 1, 448)), ("pooled", 1, (2, 1, 1280))]
)
def test_a_timm_tower(kept, merge: int, shape: tuple[int, ...]) -> None:
    layer = None if kept == "pooled" else -2
    spec = TowerSpec(**{**vars(TIMM), "layer": layer, "grid_pool": None if kept == "pooled" else 2})
    encoder = FeatureEncoder(FeatureSettings(tower=spec, kept=kept, merge=merge))
    features = encoder.pictures([picture(), picture(30, 50)])
    assert features.shape == shape
    if kept == "pooled":
        pixels = torch.stack([encoder.preparation.prepare(picture())])
        torch.testing.assert_close(features[:1, 0], encoder.network(pixels))


def test_blocks_of_cells_side_by_side() -> None:
    grid = torch.arange(2.0 * 16 * 3).view(2, 16, 3)
    blocks = merged(grid, 2)
    assert blocks.shape == (2, 4, 12)
    assert torch.equal(blocks[0, 1], torch.cat([grid[0, cell] for cell in (2, 3, 6, 7)]))
    assert torch.equal(merged(grid, 1), grid)
    with pytest.raises(UserError):
        merged(grid, 3)


def test_open_clips_projection_is_not_normalised() -> None:
    spec = TowerSpec(library="open_clip", name="ViT-S-32-alt", weights="random", image_size=64)
    encoder = FeatureEncoder(FeatureSettings(tower=spec, kept="pooled", aspect="square"))
    features = encoder.pictures([picture()])
    assert features.shape == (1, 1, 256)
    pixels = encoder.preparation.prepare(picture())[None]
    torch.testing.assert_close(features[0], encoder.network(pixels))


def save_clip(model: CLIPModel, folder: Path) -> None:
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)


def test_transformers_projection(tmp_path: Path) -> None:
    model = small_clip(0)
    save_clip(model, tmp_path)
    spec = TowerSpec(library="transformers", name=str(tmp_path))
    encoder = FeatureEncoder(FeatureSettings(tower=spec, kept="pooled", aspect="square"))
    features = encoder.pictures([picture()])
    with torch.no_grad():
        hidden = model.vision_model(encoder.preparation.prepare(picture())[None]).pooler_output
        torch.testing.assert_close(features[0], model.visual_projection(hidden))
    grid = FeatureEncoder(FeatureSettings(tower=spec, aspect="square"))
    with torch.no_grad():
        states = model.vision_model(grid.preparation.prepare(picture())[None], output_hidden_states=True).hidden_states
    torch.testing.assert_close(grid.pictures([picture()]), states[-2][:, 1:])


@pytest.mark.parametrize("kept", ["pooled", "grid"])
def test_a_transformers_tower_takes_the_weights_it_is_given(tmp_path: Path, kept) -> None:
    save_clip(small_clip(0), tmp_path / "clip")
    other = small_clip(1)
    save_clip(other, tmp_path / "other")
    network = other if kept == "pooled" else CLIPVisionModel.from_pretrained(tmp_path / "other")
    torch.save(network.state_dict(), tmp_path / "other.pth")

    def made(folder: str, weights: str) -> torch.Tensor:
        spec = TowerSpec(library="transformers", name=str(tmp_path / folder), weights=weights)
        return FeatureEncoder(FeatureSettings(tower=spec, kept=kept)).pictures([picture()])

    folders_own, loaded = made("clip", "pretrained"), made("clip", str(tmp_path / "other.pth"))
    torch.testing.assert_close(loaded, made("other", "pretrained"))
    assert not torch.allclose(loaded, folders_own, atol=1e-2)
    assert not torch.allclose(made("clip", "random"), folders_own, atol=1e-2)
    with pytest.raises(UserError):
        made("clip", "openai")


def test_frames_of_a_clip(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4")
    spec = TowerSpec(**{**vars(TIMM), "layer": -3, "grid_pool": 2})
    encoder = FeatureEncoder(FeatureSettings(tower=spec, merge=2, frames=3))
    with VideoReader(backends=("decord", "pyav")) as reader:
        frames = reader.read_prepared(tmp_path, Clip(path="a.mp4"), Uniform(3), encoder.preparation.prepare)
        pictures = reader.read(tmp_path, Clip(path="a.mp4"), Uniform(3))
    features = encoder.sequence(encoder.encode(torch.stack(frames.pictures)))
    assert features.shape == (3, 4 * 40)
    assert frames.indices == (8, 25, 41)
    torch.testing.assert_close(features, encoder.pictures(pictures.pictures)[:, 0])


def test_changes_stand_beside_each_token(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4")
    spec = TowerSpec(**{**vars(TIMM), "layer": -3, "grid_pool": 2})
    torch.manual_seed(0)
    encoder = FeatureEncoder(FeatureSettings(tower=spec, frames=3, changes=True))
    with VideoReader(backends=("decord", "pyav")) as reader:
        pictures = reader.read(tmp_path, Clip(path="a.mp4"), Uniform(3)).pictures
    features = encoder.frames(pictures)
    numbers, changes = features.unflatten(0, (3, 4)).chunk(2, dim=-1)
    alone = encoder.pictures(pictures)  # the same frames as pictures: nothing came before them
    torch.testing.assert_close(numbers, alone[..., :40])
    assert not alone[..., 40:].any()
    torch.testing.assert_close(changes[1:], alone[1:, :, :40] - alone[:-1, :, :40])
    assert not changes[0].any()
    assert changes[1:].abs().max() > 1e-3


def test_settings_travel_as_json() -> None:
    spec = TowerSpec(**{**vars(TIMM), "image_mean": (0.1, 0.2, 0.3), "image_std": (1.0, 1.0, 1.0)})
    settings = FeatureSettings(tower=spec, merge=4, changes=True, every_seconds=0.4)
    assert FeatureSettings.from_record(json.loads(json.dumps(settings.to_record()))) == settings
    assert settings.sampling == EverySeconds(0.4)
    assert FeatureSettings(tower=TIMM).sampling == EverySeconds(1.5)
    with pytest.raises(UserError):
        FeatureSettings.from_record({"kept": "grid"})
    with pytest.raises(UserError):
        _ = FeatureSettings(tower=TIMM, frames=2, every_seconds=1.0).sampling


def test_other_weights_are_another_fingerprint() -> None:
    first, other = (FeatureEncoder(FeatureSettings(tower=TIMM, kept="pooled")) for _ in range(2))
    assert first.fingerprint() == first.fingerprint()
    assert first.fingerprint() != other.fingerprint()  # random weights
