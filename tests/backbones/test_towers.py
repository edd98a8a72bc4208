"""Networks of three libraries become the same kind of tower, with the features that the library itself gives."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel, CLIPModel, CLIPVisionModel

from dora_vl.backbones import register_towers
from dora_vl.backbones.specs import TowerSpec
from dora_vl.backbones.tower_sources import load_from_file, load_tower
from dora_vl.backbones.towers import GridTower
from dora_vl.errors import UserError
from tests.backbones.conftest import small_clip

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


class TestTransformers:
    """A CLIP folder is used as it is where LLaVA can, and as a grid tower where it has to be pooled."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        small_clip(4).save_pretrained(tmp_path)
        return tmp_path

    def spec(self, folder: Path, **changes: object) -> TowerSpec:
        return TowerSpec(library="transformers", name=str(folder), image_mean=MEAN, image_std=STD, **changes)  # pyright: ignore

    def test_the_librarys_own_class(self, folder: Path) -> None:
        tower = load_tower(self.spec(folder))
        assert isinstance(tower.model, CLIPVisionModel)
        assert (tower.layer, tower.select, tower.tokens, tower.prefix_tokens) == (-2, "default", 16, 1)
        whole = CLIPModel.from_pretrained(folder)
        pixels = picture(32)
        assert torch.equal(tower.model(pixels).last_hidden_state, whole.vision_model(pixels).last_hidden_state)
        assert (tower.preparation.image_size, tower.preparation.mean) == (32, MEAN)

    def test_pooled(self, folder: Path, tmp_path: Path) -> None:
        tower = load_tower(self.spec(folder, grid_pool=2))
        assert isinstance(tower.model, GridTower)
        assert (tower.layer, tower.select, tower.tokens) == (-1, "full", 4)
        pixels = picture(32)
        states = CLIPVisionModel.from_pretrained(folder)(pixels, output_hidden_states=True).hidden_states[-2]
        grid = states[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
        expected = F.avg_pool2d(grid, 2).flatten(2).transpose(1, 2)
        torch.testing.assert_close(tower.model(pixels).last_hidden_state, expected, rtol=1e-5, atol=1e-5)

    def test_needs_a_stated_preparation(self, folder: Path) -> None:
        with pytest.raises(UserError):
            load_tower(TowerSpec(library="transformers", name=str(folder)))


def test_batch_norms_never_move() -> None:
    tower = load_tower(TowerSpec(library="timm", name="test_efficientnet", weights="random")).model
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    tower.train()
    tower(picture(160))
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())


def test_weights_cast_without_the_statistics_still_see(tmp_path: Path) -> None:
    timm_weights("test_efficientnet", tmp_path / "w.safetensors")
    spec = TowerSpec(library="timm", name="test_efficientnet", weights=str(tmp_path / "w.safetensors"))
    tower, expected = load_tower(spec).model, load_tower(spec).model.to(torch.bfloat16)
    for weight in tower.parameters():  # as DeepSpeed does
        weight.data = weight.data.to(torch.bfloat16)
    pixels = picture(160).to(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(tower.eval()(pixels).last_hidden_state, expected.eval()(pixels).last_hidden_state)


class TestWeights:
    """A weights file fits exactly or is refused with what does not fit."""

    def test_other_names_in_the_same_order(self, tmp_path: Path) -> None:
        network = timm_weights("test_efficientnet", tmp_path / "w.safetensors")
        other = {f"_{index}": value for index, value in enumerate(network.state_dict().values())}
        torch.save({"state_dict": other}, tmp_path / "other.pth")
        spec = TowerSpec(library="timm", name="test_efficientnet", weights=str(tmp_path / "other.pth"))
        with pytest.raises(UserError):
            load_tower(spec)
        tower = load_tower(
            TowerSpec(
                library="timm", name="test_efficientnet", weights=str(tmp_path / "other.pth"), weights_in_order=True
            )
        )
        pixels = picture(160)
        expected = network.forward_features(pixels).flatten(2).transpose(1, 2)
        torch.testing.assert_close(tower.model(pixels).last_hidden_state, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("other", [{"x": torch.zeros(2, 3), "y": torch.zeros(4)}, {"x": torch.zeros(2, 3)}])
    def test_order_is_checked_shape_by_shape(self, tmp_path: Path, other: dict[str, torch.Tensor]) -> None:
        save_file(other, tmp_path / "w.safetensors")
        spec = TowerSpec(library="timm", name="", weights=str(tmp_path / "w.safetensors"), weights_in_order=True)
        with pytest.raises(UserError):
            load_from_file(nn.Linear(3, 2), spec)


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
