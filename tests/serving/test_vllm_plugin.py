"""What the plugin does to a vLLM that it knows, to another, and to one that takes DoRA itself; without vLLM."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dora_vl.serving.vllm import plugin
from dora_vl.serving.vllm.layer import DoRALayer, UnservableAdapter
from dora_vl.serving.vllm.plugin import Place, difference
from tests.serving.test_vllm_layer import INPUTS, SIZES, Layer, Wrapper, layer_with, weights, written_out


class Helper:
    """vLLM's reader of an adapter's config."""

    refuses_dora = True
    use_dora = False
    modules_to_save: list[str] | None = None

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Helper:
        helper = cls()
        helper.use_dora = config["use_dora"]
        return helper

    def _validate_features(self) -> list[str]:
        errors = ["whole modules"] if self.modules_to_save else []
        return [*errors, "no DoRA"] if self.use_dora and self.refuses_dora else errors


class Thing:
    """Some class of vLLM."""

    def __init__(self, first: int) -> None:
        self.buffer = first

    def method(self, x: int, bias: int | None = None) -> int:
        return self.buffer

    @classmethod
    def made(cls, tensors: int, device: str = "cpu") -> None:
        return None


THING = "vllm.thing"
SAME = (
    Place(THING, "Thing.__init__", ("self", "first"), ("buffer",)),
    Place(THING, "Thing.method", ("self", "x", "bias")),
    Place(THING, "Thing.made", ("tensors", "device")),
)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A vLLM of our making, with a plugin that was not called yet; what is patched in it, by name."""
    done: list[str] = []
    for name, content in {
        "vllm": {"__version__": "0.32.1+cpu"},
        "vllm.lora": {},
        "vllm.lora.peft_helper": {"PEFTHelper": type("PEFTHelper", (Helper,), {})},
        THING: {"Thing": Thing},
    }.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(plugin, "_done", False)
    monkeypatch.setattr(plugin, "difference", lambda: difference(SAME))
    monkeypatch.setattr(plugin, "install", lambda: done.append("patches"))
    monkeypatch.setattr(plugin, "mend", lambda: done.append("mended") or True)
    monkeypatch.delenv(plugin.UNTESTED, raising=False)
    return done


def changed(**members: Any) -> type:
    return type("Thing", (), {**vars(Thing), **members})


def test_a_known_vllm_is_patched_once(installed: list[str]) -> None:
    plugin.register()
    plugin.register()
    assert installed == ["patches", "mended"]


@pytest.mark.parametrize(
    ("version", "tried", "thing"),
    [
        ("0.99.0", False, Thing),
        # Differing places are not passed over where another version is tried.
        ("0.99.0", True, changed(method=lambda self, x: x)),
        ("0.32.0", False, changed(__init__=lambda self, first: None)),
        ("0.32.0", False, type("Thing", (), {"__init__": Thing.__init__, "method": Thing.method})),
        ("0.32.0", False, None),
    ],
)
def test_another_vllm_is_left_as_it_is_with_one_warning(
    installed: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    version: str,
    tried: bool,
    thing: type | None,
) -> None:
    monkeypatch.setattr(sys.modules["vllm"], "__version__", version, raising=False)
    if thing is None:
        monkeypatch.delitem(sys.modules, THING)
    else:
        monkeypatch.setattr(sys.modules[THING], "Thing", thing)
    if tried:
        monkeypatch.setenv(plugin.UNTESTED, "1")
    plugin.register()
    assert installed == []
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "\n" not in record.getMessage()


def test_another_version_can_be_tried(installed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["vllm"], "__version__", "0.99.0", raising=False)
    monkeypatch.setenv(plugin.UNTESTED, "1")
    plugin.register()
    assert installed == ["patches", "mended"]


def test_it_steps_aside_where_vllm_takes_dora_itself(installed: list[str]) -> None:
    sys.modules["vllm.lora.peft_helper"].PEFTHelper.refuses_dora = False
    plugin.register()
    assert installed == []


def test_places_name_each_patch() -> None:
    """What `patches` puts something in place of was looked at before."""
    names = {target.name for target in plugin.PLACES}
    assert {
        "PEFTHelper._validate_features",
        "parse_fine_tuned_lora_name",
        "LoRAModel.from_lora_tensors",
        "PackedLoRALayerWeights.pack",
        "LoRAModelManager._create_merged_loras_inplace",
        "LoRAModelManager.activate_adapter",
        "_all_lora_classes",
    } <= names


def test_vllm_finds_it_by_its_entry_point() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '[project.entry-points."vllm.general_plugins"]\ndora_vl = "dora_vl.serving.vllm.plugin:register"' in project
    for entry in entry_points(group="vllm.general_plugins", name="dora_vl"):  # none where another checkout is installed
        assert entry.load() is plugin.register


def test_configs_with_dora_pass_and_whole_modules_are_told_what_to_do() -> None:
    helper = type("Helper", (Helper,), {})
    plugin.accept_configs(helper)
    seen = helper.from_dict({"use_dora": True})
    assert seen._validate_features() == []
    assert seen.use_dora is True
    seen.modules_to_save = ["projector"]
    assert seen._validate_features() == ["whole modules", plugin.WHOLE_MODULES]
    assert "dora-vl export --for vllm" in plugin.WHOLE_MODULES


def bgmv_shrink(rows: Tensor, weights: Tensor, output: Tensor, slots: Tensor, scaling: float = 1.0) -> None:
    """vLLM 0.32's product on CPU, written out."""
    output[:] = scaling * torch.einsum("bi,boi->bo", rows, weights[slots].squeeze(1))


def test_rows_of_the_base_get_nothing_once_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (plugin.KERNELS, *plugin.USERS):
        module = ModuleType(name)
        module.bgmv_shrink = bgmv_shrink  # pyright: ignore
        monkeypatch.setitem(sys.modules, name, module)
    assert plugin.mend() is True
    kernels = {sys.modules[name].bgmv_shrink for name in (plugin.KERNELS, *plugin.USERS)}
    assert len(kernels) == 1
    rows, weights, slots = torch.randn(3, 4), torch.randn(2, 1, 5, 4), torch.tensor([0, -1, 1])
    output, expected = torch.zeros(3, 5), torch.zeros(3, 5)
    kernels.pop()(rows, weights, output, slots, 2.0)
    bgmv_shrink(rows, weights, expected, slots.clamp_min(0), 2.0)
    expected[1] = 0
    assert torch.equal(output, expected)
    assert plugin.mend() is False  # nothing to mend any more


# -- the patches on classes as vLLM's, written out ---------------------------------------------------------------

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
        return cls(lora_a=[lora and lora.lora_a for lora in loras], lora_b=[lora and lora.lora_b for lora in loras])


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
    classes = SimpleNamespace(**{kind.__name__: type(kind.__name__, (kind,), {}) for kind in (Model, Packed, Manager)})
    module.LoRAModel = classes.Model  # pyright: ignore
    plugin.keep_magnitudes(module)
    plugin.pack_magnitudes(classes.Packed)
    plugin.give_gains_to_slots(classes.Manager)
    classes.Manager.packed = classes.Packed
    classes.parse = module.parse_fine_tuned_lora_name
    return classes


def tensors_of(adapter: Any, *, dora: bool = True) -> dict[str, Tensor]:
    """An adapter of q alone, or of both, as its file."""
    tensors = {}
    for name, a, b, m in zip("qk", adapter.lora_a, adapter.lora_b, adapter.magnitude, strict=True):
        if a is not None:
            tensors |= {f"{STEM}.{name}.lora_A.weight": a, f"{STEM}.{name}.lora_B.weight": b}
            tensors |= {f"{STEM}.{name}.lora_magnitude_vector": m} if dora else {}
    return tensors


def read(vllm: SimpleNamespace, tensors: dict[str, Tensor], *, use_dora: bool = True, **named: Any) -> Any:
    return vllm.Model.from_lora_tensors(3, tensors, SimpleNamespace(use_dora=use_dora), **named)


@pytest.mark.parametrize("without", [None, 1])
def test_a_file_becomes_gains_in_its_slot(vllm: SimpleNamespace, without: int | None) -> None:
    layer, adapter = layer_with(0, -1), weights(3, without=without)
    manager = vllm.Manager(layer)
    lora_model = read(vllm, tensors_of(adapter))
    manager._create_merged_loras_inplace(lora_model)
    manager._registered_adapters[3] = lora_model
    assert manager.activate_adapter(3) is True
    assert manager.activate_adapter(3) is False
    packed, start = lora_model.loras["model.qkv"], 0
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
    other = {name.replace("model.attn", "model.layers.9.attn"): value for name, value in tensors_of(weights(4)).items()}
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
    wrapped = {wrapper.__name__: wrapper for wrapper in module._all_lora_classes}
    assert list(wrapped) == list(kinds)
    assert {name for name, wrapper in wrapped.items() if issubclass(wrapper, DoRALayer)} == set(plugin.LINEAR)
    assert {name for name, wrapper in wrapped.items() if getattr(wrapper, "shards_inputs", False)} == {
        "RowParallelLinearWithLoRA",
        "RowParallelLinearWithShardedLoRA",
    }
