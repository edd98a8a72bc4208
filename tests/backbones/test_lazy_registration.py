"""A composed tower is known to transformers after `import dora_vl`, in any order, and that import stays light."""

from __future__ import annotations

import subprocess
import sys

import pytest

OPENS = (
    "from transformers import AutoConfig, AutoModel; "
    "config = AutoConfig.for_model('dora_grid_tower', architecture='resnet18', hidden_size=512); "
    "tower = AutoModel.from_config(config); "
    "print(type(config).__name__, type(tower).__name__)"
)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "before",
    [
        "import dora_vl",
        pytest.param("import dora_vl; from transformers import PreTrainedModel", marks=pytest.mark.slow),
        pytest.param("import transformers, dora_vl", marks=pytest.mark.slow),
        pytest.param("import transformers.models.auto.modeling_auto, dora_vl", marks=pytest.mark.slow),
    ],
)
def test_any_import_order_opens_a_grid_tower(before: str) -> None:
    assert run(f"{before}; {OPENS}") == "GridTowerConfig GridTower"


@pytest.mark.slow
@pytest.mark.parametrize("module", ["tower_config", "tower_sources", "towers"])
def test_every_vision_module_can_be_the_first_import_of_a_process(module: str) -> None:
    """The hook must not ask a module for its registration while that module is still being imported."""
    done = subprocess.run(
        [sys.executable, "-c", f"import dora_vl.backbones.{module}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("version", "registered"),
    [("5.20.0", {"dora_vl.backbones.tower_config", "dora_vl.backbones.towers"}), ("4.57.1", set()), ("6.0.0", set())],
)
def test_only_the_major_version_that_we_know(
    monkeypatch: pytest.MonkeyPatch, version: str, registered: set[str]
) -> None:
    """vLLM's plugin brings us into processes with an older transformers, where its own import must not fail for us."""
    import transformers.models.auto.modeling_auto  # both tables stand then

    from dora_vl import backbones

    imported: set[str] = set()
    real = backbones.import_module
    monkeypatch.setattr(transformers, "__version__", version)
    monkeypatch.setattr(backbones, "import_module", lambda name: imported.add(name) or real(name))
    backbones.register_with_transformers()
    assert imported == registered
