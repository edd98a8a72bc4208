"""Runs that learn which answer is better: from a file to an adapter that prefers it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from dora_vl.errors import SettingError
from dora_vl.heads import preferences, rewards
from dora_vl.run.settings import OfPreferences, OfRewards
from dora_vl.training.decoder_pipeline import DecoderPipeline
from tests.training.launched import launch
from tests.training.tiny_run import (
    COLOURS,
    assert_same_weights,
    decoder_run,
    logged,
    losses_of,
    refused,
    trained,
    write_run,
    write_tiny_data,
)

RATES = {"learning_rate": 2e-2, "max_steps": 10, "per_device_train_batch_size": 6}


def write_pairs(folder: Path, *, samples: int = 24, **more: Any) -> Path:
    """Each picture's colour is the chosen answer, the next colour the rejected one."""
    names, path = list(COLOURS), write_tiny_data(folder, samples=samples)
    rows = []
    for record in json.loads(path.read_text()):
        question, answer = (turn["value"] for turn in record["conversations"])
        wrong = names[(names.index(answer.split()[0]) + 1) % len(names)]
        question = question.removeprefix("<image>\n")
        rows.append({"prompt": question, "chosen": answer, "rejected": wrong, "image": record["image"], **more})
    path.write_text(json.dumps(rows))
    return path


def key_of(pipeline: DecoderPipeline) -> str:
    """The setting that a run is refused for, before it reads a weight."""
    error = refused(pipeline)
    assert isinstance(error, SettingError)
    return error.key


def test_a_run_learns_to_prefer_and_says_so(tmp_path: Path, tiny_llava: Path) -> None:
    run_file = write_run(
        tmp_path / "run.yaml",
        tiny_llava,
        write_pairs(tmp_path / "data"),
        training=RATES,
        objective={"loss": "dpo", "beta": 0.5},
    )
    lines = logged(trained(run_file))
    assert lines[0]["rewards/margin"] == pytest.approx(0, abs=1e-6)
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert lines[-1]["rewards/margin"] > 0.2
    assert lines[-1]["rewards/accuracy"] > 0.8
    assert lines[-1]["rewards/chosen"] > lines[-1]["rewards/rejected"]


@pytest.mark.parametrize(
    "objective", [{"dpo": 0.8, "bco": 0.2, "sft": 1.0}, pytest.param("orpo", marks=pytest.mark.slow)]
)
def test_stored_outputs_and_plain_rows_train_the_same(tmp_path: Path, tiny_llava: Path, objective: Any) -> None:
    run_file = write_run(
        tmp_path / "run.yaml",
        tiny_llava,
        write_pairs(tmp_path / "data"),
        objective={"loss": objective},
        training={"max_steps": 3},
    )
    folders = [
        trained(run_file, name="trees"),
        trained(run_file, "--data.cache_features=true", name="stored"),
        trained(run_file, "--data.packing=plain", "--data.group_by_modality_length=false", name="plain"),
    ]
    first = [[line["loss"] for line in logged(folder)] for folder in folders]
    assert first[1] == pytest.approx(first[0], rel=1e-4)
    assert_same_weights(folders[0], folders[1], atol=2e-5)
    assert len(first[2]) == 3


def test_a_resumed_run_has_the_reference_of_its_start(tmp_path: Path, tiny_llava: Path) -> None:
    """To the bit, also in a second epoch: the reference's log-probabilities of the first one come back."""
    training = {"save_strategy": "steps", "save_steps": 8, "max_steps": 10, "lr_scheduler_type": "constant"}
    run_file = write_run(
        tmp_path / "run.yaml", tiny_llava, write_pairs(tmp_path / "data"), training=training, objective={"loss": "dpo"}
    )
    whole = trained(run_file, name="whole")
    stopped = trained(run_file, name="stopped")
    for path in (stopped / "checkpoint-10", stopped / "adapter"):
        for file in sorted(path.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        path.rmdir()
    trained(run_file, "--resume=last", name="stopped")
    assert_same_weights(whole, stopped)
    assert [line["loss"] for line in logged(stopped)] == [line["loss"] for line in logged(whole)]
    states = [json.loads((run / "checkpoint-10/state/random-0.json").read_text()) for run in (whole, stopped)]
    assert sorted(states[0]["kept"]["reference"]) == sorted(states[1]["kept"]["reference"])
    assert len(states[0]["kept"]["reference"]) == 2 * 24


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_exchange_their_shards_for_the_reference(tmp_path: Path, tiny_llava: Path) -> None:
    """Two steps of a second epoch among them, where the reference's log-probabilities are known."""
    training = {"max_steps": 8, "per_device_train_batch_size": 2, "train_sampling_strategy": "sequential"}
    run_file = write_run(
        tmp_path / "run.yaml",
        tiny_llava,
        write_pairs(tmp_path / "data"),
        data={"group_by_modality_length": False},
        training=training,
        objective={"loss": "dpo", "beta": 0.5},
    )

    def launched(name: str, *settings: str, ranks: int) -> Path:
        launch(run_file, f"--training.output_dir={tmp_path / name}", *settings, ranks=ranks)
        return tmp_path / name

    alone = launched("one", "--training.deepspeed=zero0", "--training.gradient_accumulation_steps=2", ranks=1)
    assert losses_of(alone)[0] - losses_of(alone)[-1] > 0.02
    for name, sharding in (("zero2", "deepspeed=zero2"), ("zero3", "deepspeed=zero3"), ("fsdp", "fsdp=true")):
        folder = launched(name, f"--training.{sharding}", ranks=2)
        # Gradients of what a pair's answers share nearly cancel, and Adam takes their rounding for a direction.
        torch.testing.assert_close(losses_of(folder)[:2], losses_of(alone)[:2], atol=1e-4, rtol=0)
        torch.testing.assert_close(losses_of(folder), losses_of(alone), atol=1e-2, rtol=0)
        for line, expected in zip(logged(folder), logged(alone), strict=True):
            assert line["rewards/margin"] == pytest.approx(expected["rewards/margin"], abs=3e-2)


def test_answers_called_good_or_bad(tmp_path: Path, tiny_llava: Path) -> None:
    path = write_pairs(tmp_path / "data")
    rows = [
        {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen", "image": row["image"]}
        for row in json.loads(path.read_text())
        for kind in ("chosen", "rejected")
    ]
    path.write_text(json.dumps(rows))
    run_file = write_run(
        tmp_path / "run.yaml", tiny_llava, path, training=RATES, objective={"loss": "kto", "beta": 0.5}
    )
    lines = logged(trained(run_file))
    assert lines[-1]["rewards/chosen"] > 0.05 > lines[-1]["rewards/rejected"]
    new = f"--training.output_dir={tmp_path / 'new'}"
    assert key_of(decoder_run(run_file, new, "--objective.loss=dpo")) == "objective.loss"
    assert key_of(decoder_run(run_file, new, "--objective.loss=sft")) == "objective.loss"


def test_data_and_loss_must_fit(tmp_path: Path, tiny_llava: Path) -> None:
    pairs = write_run(tmp_path / "pairs.yaml", tiny_llava, write_pairs(tmp_path / "pairs"))
    assert key_of(decoder_run(pairs)) == "objective.loss"
    chosen = trained(pairs, "--data.columns={chosen: completion}", "--training.max_steps=1", name="chosen")
    assert len(logged(chosen)) == 1
    plain = write_run(tmp_path / "plain.yaml", tiny_llava, write_tiny_data(tmp_path / "plain", samples=8))
    assert key_of(decoder_run(plain, "--objective.loss=ipo")) == "objective.loss"


def test_settings_name_every_loss() -> None:
    assert {*get_args(OfPreferences)} == {*preferences.LOSSES}
    assert {*get_args(OfRewards)} == {*rewards.REWARD_LOSSES}
