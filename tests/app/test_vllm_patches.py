"""The patches on classes as vLLM's, written out: a file's tensors become gains in a slot, or nothing is taken in."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dora_vl.serving.vllm import plugin
from dora_vl.serving.vllm.layer import DoRALayer, UnservableAdapter
from tests.app.test_vllm_layer import INPUTS, SIZES, Layer, Wrapper, layer_with, weights, written_out

STEM = "base_model.model.model.attn"


class Model:
    """Reads a file: `LoRAModel`."""

    def __init__(self, loras: dict[str, Any]) -> None:
        self.loras = loras

    @staticmethod
    def _should_skip_module(module_name: str, skip_prefixes: list[str]) -> bool:
        return any(prefix in module_name for prefix in skip_prefixes)

    @classmethod
    def from_lora_tensors(
        cls, lora_model_id: int, tensors: dict[str, Tensor], peft_helper: Any, skip_prefixes: Any = None
    ) -> Model:
        loras: dict[str, Any] = {}
        for name, tensor in tensors.items():
            if not cls._should_skip_module(name, skip_prefixes or []):
                layer, is_a = parse_fine_tuned_lora_name(name)
                vars(loras.setdefault(layer, SimpleNamespace()))["lora_a" if is_a else "lora_b"] = tensor
        return cls(loras)


def parse_fine_tuned_lora_name(name: str, weights_mapper: Any = None) -> tuple[str, bool]:
    stem, _, leaf = name.removesuffix(".weight").rpartition(".lora_")
    if leaf not in ("A", "B"):
        raise ValueError(f"{name} is unsupported LoRA weight")
    return stem.removeprefix("base_model.model."), leaf == "A"


class Packed(SimpleNamespace):
    """`PackedLoRALayerWeights`."""

    @classmethod
    def pack(cls, loras: list[Any]) -> Packed:
        return cls(lora_a=[one and one.lora_a for one in loras], lora_b=[one and one.lora_b for one in loras])


class Manager:
    """`LoRAModelManager` of one layer of two parts."""

    packed: Any

    def __init__(self, layer: Layer) -> None:
        self.modules = {"model.qkv": layer}
        self.model = torch.nn.Module()
        self.lora_config = SimpleNamespace(max_lora_rank=2)
        self.lora_index_to_id: list[int | None] = [None, 7]
        self._registered_adapters: dict[int, Any] = {}

    def _get_lora_layer_weights(self, lora_model: Any, module_name: str) -> Any:
        return lora_model.loras.get(module_name)

    def _create_merged_loras_inplace(self, lora_model: Any) -> None:
        parts = [lora_model.loras.pop(f"model.attn.{part}", None) for part in ("q", "k")]
        lora_model.loras["model.qkv"] = self.packed.pack(parts)

    def activate_adapter(self, lora_id: int) -> bool:
        if lora_id in self.lora_index_to_id:
            return False
        self.lora_index_to_id[0] = lora_id
        return True


@pytest.fixture
def vllm() -> SimpleNamespace:
    """The patched classes."""
    module = ModuleType("lora_model")
    module.parse_fine_tuned_lora_name = parse_fine_tuned_lora_name  # pyright: ignore
    made = SimpleNamespace(**{kind.__name__: type(kind.__name__, (kind,), {}) for kind in (Model, Packed, Manager)})
    module.LoRAModel = made.Model  # pyright: ignore
    plugin.keep_magnitudes(module)
    plugin.pack_magnitudes(made.Packed)
    plugin.give_gains_to_slots(made.Manager)
    made.Manager.packed = made.Packed
    made.parse = module.parse_fine_tuned_lora_name
    return made


def tensors_of(adapter: Any, *, dora: bool = True) -> dict[str, Tensor]:
    """An adapter of q alone, or of both, as its file."""
    found = {}
    for name, a, b, m in zip("qk", adapter.lora_a, adapter.lora_b, adapter.magnitude, strict=True):
        if a is not None:
            found |= {f"{STEM}.{name}.lora_A.weight": a, f"{STEM}.{name}.lora_B.weight": b}
            found |= {f"{STEM}.{name}.lora_magnitude_vector": m} if dora else {}
    return found


def read(vllm: SimpleNamespace, tensors: dict[str, Tensor], *, use_dora: bool = True, **named: Any) -> Any:
    return vllm.Model.from_lora_tensors(3, tensors, SimpleNamespace(use_dora=use_dora), **named)


@pytest.mark.parametrize("without", [None, 1])
def test_a_file_becomes_gains_in_its_slot(vllm: SimpleNamespace, without: int | None) -> None:
    layer, adapter = layer_with(0, -1), weights(3, without=without)
    manager = vllm.Manager(layer)
    found = read(vllm, tensors_of(adapter))
    manager._create_merged_loras_inplace(found)
    manager._registered_adapters[3] = found
    assert manager.activate_adapter(3) is True
    assert manager.activate_adapter(3) is False
    packed, start = found.loras["model.qkv"], 0
    for a, b, size in zip(packed.lora_a, packed.lora_b, SIZES, strict=True):
        if a is not None:
            layer.change[1, start : start + size] = b @ a
        start += size
    x = torch.randn(2, INPUTS)
    torch.testing.assert_close(layer(x)[:1], written_out(layer, adapter, x[:1]), rtol=1e-4, atol=1e-4)
    assert torch.equal(layer(x)[1:], Wrapper.apply(layer, x, layer.base_layer.bias)[1:])
    manager._registered_adapters[4] = lora = read(vllm, tensors_of(adapter, dora=False), use_dora=False)
    manager._create_merged_loras_inplace(lora)
    manager.lora_index_to_id[0] = None
    assert manager.activate_adapter(4) is True
    assert (layer.dora_minus_one == 0).all()


def test_names_of_magnitudes_are_read_as_their_layers(vllm: SimpleNamespace) -> None:
    assert vllm.parse(f"{STEM}.q.lora_magnitude_vector") == ("model.attn.q", False)
    with pytest.raises(ValueError):  # noqa: PT011 - vLLM's own
        vllm.parse(f"{STEM}.q.something")


def test_layers_that_vllm_leaves_out_lose_their_magnitudes_too(vllm: SimpleNamespace) -> None:
    assert read(vllm, tensors_of(weights(3)), skip_prefixes=["attn.k"]).loras.keys() == {"model.attn.q"}


def test_a_layer_that_is_nowhere_is_refused_but_in_a_pipeline(
    vllm: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = SimpleNamespace(world_size=1)
    distributed = ModuleType("vllm.distributed")
    distributed.get_pp_group = lambda: ranks  # pyright: ignore
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.distributed", distributed)
    other = {name.replace("model.attn", "model.layers.9.attn"): one for name, one in tensors_of(weights(4)).items()}
    manager = vllm.Manager(layer_with())
    with pytest.raises(UnservableAdapter):
        manager._create_merged_loras_inplace(read(vllm, {**tensors_of(weights(3)), **other}))
    ranks.world_size = 2
    manager._create_merged_loras_inplace(read(vllm, {**tensors_of(weights(3)), **other}))


def test_listed_wrappers_get_gains_under_their_own_names_and_others_none() -> None:
    names = (*plugin.LINEAR, "CustomLinearWithLoRA")
    kinds = {name: type(name, (Wrapper,), {}) for name in names if name != "RowParallelLinearWithShardedLoRA"}
    kinds["RowParallelLinearWithShardedLoRA"] = type(
        "RowParallelLinearWithShardedLoRA", (kinds["RowParallelLinearWithLoRA"],), {}
    )
    module = SimpleNamespace(_all_lora_classes=tuple(kinds.values()))
    plugin.wrap_layers(module, SimpleNamespace(**kinds))
    found = {one.__name__: one for one in module._all_lora_classes}
    assert list(found) == list(kinds)
    assert {name for name, one in found.items() if issubclass(one, DoRALayer)} == set(plugin.LINEAR)
    assert {name for name, one in found.items() if getattr(one, "shards_inputs", False)} == {
        "RowParallelLinearWithLoRA",
        "RowParallelLinearWithShardedLoRA",
    }
