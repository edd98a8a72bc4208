"""A run for other tools: PEFT adapts the same layers by the same scale; there and back is the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from torch import nn

from dora_vl.cli import main
from dora_vl.core import DoRAConfig, adapted_layers, apply_dora
from dora_vl.run.command_line import read_run, read_run_file
from tests.translation import peer_files


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


RUN = """
model: {base: llava-hf/llava-1.5-7b-hf, template: vicuna_v1}
adapter:
  method: dora
  rank: 6
  alpha: 18
  dropout: 0.0
  targets: ["*.q_proj", "*language_model*.up_proj"]
  rank_pattern: {"*.layers.1.*": 3}
  train_projector: true
data: {train: my.json, image_folder: pictures, max_tokens: 1500, share_pictures: true}
optim: {magnitude_learning_rate: 1.0e-3}
training: {output_dir: runs/my, learning_rate: 3.0e-4, per_device_train_batch_size: 4, deepspeed: zero3,
           warmup_steps: 0.05}
evaluation: {file: test.json}
"""


class Tiny(nn.Module):
    """Names as a LLaVA's."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.ModuleDict({"q_proj": nn.Linear(5, 7), "up_proj": nn.Linear(5, 8)}) for _ in range(2)]
        self.model = nn.ModuleDict(
            {
                "language_model": nn.ModuleDict({"layers": nn.ModuleList(layers)}),
                "tower": nn.ModuleDict({"q_proj": nn.Linear(5, 3), "up_proj": nn.Linear(5, 3)}),
                "multi_modal_projector": nn.Linear(3, 5),
            }
        )


def write(capsys: pytest.CaptureFixture[str], other: str, to: str, *more: str, run: str = RUN) -> str:
    """What is printed."""
    Path("my.yaml").write_text(run, encoding="utf-8")
    main(["translate", *(more or ("my.yaml",)), "--to", other, "--write", to])
    return capsys.readouterr().out


def test_peft_adapts_the_same_layers_by_the_same_scale(capsys: pytest.CaptureFixture[str]) -> None:
    write(capsys, "peft", "adapter_config.json")
    config = LoraConfig.from_pretrained(".")
    config.inference_mode = False
    assert isinstance(config, LoraConfig)
    theirs = get_peft_model(Tiny(), config)
    ours, settings = Tiny(), read_run_file("my.yaml").adapter
    apply_dora(ours, DoRAConfig(targets=settings.targets or (), rank=6, alpha=18.0, rank_pattern=settings.rank_pattern))
    of_peft = scales_of(theirs)
    assert of_peft == {name: (layer.adapter.rank, layer.adapter.scale) for name, layer in adapted_layers(ours)}
    assert len(of_peft) == 5
    trains = {name for name, one in theirs.named_parameters() if one.requires_grad and "lora_" not in name}
    assert trains == {
        f"base_model.model.model.multi_modal_projector.modules_to_save.default.{leaf}" for leaf in ("weight", "bias")
    }
    assert any("lora_magnitude_vector" in name for name, _ in theirs.named_parameters())


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], r".*language_model.*\.(q|up)_proj", "all-linear"], ids=str)
@pytest.mark.parametrize("use_rslora", [True, False])
def test_peft_s_own_configuration_adapts_the_same_here(
    targets: str | list[str], use_rslora: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LoraConfig(r=4, lora_alpha=10, use_dora=True, use_rslora=use_rslora, target_modules=targets)
    config.rank_pattern, config.alpha_pattern = {"up_proj": 2}, {r"layers\.1\.q_proj": 7}
    config.save_pretrained(".")
    theirs = get_peft_model(Tiny(), config)
    main(["translate", "adapter_config.json", "--write", "run.yaml"])
    settings, ours = read_run_file("run.yaml").adapter, Tiny()
    wanted = settings.targets or ()
    own = {name: getattr(settings, name) for name in ("method", "rank", "alpha", "rank_scaling", "rank_pattern")}
    everything = tuple(name for name, one in ours.named_modules() if isinstance(one, nn.Linear))
    apply_dora(
        ours,
        DoRAConfig(
            targets=everything if wanted == ("all-linear",) else wanted, alpha_pattern=settings.alpha_pattern, **own
        ),
    )
    assert scales_of(theirs) == {
        name: (layer.adapter.rank, layer.adapter.scale) for name, layer in adapted_layers(ours)
    }


def scales_of(model: nn.Module) -> dict[str, tuple[int, float]]:
    """Rank and scale of each layer that PEFT has adapted."""
    return {
        name.removeprefix("base_model.model."): (module.r["default"], pytest.approx(module.scaling["default"]))
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    }


def test_every_setting_of_ours_has_its_row(capsys: pytest.CaptureFixture[str]) -> None:
    keys = [f"{section}.{name}" for section, one in yaml.safe_load(RUN).items() for name in one]
    for other, to in (("peft", "a.json"), ("llama-factory", "a.yaml"), ("trl", "b.yaml")):
        said = write(capsys, other, to)
        for key in keys:
            assert f"\n{key} " in said, (other, key)
        assert "NO COUNTERPART" in said


def test_what_only_ours_has_is_one_row(capsys: pytest.CaptureFixture[str]) -> None:
    parts = "  train_projector: true\n  parts: {vision: {targets: [vision], rank: 2}}"
    said = write(capsys, "peft", "a.json", run=RUN.replace("  train_projector: true", parts))
    (row,) = [line for line in said.splitlines() if line.startswith("adapter.parts")]
    assert "NO COUNTERPART: no parts with a rank" in row


@pytest.mark.parametrize("other", ["llama-factory", "trl"])
def test_there_and_back(other: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What both have comes back as it was."""
    write(capsys, other, "there.yaml", run=RUN.replace('"*language_model*.up_proj"', '"*.up_proj"'))
    main(["translate", "there.yaml", "--write", "back.yaml"])
    before, after = read_run_file("my.yaml"), read_run_file("back.yaml")
    for name in ("method", "rank", "alpha", "dropout", "train_projector"):
        assert getattr(after.adapter, name) == getattr(before.adapter, name), name
    assert set(after.adapter.targets or ()) == {"*.q_proj", "*.up_proj"}
    assert (after.model.base, after.model.dtype) == (before.model.base, before.model.dtype)
    assert after.data.max_tokens == 1500
    for name in ("output_dir", "learning_rate", "per_device_train_batch_size", "warmup_steps"):
        assert after.training[name] == before.training[name], name
    if other == "llama-factory":
        assert after.training["deepspeed"] == "zero3"
        assert after.model.template == "vicuna_v1"


def test_llama_factory_and_back_again(capsys: pytest.CaptureFixture[str]) -> None:
    """From their file to ours, and back: the same values under the same names."""
    Path("sets").mkdir()
    Path("sets/dataset_info.json").write_text(peer_files.DATASET_INFO, encoding="utf-8")
    Path("sft.yaml").write_text(peer_files.LLAMA_FACTORY, encoding="utf-8")
    main(["translate", "sft.yaml", "--write", "run.yaml"])
    main(["translate", "run.yaml", "--to", "llama-factory", "--write", "again.yaml"])
    before: dict[str, Any] = yaml.safe_load(peer_files.LLAMA_FACTORY)
    after: dict[str, Any] = yaml.safe_load(Path("again.yaml").read_text(encoding="utf-8"))
    different = {"learning_rate", "dataset", "dataset_dir"}
    shared = set(before) & set(after) - different
    assert len(shared) >= 22
    assert {key: after[key] for key in shared} == {key: before[key] for key in shared}
    assert (after["learning_rate"], after["dataset"]) == (2e-4, "mine,NAME")


def test_a_recipe_s_variant_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    write(capsys, "peft", "adapter_config.json", "llava/llava15", "--variant", "7b_dora")
    made = json.loads(Path("adapter_config.json").read_text(encoding="utf-8"))
    assert (made["r"], made["lora_alpha"], made["use_dora"], made["lora_dropout"]) == (128, 256, True, 0.05)
    assert made["modules_to_save"] == ["multi_modal_projector"]
    assert read_run(["--config=llava/llava15", "--variant=7b_dora"]).adapter.rank == 128


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["my.yaml", "--to", "peft", "--variant", "none"], "no variants there"),
        (["none.yaml", "--to", "peft"], "no such file or recipe"),
        (["my.yaml", "--to", "peft", "--from", "trl"], "give one of them"),
        (["my.yaml", "--variant", "x"], "--variant belongs to --to"),
        (["magnitude.yaml", "--to", "peft"], "which PEFT has not"),
        (["magnitude.yaml", "--to", "trl"], "which TRL has not"),
    ],
)
def test_it_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("my.yaml").write_text(RUN, encoding="utf-8")
    Path("magnitude.yaml").write_text(RUN.replace("method: dora", "method: magnitude"), encoding="utf-8")
    with pytest.raises(SystemExit) as left:
        main(["translate", *words])
    told = capsys.readouterr()
    assert left.value.code == 2
    assert said in told.err
    assert told.err.count("\n") == 1
