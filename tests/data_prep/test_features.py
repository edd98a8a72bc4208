"""Features of pictures and videos from the command line: whole, shared between processes, and past what is broken."""

import json
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.features import main, media_in_records, media_under
from dora_vl.backbones.feature_encoder import FeatureEncoder, Medium
from dora_vl.backbones.shards import read_settings
from dora_vl.backbones.vision_store import open_features
from dora_vl.data.example import Clip, Example, write_examples
from dora_vl.errors import UserError
from tests.data.video_files import write_video

pytest.importorskip("av", reason="pip install '.[video]'")
TOWER = ["--library", "timm", "--name", "tf_efficientnet_lite0", "--image-size", "64"]
TOWER += ["--layer", "-3", "--grid-pool", "2"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    import timm

    path = tmp_path_factory.mktemp("weights") / "tower.pth"
    torch.save(timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict(), path)
    return str(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "media"
    (folder / "deep").mkdir(parents=True)
    write_video(folder / "deep/one.mp4")
    write_video(folder / "two.mp4", [0.0, 0.04])
    (folder / "bad.mp4").write_bytes(b"no video at all")
    Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save(folder / "three.png")
    return folder


def run(root: Path, to: Path, weights: str, *more: str) -> None:
    common = ["--workers", "0", "--merge", "2", "--frames", "3", "--max-bad-share", "0.5"]
    main(["--root", str(root), "--to", str(to), "--weights", weights, *TOWER, *common, *more])


def refused(root: Path, to: Path, weights: str, *more: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(root, to, weights, *more)
    assert stopped.value.code == 2


def test_a_folder_of_pictures_and_videos(root: Path, tmp_path: Path, weights: str) -> None:
    to = tmp_path / "features"
    run(root, to, weights)
    source = open_features(to)
    shapes = {name: tuple(source.read(name).shape) for name in source.places}
    assert shapes == {"one": (3, 160), "two": (2, 160), "three": (1, 160)}
    (skipped,) = [json.loads(line) for line in (to / "skipped-0.jsonl").read_text().splitlines()]
    assert skipped["id"] == "bad.mp4"
    settings = read_settings(to)
    assert settings is not None
    assert (settings["merge"], settings["frames"], settings["tower"]["layer"]) == (2, 3, -3)
    before = sorted(to.iterdir())
    run(root, to, weights)
    assert sorted(to.iterdir()) == before
    refused(root, to, weights, "--aspect", "square")
    refused(root, tmp_path / "other", weights, "--max-bad-share", "0.1")


@pytest.mark.parametrize("option", ["--batch-size", "--merge", "--grid-pool", "--image-size", "--frames", "--workers"])
def test_a_number_out_of_its_limits_is_refused_before_anything_is_read(root: Path, tmp_path: Path, option: str) -> None:
    refused(root, tmp_path / "features", "random", option, "-1")
    if option != "--workers":
        refused(root, tmp_path / "features", "random", option, "0")
    assert not (tmp_path / "features").exists()


@pytest.mark.parametrize(
    "how",
    [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), pytest.param(None, marks=pytest.mark.slow)],
)
def test_an_interruption_loses_no_features(root, tmp_path, weights, monkeypatch, request, how) -> None:
    to, encode, seen = tmp_path / "features", FeatureEncoder.encode, []

    def interrupted(self: FeatureEncoder, pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        if len(seen) == 3:
            if how is None:
                raise RuntimeError("out of memory")
            signal.raise_signal(how)  # handled before it returns
            raise AssertionError("the signal ended nothing")
        return encode(self, pixels)

    monkeypatch.setattr(FeatureEncoder, "encode", interrupted)
    request.addfinalizer(partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever tests before, or who started them, made of it
    terminated = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError if how is None else SystemExit, match="memory" if how is None else f"{128 + how}"):
        run(root, to, weights)
    assert set(open_features(to).places) == {"one", "three"}
    assert json.loads((to / "skipped-0.jsonl").read_text())["id"] == "bad.mp4"
    monkeypatch.undo()
    run(root, to, weights)
    assert set(open_features(to).places) == {"one", "three", "two"}
    assert signal.getsignal(signal.SIGTERM) is terminated


def test_parts_share_the_work(root: Path, tmp_path: Path, weights: str) -> None:
    together, alone = tmp_path / "together", tmp_path / "alone"
    (root / "bad.mp4").unlink()
    run(root, alone, weights)
    for number in range(2):
        run(root, together, weights, "--part", f"{number}/2")
        assert len(open_features(together).places) == (2, 3)[number]
    for name in ("one", "two", "three"):
        assert torch.equal(open_features(together).read(name), open_features(alone).read(name))


def test_parts_do_not_pass_for_the_whole(root: Path, tmp_path: Path, weights: str) -> None:
    to, records = tmp_path / "features", tmp_path / "r.jsonl"
    write_examples(records, [Example(id="1", videos=(Clip(path="deep/one.mp4", start_seconds=0.4, end_seconds=1.0),))])
    run(root, to, weights, "--records", str(records))
    assert open_features(to).part("one") == (0.4, 1.0)
    refused(root, to, weights)


def test_records_name_what_is_read(tmp_path: Path) -> None:
    clip = Clip(path="a/x.mp4", start_seconds=1.0)
    examples = [Example(id="1", images=("p/y.jpg",)), Example(id="2", videos=(clip,)), Example(id="3", videos=(clip,))]
    write_examples(tmp_path / "r.jsonl", examples)
    assert [(medium.name, medium.path) for medium in media_in_records([tmp_path / "r.jsonl"])] == [
        ("y", "p/y.jpg"),
        ("x", "a/x.mp4"),
    ]
    questions = [
        Example(id=str(n), videos=(replace(clip, start_seconds=float(n)),), extra={"ts": f"{n}-9", "vid_name": "x"})
        for n in (1, 2)
    ]
    write_examples(tmp_path / "tvqa.jsonl", questions)  # spans in the prompt: the features are of the whole file
    assert media_in_records([tmp_path / "tvqa.jsonl"]) == [Medium("x", "a/x.mp4", Clip(path="a/x.mp4"))]
    parts = [
        Example(id=str(n), videos=(replace(clip, start_seconds=float(n)),), extra={"vid_name": f"x_{n}"})
        for n in (1, 2)
    ]
    write_examples(tmp_path / "yc2c.jsonl", parts)  # parts with names of their own
    assert media_in_records([tmp_path / "yc2c.jsonl"]) == [
        Medium(f"x_{n}", "a/x.mp4", replace(clip, start_seconds=float(n))) for n in (1, 2)
    ]
    write_examples(tmp_path / "s.jsonl", [Example(id="1", images=("p/y.jpg", "q/y.png"))])
    with pytest.raises(UserError):
        media_in_records([tmp_path / "s.jsonl"])
    with pytest.raises(UserError):
        media_under(tmp_path)
