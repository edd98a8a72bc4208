"""Videos in every family: the processor's own inputs with real times, the model's own loss, gradients everywhere."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dora_vl import trained_parts
from dora_vl.backbones.encoder import Encoder
from dora_vl.backbones.generation import generation_loss
from dora_vl.backbones.video_inputs import Video, as_pictures, metadata, repeated
from dora_vl.data.batches import ALIGNED, Collator
from dora_vl.data.samples import IGNORED_LABEL
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample
from tests.backbones import tiny_image_text
from tests.backbones.image_text_talks import (
    RED,
    Talk,
    adapted_backbone,
    encoder_of,
    inputs_of,
    processor_inputs,
    sample_of,
)
from tests.backbones.tiny_image_text import write_tiny
from tests.backbones.tiny_video import VIDEO_FAMILIES, coloured_video, write_tiny_video

LONG, SHORT = coloured_video(4), coloured_video(3, every=11, size=(22, 30))
SAME = coloured_video(4, every=5)

SAID = Turn("assistant", "It turns red.")
TALKS: dict[str, Talk] = {
    "one video": ((Turn("user", "<video>\nWhat colour is it?"), SAID), (), (LONG,)),
    "two videos": (
        (
            Turn("user", "Is <video>\nor <video>\nblue?"),
            Turn("assistant", "The second is blue."),
            Turn("user", "Sure?"),
            Turn("assistant", "Yes"),
        ),
        (),
        (LONG, SAME),
    ),
    "video and picture": ((Turn("user", "Is <video>\nlike <image>\nhere?"), SAID), (RED,), (LONG,)),
    "picture and video": ((Turn("user", "Is <image>\nlike <video>\nhere?"), SAID), (RED,), (LONG,)),
    "no video": ((Turn("user", "Say the colour red."), Turn("assistant", "red")), (), ()),
    "one picture": ((Turn("user", "<image>\nWhat colour is it?"), SAID), (RED,), ()),
}
families = pytest.mark.parametrize(
    "family",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                bool(family.needs) and not importlib.util.find_spec(str(family.needs)), reason=str(family.needs)
            ),
        )
        for name, family in VIDEO_FAMILIES.items()
    ],
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Families' folders, each written when it is first asked for."""
    root = tmp_path_factory.mktemp("video-families")

    class Written(dict[str, Path]):
        def __missing__(self, family: str) -> Path:
            self[family] = write_tiny_video(family, root / family)
            return self[family]

    return Written()


@families
@pytest.mark.parametrize("talk", TALKS)
def test_inputs_are_what_the_processor_makes_of_the_conversation(
    folders: dict[str, Path], family: str, talk: str
) -> None:
    encoder = encoder_of(folders[family])
    given = TALKS[talk]
    sample = sample_of(encoder, given)
    theirs = processor_inputs(encoder, family, [given])
    ours = {"input_ids": sample.input_ids[None], **sample.inputs}
    assert ours.keys() == theirs.keys()
    lost = {"pixel_values", "pixel_attention_mask"} if family == "smolvlm" and given[1] and given[2] else set()
    for name, tensor in theirs.items():
        if name not in lost:
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0)
    assert bool(set(ours) - set(ALIGNED) - {"input_ids"}) == (talk != "no video")


def test_pictures_and_videos_of_one_name_are_all_there_in_the_order_of_the_text(folders: dict[str, Path]) -> None:
    """SmolVLM's processor keeps the videos' pixels alone; its model reads all in the order of their tokens."""
    pytest.importorskip("num2words")
    encoder = encoder_of(folders["smolvlm"])
    video = sample_of(encoder, TALKS["one video"]).inputs["pixel_values"]
    picture = sample_of(encoder, TALKS["one picture"]).inputs["pixel_values"]
    for talk, parts in (("video and picture", (video, picture)), ("picture and video", (picture, video))):
        found = sample_of(encoder, TALKS[talk]).inputs
        torch.testing.assert_close(found["pixel_values"], torch.cat(parts, dim=1), rtol=0, atol=0)
        assert found["pixel_attention_mask"].shape[1] == found["pixel_values"].shape[1]
        assert len(processor_inputs(encoder, "smolvlm", [TALKS[talk]])["pixel_values"][0]) == len(
            video[0]
        )  # the picture's are lost


@families
def test_answers_and_what_closes_them_are_labelled_and_nothing_else(folders: dict[str, Path], family: str) -> None:
    encoder = encoder_of(folders[family])
    for name in TALKS:
        turns, pictures, videos = TALKS[name]
        sample = sample_of(encoder, (turns, pictures, videos))
        trained = sample.labels != IGNORED_LABEL
        assert torch.equal(sample.labels[trained], sample.input_ids[trained])
        said = "".join(f"{turn.text}<|im_end|>" for turn in turns if turn.role == "assistant")
        assert encoder.tokenizer.decode(sample.labels[trained]) == said


@families
def test_a_batch_is_the_processor_s_own(folders: dict[str, Path], family: str) -> None:
    encoder = encoder_of(folders[family])
    talks = [TALKS["one video"], TALKS["two videos"]]
    batch = Collator(encoder.pad_token_id)([sample_of(encoder, talk) for talk in talks])
    ours = {name: value for name, value in inputs_of(batch).items() if name != "labels"}
    theirs = processor_inputs(encoder, family, talks)
    assert ours.keys() == theirs.keys()
    if family == "smolvlm":  # a row for each video there, and one for each sample here: its model reads all alike
        frames = ours.pop("pixel_values").flatten(0, 1)
        frames = frames[frames.abs().sum((1, 2, 3)) > 0]  # without what fills up the shorter sample
        torch.testing.assert_close(frames, theirs["pixel_values"].flatten(0, 1), rtol=0, atol=0)
        del ours["pixel_attention_mask"]
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0)


MIXED = ("no video", "one picture", "one video", "picture and video")


@families
@pytest.mark.parametrize("talks", [("two videos",), ("no video",), MIXED], ids=str)
def test_the_loss_is_the_model_s_own_and_reaches_all_that_trains(
    folders: dict[str, Path], family: str, talks: Sequence[str]
) -> None:
    encoder, backbone = encoder_of(folders[family]), adapted_backbone(folders[family])
    one_kind = VIDEO_FAMILIES[family].one_kind
    if one_kind and any(TALKS[talk][1] for talk in talks):
        pytest.skip("pictures and videos of one batch are refused before training")
    dummy = None if one_kind else encoder.dummy()
    collate = Collator(encoder.pad_token_id, dummy=dummy, dummy_video=encoder.dummy_video(4))
    batch = inputs_of(collate([sample_of(encoder, TALKS[talk]) for talk in talks]))
    features = backbone(**batch)
    loss = generation_loss(features.logits, features.targets).loss
    theirs = backbone.model(**batch).loss
    torch.testing.assert_close(loss, theirs, rtol=0, atol=1e-5)
    loss.backward()
    for part in trained_parts(backbone.model):
        for name, parameter in part.parameters.items():
            assert parameter.grad is not None, name
            unseen = talks == ("no video",) and part.name == "projector"
            assert bool(parameter.grad.any()) != unseen, name


@families
def test_what_is_in_the_video_reaches_the_loss(folders: dict[str, Path], family: str) -> None:
    """Labels and ids alone would give one loss for all videos."""
    encoder, backbone = encoder_of(folders[family]), adapted_backbone(folders[family]).eval()
    collate = Collator(encoder.pad_token_id)
    other = replace(LONG, pictures=tuple(picture.point(lambda value: 255 - value) for picture in LONG.pictures))
    turns, _, _ = TALKS["one video"]
    losses = []
    for video in (LONG, other):
        features = backbone(**inputs_of(collate([sample_of(encoder, (turns, (), (video,)))])))
        losses.append(float(generation_loss(features.logits, features.targets).loss))
    assert abs(losses[0] - losses[1]) > 1e-6


@families
def test_which_families_take_videos_of_one_length(folders: dict[str, Path], family: str) -> None:
    encoder = encoder_of(folders[family])
    assert encoder.why_no_videos is None
    assert encoder.videos_of_one_length == VIDEO_FAMILIES[family].one_length
    assert encoder.one_kind_in_a_batch == VIDEO_FAMILIES[family].one_kind
    if not encoder.videos_of_one_length:  # then videos of several lengths are one batch
        talks = [(TALKS["one video"][0], (), (video,)) for video in (LONG, SHORT)]
        batch = Collator(encoder.pad_token_id)([sample_of(encoder, one) for one in talks])
        backbone = adapted_backbone(folders[family])
        features = backbone(**inputs_of(batch))
        alone = [backbone(**inputs_of(Collator(encoder.pad_token_id)([sample_of(encoder, one)]))) for one in talks]
        expected = torch.cat([one.logits for one in alone])
        torch.testing.assert_close(features.logits, expected, rtol=0, atol=1e-5)


@families
def test_videos_of_several_lengths_in_one_sample(folders: dict[str, Path], family: str) -> None:
    """Where the processor refuses them the shorter shows a frame twice; elsewhere all is the processor's own."""
    encoder = encoder_of(folders[family])
    turns = TALKS["two videos"][0]
    found = sample_of(encoder, (turns, (), (LONG, SHORT)))
    filled = family in ("internvl", "llava_onevision", "llava_next_video", "video_llava")
    same = repeated(SHORT, 4) if filled else SHORT
    torch.testing.assert_close(
        found.input_ids[None],
        processor_inputs(encoder, family, [(turns, (), (LONG, same))])["input_ids"],
        rtol=0,
        atol=0,
    )
    backbone = adapted_backbone(folders[family])
    batch = inputs_of(Collator(encoder.pad_token_id)([found]))
    features = backbone(**batch)
    loss = generation_loss(features.logits, features.targets).loss
    torch.testing.assert_close(loss, backbone.model(**batch).loss, rtol=0, atol=1e-5)


def text_of(encoder: Encoder, video: Video) -> str:
    prompt = encoder.encode_prompt((Turn("user", "<video>\nWhen?"),), (), (video,))
    return encoder.tokenizer.decode(prompt["input_ids"][0])


UNSTEADY = replace(LONG, seconds=(0.2, 1.0, 61.4, 65.0), duration=70.0, span=(0.0, 70.0))


def test_times_in_the_text_are_the_real_ones(folders: dict[str, Path]) -> None:
    """Frames 3, 10, 17, 24 of 25 a second; Qwen3-VL writes the middle of each two, SmolVLM whole seconds."""
    qwen = encoder_of(folders["qwen3_vl"])
    assert text_of(qwen, LONG).count("<0.3 seconds>") == 1
    assert text_of(qwen, LONG).count("<0.8 seconds>") == 1
    assert "<0.6 seconds>" in text_of(qwen, UNSTEADY)
    assert "<63.2 seconds>" in text_of(qwen, UNSTEADY)
    pytest.importorskip("num2words")
    told = text_of(encoder_of(folders["smolvlm"]), UNSTEADY)
    assert "four frames from a 0:01:10 [H:MM:SS] video" in told
    assert [f"Frame from {time}:" in told for time in ("00:00", "00:01", "01:01", "01:05")] == [True] * 4


def test_seconds_between_frames_are_those_of_the_part_that_was_meant(folders: dict[str, Path]) -> None:
    """Four frames of 4 s are one a second, two of them a grid: 2 s; of a part of 1.6 s they are 0.8 s."""
    encoder = encoder_of(folders["qwen2_5_vl"])
    part = replace(LONG, span=(0.4, 2.0))
    turns = TALKS["one video"][0]
    for video, seconds in ((LONG, 2.0), (part, 0.8), (replace(UNSTEADY, span=(0.0, 70.0)), 35.0)):
        found = encoder.encode_prompt(turns[:1], (), (video,))["second_per_grid_ts"]
        assert float(found[0]) == pytest.approx(seconds, rel=1e-3)


def test_odd_frames_leave_the_video_as_it_was(folders: dict[str, Path]) -> None:
    """Qwen3-VL's processor lengthens the list of indices in place."""
    encoder = encoder_of(folders["qwen3_vl"])
    first, second = text_of(encoder, SHORT), text_of(encoder, SHORT)
    assert first == second
    assert len(SHORT.indices) == 3


def test_videos_go_in_as_pictures_where_the_family_has_none(tmp_path: Path) -> None:
    encoder = encoder_of(write_tiny("idefics3", tmp_path / "idefics3"))
    assert encoder.why_no_videos == "Idefics3Processor has no video processor"
    turns, pictures, videos = TALKS["picture and video"]
    found = sample_of(encoder, (turns, pictures, videos))
    shown = (*pictures, *videos[0].pictures)
    marks = "\n".join(["<image>"] * 4)
    expected = sample_of(encoder, ((Turn("user", f"Is <image>\nlike {marks}\nhere?"), turns[1]), shown, ()))
    assert torch.equal(found.input_ids, expected.input_ids)
    assert torch.equal(found.labels, expected.labels)
    torch.testing.assert_close(found.inputs["pixel_values"], expected.inputs["pixel_values"], rtol=0, atol=0)


def test_a_template_without_a_place_for_videos_gets_pictures(tmp_path: Path) -> None:
    encoder = encoder_of(write_tiny("qwen2_5_vl", tmp_path / "pictures"))
    assert encoder.why_no_videos == "the chat template has no place for a video"
    inputs = sample_of(encoder, TALKS["one video"]).inputs
    assert len(inputs["image_grid_thw"]) == 4
    assert "video_grid_thw" not in inputs


def test_pictures_and_frames_keep_the_order_of_the_text() -> None:
    turns, shown = as_pictures(TALKS["video and picture"][0], (RED,), (LONG,))
    assert turns[0].text == "Is " + "\n".join(["<image>"] * 4) + "\nlike <image>\nhere?"
    assert shown == [*LONG.pictures, RED]
    for pictures, videos in (((), (LONG,)), ((RED,), ()), ((RED, RED), (LONG,)), ((RED,), (LONG, LONG))):
        with pytest.raises(ValueError, match="places"):
            as_pictures(TALKS["video and picture"][0], pictures, videos)


def test_a_video_is_never_cut(folders: dict[str, Path]) -> None:
    whole = sample_of(encoder_of(folders["qwen2_5_vl"]), TALKS["one video"])
    pad = encoder_of(folders["qwen2_5_vl"]).processor.video_token_id
    after = int((whole.input_ids == pad).nonzero()[-1]) + 1
    with pytest.raises(BadSample):
        sample_of(encoder_of(folders["qwen2_5_vl"], max_tokens=after - 1), TALKS["one video"])
    kept = len(whole.input_ids) - 3
    cut = sample_of(encoder_of(folders["qwen2_5_vl"], max_tokens=kept), TALKS["one video"])
    assert cut.cut_tokens == 3
    assert torch.equal(cut.inputs["mm_token_type_ids"], whole.inputs["mm_token_type_ids"][:, :kept])


def test_html_is_text_where_no_video_is(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = (Turn("user", "What is <video> in HTML?"), SAID), (), ()
    monkeypatch.setattr(tiny_image_text, "SPECIAL", [one for one in tiny_image_text.SPECIAL if one != "<video>"])
    encoder = encoder_of(write_tiny_video("qwen2_5_vl", tmp_path / "base"))
    assert "What is <video> in HTML?" in encoder.tokenizer.decode(sample_of(encoder, talk).input_ids)
    with pytest.raises(BadSample):
        sample_of(encoder_of(folders["llava_onevision"]), talk)


def test_a_video_whose_frames_change_their_size_is_a_bad_sample(folders: dict[str, Path]) -> None:
    """As a recording of a call whose line got worse."""
    odd = replace(LONG, pictures=(*LONG.pictures[:3], RED))
    with pytest.raises(BadSample):
        sample_of(encoder_of(folders["qwen2_5_vl"]), (TALKS["one video"][0], (), (odd,)))


def test_a_file_without_duration_has_a_clock_of_its_own() -> None:
    found = metadata(replace(LONG, duration=0.0, span=(0.0, 0.0)))
    assert found.timestamps == pytest.approx(LONG.seconds, abs=1e-3)
    assert found.total_num_frames == 4


def test_short_videos_repeat_frames() -> None:
    assert repeated(SHORT, 3) is SHORT
    assert repeated(SHORT, 8).indices == (3, 3, 3, 14, 14, 14, 25, 25)
    assert len(repeated(SHORT, 8).pictures) == len(repeated(SHORT, 8).seconds) == 8
