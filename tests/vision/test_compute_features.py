"""Stored features equal computed ones, survive a stop, follow the files, and are never taken from another tower."""

from __future__ import annotations

import os
import pickle
import shutil
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dora_vl.backbones import vision_store as computing
from dora_vl.backbones.tower_pictures import ImagePreparation, Preparation
from dora_vl.backbones.vision_store import FeatureCache, FeatureStore, FeatureWriter, read_settings
from dora_vl.errors import BadSample, UserError

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


def cache_of(place: Place, tower: Tower, preparation: ImagePreparation = PREPARATION) -> FeatureCache:
    return FeatureCache(place.cache, tower=tower, preparation=preparation, root=place.root)


def filled(place: Place, tower: Tower, **options: Any) -> FeatureStore:
    cache = cache_of(place, tower)
    cache.fill(place.pictures, batch_size=2, **options)
    return cache.open()


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
    names = sorted(path.name for path in place.cache.rglob("*") if path.is_file())
    assert [name.split("-")[0] for name in names] == ["features", "settings.json"]


@pytest.mark.parametrize("shard_bytes", [90, 10_000])  # two pictures a shard; all that was computed
def test_a_stopped_run_goes_on(place: Place, monkeypatch: pytest.MonkeyPatch, shard_bytes: int) -> None:
    monkeypatch.setattr(computing, "FeatureWriter", partial(FeatureWriter, shard_bytes=shard_bytes))
    tower = Tower()
    tower.stop_after = 5
    with pytest.raises(KeyboardInterrupt):
        filled(place, tower)
    tower = Tower()
    store = filled(place, tower)
    assert tower.seen == 3  # four were kept
    assert len(store.held) == 7
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
    other = torch.equal(cache_of(place, tower).open().read(place.pictures[2]), store.read(place.pictures[2]))
    assert other


def test_other_weights_dtype_or_preparation_are_another_store(place: Place) -> None:
    square = ImagePreparation(PREPARATION.preparation, aspect="square")
    towers = (Tower(), Tower(seed=1), Tower(dtype=torch.float32))
    caches = [cache_of(place, tower, preparation) for tower in towers for preparation in (PREPARATION, square)]
    assert len({cache.folder for cache in caches}) == 6
    assert cache_of(place, Tower(), square).folder == caches[1].folder
    filled(place, Tower())
    settings = read_settings(caches[0].folder)
    assert settings is not None
    assert (settings["layer"], settings["sha256"]) == (-1, caches[0].folder.name)
    with pytest.raises(UserError, match=r"layer -1.*-2"):
        FeatureWriter(caches[0].folder, {**settings, "layer": -2})


def test_a_broken_picture_is_named_when_it_is_read(place: Place) -> None:
    (place.root / place.pictures[0]).write_bytes(b"no picture")
    (place.root / place.pictures[1]).unlink()
    store = filled(place, Tower())
    for name, reason in ((place.pictures[0], "is no picture of PNG"), (place.pictures[1], "missing")):
        with pytest.raises(BadSample, match=reason):
            store.read(name)
    assert store.read(place.pictures[2]).shape == (4, 5)
    with pytest.raises(BadSample, match=r"never\.png"):
        store.read("never.png")


def test_a_picture_that_could_not_be_read_is_tried_again(place: Place) -> None:
    """Mended with the same size and time, as a copy that keeps times does it; or the disk had an error."""
    path = place.root / place.pictures[0]
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)))
    os.utime(path, ns=(1, 1))
    with pytest.raises(BadSample):
        filled(place, Tower()).read(place.pictures[0])
    path.write_bytes(whole)
    os.utime(path, ns=(1, 1))
    tower = Tower()
    assert filled(place, tower).read(place.pictures[0]).shape == (4, 5)
    assert tower.seen == 1


def test_another_folder_of_pictures_is_another_store(place: Place, tmp_path: Path) -> None:
    """Of equal names, sizes and times: nothing but the folder tells them apart."""
    other = Place(place.cache, tmp_path / "others", place.pictures)
    for number, name in enumerate(place.pictures):
        (other.root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 5 + number), (7, 200, 30 * number)).save(other.root / name, "BMP")
        Image.new("RGB", (9, 5 + number), (30 * number, 200, 7)).save(place.root / name, "BMP")
        for root in (place.root, other.root):
            os.utime(root / name, ns=(1, 1))
    mine, others = filled(place, Tower()), filled(other, Tower())
    assert mine.folder != others.folder
    assert not torch.equal(mine.read(place.pictures[1]), others.read(place.pictures[1]))
    assert filled(place, tower := Tower()).folder == mine.folder
    assert tower.seen == 0


def test_processes_share_the_work(place: Place) -> None:
    towers = [Tower(), Tower()]
    caches = [cache_of(place, tower) for tower in towers]  # both see the same pictures missing
    for number, cache in enumerate(caches):
        cache.fill(place.pictures, batch_size=2, part=(number, 2))
    assert [tower.seen for tower in towers] == [4, 3]
    assert all(len(cache.open().held) == 7 for cache in caches)


def test_refuses_what_does_not_fit_on_the_disk(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))  # pyright: ignore
    tower = Tower()
    with pytest.raises(UserError, match=r"data\.feature_cache"):
        filled(place, tower)
    assert tower.seen == 0
