"""Which checkpoints count as whole, and which stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_vl.adapters.checkpoints import checkpoint_to_resume, complete_checkpoints, drop_old_checkpoints, step_of
from dora_vl.errors import UserError
from dora_vl.run.run_folder import prepare_run_folder


def whole(folder: Path, step: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    return checkpoint


def test_checkpoints_are_ordered_by_step_and_must_be_whole(tmp_path: Path) -> None:
    for step in (100, 20, 3):
        whole(tmp_path, step)
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "checkpoint-abc").mkdir()
    assert [step_of(path) for path in complete_checkpoints(tmp_path)] == [3, 20, 100]
    assert checkpoint_to_resume("last", tmp_path) == tmp_path / "checkpoint-100"
    assert checkpoint_to_resume(str(tmp_path / "checkpoint-3"), tmp_path) == tmp_path / "checkpoint-3"
    assert checkpoint_to_resume(None, tmp_path) is None
    with pytest.raises(UserError, match="not a complete checkpoint"):
        checkpoint_to_resume(str(tmp_path / "checkpoint-500"), tmp_path)


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    folders = [whole(tmp_path, step) for step in (1, 2, 3, 4)]
    drop_old_checkpoints(tmp_path, keep=2, also_keep=[folders[0]])
    assert [step_of(path) for path in complete_checkpoints(tmp_path)] == [1, 3, 4]
    drop_old_checkpoints(tmp_path, keep=None)
    assert len(complete_checkpoints(tmp_path)) == 3


def test_overwriting_removes_results_and_keeps_the_rest(tmp_path: Path) -> None:
    whole(tmp_path, 5)
    (tmp_path / "log.jsonl").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "features").mkdir()
    with pytest.raises(UserError, match="earlier run"):
        prepare_run_folder(tmp_path, resume=False, overwrite=False)
    with pytest.raises(UserError, match="exclude each other"):
        prepare_run_folder(tmp_path, resume=True, overwrite=True)
    prepare_run_folder(tmp_path, resume=False, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features", "notes.txt"]
