"""What the plugin does to a vLLM that it knows, to another, and to one that takes DoRA itself; without vLLM."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dora_vl.serving.vllm import adapters, plugin
from dora_vl.serving.vllm.adapters import Place, difference


class Helper:
    """vLLM's reader of an adapter's config."""

    refuses_dora = True
    use_dora = False
    modules_to_save: list[str] | None = None

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Helper:
        made = cls()
        made.use_dora = config["use_dora"]
        return made

    def _validate_features(self) -> list[str]:
        said = ["whole modules"] if self.modules_to_save else []
        return [*said, "no DoRA"] if self.use_dora and self.refuses_dora else said


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
    names = {place.name for place in adapters.PLACES}
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
    for found in entry_points(group="vllm.general_plugins", name="dora_vl"):  # none where another checkout is installed
        assert found.load() is plugin.register


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
    for name in (adapters.KERNELS, *adapters.USERS):
        module = ModuleType(name)
        module.bgmv_shrink = bgmv_shrink  # pyright: ignore
        monkeypatch.setitem(sys.modules, name, module)
    assert adapters.mend() is True
    found = {sys.modules[name].bgmv_shrink for name in (adapters.KERNELS, *adapters.USERS)}
    assert len(found) == 1
    rows, weights, slots = torch.randn(3, 4), torch.randn(2, 1, 5, 4), torch.tensor([0, -1, 1])
    output, expected = torch.zeros(3, 5), torch.zeros(3, 5)
    found.pop()(rows, weights, output, slots, 2.0)
    bgmv_shrink(rows, weights, expected, slots.clamp_min(0), 2.0)
    expected[1] = 0
    assert torch.equal(output, expected)
    assert adapters.mend() is False  # nothing to mend any more
