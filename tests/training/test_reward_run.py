"""Runs that learn from rewards of drawn answers: gradients, a run that learns, resumes, ranks, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_vl.errors import SettingError
from dora_vl.run.folder import DRAWN, read_log
from tests.training.launched import launch
from tests.training.test_preference_run import write_pairs
from tests.training.tiny_run import (
    assert_same_weights,
    decoder_run,
    logged,
    losses_of,
    refused,
    trained,
    write_run,
    write_tiny_data,
    write_tiny_llava,
)

OWN = '''
def right_and_short(example, answer):
    """A point for the colour, another for a short answer."""
    return float(example.answers[0].text.split()[0] in answer) + float(len(answer) < 12)
'''
DRAWING = {"loss": "grpo", "group": 6, "max_new_tokens": 5}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose scores differ enough to be learned in a few steps."""
    folder = write_tiny_llava(tmp_path_factory.mktemp("base") / "base")
    weights = load_file(folder / "model.safetensors")
    weights["language_model.lm_head.weight"] *= 20
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """The adapter of a run that has seen a few answers, so that what it draws is sometimes right."""
    folder = tmp_path_factory.mktemp("begun")
    training = {"max_steps": 30, "learning_rate": 2e-2}
    return (
        trained(write_run(folder / "run.yaml", base, write_tiny_data(folder / "data"), training=training)) / "adapter"
    )


@pytest.fixture
def make(tmp_path: Path, base: Path, begun: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        (tmp_path / "own.py").write_text(OWN)
        objective = {
            **DRAWING,
            "rewards": {f"{tmp_path / 'own.py'}:right_and_short": 1.0},
            **changes.pop("objective", {}),
        }
        adapter = {"initial": str(begun), **changes.pop("adapter", {})}
        data = write_tiny_data(tmp_path / "data", samples=16)
        return write_run(tmp_path / "run.yaml", base, data, objective=objective, adapter=adapter, **changes)

    return write


def test_a_run_raises_its_reward_and_says_so(make: Callable[..., Path]) -> None:
    folder = trained(make(training={"max_steps": 24, "learning_rate": 5e-3, "lr_scheduler_type": "constant"}))
    lines = logged(folder)
    rewards = [line["rewards/mean"] for line in lines]
    assert sum(rewards[-8:]) / 8 > sum(rewards[:4]) / 4 + 0.15
    assert lines[0]["log_probs/gap"] < 1e-4  # the update sees what the rollout saw
    assert all(0 < line["answers/tokens"] <= 5 for line in lines)
    drawn = read_log(folder / DRAWN)
    assert [line["step"] for line in drawn] == list(range(1, 25))
    assert len(drawn[0]["answers"]) == 6
    assert len({answer["reward"] for answer in drawn[0]["answers"]}) > 1


def test_all_weights_learn_in_half_precision(make: Callable[..., Path], tmp_path: Path) -> None:
    """DeepSpeed's engine casts the batch's float32 numbers too."""
    adapter = {"method": "full", "initial": None, "targets": ["*.q_proj"]}
    training = {"max_steps": 2, "deepspeed": "zero0", "bf16": True, "output_dir": str(tmp_path / "run")}
    run_file = make(training=training, objective={"kl": 0.2}, adapter=adapter)
    launch(run_file, "--model.dtype=bfloat16", "--optim.projector_learning_rate=null", ranks=1, launcher="")
    assert all(0 <= line["log_probs/gap"] < 0.5 for line in logged(tmp_path / "run"))


def test_a_resumed_run_draws_the_same(make: Callable[..., Path]) -> None:
    training = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "lr_scheduler_type": "constant"}
    run_file = make(training=training, objective={"kl": 0.2})
    whole, stopped = trained(run_file, name="whole"), trained(run_file, name="stopped")
    for path in (stopped / "checkpoint-4", stopped / "adapter"):
        shutil.rmtree(path)
    trained(run_file, "--resume=last", name="stopped")
    assert_same_weights(whole, stopped)
    assert read_log(stopped / DRAWN) == read_log(whole / DRAWN)
    assert [line["loss"] for line in logged(stopped)] == [line["loss"] for line in logged(whole)]
    assert [line["log_probs/kl"] > 0 for line in logged(whole)][1:] == [True] * 3


def test_stored_outputs_and_plain_rows_draw_and_learn_the_same(make: Callable[..., Path]) -> None:
    run_file = make(training={"max_steps": 2})
    trees = trained(run_file, name="trees")
    stored = trained(run_file, "--data.cache_features=true", name="stored")
    assert read_log(stored / DRAWN) == read_log(trees / DRAWN)
    assert_same_weights(trees, stored, atol=2e-5)


def test_groups_without_spread_teach_nothing(make: Callable[..., Path], tmp_path: Path) -> None:
    run_file = make(training={"max_steps": 2}, objective={"rewards": {"format": 2.0}, "format": ".*"})
    lines = logged(trained(run_file))
    assert [(line["rewards/mean"], line["rewards/alike"], line["grad_norm"]) for line in lines] == [(2.0, 1.0, 0.0)] * 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_draw_and_learn_as_one(make: Callable[..., Path], tmp_path: Path) -> None:
    training = {"max_steps": 4, "per_device_train_batch_size": 2, "train_sampling_strategy": "sequential"}
    run_file = make(data={"group_by_modality_length": False}, training=training)
    alone, zero0, zero2 = (tmp_path / name for name in ("one", "zero0", "zero2"))
    accumulated = "--training.gradient_accumulation_steps=2"
    launch(run_file, f"--training.output_dir={alone}", accumulated, "--training.deepspeed=zero0", ranks=1)
    launch(run_file, f"--training.output_dir={zero0}", "--training.deepspeed=zero0", ranks=2)
    launch(run_file, f"--training.output_dir={zero2}", "--training.deepspeed=zero2", ranks=2)
    for folder in (zero0, zero2):
        torch.testing.assert_close(losses_of(folder), losses_of(alone), atol=1e-2, rtol=0)
        for line, expected in zip(logged(folder)[:2], logged(alone), strict=False):
            assert line["rewards/mean"] == pytest.approx(expected["rewards/mean"], abs=1e-5)
            assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (("--objective.group=1",), "objective.group"),
        (("--objective.loss={grpo: 1, sft: 1}",), "objective.loss"),
        (("--objective.rewards={precise: 1}",), "objective.rewards"),
        (("--objective.rewards={nowhere.py:reward: 1}",), "objective.rewards"),
        (("--objective.rewards={format: 1}",), "objective.format"),
        (("--objective.rewards={format: 1}", "--objective.format=("), "objective.format"),
        (("--data.streaming=true", "--data.group_by_modality_length=false"), "data.streaming"),
    ],
)
def test_what_cannot_be_rewarded_is_refused(make: Callable[..., Path], settings: tuple[str, ...], key: str) -> None:
    error = refused(decoder_run(make(), *settings))
    assert isinstance(error, SettingError)
    assert error.key == key


def test_pairs_are_refused(make: Callable[..., Path], tmp_path: Path) -> None:
    error = refused(decoder_run(make(), f"--data.train={write_pairs(tmp_path / 'pairs')}"))
    assert isinstance(error, SettingError)
    assert error.key == "objective.loss"
