"""Which checkpoints count as whole, and which stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_vl.adapters.files import checkpoint_to_resume, complete_checkpoints, drop_old_checkpoints, step_of
from dora_vl.errors import UserError
from dora_vl.run.folder import prepare_run_folder


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
    with pytest.raises(UserError):
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
    with pytest.raises(UserError):
        prepare_run_folder(tmp_path, checkpoint=None, overwrite=False)
    with pytest.raises(UserError):
        prepare_run_folder(tmp_path, checkpoint=tmp_path / "checkpoint-5", overwrite=True)
    prepare_run_folder(tmp_path, checkpoint=None, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features", "notes.txt"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_checkpoints_after_the_one_that_a_run_starts_from_count_no_more(tmp_path: Path) -> None:
    """Else the run's own are removed as the oldest, and `last` is one of the run that was left."""
    run, steps = tmp_path / "run", (300, 400, 500, 600)
    checkpoints = {step: whole(run, step) for step in steps}
    (run / "superseded-checkpoint-500").mkdir()  # of an earlier resume
    prepare_run_folder(run, checkpoint=checkpoints[400], overwrite=False)
    left_behind = ["superseded-checkpoint-500", "superseded-checkpoint-500-2", "superseded-checkpoint-600"]
    assert names(run) == ["checkpoint-300", "checkpoint-400", *left_behind]
    assert (run / "superseded-checkpoint-500-2" / "trainer_state.json").is_file()
    whole(run, 420)
    drop_old_checkpoints(run, keep=2)
    assert names(run) == ["checkpoint-400", "checkpoint-420", *left_behind]
    assert checkpoint_to_resume("last", run) == run / "checkpoint-420"


def test_a_run_from_another_folders_checkpoint_keeps_none_of_its_own_folders(tmp_path: Path) -> None:
    other, run = whole(tmp_path / "other", 400), tmp_path / "run"
    whole(run, 300)
    whole(run, 500)
    prepare_run_folder(run, checkpoint=other, overwrite=False)
    assert names(run) == ["superseded-checkpoint-300", "superseded-checkpoint-500"]
    assert names(other.parent) == ["checkpoint-400"]


def test_the_checkpoint_itself_stays_whatever_it_is_called_by(tmp_path: Path) -> None:
    here = whole(tmp_path / "run", 400)
    whole(tmp_path / "run", 500)
    (tmp_path / "links").mkdir()
    (link := tmp_path / "links" / "checkpoint-9").symlink_to(here)
    prepare_run_folder(tmp_path / "run", checkpoint=link, overwrite=False)
    assert names(tmp_path / "run") == ["checkpoint-400", "superseded-checkpoint-500"]
