"""A run's base is made and loaded as its settings say, with no code of the hub; its videos show the frames meant."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, Phi3Config, TrainingArguments

from dora_vl.adapters.base_weights import skeleton
from dora_vl.backbones.loading import read_language_model, written_base
from dora_vl.backbones.model import open_backbone, skeleton_of
from dora_vl.backbones.specs import LanguageSource, TowerSpec
from dora_vl.backbones.tower_sources import load_transformers
from dora_vl.data.turns import Clip
from dora_vl.data.video import EverySeconds, Uniform
from dora_vl.data.video_backends import BackendMissing
from dora_vl.errors import SettingError, UserError
from dora_vl.files import KERNELS, check_attention, check_model_folder, read_json
from dora_vl.run import base as run_base
from dora_vl.run.base import (
    VideoReading,
    check_videos,
    check_window,
    load_base,
    make_base,
    video_folder,
    video_sampling,
)
from dora_vl.run.settings import DataConfig, ModelConfig
from tests.data.video_files import write_video


def test_flash_attention_without_a_card_is_refused_before_loading(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingError) as error:
        load_base(pytest.fail, ModelConfig(base="folder", attn_implementation="flash_attention_2"))
    assert error.value.key == "model.attn_implementation"


def test_a_base_is_made_once_and_only_by_the_settings_that_it_has(tmp_path: Path):
    written: list[LanguageSource] = []

    def make(spec: LanguageSource, folder: Path) -> None:
        with written_base(folder, spec):
            written.append(spec)

    arguments, base = TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True), str(tmp_path / "new" / "base")
    spec = LanguageSource(folder="here", gguf_file="a.gguf", dtype="bfloat16")
    make_base(make, None, base, arguments)
    for _ in range(2):
        make_base(make, spec, base, arguments)
    assert written == [spec]
    other = LanguageSource(folder="here", gguf_file="b.gguf", dtype="bfloat16")
    with pytest.raises(UserError):
        make_base(make, other, base, arguments)
    (tmp_path / "downloaded").mkdir()  # says nothing of its settings
    make_base(make, other, str(tmp_path / "downloaded"), arguments)


def test_a_sample_that_would_change_its_neighbours_positions_is_refused(tmp_path: Path):
    """Beyond the window transformers turns every position of a batch by other factors."""
    window = 16
    rope = {"rope_type": "longrope", "short_factor": [1.0, 1.2], "long_factor": [4.0, 8.0], "factor": 4.0}
    places = {"max_position_embeddings": 4 * window, "original_max_position_embeddings": window}
    Phi3Config(hidden_size=32, num_attention_heads=8, rope_parameters=rope, **places).save_pretrained(tmp_path)
    check_window(str(tmp_path), cast(Any, SimpleNamespace(max_tokens=window)))
    with pytest.raises(SettingError) as error:
        check_window(str(tmp_path), cast(Any, SimpleNamespace(max_tokens=window + 1)))
    assert error.value.key == "data.max_tokens"


CLIP = Clip(path="a.mp4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of two seconds, 25 frames a second, and one of three frames."""
    pytest.importorskip("av")
    root = tmp_path_factory.mktemp("clips")
    write_video(root / "a.mp4")
    write_video(root / "short.mp4", [0.0, 0.04, 0.08])
    return root


def settings(folder: Path, **more: object) -> DataConfig:
    return DataConfig(train="train.json", image_folder=str(folder), **more)  # pyright: ignore[reportArgumentType]


def reading(folder: Path, **more: object) -> VideoReading:
    data = settings(folder, **more)
    return VideoReading(folder=video_folder(data), sampling=video_sampling(data))


def test_settings_choose_the_frames(folder: Path) -> None:
    assert video_sampling(settings(folder)) == Uniform(8)
    assert video_sampling(settings(folder, video_frames=12, video_fps=4.0)) == EverySeconds(
        0.25, min_frames=2, max_frames=12
    )
    assert reading(folder, video_frames=2).read([CLIP])[0].indices == (12, 37)
    assert len(reading(folder, video_frames=20, video_fps=4.0).read([CLIP])[0].indices) == 8
    assert len(reading(folder, video_frames=5, video_fps=4.0).read([CLIP])[0].indices) == 5


def test_short_videos_are_filled_up_where_all_must_have_one_length(folder: Path) -> None:
    clips = [Clip(path="short.mp4"), CLIP]
    assert [len(video.pictures) for video in reading(folder).read(clips)] == [3, 8]
    filled = VideoReading(folder=folder, sampling=Uniform(8), frames=8)
    assert [len(video.pictures) for video in filled.read(clips)] == [8, 8]


@pytest.mark.parametrize(
    ("name", "value"),
    [("video_frames", 0), ("video_fps", 0.0), ("video_fps", float("nan")), ("video_folder", "nowhere")],
)
def test_settings_that_mean_no_frame_are_refused(folder: Path, name: str, value: object) -> None:
    with pytest.raises(SettingError) as error:
        check_videos(settings(folder, **{name: value}))
    assert error.value.key == f"data.{name}"
    check_videos(settings(folder, video_folder=str(folder)))


def test_a_machine_without_a_decoder_is_told_before_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_base, "import_backend", mock.Mock(side_effect=BackendMissing("no module")))
    with pytest.raises(UserError):
        check_videos(settings(folder))


# transformers runs code from the hub for an attention kernel called `owner/kernel`: no base may name one.


EVIL = "evil/kernel"
STATED: Mapping[str, dict[str, Any]] = {
    "own": {"_attn_implementation": EVIL},
    "public": {"attn_implementation": EVIL},
    "paged": {"_attn_implementation": f"paged|{EVIL}@main:attention"},
    "by part": {"attn_implementation": {"": "sdpa", "text_config": EVIL}},
    "nested": {"text_config": {"_attn_implementation": EVIL}},
    "in a list": {"backbones": [{"config": {"attn_implementation": EVIL}}]},
}
SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=32)).save_pretrained(folder)
    return folder


def state(folder: Path, entries: dict[str, Any], target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).symlink_to(file)
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps({**read_json(folder / "config.json"), **entries}))
    return target


OPENED: Mapping[str, Callable[[str], object]] = {
    "base": open_backbone,
    "estimate": skeleton_of,
    "merge": lambda folder: skeleton(read_json(Path(folder, "config.json"))),
    "composed": read_language_model,
}


@pytest.mark.parametrize(
    ("opened", "stated"), [*(("base", stated) for stated in STATED), *((opened, "own") for opened in OPENED)]
)
def test_a_base_that_names_a_kernel_of_the_hub_is_refused(base, tmp_path, stated, opened, monkeypatch) -> None:
    monkeypatch.setattr("dora_vl.backbones.loading.load_tokenizer", lambda *words, **named: None)
    folder = state(base, STATED[stated], tmp_path / "evil")
    with pytest.raises(UserError, match=EVIL):
        OPENED[opened](str(folder))


def test_a_tower_that_names_one_is_refused(tmp_path: Path) -> None:
    CLIPVisionModel(CLIPVisionConfig(**SIZES, image_size=8, patch_size=4)).save_pretrained(tmp_path / "tower")
    folder = state(tmp_path / "tower", STATED["own"], tmp_path / "evil")
    with pytest.raises(UserError, match=EVIL):
        load_transformers(TowerSpec(library="transformers", name=str(folder)))


def test_a_hub_id_that_names_one_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = state(base, STATED["nested"], tmp_path / "evil")
    cached = mock.Mock(side_effect=lambda name, file, **_: str(folder / file))
    monkeypatch.setattr("transformers.configuration_utils.cached_file", cached)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # whether it can be reached is not asked
    with pytest.raises(UserError, match=EVIL):
        check_model_folder("owner/model", "abc")
    assert cached.call_args.kwargs["revision"] == "abc"


def test_known_names_open_and_none_is_none(base: Path, tmp_path: Path) -> None:
    for number, name in enumerate((*KERNELS, None)):
        check_attention("config.json", {"text_config": {"attn_implementation": {"": name}}})
        if name in ("sdpa", "eager", None):
            folder = state(base, {"_attn_implementation": name}, tmp_path / str(number))
            assert torch.isfinite(open_backbone(str(folder)).model.lm_head.weight).all()
