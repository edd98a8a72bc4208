"""Recipes of configs/image_text run as they are on a tiny model of their family: every method, two steps."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from dora_vl.adapters.folder import read_weights
from tasks import llava_instruct
from tests.backbones.tiny_image_text import FAMILIES, write_tiny
from tests.training.tiny_run import write_tiny_data

RUN = {
    ("smolvlm", "256m"): "smolvlm",
    ("qwen2_5_vl", "3b"): "qwen2_5_vl",
    ("internvl3", "2b"): "internvl",
}
SLOWER = {
    ("qwen3_vl", "2b"): "qwen3_vl",
    ("gemma3", "4b"): "gemma3",
    ("llava_onevision", "7b"): "llava_onevision",
}
METHODS = ("dora", "lora", "qdora", "full")
CASES = [
    *((*recipe, family, method) for recipe, family in RUN.items() for method in METHODS),
    *(
        pytest.param(*recipe, family, method, marks=pytest.mark.slow)
        for recipe, family in SLOWER.items()
        for method in METHODS
    ),
]


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    write_tiny_data(folder / "data", samples=8, text_only_blocks=4)
    return folder


@pytest.mark.parametrize(("recipe", "size", "family", "method"), CASES)
def test_the_recipe_runs(
    there: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, size: str, family: str, method: str
) -> None:
    needs = FAMILIES[family].needs
    if needs is not None:
        pytest.importorskip(needs)
    if method == "qdora" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    base = there / family
    if not base.is_dir():
        write_tiny(family, base, width=64)
    output = there / f"{recipe}_{method}"
    given: dict[str, Any] = {
        "config": f"image_text/{recipe}",
        "variant": f"{size}_{method}",
        "model.base": base,
        "data.train": there / "data" / "train.json",
        "data.image_folder": there / "data",
        "data.workers": 0,
        "training.output_dir": output,
        "training.max_steps": 2,
        "training.per_device_train_batch_size": 2,
        "training.gradient_accumulation_steps": 1,
        "training.logging_steps": 1,
    }
    monkeypatch.setattr("sys.argv", ["llava_instruct.py", *(f"--{name}={value}" for name, value in given.items())])
    llava_instruct.main()
    made = json.loads((output / "adapter" / "recipe.json").read_text())
    expected = {"qdora": ("dora", "nf4")}.get(method, (method, None))
    assert (made["adapter"]["method"], made["quantisation"]) == expected
    assert made["dtype"] == "bfloat16"
    weights = read_weights(output / "adapter")
    assert any("magnitude" in name for name in weights) == (expected[0] == "dora")
    assert json.loads((output / "metrics.json").read_text())["train_steps"] == 2


def test_a_variant_that_is_none_is_refused_with_the_list(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.argv", ["llava_instruct.py", "--config=image_text/gemma3", "--variant=27b_dora"])
    with pytest.raises(SystemExit) as ended:
        llava_instruct.main()
    assert ended.value.code == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert told.endswith("no variant '27b_dora'; there are 4b_dora, 4b_lora, 4b_qdora, 4b_full")
