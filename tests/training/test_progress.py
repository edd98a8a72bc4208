"""A resumed run ends with the sums and the skipped samples of a whole one, and is refused over other samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from dora_vl.data.samples import BadSampleLedger
from dora_vl.errors import UserError
from dora_vl.training.pipeline import TrainingData
from dora_vl.training.progress import BatchStatistics, Progress
from tests.training.launched import launch
from tests.training.tiny_run import json_of, logged_losses, skipped_by, trained, write_run, write_tiny_data

SAME = ("train_samples", "train_steps", "padding_share", "skipped_samples")
ON_CPU = "--training.use_cpu=true"


@pytest.fixture
def run_file(tmp_path: Path, tiny_llava: Path) -> Path:
    """In file order, one bad sample before the checkpoint and one after it, on different ranks where there are two."""
    data = write_tiny_data(tmp_path / "data", samples=48)
    for name in ("red-0.png", "green-45.png"):
        (data.parent / name).unlink()
    records = [{**row, "id": f"held-{row['id']}"} for row in json.loads(data.read_text())[10:16]]
    records[2]["image"] = "none.png"
    (held_out := data.parent / "held.json").write_text(json.dumps(records))
    steps = {"max_steps": 12, "save_strategy": "steps", "save_steps": 6, "eval_strategy": "steps", "eval_steps": 6}
    return write_run(
        tmp_path / "run.yaml",
        tiny_llava,
        data,
        data={"max_bad_share": 0.2, "group_by_modality_length": False, "validation": str(held_out)},
        training={**steps, "train_sampling_strategy": "sequential"},
    )


def numbers(folder: Path) -> dict[str, Any]:
    metrics = json_of(folder / "metrics.json")
    return {name: metrics[name] for name in SAME}


def check(whole: Path, resumed: Path) -> None:
    assert set(skipped_by(whole)) == {"sample-0", "sample-45", "held-sample-12"}
    assert skipped_by(resumed) == skipped_by(whole)
    assert numbers(resumed) == numbers(whole)
    assert numbers(whole)["skipped_samples"] == 2
    progress, metrics = json_of(whole / "checkpoint-6" / "progress.json"), json_of(resumed / "metrics.json")
    assert list(progress["skipped"]) == ["sample-0"]
    assert metrics["train_seconds"] >= round(progress["seconds"], 1) > 0
    assert metrics["samples_per_second"] == pytest.approx(metrics["train_samples"] / metrics["train_seconds"], rel=0.1)


def test_a_resumed_run_ends_with_the_sums_of_a_whole_one(run_file: Path) -> None:
    whole = trained(run_file, ON_CPU, name="whole")
    check(whole, trained(run_file, ON_CPU, f"--resume={whole / 'checkpoint-6'}", name="resumed"))
    names = ("metrics.json", "skipped.jsonl", "adapter/adapter_model.safetensors")
    before, losses = [(whole / name).read_bytes() for name in names], logged_losses(whole)
    trained(run_file, ON_CPU, "--resume=last", name="whole")  # which takes no further step
    assert [(whole / name).read_bytes() for name in names] == before
    assert logged_losses(whole) == losses
    expected, skipped = numbers(whole), skipped_by(whole)
    (whole / "metrics.json").unlink()  # as if it had been stopped at its last step
    (whole / "skipped.jsonl").unlink()
    trained(run_file, ON_CPU, "--resume=last", name="whole")
    assert (numbers(whole), skipped_by(whole)) == (expected, skipped)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_carry_over_what_both_skipped(run_file: Path) -> None:
    whole, resumed = run_file.parent / "whole", run_file.parent / "resumed"
    options = ("--training.deepspeed=zero2", "--training.per_device_train_batch_size=2")
    for folder, more in ((whole, ()), (resumed, (f"--resume={whole / 'checkpoint-6'}",))):
        launch(run_file, *options, f"--training.output_dir={folder}", *more, ranks=2)
    check(whole, resumed)


MEDIA = {"a.png": "1", "b.png": "2", "missing.png": "", "broken.png": "3"}


def progress_over(*ids: str, **media: str) -> Progress:
    statistics = BatchStatistics(BadSampleLedger(max_bad_share=1.0, total_samples=3, source="train.json"))
    statistics.carry_over({"c": "picture broken.png in . cannot be decoded"})
    named = {**MEDIA, **{f"{name}.png": key for name, key in media.items()}}
    return Progress(statistics, None, data_of(ids=lambda: ids, media=lambda: named))


def data_of(**account: Any) -> TrainingData:
    sizes = {"samples": 3, "batch_tokens": 9}
    return TrainingData(train=TensorDataset(torch.zeros(3)), collate=dict, source="train.json", **sizes, **account)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (folder := tmp_path / "checkpoint-40").mkdir()
    progress_over("a", "b", "c").write(folder, torch.device("cpu"), writes=True)
    return folder


@pytest.mark.parametrize(
    ("ids", "media"),
    [("abcd", {}), ("ac", {}), ("acb", {}), ("abc", {"b": "7"}), ("abc", {"b": ""})],  # another picture, none
)
def test_other_samples_and_replaced_files_are_refused(checkpoint: Path, ids: str, media: dict[str, str]) -> None:
    progress_over("a", "b", "c", missing="5", broken="6").check_samples(checkpoint)  # a mended one goes on
    with pytest.raises(UserError):
        progress_over(*ids, **media).check_samples(checkpoint)


def test_a_stream_has_no_account(checkpoint: Path) -> None:
    stream = Progress(BatchStatistics(), None, data_of())
    stream.check_samples(checkpoint)
    stream.write(checkpoint, torch.device("cpu"), writes=True)
    assert json_of(checkpoint / "progress.json")["training_samples"] is None
    progress_over("a").check_samples(checkpoint)
