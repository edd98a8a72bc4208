"""A mixture of all eight tasks trains and is tested in this process, and says what it did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dora_vl.errors import SettingError, UserError
from dora_vl.evaluation.predictions import read_predictions
from dora_vl.run.folder import read_log
from dora_vl.training.run import run
from dora_vl.training.seq2seq_tasks import check_same_features
from tests.training.tiny_vlbart_run import ITEMS, vlbart_run, write_vlbart_data, write_vlbart_run

TESTED = ("vqav2", "gqa", "nlvr2", "tvqa", "how2qa")


def test_all_tasks_train_in_one_run_and_are_scored(tmp_path: Path) -> None:
    data = write_vlbart_data(tmp_path / "data")
    tasks = ("vqav2", "gqa", "nlvr2", "coco_caption", "tvqa", "how2qa", "tvc", "yc2c")
    files = {task: str(data / "records" / f"{task}.jsonl") for task in TESTED}
    (data / "features" / "p5.npz").unlink()  # inputs 5 of 7 have no features now
    file = write_vlbart_run(
        tmp_path / "run.yaml",
        data,
        tasks,
        data={"max_bad_share": 0.5, "validation_files": {"gqa": files["gqa"]}},
        training={"use_cpu": True, "optim": "adamw_torch", "learning_rate": 1e-3},
        evaluation={"files": files, "batch_size": 4},
    )
    assert run(vlbart_run(file)) is None
    folder = tmp_path / "run"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics["sets"]) == set(TESTED)
    for task in TESTED:
        assert metrics["sets"][task]["n"] == ITEMS
        assert ("dev-5-0-0" if task == "nlvr2" else f"{task}-5") in metrics["sets"][task]["failed"]
        assert 0 <= metrics["sets"][task]["metrics"]["accuracy"]["value"] <= 100
    assert metrics["sets"]["tvqa"]["asked_with"]["answer_by"] == "choice"
    assert metrics["settings"] == {
        "task_prompt": True,
        "subtitles_first": True,
        "input_tokens": None,
        "choice_by_likelihood": True,
        "mixing": "proportional",
        "batch_size": 21,
        "weight_decay_on": "matrices",
    }
    rows = read_predictions(folder / "predictions.jsonl")["nlvr2"].values()
    assert {row.prediction for row in rows} <= {"true", "false"}
    assert metrics["train_steps"] == 8
    assert metrics["skipped_samples"] > 0
    assert any("eval_loss" in line for line in read_log(folder / "log.jsonl"))
    recipe = json.loads((folder / "adapter" / "recipe.json").read_text())
    assert recipe["backbone"] == "vlbart"
    assert sorted(recipe["tasks"]) == sorted(tasks)


@pytest.mark.parametrize(
    ("section", "change", "key"),
    [
        ("data", {"train": {"vqa": "x.jsonl"}}, "data.train"),
        ("data", {"features": {}}, "data.train"),
        ("data", {"train": {}}, "data.train"),
        ("training", {"per_device_train_batch_size": 4}, "training.per_device_train_batch_size"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, section: str, change: dict, key: str) -> None:
    file = write_vlbart_run(tmp_path / "run.yaml", tmp_path, ("vqav2",), **{section: change})
    with pytest.raises(SettingError) as error:
        vlbart_run(file)
    assert error.value.key == key


@pytest.mark.parametrize("wrong", [{"choices": [], "extra": {}}, {"extra": {"correct": 5}}])
def test_a_test_file_that_cannot_be_scored_stops_the_run_before_it_trains(tmp_path: Path, wrong: dict) -> None:
    data = write_vlbart_data(tmp_path / "data")
    records = data / "records" / "tvqa.jsonl"
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    lines[3] |= wrong
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    file = write_vlbart_run(
        tmp_path / "run.yaml",
        data,
        ("vqav2",),
        data={"features": dict.fromkeys(("vqav2", "tvqa"), str(data / "features"))},
        training={"use_cpu": True},
        evaluation={"files": {"tvqa": str(records)}},
    )
    with pytest.raises(UserError, match="tvqa-3"):
        run(vlbart_run(file))
    assert not (tmp_path / "run" / "adapter").exists()


def test_tests_on_features_computed_in_another_way_are_refused(tmp_path: Path) -> None:
    for folder, side in (("trained", 2), ("tested", 4), ("same", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "settings.json").write_text(json.dumps({"kept": "grid", "merge": side}))
    trained = {"vqav2": str(tmp_path / "trained")}
    check_same_features(trained, {"vqav2": str(tmp_path / "same")})
    check_same_features(trained, {"vqav2": str(tmp_path / "nowhere")})  # cannot be compared
    with pytest.raises(SettingError) as error:
        check_same_features(trained, {"vqav2": str(tmp_path / "tested")})
    assert error.value.key == "evaluation.features"
