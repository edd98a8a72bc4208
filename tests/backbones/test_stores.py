"""Stored features, and stored outputs of frozen vision parts with the loss and gradients of the pictures themselves."""

import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image
from torch.utils import _pytree as pytree

from dora_vl import DoRAConfig, apply_dora
from dora_vl.backbones import frozen_outputs, output_store, shards
from dora_vl.backbones.encoder import Encoder
from dora_vl.backbones.frozen_outputs import FrozenParts, NotStorable, find_verified_parts
from dora_vl.backbones.model import open_backbone
from dora_vl.backbones.output_store import OutputStore, PictureReader
from dora_vl.backbones.vision_store import FeatureReader, FeatureWriter, MediumFeatures, open_features
from dora_vl.data.example import Example
from dora_vl.data.pictures import MediaFolder, StoredPictures
from dora_vl.data.samples import Sample
from dora_vl.data.video import Uniform
from dora_vl.errors import BadSample, UserError
from dora_vl.run.base import VideoReading
from dora_vl.training.opened import SampleEncoder
from tests.backbones.conversations import BLUE, RED, TALKS, adapted_backbone, encoder_of, inputs_of, talks_of
from tests.backbones.tiny_families.table import FAMILIES, families_in_turn


def made(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def several(count: int) -> list[MediumFeatures]:
    return [MediumFeatures(f"v{n}", made(n, 2 + n % 3, 5), "pyav", (n, n + 1), (0.5, 1.25)) for n in range(count)]


def write(folder: Path, *written: MediumFeatures) -> None:
    with FeatureWriter(folder, {}) as writer:
        for features in written:
            writer.add(features)


def test_rows_of_different_lengths_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 200)
    write(tmp_path, *several(7))
    source = open_features(tmp_path)
    assert sorted(source.places) == sorted(f"v{n}" for n in range(7))
    for written in several(7):
        read = source.read(written.name)
        assert read.dtype == torch.float16
        torch.testing.assert_close(read, written.features.half(), rtol=0, atol=0)
        stored = source.stored(written.name)
        assert (stored.tokens, stored.width, stored.frames) == (len(read), 5, len(written.indices))
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
    for features, more in ((first, ()), (second, several(1)), (first, ())):
        write(tmp_path, MediumFeatures("a", features), *more)
        assert torch.equal(open_features(tmp_path).read("a"), features)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2  # the same pictures again took the place of the first


def test_what_is_no_whole_shard_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    write(tmp_path, *several(2))
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
        FeatureWriter(tmp_path, {}).add(MediumFeatures("big", torch.full((1, 2), 7e4), "pyav"))


def test_names_come_in_one_order_whoever_was_first(tmp_path: Path) -> None:
    """A base is standardised by the first names, on whichever number of processes the features were computed."""
    for folder, order in (("one", (0, 1, 2)), ("other", (2, 0, 1))):
        for number in order:
            write(tmp_path / folder, several(3)[number])
    first, other = (list(open_features(tmp_path / folder).places) for folder in ("one", "other"))
    assert first == other
    assert sorted(first) == ["v0", "v1", "v2"]


TOKENS, WIDTH = 24, 5


VALUES = {name: made(number, TOKENS, WIDTH).half() for number, name in enumerate(("a", "b", "c", "d"))}


def write_own(folder: Path) -> None:
    with FeatureWriter(folder, {}) as writer:
        for name, values in VALUES.items():
            writer.add(
                MediumFeatures(name, values.view(6, 4, WIDTH), "pyav", tuple(range(6)), tuple(map(float, range(6))))
            )


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
    assert sorted(store.places) == sorted(VALUES)
    for name, values in VALUES.items():
        stored = store.stored(name)
        assert (stored.tokens, stored.width, stored.frames) == (TOKENS, WIDTH, 6 if form == "own" else TOKENS)
        assert torch.equal(store.read(name), values)
    assert torch.equal(pickle.loads(pickle.dumps(store)).read("d"), VALUES["d"])
    for missing in ("absent", "../a"):
        with pytest.raises(BadSample):
            store.stored(missing)


def test_a_row_without_features_leaves_the_others_their_own(tmp_path: Path) -> None:
    flat = pa.list_(pa.list_(pa.float16(), WIDTH), TOKENS)
    cells = [None if name == "b" else list(values.numpy()) for name, values in VALUES.items()]
    parquet.write_table(pa.table({"id": [*VALUES], "features": pa.array(cells, flat)}), tmp_path / "0.parquet")
    reader = FeatureReader(open_features(tmp_path), TOKENS, WIDTH)
    for name in ("a", "c", "d"):
        assert torch.equal(reader.read(name), VALUES[name].float())
    with pytest.raises(BadSample) as error:
        reader.read("b")
    assert error.value.sample_id == "b"


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


NAMES = {id(RED): "red.png", id(BLUE): "deep/blue.png"}


def samples_of(encoder: Encoder, root: Path, family: str, outputs: OutputStore | None) -> list[Sample]:
    """One picture, two and none, as a run reads them."""
    samples = []
    for conversation in ("one picture", "two pictures", "no picture"):
        if conversation in talks_of(family):
            turns, pictures = TALKS[conversation]
            videos = VideoReading(folder=root, sampling=Uniform(1))
            rows = SampleEncoder(encoder=encoder, folder=MediaFolder(root), videos=videos, outputs=outputs)
            row = Example(conversation, tuple(NAMES[id(picture)] for picture in pictures), turns)
            encoded = rows.encode(row, StoredPictures(()))
            samples.append(Sample(encoded.input_ids, encoded.labels, id=conversation, inputs=encoded.inputs))
            samples[-1] = replace(samples[-1], stored=encoded.stored)
    return samples


@families_in_turn
def test_loss_and_gradients_are_those_of_the_pictures(family: str, folders: Mapping[str, Path], tmp_path: Path) -> None:
    encoder, backbone = encoder_of(folders[family]), adapted_backbone(folders[family]).eval()
    if FAMILIES[family].unstored:
        with pytest.raises(NotStorable):
            find_verified_parts(backbone.model, encoder)
        return
    write_pictures(tmp_path, {"red.png": RED, "deep/blue.png": BLUE})
    reader = PictureReader(encoder=encoder, folder=MediaFolder(tmp_path))
    parts = find_verified_parts(backbone.model, encoder)
    backbone.frozen_parts = parts
    store = OutputStore(tmp_path / "cache", backbone.model, parts, reader.settings())
    missing = store.missing(reader, [("red.png",), ("red.png", "deep/blue.png")])
    store.fill(backbone.model, parts, reader, missing)
    collate = encoder.collate
    batch = inputs_of(collate(samples_of(encoder, tmp_path, family, None)))
    stored = inputs_of(collate(samples_of(encoder, tmp_path, family, store)))
    assert {name: value.shape for name, value in batch.items() if isinstance(value, torch.Tensor)} == {
        name: value.shape for name, value in stored.items() if isinstance(value, torch.Tensor)
    }
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]

    def step(inputs: Mapping[str, Any]) -> tuple[float, list[torch.Tensor | None]]:
        features = backbone(**inputs)
        loss = features.losses.mean()
        return float(loss), list(torch.autograd.grad(loss, trained, allow_unused=True))

    (expected, live), (loss, replayed) = step(batch), step(stored)
    assert abs(loss - expected) < 1e-5
    for gradient, other in zip(live, replayed, strict=True):
        assert (gradient is None) == (other is None)
        if gradient is not None and other is not None:
            torch.testing.assert_close(gradient, other, rtol=0, atol=1e-4)
    changed = pytree.tree_map_only(torch.Tensor, lambda leaf: 1 - leaf, stored["stored"])
    assert abs(step({**stored, "stored": changed})[0] - expected) > 1e-6  # the pictures are felt
    assert step(batch)[0] == expected


@families_in_turn
def test_pictures_of_one_size_go_through_together(family, folders, monkeypatch) -> None:
    if FAMILIES[family].unstored:
        pytest.skip(FAMILIES[family].unstored)
    encoder, model = encoder_of(folders[family]), adapted_backbone(folders[family]).eval().model
    parts = find_verified_parts(model, encoder)
    samples = [encoder.media_sample([Image.new("RGB", (40, 24), colour)]) for colour in ("red", "green", "blue")]
    expected = [parts.outputs_of(model, frozen_outputs.inputs_of(model, sample)) for sample in samples]
    passes: list[object] = []
    single = FrozenParts.outputs_of
    monkeypatch.setattr(FrozenParts, "outputs_of", lambda *args: passes.append(args) or single(*args))
    outputs = parts.outputs_of_each(model, samples, encoder.collate)
    assert len(passes) == 2, "one alone, and one of all"
    for output, other in zip(pytree.tree_leaves(outputs), pytree.tree_leaves(expected), strict=True):
        if isinstance(other, torch.Tensor):
            torch.testing.assert_close(output, other, rtol=1e-4, atol=1e-4)
        else:
            assert output == other


class Case(NamedTuple):
    """A tiny LLaVA and pictures, each a sample of its own."""

    model: Any
    parts: FrozenParts
    encoder: Encoder
    root: Path
    cache: Path
    pictures: list[tuple[str, ...]]

    def reader(self, **changes: Any) -> PictureReader:
        return PictureReader(**{"encoder": self.encoder, "folder": MediaFolder(self.root), **changes})

    def store(self, **changes: Any) -> OutputStore:
        return OutputStore(self.cache, self.model, self.parts, self.reader(**changes).settings())

    def filled(self) -> OutputStore:
        store, reader = self.store(), self.reader()
        store.fill(self.model, self.parts, reader, store.missing(reader, self.pictures))
        return store

    def read(self, store: OutputStore, number: int) -> torch.Tensor:
        (leaf,) = tensors(store.read(self.reader(), self.pictures[number]).outputs)
        return leaf


def tensors(outputs: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def write_pictures(root: Path, pictures: Mapping[str, Image.Image]) -> None:
    for name, picture in pictures.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(root / name)


def colours(root: Path, names: list[tuple[str, ...]], blue: int) -> None:
    """Pictures of equal bytes and times of change, so that nothing but the folder tells them apart."""
    write_pictures(root, {name: Image.new("RGB", (9, 5), (30 * n, 200, blue)) for n, (name,) in enumerate(names)})
    for (name,) in names:
        os.utime(root / name, ns=(1, 1))


@pytest.fixture
def case(folders: Mapping[str, Path], tmp_path: Path) -> Case:
    backbone, encoder = adapted_backbone(folders["llava"]).eval(), encoder_of(folders["llava"])
    names = [(f"deep/{number}.bmp" if number % 2 else f"{number}.bmp",) for number in range(5)]
    colours(tmp_path / "pictures", names, 7)
    parts = find_verified_parts(backbone.model, encoder)
    return Case(backbone.model, parts, encoder, tmp_path / "pictures", tmp_path / "cache", names)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    seen: list[object] = []
    outputs_of = FrozenParts.outputs_of

    def counted(parts: FrozenParts, model: Any, inputs: Mapping[str, Any]) -> Any:
        if "stop" in seen and seen.index("stop") < len(seen) - 3:
            raise KeyboardInterrupt
        seen.append(inputs)
        return outputs_of(parts, model, inputs)

    monkeypatch.setattr(FrozenParts, "outputs_of", counted)
    return seen


@pytest.mark.parametrize(("shard_bytes", "again"), [(1, 2), (2**20, 5)])  # a sample a shard; all in one
def test_a_stopped_run_goes_on(case, computed, monkeypatch, shard_bytes, again) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", shard_bytes)
    computed.append("stop")  # after three
    with pytest.raises(KeyboardInterrupt):
        case.filled()
    computed.clear()
    store = case.filled()
    assert len(computed) == again
    sent = pickle.loads(pickle.dumps(store))
    for number in range(5):
        assert torch.equal(case.read(sent, number), case.read(store, number))
    case.filled()
    assert len(computed) == again
    kinds = {path.name.split("-")[0] for path in case.cache.rglob("*") if path.is_file()}
    assert kinds == {"shard", "settings.json"}


def test_a_changed_picture_is_computed_again(case: Case, computed: list[object]) -> None:
    old = case.read(case.filled(), 2)
    Image.new("RGB", (9, 7), (1, 2, 3)).save(case.root / case.pictures[2][0])
    store = case.filled()
    assert len(computed) == 6
    assert not torch.equal(case.read(store, 2), old)


def test_a_picture_that_cannot_be_read_is_named_and_tried_again(case: Case, computed: list[object]) -> None:
    """Mended with the same size and time, as a copy that keeps times does it; or the disk had an error."""
    broken, missing = (case.root / case.pictures[number][0] for number in (0, 1))
    whole = broken.read_bytes()
    broken.write_bytes(bytes(len(whole)))
    os.utime(broken, ns=(1, 1))
    missing.unlink()
    store = case.filled()
    assert len(computed) == 3
    for number in (0, 1):
        with pytest.raises(BadSample) as error:
            case.read(store, number)
        assert error.value.sample_id == case.pictures[number][0]
    broken.write_bytes(whole)
    os.utime(broken, ns=(1, 1))
    with pytest.raises(BadSample):  # mended meanwhile, but not computed
        case.read(store, 0)
    assert case.read(case.filled(), 0).numel()
    assert len(computed) == 4


def test_another_folder_of_equal_files_is_another_store(case: Case, computed: list[object], tmp_path: Path) -> None:
    other = case._replace(root=tmp_path / "others")
    colours(other.root, other.pictures, 200)
    store, other_store = case.filled(), other.filled()
    assert store.folder != other_store.folder
    assert not torch.equal(case.read(store, 1), other.read(other_store, 1))
    assert case.filled().folder == store.folder
    assert len(computed) == 10


def test_other_weights_dtype_processor_or_reading_are_another_store(case, folders, monkeypatch) -> None:
    stores = [case.store(), case.store(most_pixels=5000), case.store(folder=MediaFolder(case.root, False, True))]
    other = encoder_of(folders["llava"])
    other.processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    stores.append(case.store(encoder=other))
    monkeypatch.setattr(output_store.transformers, "__version__", "0")
    stores.append(case.store())
    monkeypatch.undo()
    tower = case.model.get_submodule(next(iter(case.parts.calls)))
    case.model.config._name_or_path = "somewhere/else"  # the same base in another place
    assert case.store().folder == stores[0].folder
    next(tower.parameters()).data[0] += 1
    stores.append(case.store())
    tower.to(torch.bfloat16)
    stores.append(case.store())
    assert len({store.folder for store in stores}) == 7


def test_processes_share_the_work(case: Case, computed: list[object]) -> None:
    reader, stores = case.reader(), [case.store(), case.store()]
    missing = [store.missing(reader, case.pictures) for store in stores]  # both see the same missing
    for number, store in enumerate(stores):
        store.fill(case.model, case.parts, reader, missing[number], part=(number, 2))
    assert len(computed) == 5
    for store in stores:
        store.refresh()
        assert not store.missing(reader, case.pictures)


def test_what_does_not_fit_on_the_disk_is_refused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))  # pyright: ignore
    with pytest.raises(UserError, match=r"data\.feature_cache"):
        case.filled()


@pytest.mark.parametrize("targets", ["model.vision_tower.*.q_proj", "model.vision_tower.*.fc2"])
def test_a_tower_that_trains_is_refused(folders: Mapping[str, Path], targets: str) -> None:
    model = open_backbone(str(folders["llava"])).model
    apply_dora(model, DoRAConfig(targets=(targets,), rank=2))
    with pytest.raises(NotStorable):
        find_verified_parts(model, encoder_of(folders["llava"]))
