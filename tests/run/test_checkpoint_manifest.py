"""What a resume compares: files, processes and settings, each with its line; what may change may."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from dora_vl.errors import UserError
from dora_vl.run.launch import Launch
from dora_vl.training.checkpoint_files import MANIFEST, check_base, check_manifest, write_manifest

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
    (folder / "state").mkdir()
    (folder / "state" / "state.json").write_bytes(b"state")
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
        {"training": {"dataloader_num_workers": 2, "dataloader_pin_memory": False}},
        {"training": {"dataloader_persistent_workers": True, "dataloader_prefetch_factor": 4}},
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
        {"adapter": {"alpha": 1.0, "targets": [], "dropout": 0.1}},
    ],
)
def test_what_changes_the_result_is_refused(checkpoint: Path, sections: dict[str, object]) -> None:
    with pytest.raises(UserError):
        check_manifest(checkpoint, changed(**sections), LAUNCH)


def shaped(micro_batch: int, accumulation: int, **training: object) -> dict[str, object]:
    """The settings with a step cut into micro-batches."""
    cut = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": accumulation}
    return changed(training={**cut, "optim": "adamw_torch", **training})


@pytest.mark.parametrize(
    ("launch", "cut", "said"),
    [
        (Launch(2, 2), (4, 1), "written by 2 ranks with ZeRO-3, goes on on 2 ranks with ZeRO-2"),
        (Launch(1, None), (4, 2), "written by 2 ranks with ZeRO-3, goes on on 1 rank without DeepSpeed"),
        (Launch(4, 0), (2, 1), "goes on on 4 ranks with ZeRO-0"),
        (Launch(2, 3), (2, 2), "which were of 4 samples and are of 2"),
    ],
)
def test_other_processes_with_the_same_step_go_on_and_it_is_said(
    checkpoint: Path, launch: Launch, cut: tuple[int, int], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    micro_batches = {"optim": {"loss_normalisation": "micro_batch"}}
    write_manifest(checkpoint, {**shaped(4, 1), **micro_batches}, LAUNCH)
    check_manifest(checkpoint, {**shaped(*cut), **micro_batches}, launch)
    assert said in caplog.text
    assert caplog.text.count("resume: ") == 1


@pytest.mark.parametrize(
    ("launch", "cut"),
    [(Launch(1, 3), (4, 1)), (Launch(4, 2), (4, 1)), (Launch(3, 3), (4, 1)), (Launch(2, 3), (4, 3))],
)
def test_another_step_is_refused(checkpoint: Path, launch: Launch, cut: tuple[int, int]) -> None:
    write_manifest(checkpoint, shaped(4, 1), LAUNCH)
    with pytest.raises(UserError):
        check_manifest(checkpoint, shaped(*cut), launch)


def test_a_mixtures_step_is_its_own_setting(checkpoint: Path) -> None:
    mixture = {"data": {"batch_size": 300}, "training": {"per_device_train_batch_size": 1, "optim": "sgd"}}
    write_manifest(checkpoint, mixture, LAUNCH)
    check_manifest(checkpoint, mixture, Launch(8, None))


@pytest.mark.parametrize("training", [{"optim": "adafactor"}, {"dataloader_drop_last": True}])
def test_what_no_other_processes_can_go_on_with_is_refused(checkpoint: Path, training: dict[str, object]) -> None:
    write_manifest(checkpoint, shaped(4, 1, **training), LAUNCH)
    check_manifest(checkpoint, shaped(4, 1, **training), LAUNCH)
    with pytest.raises(UserError):
        check_manifest(checkpoint, shaped(4, 2, **training), Launch(1, None))


def test_any_optimizer_goes_on_where_no_ranks_share_it(checkpoint: Path) -> None:
    write_manifest(checkpoint, shaped(4, 2, optim="adafactor"), Launch(1, None))
    check_manifest(checkpoint, shaped(4, 1, optim="adafactor"), Launch(2, 0))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("state/state.json", None),
        ("state/state.json", b"sta"),
        ("adapter/adapter_model.safetensors", b"wEights"),
        (MANIFEST, None),
        (MANIFEST, b"{"),
        (MANIFEST, b"[]"),
        (MANIFEST, b'{"files": {}}'),
    ],
)
def test_a_missing_cut_or_changed_file_is_named(checkpoint: Path, name: str, content: bytes | None) -> None:
    (checkpoint / name).unlink() if content is None else (checkpoint / name).write_bytes(content)
    with pytest.raises(UserError, match=str(checkpoint / name)):
        check_manifest(checkpoint, SETTINGS, LAUNCH)


def test_another_base_is_refused_where_both_are_known(checkpoint: Path) -> None:
    check_base(checkpoint, "models/base", "b" * 64)  # of a run that wrote no recipe
    recipe = checkpoint / "adapter" / "recipe.json"
    recipe.write_text(json.dumps({"base_sha256": "a" * 64}))
    check_base(checkpoint, "models/base", "a" * 64)
    check_base(checkpoint, "models/base", None)
    with pytest.raises(UserError):
        check_base(checkpoint, "models/base", "b" * 64)
