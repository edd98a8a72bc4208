"""A cut weights file is one line with its name and sizes, wherever it is read; a whole one passes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import DistStoreError

from dora_vl.adapters.files import read_tensors
from dora_vl.backbones.model import open_backbone
from dora_vl.errors import UserError
from dora_vl.files import check_whole, opening
from tests.backbones.tiny_language import tiny_language

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


@pytest.mark.parametrize(
    "error",
    [
        Exception("data did not match any variant"),
        RecursionError("maximum recursion depth exceeded"),
        OSError("no file\nof that name"),
        UserError("a.json is empty"),
    ],
)
def test_whatever_is_raised_while_a_model_is_opened_is_a_persons_error(error: Exception) -> None:
    with pytest.raises(UserError), opening("no model"):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"),
        DistStoreError("wait timeout after 300000ms"),
    ],
)
def test_too_little_memory_and_a_lost_rank_are_for_those_who_know_of_them(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, opening("no model"):
        raise error
    assert caught.value is error
