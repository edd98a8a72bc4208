"""VL-BART: a mixture of all tasks, alone and on two ranks whatever DeepSpeed splits, and what bad samples change."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_vl.data.example import iterate_examples, write_examples
from dora_vl.errors import SettingError
from dora_vl.evaluation.predictions import read_predictions
from dora_vl.run.folder import is_finished_run, read_log
from dora_vl.run.settings_parser import read_run
from dora_vl.training.run import run
from dora_vl.training.seq2seq_tasks import check_same_features
from tests.training.launched import launch
from tests.training.tiny_run import assert_same_weights, logged, losses_of, weights_of
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
    again = read_run([f"--config={file}", "--resume=if_stopped"])
    assert is_finished_run(again)  # `settings.json` has what the person has set, not what the run derives


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


TASKS = ("vqav2", "gqa", "nlvr2", "coco_caption", "tvqa", "how2qa", "tvc", "yc2c")
SHARED = "model.shared.weight"


def launched(config: Path, *overrides: str, ranks: int) -> None:
    launch(config, *overrides, ranks=ranks, program=("tests/training/tiny_vlbart_run.py",))


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vlbart")
    data = write_vlbart_data(folder / "data")
    return write_vlbart_run(folder / "run.yaml", data, TASKS, data={"closed_answers": {"gqa": 5}})


@pytest.fixture(scope="module")
def one_rank(run_file: Path) -> Path:
    folder = run_file.parent / "one"
    launched(run_file, f"--training.output_dir={folder}", "--training.deepspeed=zero0", ranks=1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero0", "zero2", "zero3", "null"])
def test_two_ranks_take_the_steps_of_one(run_file: Path, one_rank: Path, stage: str) -> None:
    folder = run_file.parent / stage
    launched(run_file, f"--training.output_dir={folder}", f"--training.deepspeed={stage}", ranks=2)
    assert len(losses_of(folder)) == len(TASKS)
    torch.testing.assert_close(losses_of(folder), losses_of(one_rank), atol=2e-5, rtol=1e-5)
    assert_same_weights(folder, one_rank, atol=2e-5, rtol=1e-4)
    weights = weights_of(folder)
    assert sum(".answer_heads.gqa." in name for name in weights) == 6
    assert sum(name.endswith("lora_B.weight") and bool(weights[name].any()) for name in weights) == 6


@contextmanager
def base_with_other_rows(base: Path, *, rows: int) -> Iterator[None]:
    """The base as another draw of its last rows would have left it."""
    file = base / "model.safetensors"
    whole = file.read_bytes()
    tensors = load_file(file)
    tensors[SHARED][-rows:] += 1.0
    save_file(tensors, file, metadata={"format": "pt"})
    try:
        yield
    finally:
        file.write_bytes(whole)


@pytest.mark.slow
def test_a_run_from_a_checkpoints_adapter_has_its_random_rows(run_file: Path) -> None:
    """Frozen rows come from the adapter folder that carries them, not from the base as it is now."""
    first, second = run_file.parent / "first", run_file.parent / "second"
    options = ("--training.deepspeed=zero3", "--training.save_strategy=steps", "--training.save_steps=4")
    launched(run_file, *options, f"--training.output_dir={first}", "--training.max_steps=4", ranks=1)
    kept = "base_model.model.model.shared.weight[-200:]"
    adapter = first / "checkpoint-4" / "adapter"
    before = load_file(adapter / "adapter_model.safetensors")[kept]
    initial = (f"--training.output_dir={second}", f"--adapter.initial={adapter}", "--training.max_steps=1")
    with base_with_other_rows(run_file.parent / "data" / "base", rows=before.shape[0]):
        launched(run_file, *options, *initial, ranks=1)
    assert torch.equal(weights_of(second)[kept], before)


FOUR_TASKS = ("vqav2", "nlvr2", "tvqa", "coco_caption")
MISSING = (1, 4)  # of six pictures


def without_missing(data: Path, folder: Path) -> dict[str, str]:
    """Each task's records but those that need one of the missing pictures."""
    files = {}
    for task in FOUR_TASKS:
        examples = iterate_examples(data / "records" / f"{task}.jsonl")
        usable = [
            example
            for example in examples
            if not any(
                Path(path).stem == f"p{number}"
                for number in MISSING
                for path in (*example.images, *([example.video.path] if example.video else []))
            )
        ]
        files[task] = str(folder / f"{task}.jsonl")
        write_examples(Path(files[task]), usable)
    return files


@pytest.fixture(scope="module")
def run_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("skipped")
    data = write_vlbart_data(folder / "data")
    for number in MISSING:
        (data / "features" / f"p{number}.npz").unlink()
    left = without_missing(data, folder / "left")
    whole = {task: str(data / "records" / f"{task}.jsonl") for task in FOUR_TASKS}
    paths = []
    for name, records in (("whole", whole), ("left", left)):
        settings = {"train": records, "validation_files": records, "batch_size": 60, "max_bad_share": 0.9}
        paths.append(write_vlbart_run(folder / f"{name}.yaml", data, FOUR_TASKS, data=settings))
    return paths[0], paths[1]


def in_this_process(config: Path, *overrides: str) -> None:
    assert run(vlbart_run(config, *overrides)) is None


@pytest.fixture(scope="module")
def expected(run_files: tuple[Path, Path]) -> Path:
    folder = run_files[1].parent / "expected"
    in_this_process(run_files[1], f"--training.output_dir={folder}", "--training.eval_strategy=epoch")
    return folder


@pytest.mark.parametrize(
    ("train", "accumulation"),
    [(in_this_process, 1), (in_this_process, 5), pytest.param(partial(launched, ranks=2), 3, marks=pytest.mark.slow)],
    ids=["at once", "accumulated", "two ranks"],
)
def test_losses_and_weights_are_those_of_the_usable_samples(run_files, expected, train, accumulation) -> None:
    folder = run_files[0].parent / f"{train.__name__}-{accumulation}"
    options = ["--training.eval_strategy=epoch", f"--training.gradient_accumulation_steps={accumulation}"]
    train(run_files[0], f"--training.output_dir={folder}", *options)
    assert len(losses_of(folder)) == len(FOUR_TASKS)
    torch.testing.assert_close(losses_of(folder), losses_of(expected), atol=2e-5, rtol=1e-5)
    assert_same_weights(folder, expected, atol=2e-5, rtol=1e-4)
    (validated,), (other,) = (logged(run, "eval_loss") for run in (folder, expected))
    assert validated["eval_loss"] == pytest.approx(other["eval_loss"], abs=2e-5)
    assert validated["eval_samples"] == other["eval_samples"]
    assert validated["eval_skipped"] > other["eval_skipped"] == 0
