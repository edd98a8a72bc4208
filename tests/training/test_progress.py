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
from dora_vl.run.reading import read_run_file
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.pipeline import TrainingData
from dora_vl.training.progress import BatchStatistics, Progress, account_of
from dora_vl.training.run import train
from tests.training.test_two_ranks import launch
from tests.training.tiny_run import write_run, write_tiny_data

SAME = ("train_samples", "train_steps", "padding_share", "skipped_samples")


@pytest.fixture
def run_file(tmp_path: Path, tiny_llava: Path) -> Path:
    """In file order, one bad sample before the checkpoint and one after it, on different ranks where there are two."""
    data = write_tiny_data(tmp_path / "data", samples=48)
    for name in ("red-0.png", "green-45.png"):
        (data.parent / name).unlink()
    records = json.loads(data.read_text())[10:16]  # pictures that training reads as well, but for one
    (held_out := data.parent / "held.json").write_text(
        json.dumps(
            [
                {**one, "id": f"held-{one['id']}", **({"image": "none.png"} if n == 2 else {})}
                for n, one in enumerate(records)
            ]
        )
    )
    return write_run(
        tmp_path / "run.yaml",
        tiny_llava,
        data,
        data={"max_bad_share": 0.2, "group_by_modality_length": False, "validation": str(held_out)},
        training={
            **{"max_steps": 12, "save_strategy": "steps", "save_steps": 6, "eval_strategy": "steps", "eval_steps": 6},
            "train_sampling_strategy": "sequential",
        },
    )


def results(folder: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    lines = (folder / "skipped.jsonl").read_text().splitlines()
    return json.loads((folder / "metrics.json").read_text()), [json.loads(line) for line in lines]


def check(whole: Path, resumed: Path) -> None:
    (metrics, skipped), (expected, named) = results(resumed), results(whole)
    assert {one["id"] for one in named} == {"sample-0", "sample-45", "held-sample-12"}
    assert sorted(map(str, skipped)) == sorted(map(str, named))
    assert {key: metrics[key] for key in SAME} == {key: expected[key] for key in SAME}
    assert expected["skipped_samples"] == 2
    progress = json.loads((whole / "checkpoint-6" / "progress.json").read_text())
    assert list(progress["skipped"]) == ["sample-0"]
    assert metrics["train_seconds"] >= round(progress["seconds"], 1) > 0
    assert metrics["samples_per_second"] == pytest.approx(metrics["train_samples"] / metrics["train_seconds"], rel=0.1)


def test_a_resumed_run_ends_with_the_sums_of_a_whole_one(run_file: Path) -> None:
    whole, resumed = run_file.parent / "whole", run_file.parent / "resumed"
    train(DecoderPipeline(read_run_file(run_file, "--training.use_cpu=true", f"--training.output_dir={whole}")))
    options = (f"--training.output_dir={resumed}", f"--resume={whole / 'checkpoint-6'}")
    train(DecoderPipeline(read_run_file(run_file, "--training.use_cpu=true", *options)))
    check(whole, resumed)
    before = results(whole)
    again = read_run_file(run_file, "--training.use_cpu=true", f"--training.output_dir={whole}", "--resume=last")
    train(DecoderPipeline(again))
    assert results(whole) == before
    (whole / "metrics.json").unlink()  # as if it had been stopped at its last step
    (whole / "skipped.jsonl").unlink()
    train(DecoderPipeline(again))
    metrics, skipped = results(whole)
    assert {key: metrics[key] for key in SAME} == {key: before[0][key] for key in SAME}
    assert skipped == before[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_carry_over_what_both_skipped(run_file: Path) -> None:
    whole, resumed = run_file.parent / "whole", run_file.parent / "resumed"
    options = ("--training.deepspeed=zero2", "--training.per_device_train_batch_size=2")
    for folder, more, port in ((whole, (), 29671), (resumed, (f"--resume={whole / 'checkpoint-6'}",), 29672)):
        launch(run_file, *options, f"--training.output_dir={folder}", *more, ranks=2, port=port)
    check(whole, resumed)


MEDIA = {"a.png": "1", "b.png": "2", "missing.png": "", "broken.png": "3"}


def progress_over(*ids: str, **media: str) -> Progress:
    statistics = BatchStatistics(BadSampleLedger(max_bad_share=1.0, total_samples=3, source="train.json"))
    statistics.carry_over({"c": "picture broken.png in . cannot be decoded"})
    named = {**MEDIA, **{f"{name}.png": key for name, key in media.items()}}
    return Progress(statistics, None, data_of(ids=lambda: ids, media=lambda: named))


def data_of(**account: Any) -> TrainingData:
    sizes = {"samples": 3, "longest_tokens": 9}
    return TrainingData(train=TensorDataset(torch.zeros(3)), collate=dict, source="train.json", **sizes, **account)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (folder := tmp_path / "checkpoint-40").mkdir()
    progress_over("a", "b", "c").write(folder, torch.device("cpu"), writes=True)
    return folder


def test_an_account_is_of_ids_in_order() -> None:
    account = account_of(["a", "b", "\ud800"])
    assert account["samples"] == 3
    assert account == account_of(iter(["a", "b", "\ud800"]))
    others = (["b", "a", "\ud800"], ["ab", "", "\ud800"], ["a", "b"])
    assert account["ids_sha256"] not in [account_of(ids)["ids_sha256"] for ids in others]


@pytest.mark.parametrize("ids", ["abcd", "ac", "acb"])
def test_other_samples_are_refused(checkpoint: Path, ids: str) -> None:
    progress_over("a", "b", "c").check_samples(checkpoint)
    with pytest.raises(UserError):
        progress_over(*ids).check_samples(checkpoint)


def test_a_replaced_file_is_refused_and_a_mended_one_goes_on(checkpoint: Path) -> None:
    progress_over("a", "b", "c", missing="5", broken="6").check_samples(checkpoint)
    for key in ("7", ""):  # another picture, none
        with pytest.raises(UserError):
            progress_over("a", "b", "c", b=key).check_samples(checkpoint)


def test_a_stream_has_no_account(checkpoint: Path) -> None:
    stream = Progress(BatchStatistics(), None, data_of())
    stream.check_samples(checkpoint)
    stream.write(checkpoint, torch.device("cpu"), writes=True)
    assert json.loads((checkpoint / "progress.json").read_text())["training_samples"] is None
    progress_over("a").check_samples(checkpoint)
