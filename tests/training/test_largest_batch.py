"""What a step holds: the largest micro-batch is tried first, pictures are shrunk to a share, and what fits no more."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dora_vl.backbones.video_inputs import grey_video, within_pixels
from dora_vl.errors import SettingError, UserError
from dora_vl.run.folder import read_log
from dora_vl.run.reading import read_run_file
from dora_vl.training import largest_batch
from dora_vl.training.largest_batch import take_and_undo
from dora_vl.training.pipeline import NextTokenLoss
from dora_vl.training.run import train
from tests.backbones.tiny_image_text import write_tiny
from tests.training.launched import launch
from tests.training.tiny_run import (
    assert_same_weights,
    decoder_run,
    json_of,
    logged,
    logged_losses,
    trained,
    write_run,
    write_tiny_data,
    write_tiny_llava,
)
from tests.training.tiny_vlbart_run import vlbart_run, write_vlbart_data, write_vlbart_run

pytestmark = pytest.mark.usefixtures("one_thread")
IMPOSSIBLE = 1 << 47
SETTINGS = ("--adapter.dropout=0.2", "--training.save_strategy=steps", "--training.save_steps=2")


@pytest.fixture
def run_file(run_file: Path) -> Path:
    run_file.write_text(run_file.read_text().replace("training:\n", "training:\n  weight_decay: 0.1\n"))
    return run_file


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The batches that are tried."""
    tried: list[Any] = []

    def noted(trainer: Any, batch: Any) -> None:
        tried.append(batch)
        take_and_undo(trainer, batch)

    monkeypatch.setattr(largest_batch, "take_and_undo", noted)
    return tried


@pytest.mark.parametrize(
    "more",
    [
        pytest.param((), marks=pytest.mark.slow),
        ("--training.gradient_accumulation_steps=2", "--training.per_device_train_batch_size=2"),
        pytest.param(("--training.optim=adafactor",), marks=pytest.mark.slow),
        pytest.param(("--training.optim=sgd", "--training.optim_args=momentum=0.9"), marks=pytest.mark.slow),
        pytest.param(("--data.streaming=true", "--data.group_by_modality_length=false"), marks=pytest.mark.slow),
    ],
    ids=["adamw", "accumulated", "adafactor", "momentum", "streamed"],
)
def test_a_run_is_the_same_to_the_bit_with_it_and_without(run_file, monkeypatch, more) -> None:
    plain = trained(run_file, *SETTINGS, *more, name="without")
    tried, options = counted(monkeypatch), [*SETTINGS, *more, "--try_largest_batch=true"]
    # a resumed run too: the optimizer's state is the checkpoint's afterwards, not a step older
    for resume in ([], [f"--resume={run_file.parent / 'with' / 'checkpoint-4'}"]):
        folder = trained(run_file, *options, *resume, name="with")
        assert logged_losses(folder) == logged_losses(plain)
        assert_same_weights(folder, plain)
        samples = [json_of(run / "metrics.json")["train_samples"] for run in (folder, plain)]
        assert samples[0] == samples[1]
    assert len(tried) == 2


def test_the_longest_samples_make_it(run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Path(str(read_run_file(run_file).data.train))
    records = json.loads(data.read_text())
    for row in (5, 11):
        records[row]["conversations"][1]["value"] = "blue it " * 30
    path = data.with_name("long.json")
    path.write_text(json.dumps(records))
    tried = counted(monkeypatch)
    options = ("--try_largest_batch=true", "--training.max_steps=1", "--training.per_device_train_batch_size=2")
    trained(run_file, *options, f"--data.train={path}")
    assert sorted(tried[0]["sample_ids"]) == ["sample-11", "sample-5"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("stage", "ranks"), [("zero3", 2), ("zero2", 1)])
def test_under_zero_the_run_is_the_same_to_the_bit(tmp_path: Path, tiny_llava: Path, stage: str, ranks: int) -> None:
    data = write_tiny_data(tmp_path / "data", samples=24, text_only_blocks=2)
    run_file = write_run(tmp_path / "run.yaml", tiny_llava, data, adapter={"dropout": 0.1})
    settings = [f"--training.deepspeed={stage}", "--training.gradient_accumulation_steps=2"]
    settings += ["--training.per_device_train_batch_size=2", "--training.max_steps=4"]
    for flag in ("false", "true"):
        more = [f"--training.output_dir={tmp_path / flag}", f"--try_largest_batch={flag}"]
        launch(run_file, *settings, *more, ranks=ranks)
    assert logged_losses(tmp_path / "true") == logged_losses(tmp_path / "false")
    assert_same_weights(tmp_path / "true", tmp_path / "false")


def test_vlbart_tries_the_longest_of_each_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_vlbart_data(tmp_path / "data")
    tried = counted(monkeypatch)
    for flag in ("false", "true"):
        path = write_vlbart_run(tmp_path / f"{flag}.yaml", data, ("vqav2", "tvc"), training={"optim": "adamw_torch"})
        train(vlbart_run(path, f"--try_largest_batch={flag}"))
    assert len(tried) == 1
    assert logged_losses(tmp_path / "true") == logged_losses(tmp_path / "false")
    assert_same_weights(tmp_path / "true", tmp_path / "false")


# ---- what does not fit


def no_room_above(monkeypatch: pytest.MonkeyPatch, most: int, make: Callable[[], object]) -> None:
    """The real allocator is asked for more than any machine has, where a micro-batch holds more than `most` rows."""
    forward = NextTokenLoss.forward

    def limited(self: NextTokenLoss, input_ids: torch.Tensor, *options: Any, **named: Any) -> Any:
        if len(input_ids) > most:
            make()
        return forward(self, input_ids, *options, **named)

    monkeypatch.setattr(NextTokenLoss, "forward", limited)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(IMPOSSIBLE, dtype=torch.uint8),
        lambda: raised(MemoryError("Unable to allocate 3.00 GiB for an array with shape (1,)")),  # numpy's
        lambda: raised(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has 79 GiB")),
    ],
)
def test_any_allocators_error_ends_a_run(run_file, monkeypatch, make) -> None:
    no_room_above(monkeypatch, 0, make)
    with pytest.raises(UserError):
        trained(run_file)


def raised(error: Exception) -> None:
    raise error


def test_what_does_not_fit_ends_before_the_first_step_with_what_does(run_file, monkeypatch) -> None:
    no_room_above(monkeypatch, 3, lambda: torch.empty(IMPOSSIBLE, dtype=torch.uint8))
    with pytest.raises(UserError) as error:
        trained(
            run_file, "--data.packing=plain", "--training.per_device_train_batch_size=16", "--try_largest_batch=true"
        )
    for fact in ("16 rows", "131072.00 GiB", "per_device_train_batch_size to 2", "gradient_accumulation_steps to 8"):
        assert fact in str(error.value)
    assert read_log(run_file.parent / "run" / "log.jsonl") == []


FAMILIES = ("qwen2_vl", "llava_next")
SIDES = ((320, 240), (60, 40), (450, 50))
SHARE = 4_000
PINPOINTS = [[16, 32], [32, 16], [32, 32], [64, 80], [96, 96]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
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
def test_what_is_above_a_samples_share_becomes_fewer_tokens(bases, tmp_path, family) -> None:
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


@pytest.mark.parametrize(("family", "pixels"), [("llava", 100_000), ("qwen2_vl", 2_001), ("qwen2_vl", 0)])
def test_it_is_refused_where_it_saves_nothing(bases, tmp_path, family, pixels) -> None:
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
