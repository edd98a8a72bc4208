"""Pixels are LLaVA's and CLIP's own, bit for bit; networks of three libraries become one kind of tower."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel, CLIPImageProcessorPil, CLIPModel, CLIPVisionModel

from dora_vl.backbones import register_towers, towers
from dora_vl.backbones.feature_encoder import FeatureEncoder, FeatureSettings, merge_cells
from dora_vl.backbones.specs import TowerSpec
from dora_vl.backbones.tower_sources import load_tower
from dora_vl.backbones.towers import GridTower, ImagePreparation, Preparation, image_processor
from dora_vl.data.example import Clip
from dora_vl.data.video import Uniform, VideoReader
from dora_vl.errors import UserError
from tests.backbones.conftest import small_clip
from tests.data.video_files import write_video

SIDE = 28
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP = Preparation(image_size=SIDE, mean=CLIP_MEAN, std=CLIP_STD)
SHAPES = [(40, 20), (20, 41), (28, 28), (7, 100), (3, 5), (33, 32)]


def noisy_picture(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def padded(image: Image.Image) -> Image.Image:
    """`expand2square` of LLaVA c121f04 with the CLIP mean, (122, 116, 104)."""
    width, height = image.size
    side = max(width, height)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def clip_pixels(image: Image.Image) -> np.ndarray:
    """CLIP: shorter side to SIDE (bicubic), centre crop, 0 to 1, minus mean, over deviation."""
    width, height = image.size
    if width <= height:
        resized = image.resize((SIDE, int(SIDE * height / width)), Image.Resampling.BICUBIC)
    else:
        resized = image.resize((int(SIDE * width / height), SIDE), Image.Resampling.BICUBIC)
    values = np.asarray(resized).astype(np.float32)
    top, left = (values.shape[0] - SIDE) // 2, (values.shape[1] - SIDE) // 2
    # The product with 1/255 is taken in float64 and rounded once, as transformers 4.37 does.
    values = (values[top : top + SIDE, left : left + SIDE].astype(np.float64) * (1 / 255)).astype(np.float32)
    return ((values - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)).transpose(2, 0, 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_pixels_are_bit_exact(shape: tuple[int, int], aspect: Any) -> None:
    pixels = ImagePreparation(CLIP, aspect=aspect).prepare(noisy_picture(*shape))
    shown = padded(noisy_picture(*shape)) if aspect == "pad" else noisy_picture(*shape)
    np.testing.assert_array_equal(pixels.numpy(), clip_pixels(shown).astype(np.float32))


@pytest.mark.parametrize("mean", ["x", [0.1, 0.2, None], "no file"])
def test_a_preprocessor_without_three_colours(tmp_path: Path, mean: object) -> None:
    image_processor(CLIP, aspect="pad").save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "image_mean": mean}))
    if mean == "no file":
        file.unlink()
    with pytest.raises(UserError):
        ImagePreparation.from_folder(str(tmp_path), aspect="pad")


@pytest.mark.parametrize("size", [(701, 33), (37, 650), (400, 399)])
@pytest.mark.parametrize("side", [56, 336])
def test_a_long_picture_padded_row_by_row_is_the_same(monkeypatch, size, side) -> None:
    noisy_picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    preparation = Preparation(image_size=side, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
    whole = ImagePreparation(preparation, aspect="pad").prepare(noisy_picture)
    monkeypatch.setattr(towers, "PADDED_SIDE", 100)
    monkeypatch.setattr(towers, "ROWS", 7)
    by_rows = ImagePreparation(preparation, aspect="pad").prepare(noisy_picture)
    assert torch.equal(whole, by_rows)


MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def timm_weights(name: str, path: Path) -> nn.Module:
    """A timm network moved off its initial state, its weights saved."""
    torch.manual_seed(3)
    network = timm.create_model(name).eval()
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.02)
    save_file(network.state_dict(), path)
    return network


def picture(side: int) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "layout"), [("test_efficientnet", "NCHW"), ("test_vit_relpos", "NLC"), ("test_mambaout", "NHWC")]
)
def test_timm_last_layer(tmp_path: Path, name: str, layout: str) -> None:
    network = timm_weights(name, tmp_path / "w.safetensors")
    tower = load_tower(TowerSpec(library="timm", name=name, weights=str(tmp_path / "w.safetensors")))
    side = network.pretrained_cfg["input_size"][-1]
    pixels = picture(side)
    raw = network.forward_features(pixels)
    if layout == "NLC":
        expected = raw[:, network.num_prefix_tokens :]
    else:
        expected = raw.flatten(2).transpose(1, 2) if layout == "NCHW" else raw.flatten(1, 2)
    assert isinstance(tower.model, GridTower)
    assert tower.model.config.layout == layout
    assert (tower.layer, tower.select, tower.tokens) == (-1, "full", expected.shape[1])
    torch.testing.assert_close(tower.model(pixels).hidden_states[-1], expected, rtol=1e-5, atol=1e-5)
    assert tower.preparation.mean == tuple(network.pretrained_cfg["mean"])
    # Saved and opened on the meta device and back: buffers that timm does not save must survive.
    tower.model.save_pretrained(tmp_path / "tower")
    register_towers()
    again = AutoModel.from_pretrained(tmp_path / "tower").eval()
    assert torch.equal(again(pixels).last_hidden_state, tower.model(pixels).last_hidden_state)


def test_timm_inner_layer_and_pooling(tmp_path: Path) -> None:
    network = timm_weights("test_vit", tmp_path / "w.safetensors")
    spec = TowerSpec(library="timm", name="test_vit", weights=str(tmp_path / "w.safetensors"), layer=-2, grid_pool=3)
    tower = load_tower(spec)
    pixels = picture(160)
    grid = network.forward_intermediates(pixels, indices=[-2], intermediates_only=True)[0]
    rows = []
    for low, high in ((0, 4), (3, 7), (6, 10)):  # 10 cells in 3 windows, as adaptive pooling divides them
        rows.append(torch.stack([grid[:, :, low:high, a:b].mean((2, 3)) for a, b in ((0, 4), (3, 7), (6, 10))], 1))
    assert tower.tokens == 9
    torch.testing.assert_close(tower.model(pixels).last_hidden_state, torch.cat(rows, 1), rtol=1e-5, atol=1e-5)


def test_open_clip(tmp_path: Path) -> None:
    tiny = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 8, "heads": 2, "layers": 1},
        "quick_gelu": True,
    }
    (tmp_path / "tiny-clip.json").write_text(json.dumps(tiny))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    torch.manual_seed(2)
    model = open_clip.create_model("tiny-clip", load_weights=False)
    torch.save(model.state_dict(), tmp_path / "tiny.pt")
    tower = load_tower(TowerSpec(library="open_clip", name="tiny-clip", weights=str(tmp_path / "tiny.pt")))
    pixels = picture(32)
    visual = model.visual.eval()
    visual.output_tokens = True
    assert tower.tokens == 16
    _, tokens = visual(pixels)
    torch.testing.assert_close(tower.model(pixels).last_hidden_state, tokens, rtol=1e-5, atol=1e-5)
    assert tower.model.config.options["quick_gelu"] is True


def test_a_transformers_grid_is_pooled(tmp_path: Path) -> None:
    small_clip(4).save_pretrained(tmp_path)
    spec = TowerSpec(library="transformers", name=str(tmp_path), image_mean=MEAN, image_std=STD, grid_pool=2)
    tower = load_tower(spec)
    assert isinstance(tower.model, GridTower)
    assert (tower.layer, tower.select, tower.tokens) == (-1, "full", 4)
    pixels = picture(32)
    states = CLIPVisionModel.from_pretrained(tmp_path)(pixels, output_hidden_states=True).hidden_states[-2]
    grid = states[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    expected = F.avg_pool2d(grid, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tower.model(pixels).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


def test_batch_norms_never_move() -> None:
    tower = load_tower(TowerSpec(library="timm", name="test_efficientnet", weights="random")).model
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    tower.train()
    tower(picture(160))
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())


def test_weights_of_other_names_in_the_same_order(tmp_path: Path) -> None:
    network = timm_weights("test_efficientnet", tmp_path / "w.safetensors")
    other = {f"_{index}": value for index, value in enumerate(network.state_dict().values())}
    torch.save({"state_dict": other}, tmp_path / "other.pth")
    spec = TowerSpec(library="timm", name="test_efficientnet", weights=str(tmp_path / "other.pth"))
    with pytest.raises(UserError):
        load_tower(spec)
    tower = load_tower(replace(spec, weights_in_order=True))
    pixels = picture(160)
    expected = network.forward_features(pixels).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tower.model(pixels).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "spec",
    [
        TowerSpec(library="timm", name="no_such_net"),
        TowerSpec(library="open_clip", name="no-such-clip"),
        TowerSpec(library="open_clip", name="ViT-S-32-alt", weights="random", weights_in_order=True),
        TowerSpec(library="timm", name="test_vit", weights="random", layer=-99),
    ],
)
def test_what_does_not_exist_is_refused(spec: TowerSpec) -> None:
    with pytest.raises(UserError):
        load_tower(spec)


VERBS = """
import json, sys
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from dora_vl import cli
towers = {'architecture': 'resnet18', 'hidden_size': 512}
for words in json.loads(sys.argv[1]):
    CONFIG_MAPPING._extra_content.pop('dora_grid_tower', None)
    try:
        cli.main(words)
    except SystemExit:  # there is no such adapter
        print(type(AutoConfig.for_model('dora_grid_tower', **towers)).__name__)
"""


def test_verbs_that_open_bases_have_registered_them() -> None:
    verbs = [["merge", "--adapter", "a", "--to", "b"], ["export", "--for", "vllm", "--adapter", "a", "--to", "b"]]
    command = [sys.executable, "-c", VERBS, json.dumps(verbs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["GridTowerConfig"] * 2, done.stderr


TIMM = TowerSpec(library="timm", name="tf_efficientnet_lite0", weights="random", image_size=64)


def photo(width: int = 90, height: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def test_squashing_equals_open_clips_own() -> None:
    import open_clip  # takes seconds

    values = ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    transform = open_clip.transform.image_transform(
        32, is_train=False, mean=values[0], std=values[1], resize_mode="squash", interpolation="bicubic"
    )
    ours = ImagePreparation(Preparation(image_size=32, mean=values[0], std=values[1]), aspect="squash")
    torch.testing.assert_close(ours.prepare(photo()), transform(photo()), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kept", "merge", "shape"), [("grid", 1, (2, 4, 112)), ("grid", 2, (2, 1, 448)), ("pooled", 1, (2, 1, 1280))]
)
def test_a_timm_tower(kept, merge: int, shape: tuple[int, ...]) -> None:
    layer = None if kept == "pooled" else -2
    spec = replace(TIMM, layer=layer, grid_pool=None if kept == "pooled" else 2)
    encoder = FeatureEncoder(FeatureSettings(tower=spec, kept=kept, merge=merge))
    features = encoder.pictures([photo(), photo(30, 50)])
    assert features.shape == shape
    if kept == "pooled":
        pixels = torch.stack([encoder.preparation.prepare(photo())])
        torch.testing.assert_close(features[:1, 0], encoder.network(pixels))


def test_blocks_of_cells_side_by_side() -> None:
    grid = torch.arange(2.0 * 16 * 3).view(2, 16, 3)
    blocks = merge_cells(grid, 2)
    assert blocks.shape == (2, 4, 12)
    assert torch.equal(blocks[0, 1], torch.cat([grid[0, cell] for cell in (2, 3, 6, 7)]))
    assert torch.equal(merge_cells(grid, 1), grid)
    with pytest.raises(UserError):
        merge_cells(grid, 3)


def test_open_clips_projection_is_not_normalised() -> None:
    spec = TowerSpec(library="open_clip", name="ViT-S-32-alt", weights="random", image_size=64)
    encoder = FeatureEncoder(FeatureSettings(tower=spec, kept="pooled", aspect="square"))
    features = encoder.pictures([photo()])
    assert features.shape == (1, 1, 256)
    pixels = encoder.preparation.prepare(photo())[None]
    torch.testing.assert_close(features[0], encoder.network(pixels))


def save_clip(model: CLIPModel, folder: Path) -> None:
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)


def test_transformers_projection(tmp_path: Path) -> None:
    model = small_clip(0)
    save_clip(model, tmp_path)
    spec = TowerSpec(library="transformers", name=str(tmp_path))
    encoder = FeatureEncoder(FeatureSettings(tower=spec, kept="pooled", aspect="square"))
    features = encoder.pictures([photo()])
    with torch.no_grad():
        hidden = model.vision_model(encoder.preparation.prepare(photo())[None]).pooler_output
        torch.testing.assert_close(features[0], model.visual_projection(hidden))
    grid = FeatureEncoder(FeatureSettings(tower=spec, aspect="square"))
    with torch.no_grad():
        states = model.vision_model(grid.preparation.prepare(photo())[None], output_hidden_states=True).hidden_states
    torch.testing.assert_close(grid.pictures([photo()]), states[-2][:, 1:])


@pytest.mark.parametrize("kept", ["pooled", "grid"])
def test_a_transformers_tower_takes_the_weights_it_is_given(tmp_path: Path, kept) -> None:
    save_clip(small_clip(0), tmp_path / "clip")
    other = small_clip(1)
    save_clip(other, tmp_path / "other")
    network = other if kept == "pooled" else CLIPVisionModel.from_pretrained(tmp_path / "other")
    torch.save(network.state_dict(), tmp_path / "other.pth")

    def made(folder: str, weights: str) -> torch.Tensor:
        spec = TowerSpec(library="transformers", name=str(tmp_path / folder), weights=weights)
        return FeatureEncoder(FeatureSettings(tower=spec, kept=kept)).pictures([photo()])

    folders_own, loaded = made("clip", "pretrained"), made("clip", str(tmp_path / "other.pth"))
    torch.testing.assert_close(loaded, made("other", "pretrained"))
    assert not torch.allclose(loaded, folders_own, atol=1e-2)
    assert not torch.allclose(made("clip", "random"), folders_own, atol=1e-2)
    with pytest.raises(UserError):
        made("clip", "openai")


def test_changes_stand_beside_each_token(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4")
    spec = replace(TIMM, layer=-3, grid_pool=2)
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


def test_other_weights_are_another_fingerprint() -> None:
    first, other = (FeatureEncoder(FeatureSettings(tower=TIMM, kept="pooled")) for _ in range(2))
    assert first.fingerprint() == first.fingerprint()
    assert first.fingerprint() != other.fingerprint()  # random weights
