"""One plan for all that merges: PEFT's folders of heads and embeddings give PEFT's logits, or all ways refuse them."""

from __future__ import annotations

import json
import re
from argparse import ArgumentParser
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dora_vl import merge_dora, options
from dora_vl.adapters.adapter import read_adapter
from dora_vl.adapters.base_weights import BaseWeights
from dora_vl.adapters.files import WEIGHTS_FILE
from dora_vl.adapters.folder import load_adapter
from dora_vl.adapters.merge import MergedWeights, merge_to_folder
from dora_vl.errors import UserError
from dora_vl.evaluation import merging
from dora_vl.evaluation.analyze import Saved, opened
from tests.adapters.peft_folders import moved_peft
from tests.backbones.tiny_language import write_tiny_language

CHANGES: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "table": {"target_modules": ["q_proj", "embed_tokens"]},
    "both": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "both, kept tied by PEFT": {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole table": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}
CASES = [
    *((False, name) for name in CHANGES if "tied" not in name),
    *((True, name) for name in ("head", "both, kept tied by PEFT", "whole table")),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """By whether its head is its table."""
    root = tmp_path_factory.mktemp("bases")
    return {tied: write_tiny_language(root / f"tied-{tied}", tie_word_embeddings=tied) for tied in (False, True)}


def peft_folder(base: Path, folder: Path, **settings: Any) -> torch.Tensor:
    """Writes PEFT's folder of a moved adapter; returns PEFT's logits."""
    wrapped = moved_peft(AutoModelForCausalLM.from_pretrained(base), **settings).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(torch.linspace(0.8, 1.3, len(parameter)).unsqueeze(1))
        wrapped.save_pretrained(folder)
        return wrapped(ids()).logits


def ids() -> torch.Tensor:
    return torch.arange(14).view(2, 7) * 11 % 200


def ways(base: Path, folder: Path, to: Path) -> list[Callable[[], Any]]:
    """What folds the adapter into its base; each returns the model that came of it."""

    def in_memory() -> Any:
        model = AutoModelForCausalLM.from_pretrained(base)
        load_adapter(model, folder)
        merge_dora(model.eval())
        return model

    def as_folder() -> Any:
        merge_to_folder(read_adapter(folder), base, to / "merged")
        return AutoModelForCausalLM.from_pretrained(to / "merged")

    def as_measured() -> Any:
        model = AutoModelForCausalLM.from_pretrained(base)
        with BaseWeights(base) as weights, opened(Saved(folder), weights) as tuned, torch.no_grad():
            for layer in {*tuned.factors, *tuned.stored_layers}:
                after = torch.cat([rows for _, rows in tuned.blocks(layer)])
                weight = model.get_submodule(layer).weight
                weight.copy_(after.t() if weight.shape != after.shape else after)
        return model

    return [in_memory, as_folder, as_measured]


@pytest.mark.parametrize("use_dora", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["dora", "lora"])
@pytest.mark.parametrize(("tied", "name"), CASES)
def test_all_give_pefts_logits_or_all_refuse(
    tmp_path: Path, bases: dict[bool, Path], tied: bool, name: str, use_dora: bool
) -> None:
    base = bases[tied]
    expected = peft_folder(base, tmp_path / "adapter", use_dora=use_dora, **CHANGES[name])
    model = AutoModelForCausalLM.from_pretrained(base)
    assert float((model(ids()).logits - expected).abs().max()) > 0.05
    if tied and name.startswith("whole"):
        with pytest.raises(UserError):
            load_adapter(model, tmp_path / "adapter")
    else:
        load_adapter(model, tmp_path / "adapter")
        torch.testing.assert_close(model.eval()(ids()).logits, expected, rtol=1e-4, atol=1e-4)
    for merged in ways(base, tmp_path / "adapter", tmp_path):
        if tied:
            with pytest.raises(UserError):
                merged()
        else:
            torch.testing.assert_close(merged().eval()(ids()).logits, expected, rtol=1e-4, atol=1e-4)
    if tied:
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("damage", ["another base", "tokens added", "twice"])
def test_a_copy_of_another_weight_is_no_base(tmp_path: Path, bases: dict[bool, Path], damage: str) -> None:
    base, folder = bases[False], tmp_path / "adapter"
    peft_folder(base, folder, **CHANGES["head"])
    load_adapter(AutoModelForCausalLM.from_pretrained(base), folder)
    tensors = load_file(folder / WEIGHTS_FILE)
    copy = next(key for key in tensors if key.endswith("lm_head.base_layer.weight"))
    tensors |= {
        "another base": {copy: tensors[copy] + 1e-3},
        "tokens added": {copy: torch.cat([tensors[copy], tensors[copy][:1]])},
        "twice": {copy.replace(".base_layer", ""): tensors[copy].clone()},
    }[damage]
    save_file(tensors, folder / WEIGHTS_FILE)
    loads = partial(load_adapter, AutoModelForCausalLM.from_pretrained(base), folder)
    for way in (loads, *ways(base, folder, tmp_path)):
        with pytest.raises(UserError):
            way()


def merged_by_verb(*words: str) -> list[str]:
    parser = ArgumentParser()
    options.merge(parser)
    return list(merging.merge(parser.parse_args(list(words))))


def test_the_verb_compares_what_it_wrote(
    tmp_path: Path, bases: dict[bool, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bases[False]
    peft_folder(base, tmp_path / "adapter", **CHANGES["head"])
    words = ["--adapter", str(tmp_path / "adapter"), "--base", str(base), "--to", str(tmp_path / "merged")]
    lines = merged_by_verb(*words, "--dtype", "bfloat16")
    assert float(re.findall(r"by (\S+) of", lines[-1])[0]) < 2e-2
    assert json.loads((tmp_path / "merged" / "check.json").read_text())["passed"] is True
    read = MergedWeights.read
    monkeypatch.setattr(  # a head that stays the base's
        MergedWeights,
        "read",
        lambda self, stored: self.base.read(stored.name) if stored.name == "lm_head.weight" else read(self, stored),
    )
    with pytest.raises(SystemExit) as ended:
        merged_by_verb(*words, "--dtype", "bfloat16")
    assert ended.value.code == 1
    assert json.loads((tmp_path / "merged" / "check.json").read_text())["passed"] is False
    assert len(merged_by_verb(*words, "--no-check")) == 1
