"""`dora-vl analyze`: the same numbers from an adapter and from its merged folder, runs, and wrong inputs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dora_vl.adapters.adapter import read_adapter
from dora_vl.adapters.folder import save_adapter
from dora_vl.adapters.merge import merge_to_folder
from dora_vl.cli import main
from dora_vl.core import DoRAConfig, adapted_layers, apply_dora
from dora_vl.core.analysis import WeightChange, change_of_blocks
from dora_vl.evaluation.analyze import Panel, Point
from tests.adapters.foreign_files import DOWN, Q, saved, tiny_llama
from tests.adapters.peft_folders import moved_peft


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(tiny_llama(), tmp_path / "base")
    moved_peft(tiny_llama()).save_pretrained(tmp_path / "dora")
    return tmp_path


def numbers(*words: object) -> dict:
    main(["analyze", *(str(word) for word in words), "--to", "out"])
    return json.loads(Path("out.json").read_text())


def by_layer(panel: dict) -> dict[str, tuple[float, float]]:
    return {p["layer"]: (p["magnitude_change"], p["direction_change"]) for p in panel["points"]}


def test_an_adapter_is_its_merged_folder(folders):
    merge_to_folder(read_adapter(folders / "dora"), folders / "base", folders / "merged", shard_bytes=10_000)
    report = numbers("base", "dora", "merged", "--label", "DoRA", "--label", "merged")
    assert [(panel["label"], panel["method"]) for panel in report["panels"]] == [("DoRA", "dora"), ("merged", "model")]
    adapter, merged = (by_layer(panel) for panel in report["panels"])
    assert len(adapter) == 4
    for layer, values in adapter.items():
        assert merged[layer] == pytest.approx(values, rel=1e-5), layer
    before, after = (read_one(folders / name, f"{Q}.weight") for name in ("base", "merged"))
    change = change_of_blocks([(before, after)], axis="output")
    assert adapter[Q] == pytest.approx((change.magnitude, change.direction), rel=1e-5)
    slope, other = (panel["regression"]["slope"] for panel in report["panels"])
    assert slope == pytest.approx(other, rel=1e-4)
    with Image.open("out.png") as picture:
        assert picture.size[0] > 2 * 400
    assert sorted(p.name for p in folders.iterdir()) == ["base", "dora", "merged", "out.json", "out.png"]


def read_one(folder: Path, name: str) -> torch.Tensor:
    return next(tensors[name] for file in sorted(folder.glob("*.safetensors")) if name in (tensors := load_file(file)))


def test_the_magnitude_change_of_dora_is_its_magnitudes_change(folders):
    """m is the norm of W' by construction, so dM needs no weight: mean |m - m_0|, written out."""
    changes = by_layer(numbers("base", "dora")["panels"][0])
    m = load_file(folders / "dora" / "adapter_model.safetensors")[f"base_model.model.{DOWN}.lora_magnitude_vector"]
    norms = load_file(folders / "base" / "model.safetensors")[f"{DOWN}.weight"].norm(dim=1)
    assert changes[DOWN][0] == pytest.approx(float((m - norms).abs().mean()), rel=1e-5)


@torch.no_grad()
def test_every_method_and_whole_models_side_by_side(folders):
    for method in ("lora", "magnitude", "dvora", "full"):
        model = tiny_llama()
        targets = ("*.q_proj",)
        apply_dora(model, DoRAConfig(targets=targets, rank=2, alpha=3.0, method=method))
        for _, layer in adapted_layers(model):
            for name, parameter in layer.named_parameters(recurse=False):
                if name in ("lora_B", "lambda_b", "magnitude"):
                    parameter.add_(torch.rand_like(parameter))
        if method == "full":
            model.model.layers[1].self_attn.q_proj.weight.mul_(2)
        save_adapter(model, folders / method)
    tuned = tiny_llama()
    for layer in tuned.model.layers:
        layer.self_attn.q_proj.weight.mul_(1.5)
        layer.mlp.up_proj.weight.mul_(1.1)
    saved(tuned, folders / "tuned")
    names = ("lora", "magnitude", "dvora", "full", "tuned")
    panels = {panel["method"]: panel for panel in numbers("base", *names)["panels"]}
    assert list(panels) == ["lora", "magnitude", "dvora", "full", "model"]
    assert [len(panel["points"]) for panel in panels.values()] == [2, 2, 2, 1, 2]
    assert panels["full"]["unchanged_matrices"] == 1
    assert panels["magnitude"]["points"][0]["direction_change"] == pytest.approx(0, abs=1e-12)
    norms = load_file("base/model.safetensors")["model.layers.1.self_attn.q_proj.weight"].norm(dim=1)
    assert by_layer(panels["full"]) == {
        "model.layers.1.self_attn.q_proj": pytest.approx((float(norms.mean()), 0), abs=1e-6)
    }
    only = numbers("base", "tuned", "--layers", "*.1.mlp.up_proj", "--axis", "input")
    assert list(by_layer(only["panels"][0])) == ["model.layers.1.mlp.up_proj"]
    assert only["axis"] == "input"


def test_a_correlation_has_an_interval_over_layers_and_the_paper_s_beside_it() -> None:
    chance, directions = Random(3), [0.1 + 0.01 * number for number in range(24)]

    def panel(noise: float) -> Panel:
        changes = [WeightChange(1.0 - 2 * x + noise * chance.gauss(0, 1), x, 8, 0) for x in directions]
        points = [Point(f"layers.{number}.q_proj", 5, change) for number, change in enumerate(changes)]
        return Panel("tuned", "run", "dora", tuple(points), 0)

    sure, unsure = panel(0.02), panel(0.4)
    for low, high in (sure.interval, unsure.interval):
        assert -1 <= low < high <= 1
    assert sure.interval[1] < -0.9
    assert unsure.interval[1] - unsure.interval[0] > 0.4
    assert replace(sure, points=sure.points[:4]).interval is None


def test_a_runs_checkpoints_are_points_of_one_panel(folders):
    """Ours hold an adapter folder inside, PEFT's Trainer writes the adapter straight into the checkpoint."""
    for step, inside in ((3, "adapter"), (20, "")):
        checkpoint = folders / "run" / f"checkpoint-{step}"
        moved_peft(tiny_llama(), seed=step).save_pretrained(checkpoint / inside)
        (checkpoint / "trainer_state.json").write_text("{}")
    (folders / "run" / "checkpoint-90").mkdir()  # not whole: no trainer_state.json
    points = numbers("base", "run")["panels"][0]["points"]
    assert [point["step"] for point in points] == [3] * 4 + [20] * 4
    alone = numbers("base", "run/checkpoint-20")["panels"][0]
    assert by_layer(alone) == {p["layer"]: (p["magnitude_change"], p["direction_change"]) for p in points[4:]}


def test_wrong_inputs_are_refused_and_write_nothing(folders: Path) -> None:
    tensors = load_file("base/model.safetensors")
    (folders / "empty").mkdir()
    odd = tensors[f"{Q}.weight"].clone()
    odd[0, 0] = float("nan")
    for name, weights in (("broken", {**tensors, f"{Q}.weight": odd}), ("short", {f"{Q}.weight": odd[1:4].clone()})):
        (folders / name).mkdir()
        save_file(weights, folders / name / "model.safetensors", metadata={"format": "pt"})
    (folders / "dora" / "recipe.json").write_text(json.dumps({"base_sha256": "0" * 64}))
    moved_peft(tiny_llama()).save_pretrained(folders / "good")
    for words in (
        *("base nothing", "nothing good", "base empty", "base good good --label a", "base good --layers *.q_porj"),
        *("base good --to a/b/c", "base good base", "base broken", "base short", "base dora"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["analyze", *words.split()])
    assert not list(folders.glob("*.png")) + list(folders.glob("*.json"))
