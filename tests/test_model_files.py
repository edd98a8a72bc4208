"""A cut weights file is one line with its name and sizes, wherever it is read; a whole one passes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.distributed import DistStoreError

from dora_vl.adapters.files import read_tensors
from dora_vl.adapters.folder import WEIGHTS_FILE
from dora_vl.adapters.folder import read_weights as read_adapter_weights
from dora_vl.backbones.model import open_backbone
from dora_vl.errors import UserError
from dora_vl.files import BRINGS_CODE, check_whole, opening
from tests.backbones.tiny_language import tiny_language

TENSORS = {"a": torch.arange(40.0).view(8, 5), "b": torch.ones(3, dtype=torch.bfloat16)}


def written(path: Path) -> bytes:
    if path.suffix == ".safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path)
    return path.read_bytes()


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin", "w.pth", "w.pt"])
@pytest.mark.parametrize("read", [read_tensors])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_cut_file_is_one_line_with_its_size(
    tmp_path: Path, name: str, read: Callable[[Path], object], share: float
) -> None:
    path = tmp_path / name
    whole = written(path)
    check_whole(path)
    read(path)
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert f"{path.stat().st_size:,} bytes" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_sizes_are_those_of_the_file_and_of_its_header(tmp_path: Path) -> None:
    whole = written(tmp_path / WEIGHTS_FILE)
    (tmp_path / WEIGHTS_FILE).write_bytes(whole[:-7])
    said = f"it has {len(whole) - 7:,} bytes, and its header says {len(whole):,}; copy or fetch it again"
    with pytest.raises(UserError, match=said):
        read_adapter_weights(tmp_path)
    (tmp_path / WEIGHTS_FILE).write_bytes(whole + b"more")
    with pytest.raises(UserError, match=f"it has {len(whole) + 4:,} bytes, and its header says {len(whole):,}"):
        read_adapter_weights(tmp_path)


def test_a_base_folder_with_a_cut_shard_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    tiny_language().save_pretrained(tmp_path / "base", max_shard_size="30KB")
    open_backbone(str(tmp_path / "base"))
    shards = sorted((tmp_path / "base").glob("model-*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-100])
    with pytest.raises(UserError, match=rf"{shards[1].name} is not a whole .* header says {len(whole):,}"):
        open_backbone(str(tmp_path / "base"))
    shards[1].unlink()
    with pytest.raises(UserError, match=rf"names {len(shards)} shards, 1 are not there, first {shards[1].name}"):
        open_backbone(str(tmp_path / "base"))
    shutil.rmtree(tmp_path / "base")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_what_passes_is_what_safetensors_reads(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "w.safetensors"
    whole = written(path)
    at = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:at] + data.draw(st.binary(max_size=12)) + whole[data.draw(st.integers(at, len(whole))) :])
    try:
        check_whole(path)
    except UserError:
        with pytest.raises(Exception):  # noqa: B017, PT011 - whatever safetensors says of it
            load_file(path)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Exception("data did not match any variant"), "no model: Exception: data did not match any variant"),
        (KeyError("text_config"), "no model: KeyError: 'text_config'"),
        (
            RecursionError("maximum recursion depth exceeded"),
            "no model: RecursionError: maximum recursion depth exceeded",
        ),
        (RuntimeError("negative dimension -1"), "no model: RuntimeError: negative dimension -1"),
        (OSError("no file\nof that name"), "no model: no file of that name"),
        (ValueError("set trust_remote_code=True"), f"no model: {BRINGS_CODE}"),
        (UserError("a.json is empty"), "a.json is empty"),
    ],
)
def test_whatever_is_raised_while_a_model_is_opened_is_one_line(error: Exception, said: str) -> None:
    with pytest.raises(UserError) as caught, opening("no model"):
        raise error
    assert str(caught.value) == said


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"),
        DistStoreError("wait timeout after 300000ms"),
    ],
)
def test_too_little_memory_and_a_lost_rank_are_for_those_who_know_of_them(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, opening("no model"):
        raise error
    assert caught.value is error
