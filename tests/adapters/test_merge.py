"""Merging: one plan for all ways, PEFT's logits or a refusal; the folder answers as the unmerged model, in one go."""

import json
import re
import weakref
from argparse import ArgumentParser
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from dora_vl import merge_dora, options
from dora_vl.adapters.adapter import read_adapter
from dora_vl.adapters.base_weights import BaseWeights
from dora_vl.adapters.files import WEIGHTS_FILE
from dora_vl.adapters.folder import load_adapter, save_adapter
from dora_vl.adapters.merge import MergedWeights, merge_to_folder
from dora_vl.core import DoRAConfig, adapted_layers, apply_dora
from dora_vl.errors import UserError
from dora_vl.evaluation import merging
from dora_vl.evaluation.analyze import Saved, opened
from dora_vl.evaluation.open_model import ModelRequest, find_source
from tests.adapters.foreign_files import saved, tiny_llama
from tests.adapters.peft_folders import moved_peft
from tests.adapters.test_export import adapter_on, published_llava
from tests.backbones.tiny_language import write_tiny_language
from tests.core.dense_dora import move_trained
from tests.core.test_experts import tiny_mixtral, tiny_qwen


def test_half_precision_rounds_once(tmp_path):
    model = tiny_llama().to(torch.bfloat16)
    base = saved(model, tmp_path / "base")
    wrapped = moved_peft(model)
    wrapped.save_pretrained(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    merge_to_folder(adapter, base, tmp_path / "merged")
    merge_to_folder(adapter, base, tmp_path / "wide", dtype=torch.float32)
    narrow, wide = (load_file(tmp_path / side / "model.safetensors") for side in ("merged", "wide"))
    for key, tensor in narrow.items():
        assert (tensor.dtype, wide[key].dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(tensor, wide[key].to(torch.bfloat16)), key
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype="auto").dtype == torch.float32


def test_a_float32_base_is_merged_in_what_the_adapter_was_trained_in(tmp_path):
    base = saved(tiny_llama(), tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    apply_dora(model, DoRAConfig(rank=2, alpha=3.0, targets=("*.q_proj",)))
    move_trained(model)
    save_adapter(model, tmp_path / "adapter", recipe={"base": str(base), "dtype": "bfloat16"})
    merge_to_folder(read_adapter(tmp_path / "adapter"), base, tmp_path / "merged")
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == torch.bfloat16
    assert find_source(ModelRequest(model=str(tmp_path / "merged"))).dtype == "bfloat16"  # asked as it was trained


def test_transposed_layers_and_embeddings(tmp_path):
    """transformers' Conv1D stores [in, out]; PEFT takes an embedding's norm over the vocabulary."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_positions=16, n_embd=12, n_layer=1, n_head=2, tie_word_embeddings=False)
    model = GPT2LMHeadModel(config).eval()
    base = saved(model, tmp_path / "base")
    for target, transposed in (("c_proj", True), ("wte", False)):
        wrapped = moved_peft(GPT2LMHeadModel.from_pretrained(base), target_modules=[target], fan_in_fan_out=transposed)
        wrapped.save_pretrained(tmp_path / target)
        ids = torch.randint(20, (2, 5))
        with torch.no_grad():
            expected = wrapped.eval()(ids).logits
            assert (expected - model(ids).logits).abs().max() > 0.01
            merge_to_folder(read_adapter(tmp_path / target), base, tmp_path / f"merged-{target}")
            plain = GPT2LMHeadModel.from_pretrained(tmp_path / f"merged-{target}").eval()
            torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_layers_that_share_matrices_merge_as_the_model_computes(tmp_path):
    """DVoRA: the shared matrices are cut to each layer, as the model's own layers do it; here of three widths."""
    model, ids = tiny_llama(), torch.randint(32, (2, 7))
    base = saved(model, tmp_path / "base")
    apply_dora(model, DoRAConfig(targets=("*.q_proj", "*.down_proj", "*.up_proj"), rank=3, method="dvora"))
    for _, layer in adapted_layers(model):
        layer.lambda_b.normal_()
        layer.lambda_d.normal_()
        layer.magnitude.mul_(torch.linspace(0.5, 1.6, len(layer.magnitude)))
    save_adapter(model, tmp_path / "adapter")
    merge_to_folder(read_adapter(tmp_path / "adapter"), base, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(plain(ids).logits, model.eval()(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.fixture
def llava(tmp_path):
    """A base folder and an adapter that trained the projector too."""
    base = saved(published_llava(), tmp_path / "base")
    return base, read_adapter(adapter_on(base, tmp_path / "adapter"))


def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path, llava):
    base, adapter = llava
    whole = load_file(base / "model.safetensors")
    key = next(key for key in whole if key.endswith("q_proj.weight") and "language" in key)
    for wrong in (saved(tiny_llama(), tmp_path / "other"), tmp_path, base):
        save_file(whole | {key: whole[key].to(torch.int8)}, base / "model.safetensors")
        with pytest.raises(UserError):
            merge_to_folder(adapter, wrong, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()


def test_the_files_are_read_that_transformers_loads(tmp_path, llava):
    """A folder saved in shards, then whole, keeps the index of the shards; an index may name files anywhere."""
    base, adapter = llava
    index = base / "model.safetensors.index.json"
    save_file({"x": torch.zeros(1)}, base / "old.safetensors")
    index.write_text(json.dumps({"weight_map": {"x": "old.safetensors"}}))
    merge_to_folder(adapter, base, tmp_path / "merged")
    index.unlink()
    merge_to_folder(adapter, base, tmp_path / "alone")
    merged, alone = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "alone"))
    assert merged.keys() == alone.keys()
    assert all(torch.equal(tensor, alone[key]) for key, tensor in merged.items())
    (base / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    for weight_map in (dict.fromkeys(alone, "../elsewhere.safetensors"), [], {"x": 3}):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(UserError, match=re.escape(str(index))):
            BaseWeights(base)


def test_only_an_earlier_merge_is_replaced(tmp_path, llava):
    (base, adapter), target = llava, tmp_path / "merged"
    merge_to_folder(adapter, base, target, shard_bytes=10_000)
    merge_to_folder(adapter, base, target)
    assert sorted(path.name for path in target.glob("*.safetensors")) == ["model.safetensors"]
    (target / "notes.txt").write_text("x")
    other = saved(tiny_llama(), tmp_path / "other")
    for folder in (target, base, tmp_path / "adapter", other):
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(UserError):
            merge_to_folder(adapter, base, folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (target / "notes.txt").unlink()
    merge_to_folder(adapter, target, tmp_path / "twice")
    merge_to_folder(adapter, base, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merged", "other", "twice"]


def test_one_tensor_is_in_memory_at_a_time(tmp_path, llava, monkeypatch):
    base, adapter = llava
    read, tensors, alive = BaseWeights.read, [], []

    def counted(self, name):
        tensor = read(self, name)
        tensors.append(weakref.ref(tensor))
        alive.append(sum(reference() is not None for reference in tensors))
        return tensor

    monkeypatch.setattr(BaseWeights, "read", counted)
    merge_to_folder(adapter, base, tmp_path / "merged")
    assert len(alive) > 40
    assert max(alive) <= 2


LINEAR = DoRAConfig(targets=("*.q_proj",), rank=3, alpha=7.0)
EXPERTS = DoRAConfig(
    targets=("*.q_proj", "*.mlp.experts.*"), kinds=("linear", "experts"), rank=3, alpha=7.0,
    rank_pattern={"*.1.mlp.experts.down_proj": 2},
)  # fmt: skip
IDS = torch.arange(24).view(2, 12) % 40


@pytest.mark.parametrize("tiny", [tiny_mixtral, tiny_qwen])
@pytest.mark.parametrize("config", [LINEAR, EXPERTS], ids=["linear", "experts"])
@torch.no_grad()
def test_merged_experts_answer_as_the_adapted_model(tiny, config, tmp_path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "base")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    assert sum(".experts." in key for key in stored) == 2 * 4 * 3
    apply_dora(model, config)
    move_trained(model, amount=0.1)
    save_adapter(model, tmp_path / "adapter")
    merged = merge_to_folder(read_adapter(tmp_path / "adapter"), tmp_path / "base", tmp_path / "merged")
    assert merged.layers == len(config.targets) * 2 + (2 if config is EXPERTS else 0)
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert written.keys() == stored.keys()
    moved_keys = {key for key in stored if not torch.equal(written[key], stored[key])}
    assert sum(".experts." in key for key in moved_keys) == (24 if config is EXPERTS else 0)
    again = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)


def test_experts_are_refused_by_what_takes_matrices_alone_and_by_another_base(tmp_path: Path) -> None:
    model = tiny_qwen()
    apply_dora(model, EXPERTS)
    save_adapter(model, tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter")
    assert adapter.experts
    with pytest.raises(UserError):
        _ = adapter.factors
    tiny_mixtral().save_pretrained(tmp_path / "other")
    with pytest.raises(UserError):
        merge_to_folder(adapter, tmp_path / "other", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


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
def test_all_give_pefts_logits_or_all_refuse(tmp_path, bases, tied, name, use_dora) -> None:
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


def test_the_verb_compares_what_it_wrote(tmp_path, bases, monkeypatch) -> None:
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
