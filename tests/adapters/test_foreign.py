"""Foreign files: names, axes and tasks; and what is refused.

Each layout as it is usually written is in test_written_folders.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from dora_vl.adapters.adapter import write_adapter
from dora_vl.adapters.read import ReadOptions, read_any
from dora_vl.errors import UserError
from tests.adapters.foreign_files import RANK, Q, dora, factors, saved, tiny_llama


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


def test_vl_adapter_has_one_adapter_for_all_tasks_or_one_is_chosen(tmp_path):
    a, b, _ = factors(torch.randn(8, 6))
    single = {f"q_proj.lora_{s}s.{task}": t for s, t in (("A", a), ("B", b)) for task in ("vqa", "gqa")}
    torch.save(single, tmp_path / "single.pth")
    layer = read_any(tmp_path / "single.pth", ReadOptions(alpha=32.0)).factors["q_proj"]
    assert layer.scale == pytest.approx(32 / RANK)
    assert torch.equal(layer.lora_A, a)
    assert torch.equal(layer.lora_B, b)
    torch.save({**single, "q_proj.lora_As.gqa": a + 1}, tmp_path / "several.pth")
    chosen = read_any(tmp_path / "several.pth", ReadOptions(alpha=32.0, task="gqa"))
    torch.testing.assert_close(chosen.factors["q_proj"].lora_A, a + 1)
    for task in (None, "nlvr"):
        with pytest.raises(UserError):
            read_any(tmp_path / "several.pth", ReadOptions(alpha=32.0, task=task))


def test_kohya_input_axis_merges_but_is_not_written_as_peft(tmp_path):
    """The square q_proj has as many rows as columns: only the shape of the magnitude tells the axis."""
    model = tiny_llama()
    base = saved(model, tmp_path / "base")
    weight = model.get_submodule(Q).weight.detach().clone()
    a, b, _ = factors(weight)
    m = weight.norm(dim=0) * torch.linspace(0.6, 1.4, weight.shape[1])
    flat = "lycoris_" + Q.replace(".", "_")
    file = {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b, f"{flat}.dora_scale": m[None]}
    save_file(file, tmp_path / "style.safetensors")
    adapter = read_any(tmp_path / "style.safetensors", ReadOptions(base=base))
    direction = weight + b @ a
    torch.testing.assert_close(adapter.factors[Q].merged(weight), direction * (m / direction.norm(dim=0)))
    with pytest.raises(UserError):
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


def with_(**more):
    return lambda file: {**file, **{key.replace("__", "."): tensor for key, tensor in more.items()}}


REFUSED = {
    "NaN": (with_(q__lora_A__weight=torch.full((2, 6), float("nan"))), 6.0),
    "rounded numbers": (lambda file: {key: tensor.long() for key, tensor in file.items()}, 6.0),
    "half a pair": (lambda file: {key: tensor for key, tensor in file.items() if "lora_B" not in key}, 6.0),
    "magnitude of another shape": (with_(q__weight_m_wdecomp__weight=torch.ones(5, 1)), 6.0),
    "magnitudes left elsewhere": (
        with_(v__lora_A__weight=torch.ones(RANK, 6), v__lora_B__weight=torch.ones(8, RANK)),
        6.0,
    ),
    "no scale": (dict, None),
    "code": (lambda file: {"q": print}, 6.0),
    "LoHa": (lambda file: {"q.hada_w1_a": file["q.lora_A.weight"]}, 6.0),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_read_wrongly_is_refused(tmp_path, name):
    a, b, m = factors(torch.randn(8, 6))
    file = {"q.lora_A.weight": a, "q.lora_B.weight": b, "q.weight_m_wdecomp.weight": m[:, None]}
    torch.save(file, tmp_path / "adapter_model.bin")
    assert list(read_any(tmp_path, ReadOptions(alpha=6.0)).factors) == ["q"]
    change, alpha = REFUSED[name]
    torch.save(change(file), tmp_path / "adapter_model.bin")
    with pytest.raises(UserError):
        read_any(tmp_path, ReadOptions(alpha=alpha))
