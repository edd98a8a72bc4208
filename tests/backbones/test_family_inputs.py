"""Families, with videos too: which are trained, inputs are the processor's own, labels the answers, cuts text."""

import json
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from dora_vl import files
from dora_vl.backbones.base import check_trained, model_type_of
from dora_vl.backbones.encoder import Encoder, load_processor
from dora_vl.backbones.families.table import NOT_TRAINED
from dora_vl.backbones.loading import load_tokenizer
from dora_vl.backbones.model import open_backbone, refuse_turned_experts, skeleton_of
from dora_vl.backbones.video_inputs import Video, repeated
from dora_vl.data.batches import ALIGNED
from dora_vl.data.example import Example
from dora_vl.data.samples import IGNORED_LABEL, Labelled, check_labels
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample, UserError
from tests.backbones import tiny_image_text
from tests.backbones.conversations import (
    LONG,
    RED,
    SEVERAL_ROUNDS,
    SHORT,
    TALKS,
    TURNS_RED,
    TWO_QUESTIONS,
    VIDEO_TALKS,
    all_talks_of,
    encoder_of,
    inputs_of,
    processor_inputs,
    sample_of,
)
from tests.backbones.model_table import PAGE, page
from tests.backbones.tiny_families.family import why_not_here
from tests.backbones.tiny_families.table import FAMILIES, LANGUAGE_MODELS_IN_TURN, QUICK, families, param
from tests.backbones.tiny_image_text import (
    VIDEO,
    VIDEO_FAMILIES,
    tiny_tokenizer,
    write_tiny,
    write_tiny_language,
    write_tiny_video,
)

Folders = Mapping[str, Path]
WITH_VIDEOS = [
    pytest.param(f"{name}{VIDEO}", marks=param(name, is_slow=name not in ("qwen2_5_vl", "llava_next_video")).marks)  # pyright: ignore
    for name in VIDEO_FAMILIES
]
SEEING = [*(param(name, is_slow=name not in QUICK) for name in FAMILIES), *WITH_VIDEOS]


def assert_same(ours: Mapping[str, object], theirs: Mapping[str, object]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0, check_dtype=name != "input_ids")


@pytest.mark.parametrize("family", [*SEEING, *LANGUAGE_MODELS_IN_TURN])
def test_inputs_are_what_the_processor_makes_of_the_conversation(folders: Folders, family: str) -> None:
    encoder = encoder_of(folders[family])
    for conversation, (turns, pictures, *videos) in all_talks_of(family).items():
        sample = sample_of(encoder, (turns, pictures, *videos))
        theirs = processor_inputs(encoder, family, [(turns, pictures, *videos)])
        ours = {"input_ids": sample.input_ids[None], **sample.inputs}
        if family == f"smolvlm{VIDEO}" and pictures and videos[0]:  # the processor loses the pictures
            for name in ("pixel_values", "pixel_attention_mask"):
                del ours[name], theirs[name]
        assert_same(ours, theirs)
        pixels = [value for value in sample.inputs.values() if isinstance(value, Tensor) and value.is_floating_point()]
        assert bool(pixels) == (bool(pictures) or bool(videos and videos[0])), conversation


@pytest.mark.parametrize("family", [*SEEING, *LANGUAGE_MODELS_IN_TURN])
def test_answers_and_what_closes_them_are_labelled_and_nothing_else(folders: Folders, family: str) -> None:
    encoder = encoder_of(folders[family])
    format_of = FAMILIES[family].format if family in FAMILIES else None
    for turns, *media in all_talks_of(family).values():
        sample = sample_of(encoder, (turns, *media))
        trained = sample.labels != IGNORED_LABEL
        assert torch.equal(sample.labels[trained], sample.input_ids[trained])
        space = " " if format_of == "question_answer" else ""
        expected = "".join(f"{space}{turn.text}<|im_end|>" for turn in turns if turn.role == "assistant")
        assert encoder.tokenizer.decode(sample.labels[trained]) == expected
        meant = encoder.answers(Example("conversation", (), turns))
        check_labels([labelled := Labelled(id="7", labels=sample.labels, answers=meant, tokenizer=encoder.tokenizer)])
        before = sample.labels.clone()
        first = int(trained.nonzero()[0])
        before[first - 3 : first] = sample.input_ids[first - 3 : first]
        with pytest.raises(UserError):
            check_labels([replace(labelled, labels=before)])


@pytest.mark.parametrize("family", SEEING)
def test_a_batch_is_the_processor_s_own(folders: Folders, family: str) -> None:
    encoder, conversations = encoder_of(folders[family]), all_talks_of(family)
    pair = (
        [*conversations.values()][:2]
        if family.endswith(VIDEO)
        else [conversations["one picture"], [*conversations.values()][-1]]
    )
    batch = inputs_of(encoder.collate([sample_of(encoder, conversation) for conversation in pair]))
    del batch["labels"]
    theirs = processor_inputs(encoder, family, pair)
    if family == f"smolvlm{VIDEO}":  # a row for each video there, and one for each sample here: its model reads alike
        frames = batch.pop("pixel_values").flatten(0, 1)
        frames = frames[frames.abs().sum((1, 2, 3)) > 0]  # without what fills up the shorter sample
        torch.testing.assert_close(frames, theirs.pop("pixel_values").flatten(0, 1), rtol=0, atol=0)
        del batch["pixel_attention_mask"], theirs["pixel_attention_mask"]
    if "cross_attention_mask" in theirs:  # the processor lets what fills short rows see pictures too; nobody reads it
        theirs["cross_attention_mask"] *= theirs["attention_mask"][:, :, None, None]
    assert_same(batch, theirs)


@pytest.mark.parametrize("family", ["qwen2_5_vl", f"qwen2_5_vl{VIDEO}"])
def test_a_long_sample_loses_its_end_in_every_input_of_tokens_and_no_picture(folders: Folders, family: str) -> None:
    encoder = encoder_of(folders[family])
    conversation = VIDEO_TALKS["one video"] if family.endswith(VIDEO) else TALKS[TWO_QUESTIONS]
    whole = sample_of(encoder, conversation)
    kept = len(whole.input_ids) - 3
    cut = sample_of(encoder_of(folders[family], max_tokens=kept), conversation)
    assert cut.cut_tokens == 3
    assert torch.equal(cut.input_ids, whole.input_ids[:kept])
    assert torch.equal(cut.labels, whole.labels[:kept])
    for name, value in whole.inputs.items():
        assert torch.equal(cut.inputs[name], value[:, :kept] if name in ALIGNED else value)
    media = {encoder.processor.image_token_id, encoder.processor.video_token_id}
    after = max(position for position, token in enumerate(whole.input_ids.tolist()) if token in media) + 1
    for most in (after - 1, after):
        with pytest.raises(BadSample):
            sample_of(encoder_of(folders[family], max_tokens=most), conversation)


def test_a_folder_without_processor_is_refused(tmp_path: Path) -> None:
    folder = write_tiny("qwen2_5_vl", tmp_path / "half")
    for path in folder.glob("*processor*"):
        path.unlink()
    with pytest.raises(UserError):
        load_processor(str(folder))


def test_a_language_model_sees_no_picture(folders: Folders) -> None:
    with pytest.raises(BadSample) as raised:
        sample_of(encoder_of(folders["llama"]), TALKS["one picture"])
    assert raised.value.sample_id == "conversation"


def test_without_chat_template_a_format_must_be_named(tmp_path: Path) -> None:
    folder = write_tiny_language("llama", tmp_path / "llama")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError):
        encoder_of(folder)
    encoder = encoder_of(folder, template="question_answer")
    text = "Question: Say the colour red. Answer: red<|im_end|>\nQuestion: Sure? Answer: Yes, it is.<|im_end|>"
    assert encoder.tokenizer.decode(sample_of(encoder, SEVERAL_ROUNDS).input_ids) == text


class TestVideos:
    def test_pictures_and_videos_of_one_name_are_all_there_in_the_order_of_the_text(self, folders: Folders) -> None:
        """SmolVLM's processor keeps the videos' pixels alone; its model reads all in the order of their tokens."""
        encoder = encoder_of(folders[f"smolvlm{VIDEO}"])
        video, picture, first, last = (
            sample_of(encoder, VIDEO_TALKS[conversation]).inputs["pixel_values"]
            for conversation in ("one video", "one picture", "video and picture", "picture and video")
        )
        assert torch.equal(first, torch.cat([video, picture], dim=1))
        assert torch.equal(last, torch.cat([picture, video], dim=1))

    @pytest.mark.parametrize("family", WITH_VIDEOS)
    def test_which_families_take_videos_of_one_length(self, folders: Folders, family: str) -> None:
        """Where the processor refuses several in one sample the shorter shows a frame twice."""
        encoder, expected = encoder_of(folders[family]), VIDEO_FAMILIES[family.removesuffix(VIDEO)]
        assert encoder.no_videos_reason is None
        assert encoder.videos_of_one_length == expected.one_length
        assert encoder.cannot_mix_media == expected.one_kind
        turns = VIDEO_TALKS["two videos"][0]
        ours = sample_of(encoder, (turns, (), (LONG, SHORT))).input_ids[None]
        same = repeated(SHORT, 4) if expected.one_length or family == f"internvl{VIDEO}" else SHORT
        theirs = processor_inputs(encoder, family, [(turns, (), (LONG, same))])["input_ids"]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)

    def test_times_in_the_text_are_the_real_ones(self, folders: Folders) -> None:
        """Frames 3, 10, 17, 24 of 25 a second; Qwen3-VL writes the middle of each two, SmolVLM whole seconds."""
        qwen = encoder_of(folders[f"qwen3_vl{VIDEO}"])
        assert text_of(qwen, LONG).count("<0.3 seconds>") == 1
        assert text_of(qwen, LONG).count("<0.8 seconds>") == 1
        assert "<0.6 seconds>" in text_of(qwen, UNSTEADY)
        assert "<63.2 seconds>" in text_of(qwen, UNSTEADY)
        # Its processor lengthens the list of indices in place.
        assert text_of(qwen, SHORT) == text_of(qwen, SHORT)
        assert len(SHORT.indices) == 3
        prompt = text_of(encoder_of(folders[f"smolvlm{VIDEO}"]), UNSTEADY)
        assert "four frames from a 0:01:10 [H:MM:SS] video" in prompt
        assert [f"Frame from {time}:" in prompt for time in ("00:00", "00:01", "01:01", "01:05")] == [True] * 4

    def test_seconds_between_frames_are_those_of_the_part_that_was_meant(self, folders: Folders) -> None:
        """Four frames of 4 s are one a second, two of them a grid: 2 s; of a part of 1.6 s they are 0.8 s."""
        encoder, (question, _) = encoder_of(folders[f"qwen2_5_vl{VIDEO}"]), VIDEO_TALKS["one video"][0]
        part = replace(LONG, span=(0.4, 2.0))
        for video, seconds in ((LONG, 2.0), (part, 0.8), (replace(UNSTEADY, span=(0.0, 70.0)), 35.0)):
            intervals = encoder.encode_prompt((question,), (), (video,)).inputs["second_per_grid_ts"]
            assert float(intervals[0]) == pytest.approx(seconds, rel=1e-3)

    @pytest.mark.parametrize("family", ["idefics3", "qwen2_5_vl"])
    def test_they_go_in_as_pictures_where_the_family_or_its_template_has_none(self, folders, family) -> None:
        encoder = encoder_of(folders[family])
        assert encoder.no_videos_reason
        turns, pictures, videos = VIDEO_TALKS["picture and video"]
        sample = sample_of(encoder, (turns, pictures, videos))
        marks = "\n".join(["<image>"] * 4)
        question = Turn("user", f"Is <image>\nlike {marks}\nhere?")
        expected = sample_of(encoder, ((question, turns[1]), (*pictures, *videos[0].pictures), ()))
        assert torch.equal(sample.input_ids, expected.input_ids)
        assert torch.equal(sample.labels, expected.labels)
        assert_same(sample.inputs, expected.inputs)

    def test_html_is_text_where_no_video_is(self, folders, tmp_path, monkeypatch) -> None:
        conversation = (Turn("user", "What is <video> in HTML?"), TURNS_RED), (), ()
        words = [tag for tag in tiny_image_text.SPECIAL if tag != "<video>"]
        with monkeypatch.context() as patched:  # the session's own folders are written with all of them
            patched.setattr(tiny_image_text, "SPECIAL", words)
            base = write_tiny_video("qwen2_5_vl", tmp_path / "base")
        encoder = encoder_of(base)
        assert "What is <video> in HTML?" in encoder.tokenizer.decode(sample_of(encoder, conversation).input_ids)
        with pytest.raises(BadSample):
            sample_of(encoder_of(folders[f"llava_onevision{VIDEO}"]), conversation)

    def test_frames_that_change_their_size_are_a_bad_sample(self, folders: Folders) -> None:
        odd = replace(LONG, pictures=(*LONG.pictures[:3], RED))
        with pytest.raises(BadSample):
            sample_of(encoder_of(folders[f"qwen2_5_vl{VIDEO}"]), (VIDEO_TALKS["one video"][0], (), (odd,)))


def text_of(encoder: Encoder, video: Video) -> str:
    prompt = encoder.encode_prompt((Turn("user", "<video>\nWhen?"),), (), (video,))
    return encoder.tokenizer.decode(prompt.input_ids)


UNSTEADY = replace(LONG, seconds=(0.2, 1.0, 61.4, 65.0), duration=70.0, span=(0.0, 70.0))


@pytest.mark.parametrize("model_type", [*NOT_TRAINED, "no_such_model"])
def test_what_cannot_be_trained_is_named(model_type: str) -> None:
    with pytest.raises(UserError, match=f"'{model_type}'"):
        check_trained("folder", model_type)


def test_each_type_that_transformers_knows_is_tried_here_or_refused() -> None:
    unknown = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys() - FAMILIES.keys() - NOT_TRAINED.keys()
    assert not unknown, "these types of transformers need a tiny model in families.yaml, or a reason in NOT_TRAINED"


@pytest.mark.parametrize("loads", [model_type_of, load_processor, load_tokenizer, skeleton_of, open_backbone])
def test_a_model_s_own_code_is_never_run_and_nobody_is_asked(tmp_path: Path, monkeypatch, loads: Any) -> None:
    code = "from transformers import PretrainedConfig\nopen('ran', 'w')\nclass C(PretrainedConfig):\n    pass\n"
    (tmp_path / "own.py").write_text(code)
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor", "AutoTokenizer")
    auto_map = {name: "own.C" for name in classes}
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        (tmp_path / name).write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    with pytest.raises(UserError):
        loads(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_the_type_is_read_from_the_config_alone(tmp_path: Path) -> None:
    AutoConfig.for_model("smolvlm").save_pretrained(tmp_path)
    assert model_type_of(str(tmp_path)) == "smolvlm"
    (tmp_path / "config.json").write_text("{}")
    for base in (str(tmp_path), str(tmp_path / "nowhere"), "runs/nowhere/base"):
        with pytest.raises(UserError, match=re.escape(repr(base))):
            model_type_of(base)


def test_a_name_that_is_nowhere_costs_no_wait_where_the_hub_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(files, "getproxies", dict)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"'runs/base'.*127\.0\.0\.1"):
        model_type_of("runs/base")
    assert time.monotonic() - began < 5


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    write_tiny("qwen2_5_vl", folder := tmp_path_factory.mktemp("whole"))
    return folder


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 5_000, '{"a": 1' + "0" * 5_000 + "}", "", "[]"], ids=lambda text: text[:6]
)
@pytest.mark.parametrize("file", ["config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_what_is_no_json_object_is_one_line(whole: Path, tmp_path: Path, file: str, text: str) -> None:
    base = shutil.copytree(whole, tmp_path / "base")
    (base / file).write_text(text)
    with pytest.raises(UserError) as error:
        load_processor(str(base))
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("key", "size"), [("num_hidden_layers", 10**7), ("hidden_size", 10**9), ("vocab_size", 1e12)])
def test_a_size_that_no_model_has_is_refused_before_anything_is_built(
    whole, tmp_path, caplog, capfd, key, size
) -> None:
    base = shutil.copytree(whole, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["text_config"][key] = size
    (base / "config.json").write_text(json.dumps(config))
    for opens in (model_type_of, skeleton_of, open_backbone):
        with pytest.raises(UserError) as error:
            opens(str(base))
        assert key in str(error.value)
        assert "\n" not in str(error.value)
    assert not caplog.records
    assert "REPORT" not in "".join(capfd.readouterr())


PAGE_OF = "5.24"


@pytest.mark.skipif(bool(why_not_here(PAGE_OF)), reason="the page lists a newer version's models too")
def test_the_page_is_written_from_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.backbones.model_table"


@families
def test_a_family_takes_videos_where_its_processor_has_a_part_for_them(family: str) -> None:
    row = FAMILIES[family]
    processor = row.processor(tiny_tokenizer(row.names))
    assert (vars(processor).get("video_processor") is not None) == row.video


def test_a_folder_of_save_pretrained_is_refused_and_a_published_one_is_not(tmp_path, monkeypatch) -> None:
    base = write_tiny("qwen3_vl_moe", tmp_path / "base")
    monkeypatch.setattr("dora_vl.backbones.model.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(UserError):
        open_backbone(str(base))
    file = base / "model.safetensors"
    weights = load_file(file)
    named = [name for name in weights if name.endswith(("experts.down_proj", "experts.gate_up_proj"))]
    assert named
    for name in named:
        weights[name] = weights[name].transpose(1, 2).contiguous()
    save_file(weights, file, metadata={"format": "pt"})
    shape = weights[next(name for name in named if name.endswith("down_proj"))].shape
    if shape[1] == shape[2]:
        pytest.fail("the tiny model's experts are square, so that this test could not tell")
    refuse_turned_experts(str(base))
