"""The commonsense task from start to scores; the published 7B recipes, from tokenizer.model to a merged folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

from dora_vl.adapters.folder import load_adapter, save_adapter
from dora_vl.backbones.loading import load_tokenizer
from dora_vl.backbones.model import open_backbone
from dora_vl.core import apply_dora
from dora_vl.errors import SettingError, UserError
from dora_vl.evaluation.test import read_sets
from dora_vl.evaluation.test_sets import read_results
from dora_vl.run.settings import EvaluationConfig, RunConfig
from dora_vl.run.settings_parser import read_run
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.run import run as run_or_test
from dora_vl.training.run import train
from dora_vl.training.run_samples import read_tables
from dora_vl.training.train_command import pipeline_of
from tests.backbones.tiny_language import write_tiny_language
from tests.training.generated_commonsense import write_commonsense
from tests.training.published_recipe import run_all
from tests.training.tiny_run import json_of, logged_losses, weights_of

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "tests" / "training" / "commonsense_smoke.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("commonsense")
    write_tiny_language(root / "base")
    write_commonsense(root / "data")
    return root


def arguments(folder: Path, output: str, *more: str) -> list[str]:
    """The smoke configuration over the tiny model."""
    changes = {
        "model.base": str(folder / "base"),
        "model.source": "null",
        "model.dtype": "float32",
        "adapter.rank": "4",
        "data.train": json.dumps([str(folder / "data" / "train.json")]),
        "data.max_tokens": "512",
        "evaluation.files": json.dumps({"openbookqa": str(folder / "data" / "test.json")}),
        "training.output_dir": str(folder / output),
    }
    return [f"--config={SMOKE}", *(f"--{name}={value}" for name, value in changes.items()), *more]


def settings(folder: Path, output: str, *more: str) -> RunConfig:
    return read_run(arguments(folder, output, *more))


@pytest.mark.slow
def test_the_smoke_configuration_runs_whole(folder: Path) -> None:
    command = [sys.executable, "tasks/commonsense.py", *arguments(folder, "smoke", "--training.max_steps", "6")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    run = folder / "smoke"
    metrics = json_of(run / "metrics.json")
    assert metrics["train_samples"] == 48
    assert "average" not in metrics  # two ways of scoring the same questions
    for way in ("generation", "likelihood"):
        entry = metrics["sets"][way]
        assert entry["n"] == 40
        assert set(entry["metrics"]) == {"average", "openbookqa"}
        low, high = entry["metrics"]["openbookqa"]["interval_95"]
        assert low <= entry["metrics"]["openbookqa"]["value"] <= high
        assert entry["failed"] == {}
        assert way in str(entry["scoring"])
        assert entry["settings"]["extraction"] == "nvlabs"
    results = read_results(run)
    assert all(item.answer for item in results["likelihood"].items.values())  # one of the four is the likeliest
    assert {len(result.predictions) for result in results.values()} == {40}
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    assert any(name.endswith("up_proj.lora_magnitude_vector") for name in weights)
    assert not any(".o_proj." in name or ".gate_proj." in name for name in weights)
    recipe = json_of(run / "adapter" / "recipe.json")
    assert (recipe["task"], recipe["template"]) == ("commonsense", "alpaca")


def test_the_smoke_run_is_tested_again_without_training(folder: Path) -> None:
    def again(output: str, *more: str) -> None:
        run_or_test(DecoderPipeline(settings(folder, output, "--test_only", "true", *more)))

    for output, more in (("nothing_here", ()), ("tested", ("--overwrite", "true"))):
        with pytest.raises(SettingError) as error:
            again(output, *more)
        assert error.value.key == "test_only"
        assert not (folder / output).exists()
    run = folder / "tested"
    (run / "adapter").mkdir(parents=True)
    task = pipeline_of(settings(folder, "tested"))
    backbone = task.load()
    apply_dora(backbone.model, task.dora_config(backbone))
    save_adapter(backbone.model, run / "adapter")
    weights = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    (run / "metrics.json").write_text(json.dumps({"train_steps": 7, "sets": {"generation": {"n": 1}}}))
    again("tested", "--evaluation.limit", "5")
    metrics = json_of(run / "metrics.json")
    assert (metrics["train_steps"], {name: entry["n"] for name, entry in metrics["sets"].items()}) == (
        *(7, {"generation": 5, "likelihood": 5}),
    )
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == weights
    assert not (run / "log.jsonl").exists()


def test_the_references_validation_split(folder: Path) -> None:
    """The same 8 rows that `train_test_split(test_size=8, shuffle=True, seed=42)` takes out."""
    import datasets

    config = settings(folder, "split")
    rows, held_out = read_tables(config.data, seed=5)
    expected = datasets.load_dataset("json", data_files=str(config.data.train[0]), cache_dir=str(folder / "cache"))
    split = expected["train"].train_test_split(test_size=8, shuffle=True, seed=42)  # type: ignore[index,union-attr]
    assert held_out is not None
    for ours, theirs in ((held_out, split["test"]), (rows, split["train"])):
        assert [turns[0]["text"] for turns in ours.rows["turns"]] == theirs["instruction"][:]


def test_a_sets_answer_is_the_rows_or_found_in_its_output(tmp_path: Path) -> None:
    row = {"instruction": "Is it?", "input": "a text", "output": "the correct answer is solution2"}
    rows = [{**row, "id": "a", "answer": "solution2"}, row, {**row, "output": ""}, {**row, "id": 7, "answer": None}]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    questions, unreadable = read_sets(EvaluationConfig(files={"piqa": str(tmp_path / "test.json")}))
    assert [item.id for item in questions] == ["piqa/a", "piqa/row 2", "piqa/7"]
    assert {(item.answers[0].text, item.extra["kind"], item.extra["output"]) for item in questions} == {
        ("solution2", "piqa", row["output"])
    }
    assert {(item.turns[0].instruction, item.turns[0].input, item.question) for item in questions} == {
        ("Is it?", "a text", "Is it?\na text")
    }
    assert unreadable == {"piqa/row 3": "'output' is empty"}


@pytest.mark.parametrize(
    ("more", "key"),
    [
        (["--data.streaming", "true"], "data.validation_size"),
        (["--adapter.method", "full", "--training.deepspeed", "null"], "adapter.targets"),
        (["--evaluation.files", '{"obqa": "x.json"}'], "evaluation.files"),
    ],
)
def test_settings_that_cannot_be_used_are_named(folder: Path, more: list[str], key: str) -> None:
    with pytest.raises(UserError, match=key):
        train(DecoderPipeline(settings(folder, "mistaken", "--overwrite", "true", *more)))


@pytest.mark.slow
def test_both_stages_and_the_merge(tmp_path: Path) -> None:
    run_all(tmp_path, python=Path(sys.executable))
    runs = tmp_path / "runs"
    assert len(logged_losses(runs / "pretrain")) == 4
    stage_2 = logged_losses(runs / "dora")
    assert len(stage_2) == 6
    assert sum(stage_2[3:]) < sum(stage_2[:3])
    assert len(weights_of(runs / "pretrain")) == 4  # weight and bias of the projector's two linears
    tokenizer = load_tokenizer(str(runs / "merged"))
    picture = tokenizer.convert_tokens_to_ids("<image>")
    ids = torch.tensor([[*tokenizer(" Is it").input_ids, *[picture] * 4, *tokenizer("red?").input_ids[1:]]])
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    adapted = open_backbone(str(runs / "base"))
    before = adapted.model(**inputs).logits
    load_adapter(adapted.model, runs / "dora" / "adapter")
    expected = adapted.model(**inputs).logits
    merged = LlavaForConditionalGeneration.from_pretrained(runs / "merged", dtype=torch.float32)
    error = (merged(**inputs).logits - expected).abs().max()
    assert error < 0.05 * (expected - before).abs().max()  # the merged weights are rounded to bfloat16
