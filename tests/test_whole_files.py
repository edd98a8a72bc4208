"""Folders and files appear whole, whenever their writer is killed; a cut weights file is told with its name."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import DistStoreError

from dora_vl import files
from dora_vl.adapters.files import read_tensors
from dora_vl.backbones.model import open_backbone
from dora_vl.errors import UserError
from dora_vl.files import check_whole, clear_leftovers, opening, whole_file, whole_folder
from tests.backbones.tiny_language import tiny_language


def in_a_child(work: Callable[[], None]) -> int:
    """The signal that ended it; 0 where it went to its end."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def write(target: Path, text: str, *, killed_in: str | None = None) -> int:
    """Writes a folder of two files in a child that is killed at its nth rename, or before the first ("files")."""

    def work() -> None:
        renames = 0
        rename = Path.rename

        def counted(self: Path, to: Path) -> Path:
            nonlocal renames
            if killed_in == str(renames):
                os.kill(os.getpid(), signal.SIGKILL)
            renames += 1
            return rename(self, to)

        Path.rename = counted  # type: ignore[method-assign] - of the child
        with whole_folder(target) as folder:
            (folder / "a").write_text(text)
            if killed_in == "files":
                os.kill(os.getpid(), signal.SIGKILL)
            (folder / "inside").mkdir()
            (folder / "inside" / "b").write_text(text)

    return in_a_child(work)


def texts(target: Path) -> list[str]:
    return [(target / name).read_text() for name in ("a", "inside/b") if (target / name).is_file()]


@pytest.mark.parametrize("killed_in", ["files", "0", "1"])
@pytest.mark.parametrize("cleared_by", ["another", "the same"])
def test_a_kill_leaves_the_old_folder_or_the_new_one(tmp_path: Path, killed_in: str, cleared_by: str) -> None:
    target = tmp_path / "m[1]"
    assert write(target, "new", killed_in="0") == signal.SIGKILL
    clear_leftovers(tmp_path, target.name)
    assert list(tmp_path.iterdir()) == []
    assert write(target, "old") == 0
    assert write(target, "new", killed_in=killed_in) == signal.SIGKILL
    assert len(list(tmp_path.iterdir())) > 1 or not target.exists()  # something was left behind
    if cleared_by == "the same":
        with pytest.raises(UserError), whole_folder(target):
            raise UserError("ends badly")
    else:
        clear_leftovers(tmp_path)
    assert texts(target) == ["old", "old"]
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    assert write(target, "new") == 0
    assert texts(target) == ["new", "new"]
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_what_living_processes_write_and_what_others_are_called_stays(tmp_path: Path) -> None:
    (tmp_path / ".n.unfinished-1-a").mkdir()  # of another target
    (tmp_path / ".m.notes").touch()
    with whole_folder(tmp_path / "m") as first:
        (first / "a").write_text("first")
        with whole_file(first / "b.json") as file:  # inside what this process holds
            file.write("{}")

        def another() -> None:
            with whole_folder(tmp_path / "m") as second:
                (second / "a").write_text("second")

        assert in_a_child(another) == 0
        assert (first / "a").read_text() == "first"
        assert (tmp_path / "m" / "a").read_text() == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".m.notes", ".n.unfinished-1-a", "m"]
    assert (tmp_path / "m" / "a").read_text() == "first"


def test_a_killed_writer_of_a_file_leaves_nothing_after_the_next(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"

    def work() -> None:
        with whole_file(path) as file:
            file.write("{")
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_child(work) == signal.SIGKILL
    assert [left.name.startswith(".settings.json.") for left in tmp_path.iterdir()] == [True]
    with whole_file(path) as file:
        file.write("{}")
    assert [left.name for left in tmp_path.iterdir()] == ["settings.json"]


def test_everything_is_on_disk_before_a_folder_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def noted(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def renamed(self: Path, to: Path) -> Path:
        events.append(f"named {to.name}")
        return rename(self, to)

    monkeypatch.setattr(files.os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", renamed)
    with whole_folder(tmp_path / "m") as folder:
        (folder / "inside").mkdir()
        (folder / "inside" / "weights").write_text("w")
    name = events.index("named m")
    assert {"weights", "inside", folder.name} <= set(events[:name])
    assert events[name + 1 :] == [tmp_path.name]


TENSORS = {"a": torch.arange(40.0).view(8, 5), "b": torch.ones(3, dtype=torch.bfloat16)}


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin", "w.pth", "w.pt"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_cut_file_is_told_with_its_name_and_size(tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    save_file(TENSORS, path) if path.suffix == ".safetensors" else torch.save(TENSORS, path)
    whole = path.read_bytes()
    check_whole(path)
    read_tensors(path)
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError) as caught:
        read_tensors(path)
    assert str(path) in str(caught.value)
    if path.suffix == ".safetensors":
        path.write_bytes(whole + b"more")
        with pytest.raises(UserError):
            read_tensors(path)


def test_a_base_folder_with_a_cut_shard_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    tiny_language().save_pretrained(tmp_path / "base", max_shard_size="30KB")
    open_backbone(str(tmp_path / "base"))
    shard = sorted((tmp_path / "base").glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError):
        open_backbone(str(tmp_path / "base"))
    shard.unlink()
    with pytest.raises(UserError):
        open_backbone(str(tmp_path / "base"))


ENDS = (
    *(Exception("data did not match any variant"), RecursionError("maximum recursion depth exceeded")),
    *(OSError("no file\nof that name"), UserError("a.json is empty")),
)
PASSES = (
    *(MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")),
    *(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"), DistStoreError("wait timeout")),
)
"""Too little memory and a lost rank are for those who know of them."""


@pytest.mark.parametrize("error", [*ENDS, *PASSES], ids=repr)
def test_whatever_is_raised_while_a_model_is_opened_is_a_persons_error_but_for_some(error: Exception) -> None:
    with pytest.raises(type(error) if error in PASSES else UserError) as caught, opening("no model"):
        raise error
    assert (caught.value is error) == (error in PASSES or isinstance(error, UserError))
