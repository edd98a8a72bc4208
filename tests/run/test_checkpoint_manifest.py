"""What a resume compares: files, processes and settings, each with its line; what may change may."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from dora_vl.errors import UserError
from dora_vl.training.checkpoint_files import MANIFEST, check_base, check_manifest, write_manifest
from dora_vl.training.launch import Launch

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
        ({"training": {"dataloader_drop_last": True}}, r"dataloader_drop_last was 'not set', is True"),
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
    ("launch", "cut", "said"),
    [
        (Launch(1, 3), (4, 1), r"took 8 samples; .*\(1 rank with ZeRO-3\) take 4: set .*accumulation_steps to 2"),
        (Launch(4, 2), (4, 1), r"take 16: set training\.per_device_train_batch_size and .* their product is 2"),
        (Launch(3, 3), (4, 1), r"take 12: start as many ranks as divide 8"),
        (Launch(2, 3), (4, 3), r"take 24: set training\.gradient_accumulation_steps to 1"),
    ],
)
def test_another_step_is_refused_with_what_to_set(
    checkpoint: Path, launch: Launch, cut: tuple[int, int], said: str
) -> None:
    write_manifest(checkpoint, shaped(4, 1), LAUNCH)
    with pytest.raises(UserError, match=said):
        check_manifest(checkpoint, shaped(*cut), launch)


def test_a_mixtures_step_is_its_own_setting(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    mixture = {"data": {"batch_size": 300}, "training": {"per_device_train_batch_size": 1, "optim": "sgd"}}
    write_manifest(checkpoint, mixture, LAUNCH)
    check_manifest(checkpoint, mixture, Launch(8, None))
    assert "goes on on 8 ranks without DeepSpeed" in caplog.text


@pytest.mark.parametrize(
    ("launch", "training", "said"),
    [
        (Launch(1, None), {"optim": "adafactor"}, "the state of training.optim adafactor cannot be dealt out anew"),
        (Launch(1, None), {"dataloader_drop_last": True}, "leaves others of an epoch's samples out for each"),
    ],
)
def test_what_no_other_processes_can_go_on_with_is_refused(
    checkpoint: Path, launch: Launch, training: dict[str, object], said: str
) -> None:
    write_manifest(checkpoint, shaped(4, 1, **training), LAUNCH)
    check_manifest(checkpoint, shaped(4, 1, **training), LAUNCH)
    with pytest.raises(UserError, match=said):
        check_manifest(checkpoint, shaped(4, 2, **training), launch)


def test_any_optimizer_goes_on_where_no_ranks_share_it(checkpoint: Path) -> None:
    write_manifest(checkpoint, shaped(4, 2, optim="adafactor"), Launch(1, None))
    check_manifest(checkpoint, shaped(4, 1, optim="adafactor"), Launch(2, 0))


def test_a_missing_file_is_named(checkpoint: Path) -> None:
    (checkpoint / "state" / "state.json").unlink()
    with pytest.raises(UserError, match=r"checkpoint-40/state/state\.json is missing"):
        check_manifest(checkpoint, SETTINGS, LAUNCH)


def test_a_cut_file_is_named_with_its_bytes(checkpoint: Path) -> None:
    (checkpoint / "state" / "state.json").write_bytes(b"sta")
    with pytest.raises(UserError, match=r"state\.json has 3 bytes instead of 5"):
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


def test_without_its_account_a_checkpoint_is_not_taken(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        check_manifest(checkpoint, changed(), LAUNCH)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "global_step40/mp_rank_00_model_states.pt"])
def test_a_checkpoint_of_an_earlier_version_is_refused_unread(checkpoint: Path, name: str) -> None:
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/read'\ntR.")
    with pytest.raises(UserError) as error:
        check_manifest(checkpoint, changed(), LAUNCH)
    said = str(error.value)
    assert f"{checkpoint / name} is a pickle of an earlier version, and reading one can run code" in said
    assert f"--adapter.initial {checkpoint / 'adapter'}" in said


def test_another_base_is_refused_where_both_are_known(checkpoint: Path) -> None:
    check_base(checkpoint, "models/base", "b" * 64)  # of a run that wrote no recipe
    recipe = checkpoint / "adapter" / "recipe.json"
    recipe.write_text(json.dumps({"base_sha256": "a" * 64}))
    check_base(checkpoint, "models/base", "a" * 64)
    check_base(checkpoint, "models/base", None)
    said = r"another base than what models/base holds now \(content hash a{12}, is b{12}\)\. Put the base back, or"
    with pytest.raises(UserError, match=said) as error:
        check_base(checkpoint, "models/base", "b" * 64)
    assert str(error.value).endswith(f"--adapter.initial {checkpoint / 'adapter'}")
