"""A base's hash is of what is loaded: its config and its weights, not of files that lie beside them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from dora_vl.adapters.adapter import content_hash
from dora_vl.errors import UserError
from dora_vl.files import weight_files
from tests.backbones.tiny_language import tiny_language


def base(folder: Path, **options: str) -> Path:
    tiny_language().save_pretrained(folder, **options)
    return folder


def test_the_hash_of_a_folder_of_one_kind_is_over_its_config_and_weights(tmp_path: Path) -> None:
    folder = base(tmp_path / "base")
    lines = [
        f"{name} {hashlib.sha256((folder / name).read_bytes()).hexdigest()}\n"
        for name in ("config.json", "model.safetensors")
    ]
    assert content_hash(folder) == hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "30KB"}])
def test_files_that_are_not_loaded_do_not_count_and_those_that_are_do(tmp_path: Path, shards: dict[str, str]) -> None:
    folder = base(tmp_path / "base", **shards)
    before = content_hash(folder)
    torch.save({"lm_head.weight": torch.ones(2, 3)}, folder / "pytorch_model.bin")
    torch.save({"rate": torch.ones(1)}, folder / "training_args.bin")
    assert content_hash(folder) == before
    loaded = weight_files(folder)
    assert len(loaded) == 1 if not shards else len(loaded) > 2
    assert all(path.name.startswith("model") and path.suffix == ".safetensors" for path in loaded)
    content = bytearray(loaded[-1].read_bytes())
    content[-1] ^= 1
    loaded[-1].write_bytes(content)
    assert content_hash(folder) != before


def test_a_folder_of_pickles_alone_is_hashed_by_them(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"one")
    before = content_hash(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"two")
    assert content_hash(tmp_path) != before
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "unknown.bin")
    (tmp_path / "folder.safetensors").mkdir()
    assert weight_files(tmp_path) == (tmp_path / "unknown.bin",)


@pytest.mark.parametrize("weight_map", ['{"a": "model-1.safetensors"}', "3", '{"a": "../other.safetensors"}'])
def test_a_broken_list_of_shards_is_refused(tmp_path: Path, weight_map: str) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    (tmp_path / "other.safetensors").write_bytes(b"of somebody else")
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {weight_map}}}')
    with pytest.raises(UserError):
        content_hash(folder)
