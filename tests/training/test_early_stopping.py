"""A run ends after validations without a lower loss, keeps the best, and goes on from a stop as if there were none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dora_vl.adapters.files import complete_checkpoints
from dora_vl.errors import SettingError
from dora_vl.run.reading import read_run_file
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.run import run, train
from tests.training.test_run import send_at_step
from tests.training.tiny_run import MakeRun, assert_same_weights, logged

STEPS, EVERY, PATIENCE = 40, 2, 3


@pytest.fixture
def run_file(make_run: MakeRun, tiny_data: Path) -> Path:
    """Validates on answers that are never right, so that their loss falls with the words' form and rises afterwards."""
    records = json.loads(tiny_data.read_text())
    for record in records:
        record["conversations"][-1]["value"] = "chat between"
    other = tiny_data.with_name("other.json")
    other.write_text(json.dumps(records))
    training: dict[str, Any] = {"use_cpu": True, "max_steps": STEPS, "eval_strategy": "steps", "eval_steps": EVERY}
    written = make_run(
        data={"validation": str(other)},
        optim={"early_stopping": PATIENCE},
        training={**training, "learning_rate": 0.02, "lr_scheduler_type": "constant"},
    )
    written.write_text(written.read_text().replace("  save_strategy: 'no'\n", ""))
    return written


def trained(run_file: Path, *words: str) -> int | None:
    return train(DecoderPipeline(read_run_file(run_file, *words)))[0]


def validations(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["eval_loss"]) for line in logged(folder, "eval_loss")]


def test_a_run_ends_and_keeps_the_best(run_file: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert trained(run_file, f"--training.output_dir={whole}") is None
    losses = validations(whole)
    best, _ = min(losses, key=lambda pair: pair[1])
    last, _ = losses[-1]
    assert (last - best, last < STEPS) == (PATIENCE * EVERY, True)
    assert json.loads((whole / "metrics.json").read_text())["train_steps"] == last
    assert_same_weights(whole, whole / f"checkpoint-{best}")


@pytest.mark.slow
def test_a_stopped_run_goes_on_counting(run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert trained(run_file, f"--training.output_dir={whole}") is None
    losses = validations(whole)
    (best, _), (last, _) = min(losses, key=lambda pair: pair[1]), losses[-1]
    send_at_step(monkeypatch, best + EVERY + 1)  # one validation without a lower loss is counted by then
    assert trained(run_file, f"--training.output_dir={stopped}") is not None
    monkeypatch.undo()
    assert trained(run_file, f"--training.output_dir={stopped}", "--resume=last") is None
    assert validations(stopped) == losses
    assert_same_weights(stopped, whole)
    assert trained(run_file, f"--training.output_dir={stopped}", "--resume=last") is None  # its end is its end
    assert validations(stopped) == losses
    assert complete_checkpoints(stopped)[-1].name == f"checkpoint-{last}"
    assert_same_weights(stopped, whole)


def test_it_needs_something_to_validate_on(make_run: MakeRun, tiny_data: Path, tmp_path: Path) -> None:
    run_file = make_run(optim={"early_stopping": 2}, training={"use_cpu": True})
    for words in ([], [f"--data.validation={tiny_data}", "--training.eval_strategy=no"]):
        with pytest.raises(SettingError) as refused:
            run(DecoderPipeline(read_run_file(run_file, *words)))
        assert refused.value.key == "optim.early_stopping"
    assert not (tmp_path / "run").exists()
    with pytest.raises(SettingError) as refused:
        read_run_file(run_file, "--optim.early_stopping=0")
    assert refused.value.key == "optim.early_stopping"
