"""What an earlier run left decides whether another may start there, and nothing that took no work blocks it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_vl.errors import SettingError, UserError
from dora_vl.files import write_json
from dora_vl.run.folder import checkpoint_of, finished_already, prepare_run_folder, write_settings
from dora_vl.run.reading import read_run_file
from dora_vl.run.settings import RunConfig
from tests.training.tiny_run import write_run


def left(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def settings(folder: Path, *more: str, resume: str) -> RunConfig:
    file = write_run(folder.parent / "settings.yaml", Path("base"), Path("data.json"))
    return read_run_file(file, f"--training.output_dir={folder}", f"--resume={resume}", *more)


@pytest.mark.parametrize(
    ("tested", "finished"),
    [({}, False), ({"sets": {"a": {}}, "not_yet_tested": ["b"]}, False), ({"sets": {"a": {}, "b": {}}}, True)],
)
def test_a_run_is_finished_once_every_set_is_tested(tmp_path: Path, tested: dict[str, object], finished: bool) -> None:
    config = settings(folder := left(tmp_path / "run", "adapter/a"), "--evaluation.file=t.json", resume="if_stopped")
    write_settings(folder, config)
    write_json(folder / "metrics.json", {"train_steps": 6, "forgetting": {}, **tested})
    assert finished_already(config) is finished


def test_a_run_that_failed_before_its_first_save_blocks_nothing(tmp_path: Path) -> None:
    folder = left(tmp_path / "run", "log.jsonl", "settings.json", "features/x.safetensors")
    prepare_run_folder(folder, checkpoint=None, overwrite=False)
    assert sorted(path.name for path in folder.iterdir()) == ["features", "settings.json"]


@pytest.mark.parametrize(
    "name", ["adapter/adapter_config.json", "metrics.json", "predictions.jsonl", "checkpoint-3/trainer_state.json"]
)
def test_what_took_work_is_kept(tmp_path: Path, name: str) -> None:
    folder = left(tmp_path / "run", "log.jsonl", name)
    with pytest.raises(UserError):
        prepare_run_folder(folder, checkpoint=None, overwrite=False)
    assert (folder / "log.jsonl").is_file()
    prepare_run_folder(folder, checkpoint=folder / "checkpoint-3", overwrite=False)
    assert (folder / "log.jsonl").is_file()
    prepare_run_folder(folder, checkpoint=None, overwrite=True)
    assert list(folder.iterdir()) == []


def test_a_run_that_was_killed_before_its_first_checkpoint_has_one_way_out(tmp_path: Path) -> None:
    """Each message's advice works: none sends a person to the other."""
    folder = left(tmp_path / "run", "log.jsonl", "settings.json", ".checkpoints-being-written/checkpoint-5/state.json")
    resumed = settings(folder, resume="last")
    with pytest.raises(SettingError, match="without resume") as error:
        checkpoint_of(resumed)
    assert error.value.key == "resume"
    prepare_run_folder(folder, checkpoint=None, overwrite=False)

    left(folder, "adapter/adapter_config.json")  # of a whole run that kept no checkpoint
    with pytest.raises(UserError, match=r"adapter .*--overwrite true"):
        checkpoint_of(resumed)
    prepare_run_folder(folder, checkpoint=None, overwrite=True)
