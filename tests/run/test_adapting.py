"""A run's adapter section is the core's own settings: each reaches the core and the adapter folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dora_vl import trained_parts
from dora_vl.adapters.settings import BY_NAME, OWN_FIELDS
from dora_vl.core import adapted_layers, apply_dora
from dora_vl.core.config import AdaptedPart, AdapterSettings, DoRAConfig
from dora_vl.errors import UserError
from dora_vl.run.reading import read_run
from dora_vl.run.settings import AdapterConfig
from dora_vl.training.parts import core_config

OTHER: dict[str, Any] = {
    "method": "lora",
    "rank": 6,
    "alpha": 5.0,
    "dropout": 0.25,
    "dropout_mode": "whole_change",
    "detach_norm": False,
    "rank_scaling": "sqrt",
    "kinds": ("linear", "embedding"),
    "magnitude_targets": ("*.o_proj",),
    "rank_pattern": {"*.v_proj": 4},
    "alpha_pattern": {"*.v_proj": 3.0},
    "parts": {"heads": AdaptedPart(targets=("*.k_proj",), rank=2, alpha=7.0)},
    "init": "orthogonal",
    "random_seed": 9,
    "opaque_layers": ("a.B",),
    "also_train": {"norms": ("*layernorm.weight",)},
    "also_keep": ("*.norm.weight",),
}
"""A value of each setting that is not its default."""


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=30, num_hidden_layers=2, **sizes))


def test_every_setting_reaches_the_core() -> None:
    assert OTHER.keys() == {field.name for field in dataclasses.fields(AdapterSettings)}
    defaults = AdapterSettings()
    assert all(getattr(defaults, name) != value for name, value in OTHER.items())
    config = core_config(AdapterConfig(**OTHER), tiny(), targets=("*.q_proj",))
    assert config == DoRAConfig(targets=("*.q_proj",), **OTHER)
    assert core_config(AdapterConfig(targets=("*.up_proj",)), tiny(), targets=("*.q_proj",)).targets == ("*.up_proj",)


def test_every_setting_is_in_the_folder_by_itself_or_by_names() -> None:
    assert set(OWN_FIELDS) | BY_NAME == OTHER.keys()
    assert not set(OWN_FIELDS) & BY_NAME


def test_yaml_gives_parts_with_what_they_leave_out(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(
        "model: {base: b}\ndata: {train: t.json}\n"
        "adapter: {targets: [language], parts: {vision: {targets: [vision], rank: 8}},\n"
        "  also_train: {tokens: ['*embed*']}}\n"
        "optim: {rates: {vision: 1.0e-5, tokens: 2.0e-5}}\n"
    )
    config = read_run([f"--config={tmp_path / 'my.yaml'}"])
    assert config.adapter.parts == {"vision": AdaptedPart(targets=("vision",), rank=8, alpha=None)}
    assert config.adapter.also_train == {"tokens": ("*embed*",)}
    assert config.optim.rates == {"vision": 1e-5, "tokens": 2e-5}


ANY = AdaptedPart(targets=("*",))


@pytest.mark.parametrize(
    "values",
    [
        {"rank": 0},
        {"parts": {"magnitude": ANY}},
        {"parts": {"x": AdaptedPart(targets=())}},
        {"parts": {"x": ANY}, "also_train": {"x": ("*",)}},
        {"parts": {"x": ANY}, "method": "full"},
        {"parts": {"x": AdaptedPart(targets=("*",), rank=3)}, "method": "dvora"},
    ],
)
def test_settings_that_contradict_each_other_are_refused_at_once(values: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        AdapterConfig(**values)


CONFIG = DoRAConfig(
    targets=("*.q_proj", "*.v_proj"),
    rank=6,
    alpha=9.0,
    dropout=0.0,
    rank_pattern={"*.1.self_attn.v_proj": 3},
    parts={"feed": AdaptedPart(targets=("*.0.mlp.*",), rank=2, alpha=8.0), "keys": AdaptedPart(targets=("*.k_proj",))},
    also_train={"tokens": ("model.embed_tokens.weight",)},
)


def test_each_part_has_its_rank_scale_and_name() -> None:
    model = tiny()
    names = apply_dora(model, CONFIG)
    assert len(names) == 4 + 3 + 2
    layers = {name: layer.adapter for name, layer in adapted_layers(model)}
    assert list(layers) == names
    assert {(name.split(".")[-1], adapter.rank, adapter.scale) for name, adapter in layers.items()} == {
        ("q_proj", 6, 1.5), ("v_proj", 6, 1.5), ("v_proj", 3, 3.0), ("k_proj", 6, 1.5),
        ("gate_proj", 2, 4.0), ("up_proj", 2, 4.0), ("down_proj", 2, 4.0),
    }  # fmt: skip
    counts = {part.name: len(part.parameters) for part in trained_parts(model)}
    expected = {f"{part}.{factor}": n for part, n in (("dora", 4), ("feed", 3), ("keys", 2)) for factor in ("A", "B")}
    assert counts == {**expected, "dora.magnitude": 4, "feed.magnitude": 3, "keys.magnitude": 2, "tokens": 1}
    assert {(part.part, part.factor) for part in trained_parts(model) if not part.adapts} == {("tokens", None)}


@pytest.mark.parametrize(
    "parts", [{"x": ("*.qq_proj",)}, {"x": ("*.k_proj",), "y": ("*.layers.0.*",)}, {"x": ("*_proj",)}]
)
def test_parts_that_hit_nothing_or_each_other_are_refused(parts: dict[str, tuple[str, ...]]) -> None:
    model = tiny()
    before = [name for name, _ in model.named_parameters()]
    adapted = {name: AdaptedPart(targets=globs) for name, globs in parts.items()}
    with pytest.raises(UserError):
        apply_dora(model, DoRAConfig(targets=("*.q_proj",), parts=adapted))
    assert [name for name, _ in model.named_parameters()] == before
    apply_dora(model, DoRAConfig(targets=(), parts={"keys": AdaptedPart(targets=("*.k_proj",))}))  # parts alone
