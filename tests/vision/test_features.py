"""Stored features equal computed ones, survive a stop, follow the files, and are never taken from another tower."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dora_vl.errors import BadSample, UserError
from dora_vl.vision import compute_features as computing
from dora_vl.vision.compute_features import compute_features, open_store
from dora_vl.vision.features import FeatureStore
from dora_vl.vision.images import ImagePreparation, Preparation

PREPARATION = ImagePreparation(Preparation(image_size=8, mean=(0.5,) * 3, std=(0.5,) * 3), aspect="pad")


class Tower:
    """A convolution in bf16 that counts the pictures it sees and can fail after some."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
        torch.manual_seed(seed)
        self.tower = nn.Conv2d(3, 5, 4, stride=4).to(dtype)
        self.tower_settings: dict[str, object] = {"layer": -1}
        self.feature_shape = (4, 5)
        self.feature_dtype = dtype
        self.seen = 0
        self.stop_after = 10**9

    @torch.no_grad()
    def picture_features(self, pixel_values: Tensor) -> Tensor:
        if self.seen + len(pixel_values) > self.stop_after:
            raise KeyboardInterrupt
        self.seen += len(pixel_values)
        return self.tower(pixel_values.to(self.feature_dtype)).flatten(2).transpose(1, 2)


class Place(NamedTuple):
    cache: Path
    root: Path
    pictures: list[str]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "pictures/deep").mkdir(parents=True)
    names = [f"deep/{number}.png" if number % 2 else f"{number}.png" for number in range(7)]
    for number, name in enumerate(names):
        Image.new("RGB", (9, 5 + number), (30 * number, 200, 7)).save(tmp_path / "pictures" / name)
    return Place(tmp_path / "cache", tmp_path / "pictures", names)


def filled(place: Place, tower: Tower, **options: object) -> FeatureStore:
    store = open_store(place.cache, tower=tower, preparation=PREPARATION, root=place.root)
    compute_features(
        store,
        place.pictures,
        tower=tower,
        preparation=PREPARATION,
        batch_size=2,
        **options,  # pyright: ignore
    )
    return store


@pytest.mark.parametrize("workers", [0, 1])
def test_equal_to_the_tower(place: Place, workers: int) -> None:
    tower = Tower()
    store = filled(place, tower, workers=workers)
    for name in place.pictures:
        pixels = PREPARATION.prepare(Image.open(place.root / name))[None]
        read = store.read(name)
        assert read.dtype == torch.bfloat16
        torch.testing.assert_close(read, tower.picture_features(pixels)[0])
    again = pickle.loads(pickle.dumps(store))
    assert torch.equal(again.read(place.pictures[3]), store.read(place.pictures[3]))
    assert not [path for path in place.cache.rglob("*") if path.is_file() and path.suffix != ".safetensors"]


def test_a_stopped_run_goes_on(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(computing, "SHARD_BYTES", 2 * 4 * 5 * 2)  # two pictures a shard
    tower = Tower()
    tower.stop_after = 5
    with pytest.raises(KeyboardInterrupt):
        filled(place, tower)
    tower = Tower()
    store = filled(place, tower)
    assert tower.seen == 3  # four were kept
    assert len(store) == 7
    tower = Tower()
    filled(place, tower)
    assert tower.seen == 0


def test_a_changed_picture_is_computed_again(place: Place) -> None:
    old = filled(place, Tower()).read(place.pictures[2]).clone()
    path = place.root / place.pictures[2]
    Image.new("RGB", (9, 7), (1, 2, 3)).save(path)
    os.utime(path, ns=(1, 1))
    tower = Tower()
    store = filled(place, tower)
    assert tower.seen == 1
    assert not torch.equal(store.read(place.pictures[2]), old)
    reopened = FeatureStore(store.folder, root=place.root)
    assert torch.equal(reopened.read(place.pictures[2]), store.read(place.pictures[2]))


def test_other_weights_dtype_or_preparation_are_another_store(place: Place) -> None:
    square = ImagePreparation(PREPARATION.preparation, aspect="square")
    folders = {
        open_store(place.cache, tower=tower, preparation=preparation, root=place.root).folder
        for tower in (Tower(), Tower(seed=1), Tower(dtype=torch.float32))
        for preparation in (PREPARATION, square)
    }
    assert len(folders) == 6
    assert open_store(place.cache, tower=Tower(), preparation=square, root=place.root).folder in folders


def test_a_broken_picture_is_named_when_it_is_read(place: Place) -> None:
    (place.root / place.pictures[0]).write_bytes(b"no picture")
    (place.root / place.pictures[1]).unlink()
    store = filled(place, Tower())
    for name, reason in ((place.pictures[0], "decoded"), (place.pictures[1], "missing")):
        with pytest.raises(BadSample, match=reason):
            store.read(name)
    assert store.read(place.pictures[2]).shape == (4, 5)
    assert store.missing(place.pictures) == []
    with pytest.raises(KeyError, match="compute_features comes first"):
        store.read("never.png")


def test_processes_share_the_work(place: Place) -> None:
    towers = [Tower(), Tower()]
    stores = [filled(place, tower, part=(number, 2)) for number, tower in enumerate(towers)]
    # Here one after the other, so the second finds the first one's part done and takes half of the rest.
    assert towers[0].seen == 4
    filled(place, towers[1])
    stores[0].reload()
    assert len(stores[0]) == 7


def test_refuses_what_does_not_fit_on_the_disk(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))  # pyright: ignore
    tower = Tower()
    with pytest.raises(UserError, match=r"need 0\.0 GiB, but .* has 0\.0 GiB free; set data\.feature_cache"):
        filled(place, tower)
    assert tower.seen == 0
