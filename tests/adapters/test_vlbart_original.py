"""The originals' dictionaries out of an adapter: scales, and what they cannot hold; rows of the token embedding in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dora_vl.adapters.adapter import read_adapter
from dora_vl.adapters.base_weights import BaseWeights
from dora_vl.adapters.exports import original_dictionary
from dora_vl.adapters.folder import save_adapter
from dora_vl.adapters.read import ReadOptions, read_any
from dora_vl.cli import main
from dora_vl.core import DoRAConfig, apply_dora
from dora_vl.core.trainable import adapted_layers
from dora_vl.errors import UserError
from tests.backbones.tiny_vlbart import tiny

Q = "model.decoder.layers.1.encoder_attn.q_proj"
V = "model.encoder.layers.0.self_attn.v_proj"
CONFIG = DoRAConfig(targets=(Q, V), rank=3, alpha=4.0, also_keep=("model.shared.weight[-200:]",))
ALIAS = "model.encoder.visual_embedding.obj_order_embedding.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny(seed=2).save_pretrained(folder)
    return folder


def adapter(folder: Path, **changes: Any) -> Path:
    model = tiny(seed=2)
    apply_dora(model, DoRAConfig(**{**vars(CONFIG), **changes}))
    torch.manual_seed(4)
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            for parameter in layer._parameters.values():
                if parameter is not None and parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
    save_adapter(model, folder)
    return folder


def written(folder: Path, base: Path, form: str, **options: Any) -> dict[str, Tensor]:
    with BaseWeights(base) as opened:
        return original_dictionary(read_adapter(folder), opened, form, **options)[0]


def test_b_takes_a_scale_that_the_form_does_not_have(tmp_path: Path, base: Path) -> None:
    source, own = read_adapter(adapter(tmp_path / "a")), tiny(seed=2).get_parameter(f"{Q}.weight").detach()
    state = written(tmp_path / "a", base, "nvlabs-vlbart")
    factors = source.factors[Q]
    assert factors.magnitude is not None
    assert factors.lora_A is not None
    assert factors.lora_B is not None
    direction = state[f"{Q}.weight_v"] + state[f"{Q}.lora_B"] @ state[f"{Q}.lora_A"]
    torch.testing.assert_close(direction, own + 4.0 / 3 * factors.lora_B @ factors.lora_A, atol=1e-6, rtol=1e-6)
    assert torch.equal(state[f"{Q}.weight_m"][:, 0], factors.magnitude)
    assert f"{Q}.weight" not in state


def test_layers_of_two_alphas_need_one_for_vl_adapter(tmp_path: Path, base: Path) -> None:
    folder = adapter(tmp_path / "a", method="lora", alpha_pattern={V: 9.0})
    with pytest.raises(UserError):
        written(folder, base, "vl-adapter", tasks=("vqa",))
    state, source = written(folder, base, "vl-adapter", tasks=("vqa", "gqa"), alpha=4.0), read_adapter(folder)
    for name, ratio in ((Q, 1.0), (V, 9.0 / 4.0)):
        b = source.factors[name].lora_B
        assert b is not None
        assert torch.equal(state[f"{name}.lora_Bs.gqa"], b * ratio)
        assert torch.equal(state[f"{name}.lora_As.vqa"], source.factors[name].lora_A)  # type: ignore[arg-type]


def test_alpha_is_the_result_s_where_the_adapter_states_its_own(tmp_path: Path, base: Path) -> None:
    words = ["convert", str(adapter(tmp_path / "a", method="lora", alpha_pattern={V: 9.0})), "--base", str(base)]
    words += ["--any-base", "--alpha", "4", "--to"]
    main([*words, str(tmp_path / "LAST.pth"), "--as", "vl-adapter", "--task", "vqa"])
    state, layers = torch.load(tmp_path / "LAST.pth", weights_only=True), read_adapter(tmp_path / "a").factors
    for name, scale in ((Q, 4 / 3), (V, 9 / 3)):
        change = state[f"{name}.lora_Bs.vqa"] @ state[f"{name}.lora_As.vqa"] * 4 / 3
        torch.testing.assert_close(change, scale * layers[name].lora_B @ layers[name].lora_A)  # type: ignore[operator]
    read_any(tmp_path / "a", ReadOptions())
    with pytest.raises(UserError):
        read_any(tmp_path / "a", ReadOptions(alpha=4.0))


@pytest.mark.parametrize(
    ("changes", "form", "tasks"),
    [
        ({}, "vl-adapter", ("vqa",)),
        ({"method": "lora"}, "nvlabs-vlbart", ()),
        ({"method": "lora"}, "vl-adapter", ()),
        ({"rank_pattern": {V: 2}}, "nvlabs-vlbart", ()),
        ({"magnitude_targets": ("model.encoder.layers.1.fc1",)}, "nvlabs-vlbart", ()),
    ],
)
def test_what_the_form_cannot_hold_is_refused(
    tmp_path: Path, base: Path, changes: Any, form: str, tasks: tuple[str, ...]
) -> None:
    folder = adapter(tmp_path / "a", **changes)
    with pytest.raises(UserError):
        written(folder, base, form, tasks=tasks)


def test_the_token_embeddings_names_must_agree_and_one_be_there(tmp_path: Path, base: Path) -> None:
    state = written(adapter(tmp_path / "a"), base, "nvlabs-vlbart")
    torch.save({**state, ALIAS: state[ALIAS] + 1}, tmp_path / "other.pth")
    with pytest.raises(UserError):
        read_any(tmp_path / "other.pth", ReadOptions())
    names = [name for name in state if state[name].shape == state[ALIAS].shape]
    assert len(names) == 5
    for name in names:
        del state[name]
    torch.save(state, tmp_path / "none.pth")
    with pytest.raises(UserError):
        read_any(tmp_path / "none.pth", ReadOptions())


def test_a_scale_gives_back_the_alpha_that_it_came_from(tmp_path: Path) -> None:
    assert 16 / 49 * 49 != 16
    file = {"q_proj.lora_As.vqa": torch.randn(49, 60), "q_proj.lora_Bs.vqa": torch.randn(60, 49)}
    torch.save(file, tmp_path / "LAST.pth")
    assert read_any(tmp_path / "LAST.pth", ReadOptions(alpha=16.0)).config["lora_alpha"] == 16.0
