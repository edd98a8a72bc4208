"""Each foreign format from a dictionary in its own layout, loaded into a model and held to the tool's own forward."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dora_vl.adapters.adapter import write_adapter
from dora_vl.adapters.folder import load_adapter
from dora_vl.adapters.read import ReadOptions, read_any
from dora_vl.errors import UserError
from tests.adapters.foreign_files import DOWN, HEADS, KEY_HEADS, RANK, Q, dora, factors, saved, tiny_llama


def loaded(source, folder, model, **options) -> list[str]:
    """What a person does: read the foreign file, write our folder, load it into the model."""
    adapter = read_any(source, ReadOptions(**options))
    write_adapter(adapter, folder)
    return load_adapter(model, folder)


def assert_layer(model: nn.Module, name: str, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    layer = model.get_submodule(name)
    x = torch.randn(5, weight.shape[1])
    expected = x @ weight.t() + (0 if bias is None else bias)
    torch.testing.assert_close(layer.eval()(x), expected, rtol=1e-5, atol=1e-5)


def weights(model: nn.Module, *names: str) -> dict[str, torch.Tensor]:
    return {name: model.get_submodule(name).weight.detach().clone() for name in names}


@pytest.mark.parametrize("split", [False, True], ids=["commonsense", "magnitudes-elsewhere"])
def test_nvlabs(tmp_path, split):
    model = tiny_llama()
    base = weights(model, Q, DOWN)
    file, other = {}, {}
    for seed, (name, weight) in enumerate(base.items()):
        a, b, m = factors(weight, seed)
        file[f"base_model.model.{name}.lora_A.weight"] = a
        file[f"base_model.model.{name}.lora_B.weight"] = b
        key = "weight_m_wdecomp.default.weight" if split else "weight_m_wdecomp.weight"
        (other if split else file)[f"base_model.model.{name}.{key}"] = m.unsqueeze(1)
    source = tmp_path / "nvlabs"
    source.mkdir()
    torch.save(file, source / "adapter_model.bin")
    if split:
        torch.save(other, source / "non_lora_trainables.bin")
    config = {"peft_type": "DORA", "r": RANK, "lora_alpha": 7, "dora_simple": True, "Wdecompose_target_modules": None}
    (source / "adapter_config.json").write_text(json.dumps(config))
    assert loaded(source, tmp_path / "ours", model) == [Q, DOWN]
    for seed, (name, weight) in enumerate(base.items()):
        assert_layer(model, name, dora(weight, *factors(weight, seed), 7 / RANK))


def test_nvlabs_without_its_magnitudes_is_refused(tmp_path):
    a, b, m = factors(torch.randn(8, 6))
    file = {
        "x.q_proj.lora_A.weight": a,
        "x.q_proj.lora_B.weight": b,
        "x.q_proj.weight_m_wdecomp.weight": m[:, None],
        "x.v_proj.lora_A.weight": a,
        "x.v_proj.lora_B.weight": b,
    }
    torch.save(file, tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match=r"x\.v_proj.*non_lora_trainables"):
        read_any(tmp_path, ReadOptions(alpha=6.0))


def test_llava_names_become_transformers(tmp_path):
    a, b, m = factors(torch.randn(8, 6))
    torch.save(
        {
            "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight": a,
            "base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight": b,
        },
        tmp_path / "adapter_model.bin",
    )
    others = {
        "base_model.model.model.layers.3.self_attn.q_proj.weight_m_wdecomp.default.weight": m[:, None],
        "base_model.model.model.mm_projector.0.weight": torch.randn(4, 4),
        "base_model.model.model.mm_projector.2.bias": torch.randn(4),
    }
    torch.save(others, tmp_path / "non_lora_trainables.bin")
    adapter = read_any(tmp_path, ReadOptions(format="nvlabs-llava", alpha=6.0))
    assert list(adapter.layers) == ["model.language_model.layers.3.self_attn.q_proj"]
    assert set(adapter.extras) == {
        "model.multi_modal_projector.linear_1.weight",
        "model.multi_modal_projector.linear_2.bias",
    }
    torch.testing.assert_close(adapter.factors["model.language_model.layers.3.self_attn.q_proj"].magnitude, m)
    # The keys alone tell LLaVA from plain NVlabs, since the projector is there.
    assert read_any(tmp_path, ReadOptions(alpha=6.0)).layers.keys() == adapter.layers.keys()


def test_vlbart_whole_checkpoint(tmp_path):
    model = nn.ModuleDict({"layers": nn.ModuleDict({"q_proj": nn.Linear(6, 8), "norm_layer_norm": nn.LayerNorm(6)})})
    weight = model["layers"]["q_proj"].weight.detach().clone()
    a, b, m = factors(weight)
    bias = torch.randn(8)
    norm = torch.randn(6)
    file = {
        "module.layers.q_proj.weight_m": m[:, None],
        "module.layers.q_proj.weight_v": weight,
        "module.layers.q_proj.lora_A": a,
        "module.layers.q_proj.lora_B": b,
        "module.layers.q_proj.bias": bias,
        "module.layers.norm_layer_norm.weight": norm,
        "module.layers.norm_layer_norm.bias": norm + 1,
        "module.layers.k_proj.weight": torch.randn(3, 3),
    }
    torch.save(file, tmp_path / "LAST.pth")
    assert loaded(tmp_path / "LAST.pth", tmp_path / "ours", model) == ["layers.q_proj"]
    assert_layer(model, "layers.q_proj", dora(weight, a, b, m, 1.0), bias)
    # PEFT would take A, B and m and leave the trained bias out.
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["peft_type"] == "DORA_VL"
    torch.testing.assert_close(model["layers"]["norm_layer_norm"].weight.detach(), norm)


def test_vl_adapter_tasks(tmp_path):
    model = nn.ModuleDict({"q_proj": nn.Linear(6, 8, bias=False)})
    weight = model["q_proj"].weight.detach().clone()
    a, b, _ = factors(weight)
    single = {f"q_proj.lora_{s}s.{task}": t for s, t in (("A", a), ("B", b)) for task in ("vqa", "gqa")}
    torch.save(single, tmp_path / "single.pth")
    loaded(tmp_path / "single.pth", tmp_path / "ours", model, alpha=32.0)
    assert_layer(model, "q_proj", dora(weight, a, b, None, 32 / RANK))
    torch.save({**single, "q_proj.lora_As.gqa": a + 1}, tmp_path / "several.pth")
    with pytest.raises(UserError, match=r"gqa.*vqa.*--task"):
        read_any(tmp_path / "several.pth", ReadOptions(alpha=32.0))
    chosen = read_any(tmp_path / "several.pth", ReadOptions(alpha=32.0, task="gqa"))
    torch.testing.assert_close(chosen.factors["q_proj"].lora_A, a + 1)


def torchtune_rows(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """transformers' rows of a rotary projection in torchtune's order: row i and row i + half become neighbours."""
    size = len(rows) // heads
    order = [h * size + i + half * size // 2 for h in range(heads) for i in range(size // 2) for half in (0, 1)]
    return rows[order]


def test_torchtune_with_its_order_of_rotary_rows(tmp_path):
    model = tiny_llama()
    base = saved(model, tmp_path / "base")
    names = {
        "layers.0.attn.q_proj": (Q, HEADS),
        "layers.0.attn.k_proj": ("model.layers.0.self_attn.k_proj", KEY_HEADS),
        "layers.1.mlp.w2": (DOWN, None),
    }
    file, expected = {}, {}
    for seed, (key, (name, heads)) in enumerate(names.items()):
        weight = weights(model, name)[name]
        theirs = weight if heads is None else torchtune_rows(weight, heads)
        a, b, m = factors(theirs, seed)
        file.update({f"{key}.lora_a.weight": a, f"{key}.lora_b.weight": b, f"{key}.magnitude": m})
        merged = dora(theirs, a, b, m, 2.0)
        back = torch.empty_like(merged)
        back[torch.arange(len(merged)) if heads is None else torchtune_rows(torch.arange(len(merged)), heads)] = merged
        expected[name] = back
    torch.save(file, tmp_path / "adapter_0.pt")
    loaded(tmp_path / "adapter_0.pt", tmp_path / "ours", model, base=base, alpha=2.0 * RANK)
    for name, weight in expected.items():
        assert_layer(model, name, weight)


@pytest.mark.parametrize("alpha", [None, 5.0])
def test_kohya_output_axis(tmp_path, alpha):
    model = tiny_llama()
    base = saved(model, tmp_path / "base")
    weight = weights(model, Q)[Q]
    a, b, m = factors(weight)
    flat = "lora_te_" + Q.replace(".", "_")
    file = {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b, f"{flat}.dora_scale": m[:, None]}
    if alpha is not None:
        file[f"{flat}.alpha"] = torch.tensor(alpha)
    save_file(file, tmp_path / "style.safetensors")
    loaded(tmp_path / "style.safetensors", tmp_path / "ours", model, base=base)
    assert_layer(model, Q, dora(weight, a, b, m, (alpha or RANK) / RANK))


def test_kohya_input_axis_merges_but_is_not_written_as_peft(tmp_path):
    """The square q_proj has as many rows as columns: only the shape of the magnitude tells the axis."""
    model = tiny_llama()
    base = saved(model, tmp_path / "base")
    weight = weights(model, Q)[Q]
    a, b, _ = factors(weight)
    m = weight.norm(dim=0) * torch.linspace(0.6, 1.4, weight.shape[1])
    flat = "lycoris_" + Q.replace(".", "_")
    file = {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b, f"{flat}.dora_scale": m[None]}
    save_file(file, tmp_path / "style.safetensors")
    adapter = read_any(tmp_path / "style.safetensors", ReadOptions(base=base))
    direction = weight + b @ a
    torch.testing.assert_close(adapter.factors[Q].merged(weight), direction * (m / direction.norm(dim=0)))
    with pytest.raises(UserError, match=Q):
        write_adapter(adapter, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_kohya_convolution(tmp_path):
    weight = torch.randn(8, 4, 3, 3)
    base = {"conv.weight": weight}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    a, b = torch.randn(RANK, 4, 3, 3) * 0.3, torch.randn(8, RANK, 1, 1) * 0.3
    m = weight.flatten(1).norm(dim=1) * torch.linspace(0.5, 1.6, 8)
    file = {"lora_unet_conv.lora_down.weight": a, "lora_unet_conv.lora_up.weight": b}
    save_file({**file, "lora_unet_conv.dora_scale": m.view(8, 1, 1, 1)}, tmp_path / "s.safetensors")
    adapter = read_any(tmp_path / "s.safetensors", ReadOptions(base=tmp_path / "base"))
    expected = dora(weight.flatten(1), a.flatten(1), b.flatten(1), m, 1.0).view(weight.shape)
    torch.testing.assert_close(adapter.factors["conv"].merged(weight), expected)
    assert adapter.tensors["base_model.model.conv.lora_magnitude_vector"].shape == (1, 8, 1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f | {"q.lora_A.weight": torch.full((2, 6), float("nan"))}, r"model\.bin: 1 .* NaN .*\['q.lora_A"),
        (lambda f: {k: v for k, v in f.items() if "lora_B" not in k}, "one of A and B without the other"),
        (lambda f: f | {"q.weight_m_wdecomp.weight": torch.ones(5, 1)}, r"magnitude \[5, 1\] fits neither 8 output"),
    ],
    ids=["nan", "half-a-pair", "magnitude-shape"],
)
def test_broken_files_are_named(tmp_path, change, message):
    a, b, m = factors(torch.randn(8, 6))
    file = {"q.lora_A.weight": a, "q.lora_B.weight": b, "q.weight_m_wdecomp.weight": m[:, None]}
    torch.save(change(file), tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match=message):
        read_any(tmp_path, ReadOptions(alpha=6.0))


def test_scale_must_be_known_and_pickles_hold_tensors_alone(tmp_path):
    a, b, m = factors(torch.randn(8, 6))
    file = {"q.lora_A.weight": a, "q.lora_B.weight": b, "q.weight_m_wdecomp.weight": m[:, None]}
    torch.save(file, tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="--alpha"):
        read_any(tmp_path, ReadOptions())
    torch.save({"q": print}, tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model\.bin"):
        read_any(tmp_path, ReadOptions())
    (tmp_path / "LoHa.safetensors").touch()
    save_file({"q.hada_w1_a": a}, tmp_path / "LoHa.safetensors")
    with pytest.raises(UserError, match=r"LoHa.*--from"):
        read_any(tmp_path / "LoHa.safetensors", ReadOptions())
