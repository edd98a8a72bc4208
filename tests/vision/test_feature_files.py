"""Features come back as they were written, from every form there is, and a stopped run goes on."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch

from dora_vl.errors import BadSample, UserError
from dora_vl.vision import feature_parquet
from dora_vl.vision.feature_files import ParquetFeatures, open_features
from dora_vl.vision.feature_shards import FeatureRow, FeatureWriter, written


def made(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(count: int) -> list[FeatureRow]:
    return [FeatureRow(f"v{n}", made(n, 2 + n % 3, 5), "pyav", (n, n + 1), (0.5, 1.25)) for n in range(count)]


def test_rows_of_different_lengths_come_back(tmp_path: Path) -> None:
    writer = FeatureWriter(tmp_path, {"frames": 2}, shard_bytes=64)
    for row in rows(7):
        writer.add(row)
    writer.flush()
    source = open_features(tmp_path)
    assert sorted(source.names()) == sorted(f"v{n}" for n in range(7))
    for row in rows(7):
        read = source.read(row.name)
        assert read.dtype == torch.float16
        torch.testing.assert_close(read, row.features.half(), rtol=0, atol=0)
        assert source.stored(row.name).frames == len(row.indices)
    assert len(list(tmp_path.glob("*.parquet"))) > 1
    again = pickle.loads(pickle.dumps(source))
    assert torch.equal(again.read("v3"), source.read("v3"))


def test_what_they_were_made_from_is_beside_them(tmp_path: Path) -> None:
    writer = FeatureWriter(tmp_path, {})
    writer.add(rows(1)[0])
    writer.flush()
    (shard,) = tmp_path.glob("*.parquet")
    table = parquet.read_table(shard)
    assert table.schema.field("features").type == pa.list_(pa.float16())
    plain = {name: table[name].to_pylist() for name in table.column_names if name != "features"}
    assert plain == {
        "id": ["v0"],
        "shape": [[2, 5]],
        "backend": ["pyav"],
        "frame_indices": [[0, 1]],
        "timestamps": [[0.5, 1.25]],
        "start_seconds": [0.0],
        "end_seconds": [None],
    }


def test_a_stopped_run_goes_on_and_nothing_half_written_is_read(tmp_path: Path) -> None:
    writer = FeatureWriter(tmp_path, {"frames": 2}, shard_bytes=64)
    for row in rows(4):
        writer.add(row)
    done = written(tmp_path)
    assert 0 < len(done) < 4
    (tmp_path / ".features-0.parquet.17").write_bytes(b"half")
    writer = FeatureWriter(tmp_path, {"frames": 2})
    for row in rows(4):
        if row.name not in done:
            writer.add(row)
    writer.flush()
    assert set(written(tmp_path)) == {"v0", "v1", "v2", "v3"}


def test_other_settings_are_refused(tmp_path: Path) -> None:
    FeatureWriter(tmp_path, {"frames": 2, "tower": {"mean": (0.5, 0.5)}})
    FeatureWriter(tmp_path, {"frames": 2, "tower": {"mean": (0.5, 0.5)}})
    with pytest.raises(UserError, match="frames 2, and 3 is asked for"):
        FeatureWriter(tmp_path, {"frames": 3, "tower": {"mean": (0.5, 0.5)}})


def test_numbers_too_large_for_float16_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"features of big do not fit into float16: the largest is 7e\+04"):
        FeatureWriter(tmp_path, {}).add(FeatureRow("big", torch.full((1, 2), 7e4), "pyav"))


def test_only_so_many_groups_stay_in_memory(tmp_path: Path) -> None:
    writer = FeatureWriter(tmp_path, {}, shard_bytes=16)
    for row in rows(6):
        writer.add(row)
    writer.flush()
    source = ParquetFeatures(tmp_path, cache_bytes=50)
    for row in rows(6):
        source.read(row.name)
        assert sum(group.bytes for group in source._groups.values()) <= 50 or len(source._groups) == 1


def test_one_picture_costs_no_more_than_a_small_group(tmp_path: Path) -> None:
    writer = FeatureWriter(tmp_path, {})
    for number in range(40):  # VL-Adapter's grids, 200 kB each
        writer.add(FeatureRow(f"p{number}", made(number, 49, 2048), "pillow"))
    writer.flush()
    source = ParquetFeatures(tmp_path)
    source.read("p17")
    assert sum(group.bytes for group in source._groups.values()) <= 2**19


def test_only_so_many_shards_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = FeatureWriter(tmp_path, {}, shard_bytes=16)
    for row in rows(6):
        writer.add(row)
    writer.flush()
    monkeypatch.setattr(feature_parquet, "OPEN_SHARDS", 2)
    source = ParquetFeatures(tmp_path, cache_bytes=1)
    for row in [*rows(6), *rows(6)]:
        assert torch.equal(source.read(row.name), row.features.half())
        assert len(source._open) <= 2
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
    assert source.stored("clip_1").frames == 13
    for name, reason in (("wrong", "cannot be read"), ("cut", "cannot be read"), ("flat", "not a table")):
        with pytest.raises(BadSample, match=reason):
            source.read(name)


@pytest.mark.parametrize("suffix", [".parquet", ".npz"])
def test_what_is_not_there_is_named(tmp_path: Path, suffix: str) -> None:
    if suffix == ".npz":
        np.savez(tmp_path / "a.npz", features=np.zeros((1, 2), np.float16))
    else:
        writer = FeatureWriter(tmp_path, {})
        writer.add(rows(1)[0])
        writer.flush()
    source = open_features(tmp_path)
    assert "b" not in source
    with pytest.raises(BadSample, match="holds no features of b"):
        source.read("b")
    with pytest.raises(BadSample):
        source.read("../a")


def test_a_folder_without_features_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no features: no \*\.parquet, \*\.h5, \*\.npz in it"):
        open_features(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        open_features(tmp_path / "nowhere")


@pytest.mark.parametrize("form", ["ours", "fixed", "npz", "h5"])
def test_what_is_stored_is_known_without_reading_it(tmp_path: Path, form: str) -> None:
    values = made(3, 6, 4, 5).half()  # six frames of four tokens
    if form == "ours":
        writer = FeatureWriter(tmp_path, {})
        writer.add(FeatureRow("other", made(1, 2, 5), "pyav"))
        writer.add(FeatureRow("v", values, "pyav", tuple(range(6)), tuple(map(float, range(6)))))
        writer.flush()
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
    stored = source.stored("v")
    assert (stored.tokens, stored.width) == tuple(source.read("v").shape) == (24, 5)
    assert stored.frames == (6 if form == "ours" else 24)
    with pytest.raises(BadSample, match="holds no features of absent"):
        source.stored("absent")


def test_damaged_pages_of_a_shard_are_a_bad_sample(tmp_path: Path) -> None:
    """Its index at the end is whole: what it stores is known, and reading it says which shard."""
    writer = FeatureWriter(tmp_path, {})
    for row in rows(3):
        writer.add(row)
    writer.flush()
    (shard,) = tmp_path.glob("*.parquet")
    first = parquet.ParquetFile(shard).metadata.row_group(0)
    column = next(c for c in (first.column(n) for n in range(first.num_columns)) if c.path_in_schema.startswith("feat"))
    content = bytearray(shard.read_bytes())
    start = column.data_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    shard.write_bytes(bytes(content))
    source = open_features(tmp_path)
    assert source.stored("v1").width == 5
    with pytest.raises(BadSample, match=rf"features of v1 in .*{shard.name} cannot be read: "):
        source.read("v1")
    shard.write_bytes(bytes(content[:-20]))
    with pytest.raises(UserError, match=rf"{shard.name} cannot be read .*; copy it again"):
        open_features(tmp_path)
