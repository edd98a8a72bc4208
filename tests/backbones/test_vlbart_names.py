"""Original files: three layouts of the visual embedding, adapters of both kinds, strictly or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dora_vl.adapters.adapter import write_adapter
from dora_vl.adapters.folder import load_adapter
from dora_vl.adapters.foreign import LAYOUTS
from dora_vl.adapters.read import ReadOptions, from_vl_adapter, to_adapter
from dora_vl.backbones.vlbart import DORA_TARGETS, VlBartBackbone
from dora_vl.backbones.vlbart_compose import add_picture_tokens, as_original, load_original, original_state
from dora_vl.errors import UserError
from tests.backbones.tiny_vlbart import batch, tiny


def saved(model: torch.nn.Module, prefix: str = "module.") -> dict[str, Tensor]:
    """As `torch.save(model.state_dict())` of a DDP run: five names of one tensor, a buffer, a prefix."""
    return {f"{prefix}{name}": tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("norm", ["each", "sum", "none"])
def test_the_layout_is_read_from_the_keys(norm: Any, tmp_path: Path) -> None:
    model = tiny(seed=3, visual_norm=norm)
    torch.save(saved(model), tmp_path / "Epoch30.pth")
    state = original_state(tmp_path / "Epoch30.pth")
    assert state.visual_norm == norm
    assert state.feature_width == 8
    other = tiny(seed=4, visual_norm=norm)
    load_original(other, state)
    assert torch.equal(VlBartBackbone(other)(**batch()).logits, VlBartBackbone(model)(**batch()).logits)


def test_it_loads_strictly_and_names_what_does_not_fit() -> None:
    state = saved(tiny())
    del state["module.model.decoder.layers.1.fc1.bias"]
    state["module.surplus.weight"] = torch.zeros(2)
    with pytest.raises(UserError, match=r"1 missing \['model.decoder.layers.1.fc1.bias'\], 1 unexpected"):
        load_original(tiny(), as_original(state, source="LAST.pth"))
    with pytest.raises(UserError):
        as_original({"model.shared.weight": torch.zeros(2, 2)}, source="bart.pth")
    with pytest.raises(UserError):
        load_original(tiny(feature_width=9), as_original(saved(tiny()), source="LAST.pth"))


def adapted_names(model: torch.nn.Module) -> list[str]:
    from dora_vl.core.trainable import matching

    linears = (name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    return matching(linears, DORA_TARGETS, "targets")


def nvlabs(model: torch.nn.Module, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """NVlabs' dictionary, and the whole weights it means (s is 1, the norm is a row's)."""
    generator = torch.Generator().manual_seed(seed)
    state, whole = saved(model, prefix=""), {}
    for name in adapted_names(model):
        weight = state.pop(f"{name}.weight")
        a, b = torch.randn(4, 16, generator=generator), torch.randn(16, 4, generator=generator) * 0.2
        magnitude = weight.norm(dim=1, keepdim=True) * (1 + 0.1 * torch.randn(16, 1, generator=generator))
        changed = weight + b @ a
        whole[f"{name}.weight"] = magnitude * changed / changed.norm(dim=1, keepdim=True)
        state |= {f"{name}.weight_v": weight, f"{name}.weight_m": magnitude, f"{name}.lora_A": a, f"{name}.lora_B": b}
    return state, whole


def test_nvlabs_dora_gives_the_same_forward(tmp_path: Path) -> None:
    trained = tiny(seed=5)
    state, whole = nvlabs(trained, seed=6)
    expected_model = tiny(seed=5)
    expected_model.load_state_dict({**expected_model.state_dict(), **whole})
    expected = VlBartBackbone(expected_model)(**batch()).logits

    base = tiny(seed=7)
    load_original(base, as_original(state, source="LAST.pth"))
    adapter = to_adapter(state, LAYOUTS["nvlabs-vlbart"], config={}, options=ReadOptions(), source="LAST.pth")
    write_adapter(adapter, tmp_path / "adapter")
    assert len(load_adapter(base, tmp_path / "adapter")) == len(whole) == 12
    torch.testing.assert_close(VlBartBackbone(base.eval())(**batch()).logits, expected, atol=1e-5, rtol=1e-4)


def test_vl_adapter_lora_gives_the_same_forward(tmp_path: Path) -> None:
    trained = tiny(seed=8)
    generator = torch.Generator().manual_seed(9)
    state, whole = saved(trained, prefix=""), {}
    for name in adapted_names(trained):
        a, b = torch.randn(4, 16, generator=generator), torch.randn(16, 4, generator=generator) * 0.2
        whole[f"{name}.weight"] = state[f"{name}.weight"] + 0.25 * b @ a
        for task in ("vqa", "gqa"):
            state |= {f"{name}.lora_As.{task}": a, f"{name}.lora_Bs.{task}": b}
    expected_model = tiny(seed=8)
    expected_model.load_state_dict({**expected_model.state_dict(), **whole})
    base = tiny(seed=10)
    load_original(base, as_original(state, source="LAST.pth"))
    plain = from_vl_adapter(state, None, "LAST.pth")
    adapter = to_adapter(plain, LAYOUTS["vl-adapter"], config={}, options=ReadOptions(alpha=1.0), source="LAST.pth")
    write_adapter(adapter, tmp_path / "adapter")
    load_adapter(base, tmp_path / "adapter")
    found, expected = (VlBartBackbone(one.eval())(**batch()).logits for one in (base, expected_model))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_token_ids_are_those_of_the_original() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, **{f"w{number}": number for number in range(4, 50265)}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")))
    add_picture_tokens(tokenizer)
    assert len(tokenizer) == 50465
    ids = {"<extra_id_99>": 50265, "<extra_id_0>": 50364, "<vis_extra_id_99>": 50365, "<vis_extra_id_0>": 50464}
    assert {name: tokenizer.convert_tokens_to_ids(name) for name in ids} == ids
