"""What the plugin does to a vLLM that it knows, to another, and to one that takes DoRA itself; without vLLM."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dora_vl.serving.vllm import adapters, plugin
from dora_vl.serving.vllm import plugin as patches
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
    monkeypatch.setattr(patches, "install", lambda: done.append("patches"))
    monkeypatch.setattr(plugin, "mend", lambda: done.append("mended") or True)
    monkeypatch.delenv(plugin.UNTESTED, raising=False)
    return done


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[tuple[str, str]]]:
    caplog.set_level(logging.INFO, logger="vllm.dora_vl")
    return lambda: [(record.levelname, record.getMessage()) for record in caplog.records]


def version(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(sys.modules["vllm"], "__version__", name, raising=False)


def test_a_known_vllm_is_patched_once(installed: list[str], said: Any) -> None:
    plugin.register()
    plugin.register()
    assert installed == ["patches", "mended"]
    ((level, line),) = said()
    assert level == "INFO"
    assert "lora_ops.bgmv_shrink of vLLM 0.32.1+cpu gives rows of the base the last slot's adapter; mended" in line


def test_another_version_is_left_as_it_is(installed: list[str], said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    version(monkeypatch, "0.99.0")
    plugin.register()
    assert installed == []
    ((level, line),) = said()
    assert level == "WARNING"
    assert "vLLM is left as it is: version 0.99.0 was never tried" in line
    assert f"(tested with vLLM {', '.join(adapters.TESTED)})" in line
    assert "\n" not in line


def test_another_version_can_be_tried(installed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    version(monkeypatch, "0.99.0")
    monkeypatch.setenv(plugin.UNTESTED, "1")
    plugin.register()
    assert installed == ["patches", "mended"]


def changed(**members: Any) -> type:
    return type("Thing", (), {**vars(Thing), **members})


@pytest.mark.parametrize(
    ("thing", "line"),
    [
        (changed(method=lambda self, x: x), "vllm.thing.Thing.method takes (self, x), not (self, x, bias)"),
        (changed(__init__=lambda self, first: None), "vllm.thing.Thing.__init__ does without buffer"),
        (type("Thing", (), {"__init__": Thing.__init__, "method": Thing.method}), "vllm.thing.Thing.made is not there"),
        (None, "vllm.thing.Thing.__init__ is not there"),
    ],
)
def test_places_that_differ_leave_vllm_as_it_is(
    installed: list[str], said: Any, monkeypatch: pytest.MonkeyPatch, thing: type | None, line: str
) -> None:
    if thing is None:
        monkeypatch.delitem(sys.modules, THING)
    else:
        monkeypatch.setattr(sys.modules[THING], "Thing", thing)
    monkeypatch.setenv(plugin.UNTESTED, "1")  # which does not pass over them
    plugin.register()
    assert installed == []
    assert [level for level, _ in said()] == ["WARNING"]
    assert line in said()[0][1]


def test_it_steps_aside_where_vllm_takes_dora_itself(installed: list[str], said: Any) -> None:
    sys.modules["vllm.lora.peft_helper"].PEFTHelper.refuses_dora = False
    plugin.register()
    assert installed == []
    assert [level for level, _ in said()] == ["INFO"]
    assert "takes DoRA adapters itself" in said()[0][1]


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
    patches.accept_configs(helper)
    seen = helper.from_dict({"use_dora": True})
    assert seen._validate_features() == []
    assert seen.use_dora is True
    seen.modules_to_save = ["projector"]
    assert seen._validate_features() == ["whole modules", patches.WHOLE_MODULES]
    assert "dora-vl export --for vllm" in patches.WHOLE_MODULES


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
