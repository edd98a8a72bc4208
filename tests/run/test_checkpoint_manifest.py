"""What a resume compares: files, processes and settings, each with its line; what may change may."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from dora_vl.errors import UserError
from dora_vl.run.checkpoint_manifest import MANIFEST, Launch, check_manifest, write_manifest

SETTINGS = {
    "resume": None,
    "watch": 4,
    "adapter": {"alpha": 16.0, "parts": {}, "targets": ["a", "b"]},
    "training": {"learning_rate": 2e-4, "save_steps": 50, "max_steps": 100, "seed": 0},
    "data": {"train": "one.json", "workers": 4},
}
LAUNCH = Launch(2, 3)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint-40"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "optimizer.pt").write_bytes(b"state")
    write_manifest(folder, SETTINGS, LAUNCH)
    return folder


def changed(**sections: object) -> dict[str, object]:
    """The settings with some of a section's values replaced."""
    there = json.loads(json.dumps(SETTINGS))
    for name, value in sections.items():
        there[name] = {**there[name], **value} if isinstance(value, dict) else value
    return there


def test_the_same_run_resumes(checkpoint: Path) -> None:
    check_manifest(checkpoint, changed(), LAUNCH)


@pytest.mark.parametrize(
    "sections",
    [
        {"resume": "last"},
        {"watch": 0},
        {"training": {"save_steps": 10, "logging_steps": 1, "output_dir": "elsewhere"}},
        {"data": {"workers": 0}},
        {"adapter": {"parts": None}},  # nothing, written in two ways
    ],
)
def test_what_changes_no_step_may_change(checkpoint: Path, sections: dict[str, object]) -> None:
    check_manifest(checkpoint, changed(**sections), LAUNCH)


def test_a_longer_run_resumes_and_says_so(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    check_manifest(checkpoint, changed(training={"max_steps": 200}), LAUNCH)
    assert "training.max_steps was 100, is 200" in caplog.text


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"adapter": {"alpha": 32.0}}, r"adapter\.alpha was 16\.0, is 32\.0"),
        ({"training": {"learning_rate": 1e-3}}, r"training\.learning_rate was 0\.0002, is 0\.001"),
        ({"training": {"seed": 1}}, r"training\.seed was 0, is 1"),
        ({"data": {"train": "two.json"}}, r"data\.train was 'one\.json', is 'two\.json'"),
        ({"adapter": {"dropout": 0.1}}, r"adapter\.dropout was 'not set', is 0\.1"),
        ({"adapter": {"alpha": 1.0, "targets": [], "dropout": 0.1}}, "and 1 more"),
    ],
)
def test_what_changes_the_result_is_refused_with_both_values(
    checkpoint: Path, sections: dict[str, object], said: str
) -> None:
    with pytest.raises(UserError, match=said) as error:
        check_manifest(checkpoint, changed(**sections), LAUNCH)
    assert f"--adapter.initial {checkpoint / 'adapter'}" in str(error.value)


@pytest.mark.parametrize(
    ("launch", "said"),
    [
        (Launch(2, 2), "2 ranks with ZeRO-3, this run is 2 ranks with ZeRO-2"),
        (Launch(1, 3), "2 ranks with ZeRO-3, this run is 1 rank with ZeRO-3"),
        (Launch(2, None), "this run is 2 ranks without DeepSpeed"),
    ],
)
def test_other_processes_are_refused(checkpoint: Path, launch: Launch, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_manifest(checkpoint, SETTINGS, launch)


def test_a_missing_file_is_named(checkpoint: Path) -> None:
    (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(UserError, match=r"checkpoint-40/optimizer\.pt is missing"):
        check_manifest(checkpoint, SETTINGS, LAUNCH)


def test_a_cut_file_is_named_with_its_bytes(checkpoint: Path) -> None:
    (checkpoint / "optimizer.pt").write_bytes(b"sta")
    with pytest.raises(UserError, match=r"optimizer\.pt has 3 bytes instead of 5"):
        check_manifest(checkpoint, SETTINGS, LAUNCH)


def test_a_changed_file_of_the_same_size_is_named(checkpoint: Path) -> None:
    (checkpoint / "adapter" / "adapter_model.safetensors").write_bytes(b"wEights")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors was changed after it was written"):
        check_manifest(checkpoint, SETTINGS, LAUNCH)


@pytest.mark.parametrize("content", ["{", "[]", '{"files": {}}'])
def test_a_damaged_account_is_one_line(checkpoint: Path, content: str) -> None:
    (checkpoint / MANIFEST).write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        check_manifest(checkpoint, SETTINGS, LAUNCH)


def test_a_checkpoint_of_an_earlier_version_resumes_with_a_warning(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (checkpoint / MANIFEST).unlink()
    check_manifest(checkpoint, changed(adapter={"alpha": 1.0}), LAUNCH)
    assert "nothing of it is compared" in caplog.text
