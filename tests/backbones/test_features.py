"""Features come back from every store as they were written; damage is named by its file, a stopped run goes on."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch

from dora_vl.backbones.vision_store import FeatureRow, FeatureWriter, open_features
from dora_vl.errors import BadSample, UserError


def made(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(count: int) -> list[FeatureRow]:
    return [FeatureRow(f"v{n}", made(n, 2 + n % 3, 5), "pyav", (n, n + 1), (0.5, 1.25)) for n in range(count)]


def write(folder: Path, *written: FeatureRow, shard_bytes: int = 2**20) -> None:
    with FeatureWriter(folder, {}, shard_bytes=shard_bytes) as writer:
        for row in written:
            writer.add(row)


def test_rows_of_different_lengths_come_back(tmp_path: Path) -> None:
    write(tmp_path, *rows(7), shard_bytes=200)
    source = open_features(tmp_path)
    assert sorted(source.rows) == sorted(f"v{n}" for n in range(7))
    for row in rows(7):
        read = source.read(row.name)
        assert read.dtype == torch.float16
        torch.testing.assert_close(read, row.features.half(), rtol=0, atol=0)
        stored = source.stored(row.name)
        assert (stored.tokens, stored.width, stored.frames) == (len(read), 5, len(row.indices))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    sent = pickle.dumps(source)
    assert len(sent) < 2000  # no features in it
    again = pickle.loads(sent)
    assert torch.equal(again.read("v3"), source.read("v3"))


def test_other_settings_are_refused(tmp_path: Path) -> None:
    FeatureWriter(tmp_path, {"frames": 2, "tower": {"mean": (0.5, 0.5)}})
    FeatureWriter(tmp_path, {"frames": 2, "tower": {"mean": (0.5, 0.5)}})
    with pytest.raises(UserError):
        FeatureWriter(tmp_path, {"frames": 3, "tower": {"mean": (0.5, 0.5)}})


def test_of_two_shards_the_one_written_last_counts(tmp_path: Path) -> None:
    """A, then B beside another picture, then A again; the order of the names does not tell who came last."""
    first, second = made(1, 2, 5).half(), made(2, 2, 5).half()
    for features, more in ((first, ()), (second, rows(1)), (first, ())):
        write(tmp_path, FeatureRow("a", features), *more)
        assert torch.equal(open_features(tmp_path).read("a"), features)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) == 2  # the same pictures again took the place of the first


def test_what_is_no_whole_shard_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    write(tmp_path, *rows(2))
    (shard,) = tmp_path.glob("*.safetensors")
    content = shard.read_bytes()
    shard.write_bytes(content[:-20])
    with pytest.raises(UserError):
        open_features(tmp_path)
    for tensors in ({"weight": torch.zeros(2)}, {"features": torch.zeros(2, 3)}):
        save_file(tensors, shard)
        with pytest.raises(UserError):
            open_features(tmp_path)
    shard.write_bytes(content.replace(b"written", b"writing"))
    with pytest.raises(UserError):
        open_features(tmp_path)


def test_numbers_too_large_for_float16_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        FeatureWriter(tmp_path, {}).add(FeatureRow("big", torch.full((1, 2), 7e4), "pyav"))


def test_names_come_in_one_order_whoever_was_first(tmp_path: Path) -> None:
    """A base is standardised by the first names, on whichever number of processes the features were computed."""
    for folder, order in (("one", (0, 1, 2)), ("other", (2, 0, 1))):
        for number in order:
            write(tmp_path / folder, rows(3)[number])
    first, other = (list(open_features(tmp_path / folder).rows) for folder in ("one", "other"))
    assert first == other
    assert sorted(first) == ["v0", "v1", "v2"]


TOKENS, WIDTH = 24, 5


VALUES = {name: made(number, TOKENS, WIDTH).half() for number, name in enumerate(("a", "b", "c", "d"))}


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
    h5py = pytest.importorskip("h5py", reason="pip install '.[video]'")
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
    assert sorted(store.rows) == sorted(VALUES)
    for name, values in VALUES.items():
        stored = store.stored(name)
        assert (stored.tokens, stored.width, stored.frames) == (TOKENS, WIDTH, 6 if form == "own" else TOKENS)
        assert torch.equal(store.read(name), values)
    assert torch.equal(pickle.loads(pickle.dumps(store)).read("d"), VALUES["d"])
    for missing in ("absent", "../a"):
        with pytest.raises(BadSample):
            store.stored(missing)


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


def test_what_is_no_folder_of_one_form_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError):
            open_features(folder)
    table = pa.table({"id": ["a", "b"], "features": pa.array([[[1.0]], [[1.0], [2.0]]])})
    parquet.write_table(table, tmp_path / "any_length.parquet")
    with pytest.raises(UserError):
        open_features(tmp_path)
    write_own(tmp_path)  # none of the two may be left out in silence
    with pytest.raises(UserError):
        open_features(tmp_path)
