"""Bases of videos, of conversations with thoughts and tools, and quantised ones: trained, resumed, or refused."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from dora_vl.adapters.base_weights import SCHEMES
from dora_vl.adapters.folder import read_weights
from dora_vl.backbones.model import open_backbone
from dora_vl.data.turns import Clip, Turn
from dora_vl.data.video import Uniform
from dora_vl.errors import UserError
from dora_vl.evaluation.ask_command import open_picture
from dora_vl.evaluation.assistant import Assistant, prompt_sample
from dora_vl.evaluation.open_model import ModelRequest, find_source, open_model, prompt_encoder
from dora_vl.evaluation.predictor import PromptMedia
from dora_vl.run.settings_parser import read_run_file
from dora_vl.training.opened import encoder_of_saved
from tasks import llava_instruct
from tests.backbones.test_chat_templates import CHAT
from tests.backbones.tiny_image_text import write_tiny, write_tiny_language, write_tiny_video
from tests.data.readers.test_chat_forms import FORMS, ITEMS
from tests.data.video_files import read_frames
from tests.training.launched import launch
from tests.training.tiny_run import (
    assert_same_weights,
    check_resume,
    decoder_run,
    json_of,
    logged_losses,
    losses_of,
    merged,
    refused,
    refused_key,
    skipped_by,
    trained,
    write_run,
    write_tiny_data,
    write_tiny_llava,
)
from tests.training.video_run import write_video_data


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("videos")
    write_tiny_video("qwen2_5_vl", folder / "base")
    write_video_data(folder / "data")
    return folder


def of_videos(videos: Path, name: str, base: Path | None = None, *, steps: int = 3, **data: object) -> Path:
    return write_run(
        videos / f"{name}.yaml",
        base or videos / "base",
        videos / "data" / "train.json",
        data={"video_frames": 4, "max_tokens": 512, "max_bad_share": 0.0, **data},
        training={"use_cpu": True, "max_steps": steps},
    )


def test_three_steps_are_trained_saved_and_opened_again(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = of_videos(videos, "whole", workers=2)
    monkeypatch.setattr("sys.argv", ["llava_instruct.py", "--config", str(path)])
    llava_instruct.main()
    run_folder = videos / "whole"
    assert len(logged_losses(run_folder)) == 3
    weights = read_weights(run_folder / "adapter")
    assert all(bool(tensor.any()) for name, tensor in weights.items() if "lora_B" in name)
    recipe = json.loads((run_folder / "adapter" / "recipe.json").read_text())
    assert (recipe["video_frames"], recipe["video_fps"]) == (4, None)
    opened = open_model(ModelRequest(adapter=run_folder / "adapter", with_base=True))
    video = read_frames(videos / "data", Clip(path="red.mp4"), Uniform(4))
    answers: list[torch.Tensor] = []
    for assistant in (opened.adapted, opened.base):
        assert isinstance(assistant, Assistant)
        sample = prompt_sample(
            assistant.encoder, [Turn("user", "<video>\nSay the colour.")], PromptMedia(videos=(video,))
        )
        with torch.no_grad():
            answers.append(assistant.backbone.model(input_ids=sample.input_ids[None], **sample.inputs).logits)
    assert (answers[0] - answers[1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    "family",
    ["smolvlm", "llava", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llava_next_video", "idefics3"))],
)
def test_other_ways_that_videos_go_in(videos, tmp_path, monkeypatch, family) -> None:
    """Frames among the pictures, videos of one length, and frames as pictures, which is said."""
    ways = {"idefics3": write_tiny, "llava": lambda _, folder: write_tiny_llava(folder)}
    base = ways.get(family, write_tiny_video)(family, tmp_path / "base")
    messages: list[str] = []
    monkeypatch.setattr(logging.Logger, "warning", lambda self, text, *words: messages.append(text % words))
    trained(of_videos(videos, family, base, video_frames=8))
    assert len(logged_losses(videos / family)) == 3
    assert sum("as pictures" in message for message in messages) == (family in ways)


def test_a_broken_video_is_a_bad_sample_and_named(videos: Path) -> None:
    records = json.loads((videos / "data" / "train.json").read_text())
    broken = {2: "none.mp4", 6: "../data/red.mp4", 11: "cut.mp4"}
    (videos / "data" / "cut.mp4").write_bytes((videos / "data" / "white.mp4").read_bytes()[:-200])
    for index, name in broken.items():
        records[index]["video"] = name
    (videos / "data" / "broken.json").write_text(json.dumps(records))
    broken_file = str(videos / "data" / "broken.json")
    reasons = skipped_by(trained(of_videos(videos, "broken", steps=4, train=broken_file, max_bad_share=0.5)))
    assert "video none.mp4 is missing" in reasons["sample-2"]
    assert "must not leave" in reasons["sample-6"]
    assert "cannot be read" in reasons["sample-11"]
    assert len(reasons) == 3


@pytest.mark.parametrize(
    ("family", "data", "key"),
    [
        ("llava_next_video", {"video_fps": 2.0}, "data.video_fps"),
        ("qwen3_vl", {"video_frames": 1}, "data.video_frames"),
        ("glm4v", {}, "data.train"),
    ],
)
def test_what_no_video_could_be_trained_with_ends_before_weights_are_read(videos, tmp_path, family, data, key) -> None:
    base = write_tiny_video(family, tmp_path / "base")
    assert refused_key(of_videos(videos, "refused", base, **data)) == key


def write_talks(folder: Path, *, pictures: bool, thoughts: bool) -> Path:
    """Eight conversations of one to three rounds, those of pictures with one in the first or a later round."""
    folder.mkdir()
    records = []
    for index in range(8):
        turns = []
        for number in range(1 + index % 3):
            shown = "<image>\n" if pictures and number == index % 2 else ""
            thought = f"<think>\nI see {index}.\n</think>\n\n" if thoughts else ""
            turns += [("human", f"{shown}Is it red?"), ("gpt", f"{thought}It is {number}.")]
        record = {"id": str(index), "conversations": [{"from": who, "value": text} for who, text in turns]}
        if any("<image>" in text for _, text in turns):
            record["image"] = f"{index}.png"
            Image.new("RGB", (30 + index, 22), (200, 30 * index, 40)).save(folder / f"{index}.png")
        records.append(record)
    (folder / "train.json").write_text(json.dumps(records))
    return folder / "train.json"


@pytest.mark.parametrize(
    ("family", "thoughts"), [("qwen3", True), pytest.param("qwen3", False, marks=pytest.mark.slow), ("qwen3_vl", True)]
)
def test_they_train_and_resume_with_the_same_loss_in_any_rows(tmp_path: Path, family: str, thoughts: bool) -> None:
    sees = family == "qwen3_vl"
    template = CHAT["qwen3_vl_thinking" if sees else "qwen3"]
    base = (write_tiny if sees else write_tiny_language)(family, tmp_path / "base", template=template)
    records = write_talks(tmp_path / "data", pictures=sees, thoughts=thoughts)
    run_file = write_run(
        tmp_path / "run.yaml",
        base,
        records,
        training={"use_cpu": True, "max_steps": 2, "save_strategy": "steps", "save_steps": 1},
        optim={"projector_learning_rate": 1e-3 if sees else None},
        data={"max_tokens": 1024, "group_by_modality_length": False},
    )
    folder, _ = check_resume(run_file, step=1)
    losses = losses_of(folder)
    assert len(losses) == 2
    assert not skipped_by(folder)
    apart = trained(run_file, "--data.packing=plain", name="plain")
    torch.testing.assert_close(losses_of(apart), losses, rtol=0, atol=1e-5)
    recipe = json_of(folder / "adapter" / "recipe.json")
    assert recipe["thinking"] is (None if sees else thoughts)
    prompts = prompt_encoder(find_source(ModelRequest(adapter=folder / "adapter"))).prompts
    tested = encoder_of_saved(decoder_run(run_file, f"--training.output_dir={folder}").config).prompts
    assert prompts.thinking is tested.thinking is recipe["thinking"]


def test_tools_thoughts_and_marks_train_in_any_rows_and_their_preferences_too(tmp_path: Path) -> None:
    """The rows are those of ms-swift's, servers' and TRL's own forms; a base that writes no tools stops by name."""
    base = write_tiny_language("qwen3", tmp_path / "base", template=CHAT["qwen3"])
    settings: dict[str, Any] = {
        "training": {"use_cpu": True, "max_steps": 2, "per_device_train_batch_size": 3},
        "data": {"max_tokens": 2048, "group_by_modality_length": False},
        "optim": {"projector_learning_rate": None},
    }
    for form in ("swift_loss", "reasoning"):
        (tmp_path / f"{form}.json").write_text(json.dumps([FORMS[form](item)[0] for item in ITEMS]))
        run_file = write_run(tmp_path / f"{form}.yaml", base, tmp_path / f"{form}.json", **settings)
        folder = trained(run_file, name=form)
        assert not skipped_by(folder)
        apart = trained(run_file, "--data.packing=plain", name=f"{form}_plain")
        torch.testing.assert_close(losses_of(apart), losses_of(folder), rtol=0, atol=1e-5)
        assert json_of(folder / "adapter" / "recipe.json")["thinking"] is (form == "reasoning")
    pairs = []
    for item in ITEMS:
        row, _ = FORMS["trl_tools"](item)
        *prompt, chosen = row["messages"]
        rejected = {**chosen, "content": "I cannot tell."}
        pairs.append({"prompt": prompt, "chosen": [chosen], "rejected": [rejected], "tools": row["tools"]})
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    compared = write_run(tmp_path / "c.yaml", base, tmp_path / "pairs.json", objective={"loss": "dpo"}, **settings)
    assert losses_of(trained(compared, name="compared")).tolist()[0] == pytest.approx(0.6931, abs=1e-3)
    without = write_tiny_language("qwen3", tmp_path / "without")
    refused_file = write_run(tmp_path / "refused.yaml", without, tmp_path / "reasoning.json", **settings)
    error = refused(decoder_run(refused_file))
    assert "row 1" in str(error)
    assert str(without) in str(error)


CPU: dict[str, object] = {"use_cpu": True, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
KINDS = ["nf4", *(pytest.param(kind, marks=pytest.mark.slow) for kind in sorted(SCHEMES) if kind != "nf4")]
TURNS = [Turn("user", "<image>\nSay the colour.")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised")
    write_tiny("qwen2_5_vl", folder / "qwen2_5_vl", width=64)
    write_tiny_llava(folder / "llava", width=64)
    write_tiny_data(folder / "data", samples=24, text_only_blocks=4)
    Image.new("RGB", (21, 15), "red").save(folder / "red.png")
    return folder


def settings(root: Path, base: str, name: str, **changes: Any) -> Path:
    sections = {**changes, "training": {**CPU, **changes.get("training", {})}}
    return write_run(root / f"{name}.yaml", root / base, root / "data" / "train.json", **sections)


def adapter_of(root: Path, kind: str) -> Path:
    """The adapter of a run, made once."""
    pytest.importorskip(SCHEMES[kind].package)
    adapter = root / f"qwen2_5_vl-{kind}" / "adapter"
    if not adapter.is_dir():
        trained(settings(root, "qwen2_5_vl", f"qwen2_5_vl-{kind}", model={"quantisation": kind}))
    return adapter


def logits_of(assistant: Assistant, picture: Path) -> torch.Tensor:
    sample = prompt_sample(assistant.encoder, TURNS, PromptMedia(pictures=(open_picture(picture),)))
    with torch.no_grad():
        return assistant.backbone.model(input_ids=sample.input_ids[None], **sample.inputs).logits


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_the_decoder_and_the_whole_projector(root: Path, kind: str) -> None:
    adapter = adapter_of(root, kind)
    weights = read_weights(adapter)
    assert sum("lora_B" in name for name in weights) == 14
    assert all(bool(tensor.any()) for name, tensor in weights.items() if "lora_B" in name)
    assert any("merger" in name for name in weights)
    recipe = json_of(adapter / "recipe.json")
    assert (recipe["quantisation"], recipe["adapter"]["method"]) == (kind, "dora")
    losses = logged_losses(adapter.parent)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_plain_model_is_the_trained_one(root: Path, tmp_path: Path, kind: str) -> None:
    adapter = adapter_of(root, kind)
    opened = open_model(ModelRequest(adapter=adapter, with_base=True))
    assert isinstance(opened.adapted, Assistant)
    ours = logits_of(opened.adapted, root / "red.png")
    plain = AutoModelForImageTextToText.from_pretrained(merged(adapter, tmp_path / "merged")).eval()
    assert "quantization_config" not in json_of(tmp_path / "merged" / "config.json")
    assistant = Assistant(type(opened.adapted.backbone)(plain), opened.adapted.encoder)
    # LLM.int8 rounds inputs as well, which no plain model does.
    tolerance = 0.05 * float(ours.abs().max()) if kind == "int8" else 1e-4
    torch.testing.assert_close(logits_of(assistant, root / "red.png"), ours, rtol=0, atol=tolerance)
    assert isinstance(opened.base, Assistant)
    alone = open_backbone(str(root / "qwen2_5_vl"), quantisation=kind)  # pyright: ignore[reportArgumentType]
    untouched = logits_of(Assistant(alone.eval(), opened.adapted.encoder), root / "red.png")
    torch.testing.assert_close(logits_of(opened.base, root / "red.png"), untouched, rtol=0, atol=1e-6)
    assert float((untouched - ours).abs().max()) > 1e-2
    stored = AutoModelForImageTextToText.from_pretrained(merged(adapter, tmp_path / "b", "--base-values", "stored"))
    other = Assistant(type(opened.adapted.backbone)(stored.eval()), opened.adapted.encoder)
    assert float((logits_of(other, root / "red.png") - logits_of(assistant, root / "red.png")).abs().max()) > 1e-3


def test_a_resumed_run_ends_where_a_whole_one_does(root: Path) -> None:
    whole, path = adapter_of(root, "nf4").parent, settings(root, "qwen2_5_vl", "half", model={"quantisation": "nf4"})
    folder = trained(path)
    trained(path, f"--resume={folder / 'checkpoint-2'}")
    assert_same_weights(folder, whole, atol=1e-6)


@pytest.mark.slow
def test_zero_2_trains_what_one_process_trains(root: Path) -> None:
    path = settings(root, "qwen2_5_vl", "zero2", model={"quantisation": "nf4"}, training={"deepspeed": "zero2"})
    launch(path, ranks=1)
    assert_same_weights(root / "zero2", adapter_of(root, "nf4").parent, atol=1e-5)


@pytest.mark.parametrize("base", ["qwen2_5_vl", "llava"])
def test_zero_3_is_refused_before_weights_are_read(root: Path, base: str) -> None:
    path = settings(root, base, f"zero3-{base}", model={"quantisation": "nf4"}, training={"deepspeed": "zero3"})
    refused(decoder_run(path))
    with pytest.raises(UserError):
        read_run_file(path, "--model.quantisation=fp3")
