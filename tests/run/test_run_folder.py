"""What an earlier run left decides whether another may start there, and nothing that took no work blocks it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_vl.errors import UserError
from dora_vl.run.run_folder import prepare_run_folder


def left(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def test_a_run_that_failed_before_its_first_save_blocks_nothing(tmp_path: Path) -> None:
    folder = left(tmp_path / "run", "log.jsonl", "settings.json", "features/x.safetensors")
    prepare_run_folder(folder, resume=False, overwrite=False)
    assert sorted(path.name for path in folder.iterdir()) == ["features", "settings.json"]


@pytest.mark.parametrize(
    "name", ["adapter/adapter_config.json", "metrics.json", "predictions.jsonl", "checkpoint-3/trainer_state.json"]
)
def test_what_took_work_is_kept(tmp_path: Path, name: str) -> None:
    folder = left(tmp_path / "run", "log.jsonl", name)
    with pytest.raises(UserError, match=f"holds an earlier run's {Path(name).parts[0]}; --resume last resumes it"):
        prepare_run_folder(folder, resume=False, overwrite=False)
    assert (folder / "log.jsonl").is_file()
    prepare_run_folder(folder, resume=True, overwrite=False)
    assert (folder / "log.jsonl").is_file()
    prepare_run_folder(folder, resume=False, overwrite=True)
    assert list(folder.iterdir()) == []
