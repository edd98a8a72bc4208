"""Features that others wrote are read as they were written: one contract for every form, damage named by its file."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch

from dora_vl.backbones import published_features
from dora_vl.backbones.published_features import ParquetShards, open_features
from dora_vl.backbones.vision_store import FeatureRow, FeatureStore, FeatureWriter
from dora_vl.errors import BadSample, UserError

TOKENS, WIDTH = 24, 5


def made(seed: int) -> torch.Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed)).half()


VALUES = {name: made(number) for number, name in enumerate(("a", "b", "c", "d"))}


def write_own(folder: Path) -> None:
    with FeatureWriter(folder, {}) as writer:
        for name, values in VALUES.items():
            writer.add(FeatureRow(name, values.view(6, 4, WIDTH), "pyav", tuple(range(6)), tuple(map(float, range(6)))))


def write_parquet(folder: Path) -> None:
    """VL-Adapter's re-hosted shards, two rows a group."""
    flat = pa.array(torch.stack([*VALUES.values()]).flatten().numpy())
    nested = pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(flat, WIDTH), TOKENS)
    for number, part in enumerate((slice(0, 3), slice(3, 4))):
        table = pa.table({"id": pa.array([*VALUES][part]), "features": nested[part]})
        parquet.write_table(table, folder / f"{number:05d}.parquet", compression="zstd", row_group_size=2)


def write_npz(folder: Path) -> None:
    for name, values in VALUES.items():
        np.savez_compressed(folder / f"{name}.npz", features=values.numpy())


def write_hdf5(folder: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="pip install 'dora-vl[video]'")
    for name, values in VALUES.items():
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file.create_group(name).create_dataset("features", data=values.numpy())


FORMS: dict[str, Callable[[Path], None]] = {
    "own": write_own, "parquet": write_parquet, "npz": write_npz, "hdf5": write_hdf5,
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_as_it_was_written(tmp_path: Path, form: str) -> None:
    FORMS[form](tmp_path)
    store = open_features(tmp_path)
    assert sorted(store.held) == sorted(VALUES)
    for name, values in VALUES.items():
        stored = store[name].stored()
        assert (stored.tokens, stored.width, stored.frames) == (TOKENS, WIDTH, 6 if form == "own" else TOKENS)
        assert torch.equal(store.read(name), values)
    assert torch.equal(pickle.loads(pickle.dumps(store)).read("d"), VALUES["d"])
    for missing in ("absent", "../a"):
        assert missing not in store
        with pytest.raises(BadSample):
            store[missing].stored()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    ("form", "file", "damage"),
    [
        ("npz", "a.npz", cut),
        ("npz", "a.npz", lambda path: np.savez(path, other=np.zeros(3))),
        ("npz", "a.npz", lambda path: np.savez(path, features=np.zeros(3))),
        ("hdf5", "a.h5", cut),
    ],
)
def test_a_damaged_file_costs_its_own_sample(tmp_path: Path, form: str, file: str, damage) -> None:
    FORMS[form](tmp_path)
    damage(tmp_path / file)
    store = open_features(tmp_path)
    with pytest.raises(BadSample) as error:
        store.read("a")
    assert error.value.sample_id == "a"
    assert torch.equal(store.read("b"), VALUES["b"])


def test_damaged_pages_of_a_shard_are_a_bad_sample_and_a_cut_shard_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path)
    shard = tmp_path / "00001.parquet"
    group = parquet.ParquetFile(shard).metadata.row_group(0)
    column = next(c for c in (group.column(n) for n in range(group.num_columns)) if c.path_in_schema.startswith("feat"))
    content, start = bytearray(shard.read_bytes()), column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    shard.write_bytes(bytes(content))
    with pytest.raises(BadSample, match=shard.name):
        open_features(tmp_path).read("d")
    shard.write_bytes(bytes(content[:-20]))
    with pytest.raises(UserError, match=shard.name):
        open_features(tmp_path)


def test_only_so_many_groups_and_shards_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path)
    monkeypatch.setattr(published_features, "OPEN_SHARDS", 1)
    for cache_bytes in (2 * TOKENS * WIDTH * 2, 1):
        shards = ParquetShards(tmp_path, cache_bytes=cache_bytes)
        store = FeatureStore(tmp_path, shards.rows())
        for name in (*VALUES, *VALUES):
            assert torch.equal(store.read(name), VALUES[name])
            held = sum(group.nbytes for group in shards._groups.values())
            assert held <= cache_bytes or len(shards._groups) == 1
            assert len(shards._open) <= 1


def test_what_is_no_folder_of_one_form_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=folder.name):
            open_features(folder)
    table = pa.table({"id": ["a", "b"], "features": pa.array([[[1.0]], [[1.0], [2.0]]])})
    parquet.write_table(table, tmp_path / "any_length.parquet")
    with pytest.raises(UserError, match="any_length"):
        open_features(tmp_path)
    write_own(tmp_path)  # none of the two may be left out in silence
    with pytest.raises(UserError):
        open_features(tmp_path)
