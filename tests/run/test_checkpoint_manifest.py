"""What a resume compares: files, processes and settings, each with its line; what may change may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dora_vl.errors import UserError
from dora_vl.run.launch import Launch
from dora_vl.training.checkpoint_files import MANIFEST, check_manifest, write_manifest

SETTINGS: dict[str, Any] = {
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
    (folder / "state").mkdir()
    (folder / "state" / "state.json").write_bytes(b"state")
    write_manifest(folder, SETTINGS, LAUNCH)
    return folder


def changed(**sections: object) -> dict[str, object]:
    """The settings with some of a section's values replaced."""
    return SETTINGS | {
        name: {**SETTINGS[name], **value} if isinstance(value, dict) else value for name, value in sections.items()
    }


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"resume": "last", "watch": 0},
        {"training": {"save_steps": 10, "logging_steps": 1, "output_dir": "elsewhere"}},
        {"data": {"workers": 0}},
        {"training": {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 4}},
        {"adapter": {"parts": None}},  # nothing, written in two ways
        {"training": {"max_steps": 200}},  # a longer run
    ],
)
def test_what_changes_no_step_may_change(checkpoint: Path, sections: dict[str, object]) -> None:
    check_manifest(checkpoint, changed(**sections), LAUNCH)


@pytest.mark.parametrize(
    "sections",
    [
        {"adapter": {"alpha": 32.0}},
        {"training": {"learning_rate": 1e-3}},
        {"data": {"train": "two.json"}},
        {"training": {"dataloader_drop_last": True}},
    ],
)
def test_what_changes_the_result_is_refused(checkpoint: Path, sections: dict[str, object]) -> None:
    with pytest.raises(UserError):
        check_manifest(checkpoint, changed(**sections), LAUNCH)


def shaped(micro_batch: int, accumulation: int, **training: object) -> dict[str, object]:
    """The settings with a step cut into micro-batches."""
    cut = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": accumulation}
    return changed(training={**cut, "optim": "adamw_torch", **training})


MIXTURE = {"data": {"batch_size": 300}, "training": {"per_device_train_batch_size": 1, "optim": "sgd"}}
ADAFACTOR, DROPS = {"optim": "adafactor"}, {"dataloader_drop_last": True}


@pytest.mark.parametrize(
    ("then", "wrote", "now", "launch"),
    [
        (shaped(4, 1), LAUNCH, shaped(4, 2), Launch(1, None)),
        (shaped(4, 1), LAUNCH, shaped(2, 1), Launch(4, 0)),
        (MIXTURE, LAUNCH, MIXTURE, Launch(8, None)),  # a mixture's step is its own setting
        (shaped(4, 1, **ADAFACTOR), LAUNCH, shaped(4, 1, **ADAFACTOR), LAUNCH),
        (shaped(4, 2, **ADAFACTOR), Launch(1, None), shaped(4, 1, **ADAFACTOR), Launch(2, 0)),  # no ranks share it
    ],
)
def test_processes_with_the_same_step_go_on(
    checkpoint: Path, then: dict[str, object], wrote: Launch, now: dict[str, object], launch: Launch
) -> None:
    write_manifest(checkpoint, then, wrote)
    check_manifest(checkpoint, now, launch)


@pytest.mark.parametrize(
    ("launch", "cut", "training"),
    [
        *((launch, (4, 1), {}) for launch in (Launch(1, 3), Launch(4, 2), Launch(3, 3))),
        (LAUNCH, (4, 3), {}),
        *((Launch(1, None), (4, 2), training) for training in (ADAFACTOR, DROPS)),
    ],
)
def test_another_step_and_what_others_cannot_go_on_with_is_refused(
    checkpoint: Path, launch: Launch, cut: tuple[int, int], training: dict[str, object]
) -> None:
    write_manifest(checkpoint, shaped(4, 1, **training), LAUNCH)
    with pytest.raises(UserError):
        check_manifest(checkpoint, shaped(*cut, **training), launch)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("state/state.json", None),
        ("state/state.json", b"sta"),
        ("adapter/adapter_model.safetensors", b"wEights"),
        (MANIFEST, None),
        (MANIFEST, b"{"),
        (MANIFEST, b'{"files": {}}'),
    ],
)
def test_a_missing_cut_or_changed_file_is_named(checkpoint: Path, name: str, content: bytes | None) -> None:
    (checkpoint / name).unlink() if content is None else (checkpoint / name).write_bytes(content)
    with pytest.raises(UserError, match=str(checkpoint / name)):
        check_manifest(checkpoint, SETTINGS, LAUNCH)
