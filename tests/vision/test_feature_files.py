"""Features of others, and of earlier versions of ours, are read as they were written."""

from __future__ import annotations

import pickle
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
from tests.vision.parquet_shards import write_parquet


def made(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(count: int) -> list[FeatureRow]:
    return [FeatureRow(f"v{n}", made(n, 2 + n % 3, 5), "pyav", (n, n + 1), (0.5, 1.25)) for n in range(count)]


def test_shards_of_earlier_versions_are_read_and_added_to(tmp_path: Path) -> None:
    before = [*rows(4), FeatureRow("part", made(9, 3, 2, 5), "pyav", (1, 2, 3), (0.1, 0.2, 0.3), (1.5, None))]
    write_parquet(tmp_path / "features-a.parquet", before[:3])
    write_parquet(tmp_path / "features-b.parquet", before[3:])
    with FeatureWriter(tmp_path, {}) as writer:
        writer.add(FeatureRow("new", made(7, 4, 5), "pillow"))
    source = open_features(tmp_path)
    assert set(source.held) == {"v0", "v1", "v2", "v3", "part", "new"}
    for row in before:
        assert row.features is not None
        assert torch.equal(source.read(row.name), row.features.half().flatten(0, -2))
        stored = source[row.name].stored()
        assert (stored.tokens, stored.width) == tuple(source.read(row.name).shape)
        assert (stored.frames, source[row.name].part) == (len(row.indices), row.part)
    assert torch.equal(source.read("new"), made(7, 4, 5).half())
    assert torch.equal(pickle.loads(pickle.dumps(source)).read("v3"), source.read("v3"))


def test_only_so_many_groups_and_shards_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, row in enumerate(rows(6)):
        write_parquet(tmp_path / f"{number}.parquet", [row])
    monkeypatch.setattr(published_features, "OPEN_SHARDS", 2)
    for cache_bytes in (50, 1):
        shards = ParquetShards(tmp_path, cache_bytes=cache_bytes)
        source = FeatureStore(tmp_path, shards.rows())
        for row in [*rows(6), *rows(6)]:
            assert row.features is not None
            assert torch.equal(source.read(row.name), row.features.half())
            held = sum(group.numbers.nbytes for group in shards._groups.values())
            assert held <= cache_bytes or len(shards._groups) == 1
            assert len(shards._open) <= 2
    assert torch.equal(pickle.loads(pickle.dumps(source)).read("v1"), source.read("v1"))


def test_the_re_hosted_shards(tmp_path: Path) -> None:
    values = made(0, 3, 4, 6).half()
    flat = pa.array(values.flatten().numpy())
    nested = pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(flat, 6), 4)
    for number, part in enumerate((slice(0, 2), slice(2, 3))):
        table = pa.table({"id": pa.array(["COCO_1", "COCO_2", "COCO_3"][part]), "features": nested[part]})
        parquet.write_table(table, tmp_path / f"{number:05d}.parquet", compression="zstd")
    source = open_features(tmp_path)
    for number, name in enumerate(("COCO_1", "COCO_2", "COCO_3")):
        assert torch.equal(source.read(name), values[number])


def test_the_tree_of_hdf5_files(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="pip install 'dora-vl[video]'")
    values = made(1, 49, 8).half()
    with h5py.File(tmp_path / "COCO_9.h5", "w") as file:
        file.create_group("COCO_9").create_dataset("features", data=values.numpy())
    (tmp_path / "broken.h5").write_bytes(b"no hdf5")
    source = open_features(tmp_path)
    assert "COCO_9" in source
    assert torch.equal(source.read("COCO_9"), values)
    with pytest.raises(BadSample, match=r"broken\.h5 in .* cannot be read"):
        source.read("broken")


def test_values_npz(tmp_path: Path) -> None:
    values = made(2, 13, 512).half()
    np.savez(tmp_path / "clip_1.npz", features=values.numpy())
    np.savez(tmp_path / "wrong.npz", other=np.zeros(3))
    np.savez(tmp_path / "flat.npz", features=np.zeros(3))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "clip_1.npz").read_bytes()[:200])
    source = open_features(tmp_path)
    assert torch.equal(source.read("clip_1"), values)
    assert source["clip_1"].stored().frames == 13
    for name, reason in (("wrong", "cannot be read"), ("cut", "cannot be read"), ("flat", "not a table")):
        with pytest.raises(BadSample, match=reason):
            source.read(name)


@pytest.mark.parametrize("suffix", [".safetensors", ".parquet", ".npz"])
def test_what_is_not_there_is_named(tmp_path: Path, suffix: str) -> None:
    if suffix == ".npz":
        np.savez(tmp_path / "a.npz", features=np.zeros((1, 2), np.float16))
    elif suffix == ".parquet":
        write_parquet(tmp_path / "a.parquet", rows(1))
    else:
        with FeatureWriter(tmp_path, {}) as writer:
            writer.add(rows(1)[0])
    source = open_features(tmp_path)
    assert "b" not in source
    with pytest.raises(BadSample, match="holds no features of b"):
        source.read("b")
    with pytest.raises(BadSample):
        source.read("../a")


def test_lists_of_any_length_need_a_shape(tmp_path: Path) -> None:
    inner = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(20, np.float16)), 5)
    table = pa.table({"id": ["a", "b"], "features": pa.ListArray.from_arrays(pa.array([0, 1, 4]), inner)})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="rows of different lengths and no column 'shape'"):
        open_features(tmp_path)


def test_a_folder_without_features_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no features: no \*\.safetensors, \*\.parquet, \*\.h5, \*\.npz in it"):
        open_features(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        open_features(tmp_path / "nowhere")


@pytest.mark.parametrize("form", ["ours", "earlier", "fixed", "npz", "h5"])
def test_what_is_stored_is_known_without_reading_it(tmp_path: Path, form: str) -> None:
    values = made(3, 6, 4, 5).half()  # six frames of four tokens
    six = FeatureRow("v", values, "pyav", tuple(range(6)), tuple(map(float, range(6))))
    if form == "ours":
        with FeatureWriter(tmp_path, {}) as writer:
            writer.add(FeatureRow("other", made(1, 2, 5), "pyav"))
            writer.add(six)
    elif form == "earlier":
        write_parquet(tmp_path / "a.parquet", [FeatureRow("other", made(1, 2, 5), "pyav"), six])
    elif form == "fixed":
        flat = pa.array(np.concatenate([values.flatten(), values.flatten()]))
        nested = pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(flat, 5), 24)
        parquet.write_table(pa.table({"id": ["other", "v"], "features": nested}), tmp_path / "a.parquet")
    elif form == "npz":
        np.savez_compressed(tmp_path / "v.npz", features=values.numpy())
    else:
        with pytest.importorskip("h5py").File(tmp_path / "v.h5", "w") as file:
            file["v/features"] = values.numpy()
    source = open_features(tmp_path)
    stored = source["v"].stored()
    assert (stored.tokens, stored.width) == tuple(source.read("v").shape) == (24, 5)
    assert stored.frames == (6 if form in ("ours", "earlier") else 24)
    with pytest.raises(BadSample, match="holds no features of absent"):
        source["absent"].stored()


def test_damaged_pages_of_a_shard_are_a_bad_sample(tmp_path: Path) -> None:
    """Its index at the end is whole: what it stores is known, and reading it says which shard."""
    shard = tmp_path / "features-0.parquet"
    write_parquet(shard, rows(3), group_rows=3)
    first = parquet.ParquetFile(shard).metadata.row_group(0)
    column = next(c for c in (first.column(n) for n in range(first.num_columns)) if c.path_in_schema.startswith("feat"))
    content = bytearray(shard.read_bytes())
    start = column.data_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    shard.write_bytes(bytes(content))
    source = open_features(tmp_path)
    assert source["v1"].stored().width == 5
    with pytest.raises(BadSample, match=rf"features of v1 in .*{shard.name} cannot be read: "):
        source.read("v1")
    shard.write_bytes(bytes(content[:-20]))
    with pytest.raises(UserError, match=rf"{shard.name} cannot be read .*; copy it again"):
        open_features(tmp_path)
