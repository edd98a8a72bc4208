"""Foreign files: names; and what is refused.

Each layout as it is usually written is in test_written_folders.
"""

from __future__ import annotations

import pytest
import torch

from dora_vl.adapters.foreign_formats import ReadOptions, read_foreign_adapter
from dora_vl.errors import UserError
from tests.adapters.foreign_files import RANK, factors


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
    adapter = read_foreign_adapter(tmp_path, ReadOptions(format="nvlabs-llava", alpha=6.0))
    assert list(adapter.layers) == ["model.language_model.layers.3.self_attn.q_proj"]
    assert set(adapter.extras) == {
        "model.multi_modal_projector.linear_1.weight",
        "model.multi_modal_projector.linear_2.bias",
    }
    torch.testing.assert_close(adapter.factors["model.language_model.layers.3.self_attn.q_proj"].magnitude, m)
    # The keys alone tell LLaVA from plain NVlabs, since the projector is there.
    assert read_foreign_adapter(tmp_path, ReadOptions(alpha=6.0)).layers.keys() == adapter.layers.keys()


def test_a_whole_vlbart_gives_its_adapter_what_trained_and_the_added_rows(tmp_path):
    (a, b, m), rows = factors(torch.randn(8, 6)), torch.randn(210, 4)
    layer, visual = "model.encoder.layers.0.self_attn.q_proj", "model.encoder.visual_embedding.feat_embedding.0.weight"
    file = {f"{layer}.{leaf}": part for leaf, part in {"lora_A": a, "lora_B": b, "weight_m": m[:, None]}.items()}
    file |= {f"{layer}.weight_v": torch.ones(8, 6), f"{layer}.bias": torch.ones(8), visual: torch.ones(4, 4)}
    for tokens in ({}, {"model.shared.weight": rows, "lm_head.weight": rows}):
        torch.save({f"module.{name}": part for name, part in {**file, **tokens}.items()}, tmp_path / "LAST.pth")
        if not tokens:
            with pytest.raises(UserError):
                read_foreign_adapter(tmp_path / "LAST.pth", ReadOptions())
    adapter, added = read_foreign_adapter(tmp_path / "LAST.pth", ReadOptions()), "model.shared.weight[-200:]"
    assert adapter.factors[layer].scale == 1.0
    assert set(adapter.extras) == {f"{layer}.bias", visual, added}
    assert torch.equal(adapter.extras[added], rows[-200:])
    assert adapter.recipe["adapter"]["kept"] == [added]


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
    assert list(read_foreign_adapter(tmp_path, ReadOptions(alpha=6.0)).factors) == ["q"]
    change, alpha = REFUSED[name]
    torch.save(change(file), tmp_path / "adapter_model.bin")
    with pytest.raises(UserError):
        read_foreign_adapter(tmp_path, ReadOptions(alpha=alpha))
