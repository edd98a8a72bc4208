"""Foreign files: names, refusals; what `convert` or `save` writes opens as its source was, in PEFT too or never."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaForCausalLM

from dora_vl.adapters.adapter import write_adapter
from dora_vl.adapters.files import CONFIG_FILE
from dora_vl.adapters.folder import load_adapter, save_adapter
from dora_vl.adapters.foreign_formats import ReadOptions, read_foreign_adapter
from dora_vl.core import DoRAConfig, apply_dora
from dora_vl.core.config import AdaptedPart
from dora_vl.errors import UserError
from tests.adapters.foreign_files import DOWN, RANK, K, Q, dora, factors, saved, tiny_llama
from tests.adapters.peft_folders import moved_peft
from tests.core.dense_dora import move_trained


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


GATE, HEAD, TABLE = "model.layers.0.mlp.gate_proj", "lm_head", "model.embed_tokens"


@torch.no_grad()
def base_model(*, tied: bool = False) -> LlamaForCausalLM:
    model = tiny_llama(attention_bias=True, tie_word_embeddings=tied)
    for weight in model.parameters():
        weight.mul_(8)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(torch.randint(32, (2, 7), generator=torch.Generator().manual_seed(3))).logits


# -- other tools' files ---------------------------------------------------------------------------------------


def foreign(file_of: Callable[[dict[str, tuple[Tensor, Tensor, Tensor]], Path], None], scale: float, **options: Any):
    """A layout: `file_of` writes A, B and m of some layers as its tool does; the truth is written out dense."""

    def write(folder: Path) -> Tensor:
        model = base_model()
        base = saved(model, folder / "base")
        layers = {name: factors(model.get_submodule(name).weight, seed) for seed, name in enumerate((Q, K, DOWN, GATE))}
        source = folder / "source"
        source.mkdir()
        file_of(layers, source)
        adapter = read_foreign_adapter(source, ReadOptions(base=base, **options))
        write_adapter(adapter, folder / "adapter")
        for name, (a, b, m) in layers.items():
            alone = adapter.factors[name].rank == 0
            weight = model.get_submodule(name).weight.detach()
            magnitude = m if adapter.factors[name].magnitude is not None else None
            model.get_submodule(name).weight = torch.nn.Parameter(
                dora(weight, a, torch.zeros_like(b) if alone else b, magnitude, scale)
            )
        return logits(model)

    return write


def nvlabs(
    layers: dict[str, tuple[Tensor, Tensor, Tensor]], folder: Path, alone: tuple[str, ...] = (), *, split: bool = False
) -> None:
    """`split`: with the magnitudes in LLaVA's second file, under the name that they have there."""
    file, other = {}, {}
    for name, (a, b, m) in layers.items():
        leaf = "weight_m_wdecomp.default.weight" if split else "weight_m_wdecomp.weight"
        other[f"base_model.model.{name}.{leaf}"] = m[:, None]
        if name not in alone:
            file |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    torch.save(file if split else {**file, **other}, folder / "adapter_model.bin")
    if split:
        torch.save(other, folder / "non_lora_trainables.bin")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "DORA", "r": RANK, "lora_alpha": 7}))


# -- our own ---------------------------------------------------------------------------------------------------


def own(*, tied: bool = False, **settings: Any) -> Callable[[Path], Tensor]:
    """What `save_adapter` writes with these settings, moved away from its start."""

    def write(folder: Path, name: str = "adapter") -> Tensor:
        model = base_model(tied=tied)
        saved(model, folder / "base")
        apply_dora(model, DoRAConfig(**{"targets": ("*.q_proj", "*.down_proj"), "rank": 3, "alpha": 7.0, **settings}))
        move_trained(model)
        save_adapter(model, folder / name, base_model=str(folder / "base"))
        return logits(model)

    return write


def by_peft(folder: Path) -> Tensor:
    wrapped = moved_peft(base_model(), target_modules=["q_proj", "lm_head"], bias="lora_only")
    wrapped.save_pretrained(folder / "source")
    write_adapter(read_foreign_adapter(folder / "source", ReadOptions()), folder / "adapter")
    return logits(wrapped)


PROJECTOR = {"norm": ("model.norm.weight",)}
GRANULAR = {"magnitude_targets": ("*.o_proj",)}
LAYOUTS: dict[str, tuple[Callable[[Path], Tensor], str]] = {
    "nvlabs": (foreign(nvlabs, 7 / RANK), "LORA"),
    "nvlabs, two files": (foreign(partial(nvlabs, split=True), 7 / RANK), "LORA"),
    "nvlabs, granular": (foreign(partial(nvlabs, alone=(GATE,)), 7 / RANK), "DORA_VL"),
    "nvlabs, magnitudes alone": (foreign(partial(nvlabs, alone=(Q, K, DOWN, GATE)), 7 / RANK), "DORA_VL"),
    "peft, head and biases": (by_peft, "LORA"),
    "head and table": (own(targets=(HEAD, TABLE, "*.q_proj"), kinds=("linear", "embedding")), "LORA"),
    "whole norm": (own(also_train=PROJECTOR), "LORA"),
    "single biases": (own(also_train={"biases": ("*.q_proj.bias",)}), "DORA_VL"),
    "kept rows": (own(also_keep=(f"{TABLE}.weight[-5:]",)), "DORA_VL"),
    "whole head": (own(also_train={"head": ("lm_head.weight",)}), "LORA"),
    "whole tied table": (own(tied=True, also_train={"table": (f"{TABLE}.weight",)}), "DORA_VL"),
    "granular": (own(**GRANULAR), "DORA_VL"),
    "parts": (own(parts={"mlp": AdaptedPart(targets=("*.up_proj",), rank=2, alpha=5.0)}), "LORA"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_opens_here_and_in_peft_alike_or_not(tmp_path: Path, layout: str) -> None:
    write, kind = LAYOUTS[layout]
    expected = write(tmp_path)
    tied = "tied" in layout
    assert float((logits(base_model(tied=tied)) - expected).abs().max()) > 0.01
    model = base_model(tied=tied)
    load_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())["peft_type"] == kind
    if kind == "LORA":
        opened = PeftModel.from_pretrained(base_model(tied=tied), tmp_path / "adapter")
        torch.testing.assert_close(logits(opened), expected, rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(KeyError):
            PeftModel.from_pretrained(base_model(tied=tied), tmp_path / "adapter")
