"""Variants of a run's file: what is merged, what wins, and what a wrong name is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dora_vl.errors import UserError
from dora_vl.run.reading import find_recipe, merged, read_run, recipe_names, variants_of
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.run import train
from tests.training.tiny_run import write_run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A run with two variants; `small` changes one value of a nested section and names its own folder."""
    path = write_run(tmp_path / "run.yaml", tmp_path / "base", tmp_path / "train.json")
    content = yaml.safe_load(path.read_text())
    content["adapter"] = {**content.get("adapter", {}), "rank": 5, "alpha": 7.5}
    content["variants"] = {
        "small": {"adapter": {"rank": 3}, "training": {"output_dir": "runs/small", "max_steps": 11}},
        "lora": {"adapter": {"method": "lora", "targets": ["*.q_proj"]}},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def write(path: Path, **changes: object) -> Path:
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))
    return path


def test_a_variant_lies_over_the_rest_at_every_depth(run_file: Path) -> None:
    plain, small = read_run([f"--config={run_file}"]), read_run([f"--config={run_file}", "--variant", "small"])
    assert (plain.adapter.rank, plain.adapter.alpha, plain.variant) == (5, 7.5, None)
    assert (small.adapter.rank, small.adapter.alpha, small.variant) == (3, 7.5, "small")
    assert small.training == {**plain.training, "output_dir": "runs/small", "max_steps": 11}
    assert small.model == plain.model


def test_merged_replaces_what_is_no_mapping_and_leaves_its_inputs() -> None:
    settings = {"a": {"b": {"c": 1, "d": [1, 2]}, "e": {"f": 1}}, "g": None}
    changes = {"a": {"b": {"d": [3]}, "e": None}, "g": {"h": 2}}
    assert merged(settings, changes) == {"a": {"b": {"c": 1, "d": [3]}, "e": None}, "g": {"h": 2}}
    assert settings["a"] == {"b": {"c": 1, "d": [1, 2]}, "e": {"f": 1}}


@pytest.mark.parametrize(
    "variant", [["--variant", "small"], ["--variant=small"], ["--variant", "lora", "--variant=small"]]
)
def test_the_command_line_wins_over_the_variant_wherever_it_stands(run_file: Path, variant: list[str]) -> None:
    config = read_run(["--adapter.rank=9", *variant, "--config", str(run_file), "--training.seed", "4"])
    assert (config.adapter.rank, config.training["max_steps"], config.training["seed"]) == (9, 11, 4)
    assert config.variant == "small"


def test_a_file_says_which_variant_it_is_without_one(run_file: Path) -> None:
    write(run_file, variant="small")
    assert read_run([f"--config={run_file}"]).adapter.rank == 3
    assert read_run([f"--config={run_file}", "--variant=lora"]).adapter.method == "lora"
    assert read_run([f"--config={run_file}", "--variant=lora"]).adapter.rank == 5


@pytest.mark.parametrize(
    ("changes", "words", "named"),
    [
        ({"variants": ["small"]}, [], "variants"),
        ({"variants": {"small": 3}}, [], "variants"),
        ({"variants": None}, ["--variant=small"], "'small'"),
        ({}, ["--variant=smal"], "lora, small"),
        ({"variant": "smal"}, [], "lora, small"),
        ({"variants": {"small": {"adapter": {"rnk": 3}}}}, ["--variant=small"], "adapter.rnk"),
    ],
)
def test_what_cannot_be_a_variant_is_named(run_file: Path, changes: dict, words: list[str], named: str) -> None:
    with pytest.raises(UserError) as error:
        read_run([f"--config={write(run_file, **changes)}", *words])
    assert named in str(error.value)


def test_a_variant_without_a_file() -> None:
    with pytest.raises(UserError, match="--config"):
        read_run(["--variant", "small"])


def test_a_printed_run_reads_back_as_it_was(run_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "tasks/llava_instruct.py", "--config", str(run_file), "--variant", "small"]
    printed = subprocess.run([*command, "--print_config"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (tmp_path / "printed.yaml").write_text(printed)
    assert read_run([f"--config={tmp_path / 'printed.yaml'}"]) == read_run([f"--config={run_file}", "--variant=small"])


def test_a_recipe_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    llava15 = ROOT / "configs" / "llava" / "llava15.yaml"
    for name in ("llava/llava15", "llava/llava15.yaml", "configs/llava/llava15.yaml"):
        assert find_recipe(name) == llava15
    assert "llava/llava15" in recipe_names()
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "llava15").write_text("{}")
    assert find_recipe("llava/llava15") == Path("llava/llava15")  # a file that is there comes first
    with pytest.raises(UserError, match=r"'llava/lava'.* commonsense/"):
        find_recipe("llava/lava")


def test_every_variant_writes_to_a_folder_of_its_own() -> None:
    folders = []
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        variants = [merged(content, content["variants"][name]) for name in variants_of(path)] or [content]
        folders += [one["training"]["output_dir"] for one in variants]
    assert len(folders) == len(set(folders)) >= 45


@pytest.mark.slow
def test_a_run_writes_its_settings_and_its_variant(tiny_llava: Path, tiny_data: Path, tmp_path: Path) -> None:
    path = write_run(tmp_path / "run.yaml", tiny_llava, tiny_data, training={"use_cpu": True, "max_steps": 1})
    write(path, variants={"wide": {"adapter": {"rank": 3}, "training": {"output_dir": str(tmp_path / "wide")}}})
    config = read_run([f"--config={path}", "--variant=wide", "--data.workers=0"])
    train(DecoderPipeline(config))
    written = json.loads((tmp_path / "wide" / "settings.json").read_text())
    assert (written["variant"], written["adapter"]["rank"], written["data"]["workers"]) == ("wide", 3, 0)
    assert written["adapter"]["alpha"] == config.adapter.alpha
