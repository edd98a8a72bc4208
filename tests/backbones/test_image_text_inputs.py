"""Every family: our inputs are the processor's own, the labels are the answers, and a cut loses text alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dora_vl.backbones.encoder import load_processor
from dora_vl.data.example import Example
from dora_vl.data.samples import IGNORED_LABEL, Labelled, check_labels
from dora_vl.errors import BadSample, UserError
from tests.backbones.image_text_talks import (
    TALKS,
    TWO_QUESTIONS,
    batch_of,
    encoder_of,
    processor_inputs,
    sample_of,
    talks_of,
)
from tests.backbones.tiny_families.table import FAMILIES, families
from tests.backbones.tiny_image_text import write_tiny

Folders = Mapping[str, Path]


def assert_same(ours: Mapping[str, object], theirs: Mapping[str, object]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0, check_dtype=name != "input_ids")


@families
@pytest.mark.parametrize("talk", TALKS)
def test_inputs_are_what_the_processor_makes_of_the_conversation(folders: Folders, family: str, talk: str) -> None:
    if talk not in talks_of(family):
        pytest.skip("takes one question alone")
    encoder = encoder_of(folders[family])
    sample = sample_of(encoder, TALKS[talk])
    assert_same(
        {"input_ids": sample.input_ids[None], **sample.inputs}, processor_inputs(encoder, family, [TALKS[talk]])
    )
    pixels = [one for one in sample.inputs.values() if isinstance(one, Tensor) and one.is_floating_point()]
    assert bool(pixels) == (talk != "no picture")


@families
def test_answers_and_what_closes_them_are_labelled_and_nothing_else(folders: Folders, family: str) -> None:
    encoder = encoder_of(folders[family])
    for talk in talks_of(family):
        turns, _ = TALKS[talk]
        sample = sample_of(encoder, TALKS[talk])
        trained = sample.labels != IGNORED_LABEL
        assert torch.equal(sample.labels[trained], sample.input_ids[trained])
        space = " " if FAMILIES[family].format == "question_answer" else ""
        said = "".join(f"{space}{turn.text}<|im_end|>" for turn in turns if turn.role == "assistant")
        assert encoder.tokenizer.decode(sample.labels[trained]) == said
        meant = encoder.answers(Example("talk", (), turns))
        check_labels([labelled := Labelled(id="7", labels=sample.labels, answers=meant, tokenizer=encoder.tokenizer)])
        before = sample.labels.clone()
        first = int(trained.nonzero()[0])
        before[first - 3 : first] = sample.input_ids[first - 3 : first]
        with pytest.raises(UserError):
            check_labels([replace(labelled, labels=before)])


@families
def test_a_batch_is_the_processor_s_own(folders: Folders, family: str) -> None:
    encoder = encoder_of(folders[family])
    talks = [TALKS["one picture"], TALKS[talks_of(family)[-1]]]
    batch = batch_of(encoder, talks)
    del batch["labels"]
    theirs = processor_inputs(encoder, family, talks)
    if "cross_attention_mask" in theirs:  # the processor lets what fills short rows see pictures too; nobody reads it
        theirs["cross_attention_mask"] *= theirs["attention_mask"][:, :, None, None]
    assert_same(batch, theirs)


def test_a_long_sample_loses_its_end_in_every_input_of_tokens_and_no_picture(folders: Folders) -> None:
    folder, talk = folders["qwen2_5_vl"], TALKS[TWO_QUESTIONS]
    whole = sample_of(encoder_of(folder), talk)
    kept = len(whole.input_ids) - 5
    cut = sample_of(encoder_of(folder, max_tokens=kept), talk)
    assert cut.cut_tokens == 5
    assert torch.equal(cut.input_ids, whole.input_ids[:kept])
    assert torch.equal(cut.labels, whole.labels[:kept])
    for name in ("attention_mask", "mm_token_type_ids"):
        assert torch.equal(cut.inputs[name], whole.inputs[name][:, :kept])
    assert torch.equal(cut.inputs["pixel_values"], whole.inputs["pixel_values"])
    after_pictures = int((whole.input_ids == encoder_of(folder).processor.image_token_id).nonzero()[-1]) + 1
    for most in (after_pictures - 1, after_pictures):
        with pytest.raises(BadSample):
            sample_of(encoder_of(folder, max_tokens=most), talk)


def test_a_folder_without_processor_is_one_line(tmp_path: Path) -> None:
    folder = write_tiny("qwen2_5_vl", tmp_path / "half")
    for path in folder.glob("*processor*"):
        path.unlink()
    with pytest.raises(UserError):
        load_processor(str(folder))
