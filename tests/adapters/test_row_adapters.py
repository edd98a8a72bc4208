"""Rows of one batch under different adapter folders: each has the logits of its adapter alone, whatever it trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from dora_vl.adapters.base_weights import SCHEMES
from dora_vl.adapters.folder import load_adapter, save_adapter
from dora_vl.backbones.model import open_backbone
from dora_vl.core import DoRAConfig, adapted_layers, apply_dora
from dora_vl.core.adapter_slots import Slot, SlotLayer
from dora_vl.core.strength import AppliedAdapter
from dora_vl.errors import UserError
from dora_vl.serving.model import AdapterSlots, Layers, sequences_seen
from tests.adapters import foreign_files
from tests.adapters.peft_folders import moved_peft
from tests.backbones.tiny_language import write_tiny_language
from tests.core.dense_dora import at_strength, move_trained

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "dora": {"targets": ("*.q_proj", "*.down_proj"), "rank": 2, "alpha": 5.0},
    "lora": {"targets": ("*.q_proj", "*.v_proj"), "rank": 3, "alpha": 7.0, "method": "lora"},
    "magnitude": {"targets": ("*.up_proj",), "method": "magnitude"},
    "dvora": {"targets": ("*.q_proj", "*.down_proj", "*.up_proj"), "rank": 3, "method": "dvora"},
    "pissa": {"targets": ("*.q_proj", "*.o_proj"), "rank": 2, "alpha": 3.0, "init": "pissa"},
    "norms": {"targets": ("*.k_proj",), "also_train": {"norms": ("*norm.weight",)}},
    "embedding": {"targets": ("*.q_proj", "*.embed_tokens"), "kinds": ("linear", "embedding"), "rank": 2},
    "whole_embedding": {"targets": ("*.q_proj",), "also_train": {"words": ("*.embed_tokens.weight",)}},
    "head": {"targets": ("lm_head", "*.v_proj"), "rank": 4, "alpha": 6.0},
    "full": {"targets": ("*.gate_proj",), "method": "full"},
}
IDS = torch.randint(32, (len(SETTINGS) + 3, 7), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def tiny_llama() -> Any:
    """Weights large enough that every layer counts in the logits."""
    model = foreign_files.tiny_llama()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.mul_(8)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        model = tiny_llama()
        apply_dora(model, DoRAConfig(dropout=0.0, **settings))
        move_trained(model, seed)
        save_adapter(model, root / name)
    moved_peft(tiny_llama(), seed=5, r=4, lora_alpha=9).save_pretrained(root / "peft")
    return {name: root / name for name in (*SETTINGS, "peft")}


def layers_of(model: Any) -> Layers:
    seen = sequences_seen(model, lambda: model(IDS[:2]), sequences=2, tokens=IDS.shape[1])
    decoder = {name for name, _ in model.named_modules() if name.startswith("model")}
    return Layers(by_sequence=seen, decoder=frozenset(decoder))


def adapter_slots(model: Any, folders: Mapping[str, Path]) -> AdapterSlots:
    adapters = AdapterSlots(model, layers_of(model))
    for name, folder in folders.items():
        adapters.put(name, adapters.read(folder))
    return adapters


@torch.no_grad()
def logits(adapters: AdapterSlots, names: tuple[Slot, ...]) -> Tensor:
    with adapters.batch.holding(names):
        return adapters.model(IDS[: len(names)]).logits


@torch.no_grad()
def mixed(folder: Path, strength: float) -> Any:
    """A plain model whose weights are those of an adapter at a strength, each written out dense."""
    adapted, plain = tiny_llama(), tiny_llama()
    load_adapter(adapted, folder, change_base=False)
    layers = dict(adapted_layers(adapted))
    own = {name: tensor for name, tensor in adapted.named_parameters() if name.rpartition(".")[0] not in layers}
    for name, tensor in plain.named_parameters():
        if name in own:
            tensor.lerp_(own[name].to(tensor.dtype), strength)
    for name, layer in layers.items():
        matrix = layer.as_matrix(layer.weight)
        rows = at_strength(layer, matrix, None, torch.eye(matrix.shape[1]), strength).t()
        plain.get_submodule(name).weight.copy_(layer.from_matrix(rows))
    return plain.eval()


@torch.no_grad()
def test_every_kind_of_adapter_at_a_strength_of_its_own_in_one_batch(folders: dict[str, Path]) -> None:
    rows = [AppliedAdapter(name, 0.3 + 0.1 * number) for number, name in enumerate(folders)]  # 1.3 of the last
    outputs = logits(adapter_slots(tiny_llama(), folders), (None, *rows, AppliedAdapter("dora", 0.0)))
    base = tiny_llama()(IDS).logits
    assert torch.equal(outputs[0], base[0])
    assert torch.equal(outputs[-1], base[len(rows) + 1])
    for number, share in enumerate(rows, 1):
        expected = mixed(folders[share.key], share.strength)(IDS).logits[number]
        assert (expected - base[number]).abs().max() > 1e-2, share
        torch.testing.assert_close(outputs[number], expected, rtol=1e-3, atol=1e-3, msg=str(share))


@torch.no_grad()
def test_the_base_is_never_touched(folders: dict[str, Path]) -> None:
    model = tiny_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapters = adapter_slots(model, folders)
    assert isinstance(model.model.layers[0].self_attn.q_proj, SlotLayer)
    logits(adapters, ("dora", "peft"))
    after = {name.replace(".base.", "."): tensor for name, tensor in model.state_dict().items()}
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_layer_that_is_not_given_rows_is_refused(tmp_path: Path) -> None:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 4}
    config = Qwen3MoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, **sizes,
    )  # fmt: skip

    def model() -> Qwen3MoeForCausalLM:
        torch.manual_seed(0)
        return Qwen3MoeForCausalLM(config).eval()

    settings: Mapping[str, Any] = {
        "experts": {"targets": ("*.experts.down_proj",), "kinds": ("experts",)},
        "router": {"targets": ("*.q_proj",), "also_train": {"router": ("*.mlp.gate.weight",)}},
    }
    for name, chosen in settings.items():
        adapted = model()
        apply_dora(adapted, DoRAConfig(dropout=0.0, **chosen))
        save_adapter(adapted, tmp_path / name)
        plain = model()
        adapters = AdapterSlots(plain, layers_of(plain))
        with pytest.raises(UserError):
            adapters.read(tmp_path / name)
        assert not any(isinstance(module, SlotLayer) for module in plain.modules())


def test_rows_are_those_of_every_call() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.flat, self.sometimes, self.never = (nn.Linear(3, 3) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.rows(x)
            self.sometimes(y)
            return self.flat(y.flatten(0, 1)) + self.sometimes(y.flatten(0, 1))

    model = Odd()
    seen = sequences_seen(model, lambda: model(torch.zeros(2, 5, 3)), sequences=2, tokens=5)
    assert seen == {"", "rows"}


@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
@torch.no_grad()
def test_rows_over_a_quantised_base(kind: Any, tmp_path: Path) -> None:
    """The gain comes from the layer's own product, so nothing is dequantised; base rows keep their bits."""
    pytest.importorskip(SCHEMES[kind].package)
    base = write_tiny_language(tmp_path / "base", hidden_size=64, intermediate_size=64)

    def model() -> Any:
        return open_backbone(str(base), dtype=torch.bfloat16, quantisation=kind).model

    folders = {}
    for seed, (name, targets) in enumerate({"one": ("*.q_proj", "*.down_proj"), "two": ("*.q_proj",)}.items()):
        adapted = model()
        apply_dora(adapted, DoRAConfig(targets=targets, rank=2 + seed, alpha=5.0, dropout=0.0))
        move_trained(adapted, seed)
        save_adapter(adapted, tmp_path / name)
        folders[name] = tmp_path / name
    adapters = adapter_slots(model(), folders)
    outputs = logits(adapters, (None, "one", "two", None)).float()
    plain = model()(IDS[:4]).logits.float()
    if kind != "int8":  # which takes its outliers from all rows together
        assert torch.equal(outputs[0], plain[0])
    for number, name in ((1, "one"), (2, "two")):
        alone = model()
        load_adapter(alone, folders[name], change_base=False)
        expected = alone.eval()(IDS[:4]).logits[number].float()
        spread = expected.abs().max()
        assert (expected - plain[number]).abs().max() > 0.2 * spread
        assert (outputs[number] - expected).abs().max() < 0.05 * spread


def test_half_precision_extras_stay_float32(tmp_path: Path) -> None:
    """A norm that trained in float32 over a bfloat16 base serves its rows so, as it does alone."""
    model = tiny_llama().bfloat16()
    apply_dora(model, DoRAConfig(dropout=0.0, **SETTINGS["norms"]))
    move_trained(model, 3)
    save_adapter(model, tmp_path / "norms")
    adapters = adapter_slots(tiny_llama().bfloat16(), {"norms": tmp_path / "norms"})
    with torch.no_grad():
        expected = model.eval()(IDS[:2]).logits
        outputs = logits(adapters, (None, "norms"))
        assert torch.equal(outputs[0], tiny_llama().bfloat16()(IDS[:2]).logits[0])
    torch.testing.assert_close(outputs[1].float(), expected[1].float(), rtol=2e-2, atol=2e-2)
    assert [name for name, _ in adapted_layers(adapters.model)] == []
