"""data.max_pixels_per_step: pictures above a sample's share are shrunk, counted and told, over two families."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image

from dora_vl.backbones.video_inputs import grey_video, within_pixels
from dora_vl.errors import SettingError
from tests.backbones.tiny_image_text import write_tiny
from tests.training.tiny_run import decoder_run, json_of, logged, trained, write_run, write_tiny_llava

FAMILIES = ("qwen2_vl", "llava_next")
SIDES = ((320, 240), (60, 40), (450, 50))
SHARE = 4_000
PINPOINTS = [[16, 32], [32, 16], [32, 32], [64, 80], [96, 96]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The tiny families, with room for pictures of several sizes; and a LLaVA-1.5."""
    folder = tmp_path_factory.mktemp("bases")
    tiny = {name: write_tiny(name, folder / name) for name in FAMILIES}
    changed(
        tiny["qwen2_vl"] / "processor_config.json", "image_processor", size={"shortest_edge": 64, "longest_edge": 16384}
    )
    changed(tiny["llava_next"] / "processor_config.json", "image_processor", image_grid_pinpoints=PINPOINTS)
    changed(tiny["llava_next"] / "config.json", None, image_grid_pinpoints=PINPOINTS)
    return tiny | {"llava": write_tiny_llava(folder / "llava")}


def changed(path: Path, section: str | None, **values: object) -> None:
    content = json.loads(path.read_text())
    (content if section is None else content[section]).update(values)
    path.write_text(json.dumps(content))


def written(folder: Path, base: Path, **changes: dict[str, object]) -> Path:
    """Twelve samples: a large picture, a small one, a long one, four times."""
    (folder / "data").mkdir(parents=True)
    records = []
    for index in range(12):
        Image.new("RGB", SIDES[index % 3], (200, 20 * index, 40)).save(folder / "data" / f"{index}.png")
        turns = [{"from": "human", "value": "<image>\nSay the colour."}, {"from": "gpt", "value": "It is red."}]
        records.append({"id": f"s{index}", "image": f"{index}.png", "conversations": turns})
    (folder / "data" / "train.json").write_text(json.dumps(records))
    training = {"use_cpu": True, "per_device_train_batch_size": 2, "max_steps": 6, **changes.pop("training", {})}
    changes["data"] = {"max_tokens": 4096, **changes.get("data", {})}
    return write_run(folder / "run.yaml", base, folder / "data" / "train.json", training=training, **changes)


def tokens_of(path: Path, *overrides: str) -> list[int]:
    """Of the first three training samples."""
    pipeline = decoder_run(path, *overrides)
    arguments = pipeline.arguments()
    pipeline.prepare(arguments)
    data = pipeline.data(pipeline.skeleton(), arguments)
    return [len(data.train[index].input_ids) for index in range(3)]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_above_a_samples_share_becomes_fewer_tokens(
    bases: Mapping[str, Path], tmp_path: Path, family: str
) -> None:
    path = written(tmp_path, bases[family])
    whole, budget = tokens_of(path), tokens_of(path, f"--data.max_pixels_per_step={2 * SHARE}")
    assert budget[0] < 0.7 * whole[0]  # 76,800 pixels became at most 4,000
    assert budget[1] == whole[1]  # 2,400 fit
    alone = (f"--data.max_pixels_per_step={2 * SHARE}", "--training.per_device_train_batch_size=1")
    shares = tokens_of(path, *alone)  # one sample has all of it
    assert budget[0] < shares[0] <= whole[0]
    assert shares[1] == whole[1]


def test_a_run_counts_them(bases: Mapping[str, Path], tmp_path: Path) -> None:
    path = written(tmp_path, bases["qwen2_vl"], data={"max_pixels_per_step": 2 * SHARE})
    metrics = json_of(trained(path) / "metrics.json")
    assert (metrics["train_samples"], metrics["shrunk_samples"]) == (12, 8)  # large and long ones
    assert logged(tmp_path / "run")[-1]["shrunk_samples"] == 8


def test_the_largest_batch_finds_the_largest_picture(bases: Mapping[str, Path], tmp_path: Path) -> None:
    path = written(tmp_path, bases["qwen2_vl"])
    pipeline = decoder_run(path)
    arguments = pipeline.arguments()
    data = pipeline.data(pipeline.skeleton(), arguments)
    pictured = data.pools()[0]
    largest = max(pictured, key=lambda sample: len(sample.input_ids))
    assert int(largest.id[1:]) % 3 != 1  # all are named alike, so only their headers tell the small ones
    assert len(pictured) <= 3 * arguments.per_device_train_batch_size  # not every picture is decoded for it


@pytest.mark.parametrize(("family", "pixels"), [("llava", 100_000), ("qwen2_vl", 2_001), ("qwen2_vl", 0)])
def test_it_is_refused_where_it_saves_nothing(
    bases: Mapping[str, Path], tmp_path: Path, family: str, pixels: int
) -> None:
    with pytest.raises(SettingError) as error:
        tokens_of(written(tmp_path, bases[family]), f"--data.max_pixels_per_step={pixels}")
    assert error.value.key == "data.max_pixels_per_step"


def test_pictures_and_frames_of_a_sample_shrink_by_one_factor() -> None:
    pictures = [Image.new("RGB", (400, 300)), Image.new("RGB", (200, 100))]
    video = grey_video((1, 2, 3), 100, frames=4)
    smaller, (clip,), lost = within_pixels(pictures, [video], 45_000)  # of 180,000, so each side halves
    assert [picture.size for picture in smaller] == [(200, 150), (100, 50)]
    assert {frame.size for frame in clip.pictures} == {(50, 50)}
    assert clip.seconds == video.seconds
    assert lost == 135_000
    same, clips, lost = within_pixels(pictures, [video], 180_000)
    assert (same, clips, lost) == (pictures, [video], 0)


@pytest.mark.parametrize("most", [1_024, 3_333, 50_000])
def test_never_above_the_share(most: int) -> None:
    draws = torch.Generator().manual_seed(most)
    for _ in range(10):
        sides = torch.randint(20, 900, (3, 2), generator=draws).tolist()
        smaller, _, _ = within_pixels([Image.new("RGB", (width, height)) for width, height in sides], [], most)
        assert sum(picture.width * picture.height for picture in smaller) <= most
