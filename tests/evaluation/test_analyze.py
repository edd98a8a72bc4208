"""`dora-vl analyze`: the equations by hand, an adapter and its merged folder alike, wrong inputs; pictures of a run."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dora_vl.adapters.adapter import read_adapter
from dora_vl.adapters.folder import save_adapter
from dora_vl.adapters.merge import merge_to_folder
from dora_vl.cli import main
from dora_vl.core import DoRAConfig, adapted_layers, apply_dora
from dora_vl.core.analysis import WeightChange, change_of_blocks, fit_line
from dora_vl.data.example import Answer, Example
from dora_vl.errors import BadSample
from dora_vl.evaluation import test
from dora_vl.evaluation.analyze import Panel, Point
from dora_vl.evaluation.plots import (
    COLUMNS,
    RIGHT,
    SHEET_CELLS,
    TRAIN,
    VALIDATION,
    WRONG,
    chosen_for_sheet,
    loss_unit,
    series,
    smoothed,
    write_contact_sheet,
    write_loss_curve,
)
from dora_vl.evaluation.predictions import Prediction, Predictions
from dora_vl.evaluation.predictor import media_reader
from dora_vl.evaluation.scores import caption, exact, vqa
from dora_vl.evaluation.scores.scored import Scored
from dora_vl.evaluation.test_sets import Tested, TestSet
from tests.adapters.foreign_files import DOWN, Q, saved, tiny_llama
from tests.adapters.peft_folders import moved_peft

BEFORE = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
AFTER = torch.tensor([[6.0, 8.0], [0.0, 1.0], [0.0, -3.0]])


def test_rows_by_hand():
    """Row 1 doubles (|10 - 5|, same direction), row 2 turns by 90 degrees, row 3 turns round and grows by 1."""
    change = change_of_blocks(zip(BEFORE.split(2), AFTER.split(2), strict=True), axis="output")
    assert change.magnitude == pytest.approx((5 + 0 + 1) / 3, rel=1e-12)
    assert change.direction == pytest.approx((0 + 1 + 2) / 3, rel=1e-12)
    assert (change.vectors, change.without_direction) == (3, 0)


def test_columns_by_hand():
    """Columns (3, 1, 0) -> (6, 0, 0) and (4, 0, 2) -> (8, 1, -3)."""
    change = change_of_blocks(zip(BEFORE.split(2), AFTER.split(2), strict=True), axis="input")
    magnitudes = abs(6 - math.sqrt(10)) + abs(math.sqrt(74) - math.sqrt(20))
    cosines = (18 / (6 * math.sqrt(10)), 26 / math.sqrt(74 * 20))
    assert change.magnitude == pytest.approx(magnitudes / 2, rel=1e-12)
    assert change.direction == pytest.approx(1 - sum(cosines) / 2, rel=1e-12)
    assert change.vectors == 2


def test_a_zero_vector_has_no_direction_nothing_is_nothing_and_little_is_not_lost():
    """A turn by 1e-5 changes the cosine by 5e-11, which float32 cannot tell from 1."""
    before, after = (
        torch.tensor([[0.0, 0.0], [0.0, 2.0], [0.0, 0.0]]),
        torch.tensor([[0.0, 3.0], [2.0, 0.0], [0.0, 0.0]]),
    )
    change = change_of_blocks([(before, after)], axis="output")
    assert (change.magnitude, change.direction, change.without_direction) == (1.0, 1.0, 2)
    same = change_of_blocks([(BEFORE, BEFORE.clone())], axis="output")
    assert (same.magnitude, same.direction) == (0.0, 0.0)
    little = change_of_blocks([(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1e-5]]))], axis="output")
    assert little.direction == pytest.approx(0.5e-10, rel=1e-4)


def test_line_by_hand():
    """Points (0,1), (1,3), (2,2): slope 1/2, intercept 3/2, correlation 1/2."""
    line = fit_line([0.0, 1.0, 2.0], [1.0, 3.0, 2.0])
    assert line is not None
    assert (line.slope, line.intercept, line.correlation) == pytest.approx((0.5, 1.5, 0.5))


@pytest.mark.parametrize(("x", "y"), [([], []), ([1.0], [2.0]), ([1.0, 1.0], [2.0, 3.0]), ([1.0, 2.0], [3.0, 3.0])])
def test_no_line_without_two_different_points(x, y):
    assert fit_line(x, y) is None


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


def prediction(number: int, answer: str = "red") -> Prediction:
    return Prediction(id=str(number), images=[f"{number}.png"], question="what color?", truth="red", prediction=answer)


def colors_in(path: Path) -> set[str]:
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    return {"#{:02x}{:02x}{:02x}".format(*pixel) for pixel in np.unique(pixels, axis=0)}


def test_the_loss_curve_shows_training_and_validation(tmp_path: Path) -> None:
    entries = [{"step": step, "loss": 3.0 / step, "learning_rate": 1e-3} for step in range(1, 30)]
    write_loss_curve(
        [*entries, {"step": 10, "eval_loss": 1.0}, {"step": 20, "eval_loss": 0.5}], tmp_path / "a.png", unit="dpo"
    )
    assert {TRAIN, VALIDATION} <= colors_in(tmp_path / "a.png")
    write_loss_curve(entries, tmp_path / "b.png", unit="dpo")
    assert VALIDATION not in colors_in(tmp_path / "b.png")
    assert series([{"step": 1, "loss": "nan"}, {"step": 2}], "loss") == ([], [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("objective", "unit"),
    [
        ({}, "nats per answer token"),
        ({"loss": "sft"}, "nats per answer token"),
        ({"loss": "dpo"}, "dpo"),
        ({"loss": {"dpo": 1.0, "sft": 0.2}}, "dpo + 0.2 sft"),
    ],
)
def test_a_loss_is_named_as_what_it_is(objective: dict[str, Any], unit: str) -> None:
    assert loss_unit(objective) == unit


def test_margin_and_accuracy_have_axes_of_their_own(tmp_path: Path) -> None:
    entries = [{"step": n, "loss": 0.5 - 0.1 * n, "rewards/margin": n - 5.0, "rewards/accuracy": 0.5} for n in range(9)]
    with mock.patch("dora_vl.evaluation.plots.save_png") as saved:
        write_loss_curve(entries, tmp_path / "a.png", unit="dpo")
    figure = saved.call_args[0][0]
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss (dpo)", "margin", "accuracy"]
    assert figure.axes[0].get_yscale() == "linear"  # a loss may be below 0


def test_values_below_0_are_averaged_as_they_are() -> None:
    assert smoothed([-16.0, -16.0, -16.0]) == pytest.approx([-16.0] * 3)
    assert smoothed([-1.0, 1.0]) == pytest.approx([-1.0, (-0.16 + 0.2) / 0.36])
    assert smoothed([4.0, 1.0]) == pytest.approx([4.0, 4.0 ** (0.16 / 0.36)])


def test_the_sheet_is_a_fair_sample_with_a_row_of_mistakes() -> None:
    rows = [prediction(number) for number in range(1000)]
    shares = {row.id: float(int(row.id) < 900) for row in rows}
    fair, mistakes = chosen_for_sheet(rows, shares)
    assert (len(fair), len(mistakes)) == (SHEET_CELLS - COLUMNS, COLUMNS)
    assert all(int(row.id) >= 900 for row in mistakes)
    assert len({row.id for row in fair + mistakes}) == SHEET_CELLS
    assert chosen_for_sheet(rows[:2], {})[1] == []


def test_the_sheet_survives_broken_pictures_and_long_or_empty_text(tmp_path: Path) -> None:
    def picture(row: Prediction) -> Image.Image:
        if row.id.startswith("0"):
            raise BadSample(row.id, "picture 0.png is missing in a folder with a long name somewhere")
        return Image.new("RGB", (64, 64 if row.id.startswith("1") else 500), "white")

    rows = [prediction(number, ("red", "", "a very long answer " * 20)[number % 3]) for number in range(7)]
    write_contact_sheet(rows, picture, tmp_path / "sheet.png", title="one", shares={})
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > sheet.height / 3
    sheets = []
    # Mathematics would draw the first three alike.
    for question, heard in (("$a$", ""), ("$a $", ""), (r"\$a\$", ""), ("$a$", "Look.")):
        rows = [replace(prediction(1), question=question)]
        write_contact_sheet(rows, picture, tmp_path / "sheet.png", title="one", shares={}, subtitles={"1": heard})
        sheets.append((tmp_path / "sheet.png").read_bytes())
    assert len(set(sheets)) == 4


def people(name: str, *answers: str) -> Example:
    extra = {"human_answers": [text for text in answers for _ in range(10 // len(answers))]}
    return Example(id=name, images=("a.png",), question="what?", answers=(Answer(text=answers[0]),), extra=extra)


def task(name: str, examples: Sequence[Example], answers: Mapping[str, str], scored: Scored | None) -> Tested:
    predictions = Predictions(
        answered=[Prediction(id=sample_id, prediction=text) for sample_id, text in answers.items()]
    )
    return Tested(test=TestSet(name=name, examples=examples, score=None), predictions=predictions, scored=scored)


def draw(folder: Path, *tasks: Tested) -> None:
    test.draw(tasks, run_folder=folder, media=media_reader(folder, frames=1))


def test_a_label_stands_in_its_words_and_other_scores_are_no_share(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PATH", "")  # without Java, which takes eight seconds for each score of a caption
    choice = Example(id="1", images=("a.png",), choices=("red", "blue"), extra={"correct": 1})
    clips = [Example(id=n, images=("a.png",), answers=(Answer(text=f"a man {n} runs"),)) for n in ("one", "two")]
    predictions = {"one": "a man one runs", "two": "a dog"}
    choices = task("tvqa", [choice], {"1": "a1"}, exact.video_score([choice], {"1": "a1"}))
    captions = task("coco_caption", clips, predictions, caption.score(clips, predictions))
    with mock.patch.object(test, "write_contact_sheet") as sheet:
        draw(tmp_path, choices, captions, task("tvc", clips, predictions, None))
    (rows, *_), named = sheet.call_args
    assert (rows[0].prediction, rows[0].truth) == ("blue", "blue")
    assert "coco_caption: CIDEr " in named["title"]
    assert "tvc: 2 answers, not scored" in " ".join(named["title"].split())
    assert named["shares"] == {"tvqa/1": 1.0}


@pytest.mark.parametrize("answer", ["the kitten", "dog", ""])
def test_the_sheet_is_green_where_the_score_says_so(tmp_path: Path, answer: str) -> None:
    Image.new("RGB", (8, 8), "white").save(tmp_path / "a.png")
    examples = [people("one", "cat", "kitten")]
    scored = vqa.vqa_score(examples, {"one": answer}, version="before_2021") if answer else None
    draw(tmp_path, task("x", examples, {"one": answer}, scored))
    expected = {"the kitten": {RIGHT}, "dog": {WRONG}, "": set[str]()}[answer]
    assert {RIGHT, WRONG} & colors_in(tmp_path / "contact_sheet.png") == expected
