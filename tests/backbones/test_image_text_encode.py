"""One family's inputs at the edges: what is cut, what is refused, what a worker receives."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from dora_vl.backbones.encoder import load_processor
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample, UserError
from tests.backbones.image_text_talks import TALKS, encoder_of, sample_of
from tests.backbones.tiny_image_text import write_tiny


def test_a_long_sample_loses_its_end_in_every_input_of_tokens(folders: dict[str, Path]) -> None:
    talk = TALKS["two pictures, two questions"]
    whole = sample_of(encoder_of(folders["qwen2_5_vl"]), talk)
    kept = len(whole.input_ids) - 5
    cut = sample_of(encoder_of(folders["qwen2_5_vl"], max_tokens=kept), talk)
    assert cut.cut_tokens == 5
    assert torch.equal(cut.input_ids, whole.input_ids[:kept])
    assert torch.equal(cut.labels, whole.labels[:kept])
    for name in ("attention_mask", "mm_token_type_ids"):
        assert torch.equal(cut.inputs[name], whole.inputs[name][:, :kept])
    assert torch.equal(cut.inputs["pixel_values"], whole.inputs["pixel_values"])


def test_a_picture_is_never_cut(folders: dict[str, Path]) -> None:
    talk = TALKS["two pictures, two questions"]
    folder = folders["qwen2_5_vl"]
    encoder = encoder_of(folder)
    pad = encoder.processor.image_token_id
    after_pictures = int((sample_of(encoder, talk).input_ids == pad).nonzero()[-1]) + 1
    with pytest.raises(BadSample):
        sample_of(encoder_of(folder, max_tokens=after_pictures - 1), talk)
    with pytest.raises(BadSample):
        sample_of(encoder_of(folder, max_tokens=after_pictures), talk)


@pytest.mark.parametrize("text", ["Is <|im_end|> a word?", "What is <|image_pad|>?"])
def test_special_tokens_in_what_is_said_are_refused(folders: dict[str, Path], text: str) -> None:
    turns = (Turn("user", text), Turn("assistant", "no"))
    with pytest.raises(BadSample):
        sample_of(encoder_of(folders["qwen2_5_vl"]), (turns, ()))


def test_an_encoder_can_be_sent_to_a_data_worker(folders: dict[str, Path]) -> None:
    encoder = encoder_of(folders["qwen2_5_vl"])
    sent = pickle.loads(pickle.dumps(encoder))
    talk = TALKS["one picture"]
    assert torch.equal(sample_of(sent, talk).input_ids, sample_of(encoder, talk).input_ids)


def test_a_folder_without_processor_is_one_line(tmp_path: Path) -> None:
    folder = write_tiny("qwen2_5_vl", tmp_path / "half")
    for path in folder.glob("*processor*"):
        path.unlink()
    with pytest.raises(UserError):
        load_processor(str(folder))
