"""Several adapters on one model: switching is exact in both directions, a combination is the sum of changes."""

from __future__ import annotations

import pytest
import torch

from dora_vl.adapters.folder import save_adapter
from dora_vl.adapters.several import AdapterSet
from dora_vl.core import DoRAConfig, apply_dora, merge_dora, trained_parts
from dora_vl.errors import UserError
from tests.adapters.foreign_files import DOWN, Q, tiny_llama
from tests.core.dense_dora import move, unchanged

SETTINGS = {
    "attention": {"targets": ("*.q_proj", "*.v_proj"), "rank": 2, "alpha": 5.0},
    "mlp": {"targets": ("*.q_proj", "*.down_proj"), "also_train": {"norms": ("*.input_layernorm.weight",)}},
}
IDS = torch.randint(32, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two adapters that overlap in one kind of layer, one of them with trained norms; and what each answers."""
    root, answers = tmp_path_factory.mktemp("adapters"), {}
    for name, settings in SETTINGS.items():
        model = tiny_llama()
        apply_dora(model, DoRAConfig(dropout=0.0, **settings))
        torch.manual_seed(len(name))
        move(model)
        with torch.no_grad():
            if name == "mlp":
                model.model.layers[0].input_layernorm.weight.mul_(1.4)
            answers[name] = model.eval()(IDS).logits
        save_adapter(model, root / name)
    return root, answers


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(IDS).logits


def loaded(folder) -> tuple[AdapterSet, torch.Tensor]:
    model = tiny_llama()
    base = logits(model)
    adapters = AdapterSet(model)
    for name in SETTINGS:
        adapters.load(name, folder / name)
    return adapters, base


def test_switching_is_bitwise_in_every_direction(folders):
    folder, answers = folders
    adapters, base = loaded(folder)
    assert adapters.active == "mlp"
    for name in ("attention", None, "mlp", "attention", "mlp", None):
        adapters.switch(name)
        assert torch.equal(logits(adapters.model), base if name is None else answers[name]), name


def test_active_adapter_trains_alone_and_keeps_what_it_learned(folders):
    folder, answers = folders
    adapters, _ = loaded(folder)
    names = {name for part in trained_parts(adapters.model) for name in part.parameters}
    assert {n for n, p in adapters.model.named_parameters() if p.requires_grad} == names
    assert f"{DOWN}.lora_A" in names
    optimizer = torch.optim.SGD([p for part in trained_parts(adapters.model) for p in part.parameters.values()], lr=0.1)
    adapters.model.train()(IDS, labels=IDS).loss.backward()
    optimizer.step()
    learned = logits(adapters.model)
    assert not torch.equal(learned, answers["mlp"])
    adapters.switch("attention")
    assert torch.equal(logits(adapters.model), answers["attention"])
    adapters.switch("mlp")
    assert torch.equal(logits(adapters.model), learned)


def test_names_are_checked_and_what_cannot_be_switched_is_refused(folders, tmp_path):
    folder, answers = folders
    adapters, base = loaded(folder)
    adapters.combine("copy", {"attention": 1.0, "mlp": 0.0})
    assert torch.equal(logits(adapters.model), answers["attention"])
    apply_dora(model := tiny_llama(), DoRAConfig(targets=("*.q_proj",), rank=3, method="dvora"))
    save_adapter(model, tmp_path / "dvora")
    for wrong in (
        lambda: adapters.load("mlp", folder / "mlp"),
        lambda: adapters.switch("other"),
        lambda: adapters.combine("x", {"other": 1.0}),
        lambda: adapters.load("missing", folder / "missing"),
        lambda: adapters.load("dvora", tmp_path / "dvora"),
        lambda: AdapterSet(model),
    ):
        with pytest.raises(UserError):
            wrong()
    adapters.switch(None)
    assert torch.equal(logits(adapters.model), base)


def test_a_pissa_adapter_leaves_the_base_as_it_was(folders, tmp_path):
    folder, answers = folders
    source = tiny_llama()
    apply_dora(source, DoRAConfig(targets=("*.q_proj",), rank=2, alpha=5.0, dropout=0.0, init="pissa"))
    with torch.no_grad():
        for layer in source.model.layers:
            layer.self_attn.q_proj.lora_B.add_(0.1)
    expected = logits(source)
    save_adapter(source, tmp_path / "pissa")
    adapters, base = loaded(folder)
    adapters.load("pissa", tmp_path / "pissa")
    torch.testing.assert_close(logits(adapters.model), expected, rtol=1e-4, atol=1e-5)
    for name in (None, "attention"):
        adapters.switch(name)
        assert torch.equal(logits(adapters.model), base if name is None else answers[name])
    adapters.combine("half", {"pissa": 0.5})
    merge_dora(adapters.model)
    fresh = tiny_llama()
    half = fresh.get_parameter(f"{Q}.weight") / 2
    merge_dora(source)
    half = half + source.get_parameter(f"{Q}.weight") / 2
    torch.testing.assert_close(adapters.model.get_parameter(f"{Q}.weight"), half, rtol=1e-4, atol=1e-5)


def test_a_combination_that_is_refused_changes_nothing(folders, tmp_path):
    folder, answers = folders
    source = tiny_llama()
    targets = ("*.q_proj", "*.embed_tokens")
    apply_dora(source, DoRAConfig(targets=targets, rank=2, dropout=0.0, kinds=("linear", "embedding")))
    save_adapter(source, tmp_path / "words")
    adapters, _ = loaded(folder)
    adapters.load("words", tmp_path / "words")
    adapters.switch("attention")
    with unchanged(adapters.model), pytest.raises(UserError):
        adapters.combine("both", {"attention": 0.5, "words": 0.5})
    assert adapters.active == "attention"
    assert torch.equal(logits(adapters.model), answers["attention"])
