"""Runs that read their samples as they come: the same losses however they are read, and resumed at the exact sample."""

import json
from pathlib import Path

import pytest
import torch

from dora_vl.training import opened
from tests.training.launched import launch
from tests.training.own_data import HOLD_PICTURES, WRITERS, items, lines, write_pictures
from tests.training.tiny_run import json_of, logged_losses, losses_of, refused_key, skipped_by, trained, write_run

STREAMED = {"streaming": True, "group_by_modality_length": False, "shuffle_buffer": 5}
OFTEN = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 9}


@pytest.fixture(autouse=True)
def a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    caplog.set_level("INFO")


def run_file(
    tmp_path: Path, tiny_llava: Path, train_on: object, *, data: dict[str, object], **training: object
) -> Path:
    """A run over what is in `tmp_path`, its pictures too."""
    data = {**STREAMED, "train": train_on if isinstance(train_on, list) else str(train_on), **data}
    training = {"use_cpu": True, "max_steps": 4, **training}
    return write_run(tmp_path / "run.yaml", tiny_llava, tmp_path / "data.json", data=data, training=training)


def losses(path: Path, name: str, *overrides: str) -> list[float]:
    """Of a run in a folder of its own."""
    return logged_losses(trained(path, *overrides, name=name))


@pytest.mark.slow
def test_every_container_and_any_number_of_workers_give_the_same_losses(tmp_path: Path, tiny_llava: Path) -> None:
    samples, curves = items(12), {}
    write_pictures(tmp_path, samples)
    for name in ("messages", "csv", "parquet", "webdataset"):
        path = run_file(tmp_path, tiny_llava, WRITERS[name](tmp_path, samples), data={})
        for workers in (0, 2) if name in ("csv", "parquet") else (0,):
            curves[name, workers] = losses(path, f"{name}-{workers}", f"--data.workers={workers}")
    losses_of_one = curves["messages", 0]
    assert len({*losses_of_one}) == 4
    assert curves == dict.fromkeys(curves, losses_of_one)  # the fourth step is in the second epoch
    plain = losses(path, "table", "--data.streaming=false")
    assert sorted(plain[:3]) != sorted(losses_of_one[:3])


@pytest.mark.parametrize(("name", "step"), [pytest.param("messages", 4, marks=pytest.mark.slow), ("parquet", 6)])
def test_a_resumed_run_has_the_losses_of_a_whole_one(tmp_path, tiny_llava, monkeypatch, name, step) -> None:
    """Three steps an epoch: in the second, and at its end."""
    samples = items(12)
    write_pictures(tmp_path, samples)
    path = run_file(tmp_path, tiny_llava, WRITERS[name](tmp_path, samples), data={}, max_steps=8, **OFTEN)
    dropout = "--adapter.dropout=0.2"
    whole = losses(path, "whole", dropout)
    decoded: list[str] = []
    read_pixels = opened.open_image
    monkeypatch.setattr(
        opened, "open_image", lambda root, picture, *more: decoded.append(picture) or read_pixels(root, picture, *more)
    )
    monkeypatch.setattr("dora_vl.training.run.check_labels", lambda samples: None)  # they read the first samples too
    again = losses(path, "again", dropout, f"--resume={tmp_path / 'whole' / f'checkpoint-{step}'}")
    assert len(whole) == 8
    assert again == whole[step:]
    assert 4 * (8 - step) <= len(decoded) <= 4 * (9 - step)  # none of those that were skipped; one batch ahead
    metrics = [json_of(tmp_path / run / "metrics.json") for run in ("whole", "again")]
    assert [entry["train_samples"] for entry in metrics] == [32, 32]


def test_files_are_mixed_and_bad_rows_are_counted_and_named(tmp_path: Path, tiny_llava: Path) -> None:
    samples = items(16)
    write_pictures(tmp_path, samples)
    rows = [json.loads(line) for line in WRITERS["messages"](tmp_path, samples[:8]).read_text().splitlines()]
    rows[3]["messages"][1]["content"][0]["text"] = ""
    files = [
        {"path": str(lines(tmp_path / "conversations.jsonl", rows)), "weight": 2.0},
        {"path": str(WRITERS["parquet"](tmp_path, samples[8:]))},
    ]
    path = run_file(tmp_path, tiny_llava, files, data={"max_bad_share": 0.2}, max_steps=6, logging_steps=6)
    assert len(losses(path, "run")) == 1
    assert [*skipped_by(tmp_path / "run")] == ["n3"]
    metrics = json_of(tmp_path / "run" / "metrics.json")
    assert (metrics["train_samples"], metrics["skipped_samples"]) == (22, 2)


@pytest.mark.parametrize("option", ["data.cache_features=true", "data.shuffle_buffer=0", "training.max_steps=-1"])
def test_what_a_stream_cannot_do_is_refused_before_weights(tmp_path: Path, tiny_llava: Path, option: str) -> None:
    write_pictures(tmp_path, items(4))
    path = run_file(tmp_path, tiny_llava, WRITERS["messages"](tmp_path, items(4)), data={})
    assert refused_key(path, f"--{option}") == option.partition("=")[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["messages", "parquet"])
def test_two_ranks_read_disjoint_samples_and_resume_exactly(tmp_path: Path, tiny_llava: Path, name: str) -> None:
    samples = items(20)
    if name not in HOLD_PICTURES:
        write_pictures(tmp_path, samples)
    steps = {"max_steps": 8, "per_device_train_batch_size": 2, **OFTEN}
    path = run_file(tmp_path, tiny_llava, WRITERS[name](tmp_path, samples), data={"workers": 1}, **steps)

    def launched(folder: str, ranks: int, *overrides: str) -> torch.Tensor:
        launch(path, f"--training.output_dir={tmp_path / folder}", *overrides, ranks=ranks)
        return losses_of(tmp_path / folder)

    two = launched("two", 2, "--training.deepspeed=zero2")
    single = launched("one", 1, "--training.deepspeed=zero0", "--training.gradient_accumulation_steps=2")
    torch.testing.assert_close(two, single, atol=1e-4, rtol=0)
    resume = f"--resume={tmp_path / 'two' / 'checkpoint-6'}"  # in the second epoch of five steps
    again = launched("again", 2, "--training.deepspeed=zero2", resume)
    assert torch.equal(again, two[6:])
    assert len(two) == 8
    accumulated = "--training.gradient_accumulation_steps=2"
    alone = launched("alone", 1, accumulated, resume)  # without DeepSpeed
    torch.testing.assert_close(alone, two[6:], atol=1e-4, rtol=0)
    resume = f"--resume={tmp_path / 'one' / 'checkpoint-2'}"
    torch.testing.assert_close(launched("more", 2, "--training.deepspeed=zero3", resume), single[2:], atol=1e-4, rtol=0)
