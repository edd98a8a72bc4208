"""Every family, with videos too, and language models: the loss is transformers' own; decoder and projector train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from dora_vl import DoRAConfig, apply_dora, trained_parts
from dora_vl.backbones.base import decoder_of
from dora_vl.backbones.encoder import Encoder
from dora_vl.backbones.model import language_targets, open_backbone, projector_patterns
from dora_vl.data.batches import Collator, stacked
from dora_vl.data.samples import IGNORED_LABEL
from tests.backbones.image_text_conversations import (
    SHORT,
    TALKS,
    VIDEO_TALKS,
    adapted_backbone,
    all_talks_of,
    batch_of,
    encoder_of,
    inputs_of,
    processor_inputs,
    sample_of,
    talks_of,
)
from tests.backbones.tiny_families.language import LANGUAGE_MODELS_IN_TURN
from tests.backbones.tiny_families.table import FAMILIES, families_in_turn, param
from tests.backbones.tiny_video import VIDEO, VIDEO_FAMILIES

Folders = Mapping[str, Path]
NEAR = {"rtol": 0, "atol": 1e-5}


def transformers_loss(
    model: PreTrainedModel, encoder: Encoder, family: str, conversations: Sequence[str]
) -> torch.Tensor:
    """The model's own loss over all labelled tokens, on what its own processor makes of the conversations with pictures
    together, and of the words alone.
    """
    seen, words = [
        [TALKS[conversation] for conversation in conversations if bool(TALKS[conversation][1]) == pictures]
        for pictures in (True, False)
    ]
    total, count = torch.zeros(()), 0
    for together in (group for group in (seen, words) if group):
        inputs = processor_inputs(encoder, family, together)
        labels = stacked([sample_of(encoder, conversation).labels[None] for conversation in together], IGNORED_LABEL)
        labelled = int((labels[:, 1:] != IGNORED_LABEL).sum())
        total += model(**inputs, labels=labels, use_cache=False).loss * labelled
        count += labelled
    return total / count


@families_in_turn
def test_the_loss_is_the_model_s_own_and_reaches_all_that_trains(folders: Folders, family: str) -> None:
    encoder, backbone = encoder_of(folders[family]), adapted_backbone(folders[family])
    taken = talks_of(family)
    learned: set[str] = set()
    for conversations in (*((conversation,) for conversation in taken), taken):
        batch = batch_of(encoder, [TALKS[conversation] for conversation in conversations])
        backbone.zero_grad()
        features = backbone(**batch)
        loss = features.losses.mean()
        assert len(features.losses) == int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())
        loss.backward()
        with torch.no_grad():  # and after it: Gemma 3n writes to a weight in its forward
            torch.testing.assert_close(
                loss.detach(), transformers_loss(backbone.model, encoder, family, conversations), **NEAR
            )
        for part in trained_parts(backbone.model):
            for name, parameter in part.parameters.items():
                # a batch of words alone too: a rank under ZeRO-3 must not wait
                assert parameter.grad is not None or name.startswith(FAMILIES[family].idle), (conversations, name)
                if parameter.grad is not None and bool(parameter.grad.any()):
                    learned.add(name)
                    assert conversations != ("no picture",) or part.name != "projector", name
    trained = {name for part in trained_parts(backbone.model) for name in part.parameters}
    assert {name for name in trained - learned if not name.startswith(FAMILIES[family].idle)} == set()


MIXED = ("no video", "one picture", "one video", "picture and video")


@pytest.mark.parametrize("conversations", [("two videos",), ("no video",), MIXED], ids=str)
@pytest.mark.parametrize("family", [pytest.param(name, marks=param(name).marks) for name in VIDEO_FAMILIES])  # pyright: ignore
def test_with_videos_too(folders: Folders, family: str, conversations: Sequence[str]) -> None:
    encoder, backbone = (make(folders[f"{family}{VIDEO}"]) for make in (encoder_of, adapted_backbone))
    one_kind = VIDEO_FAMILIES[family].one_kind
    if one_kind and conversations == MIXED:
        pytest.skip("pictures and videos of one batch are refused before training")
    dummy = None if one_kind else encoder.dummy()
    collate = Collator(encoder.pad_token_id, dummy=dummy, dummy_video=encoder.dummy_video(4))
    samples = [sample_of(encoder, VIDEO_TALKS[conversation]) for conversation in conversations]
    lengths = () if VIDEO_FAMILIES[family].one_length or conversations == MIXED else (SHORT,)
    samples += [sample_of(encoder, (VIDEO_TALKS["one video"][0], (), (video,))) for video in lengths]
    batch = inputs_of(collate(samples))
    features = backbone(**batch)
    loss = features.losses.mean()
    torch.testing.assert_close(loss, backbone.model(**batch).loss, **NEAR)
    loss.backward()
    words_alone = conversations == ("no video",) and not lengths
    for part in trained_parts(backbone.model):
        for name, parameter in part.parameters.items():
            assert parameter.grad is not None, name
            assert bool(parameter.grad.any()) != (words_alone and part.name == "projector"), name


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS_IN_TURN)
def test_of_language_models(folders: Folders, model_type: str) -> None:
    encoder, backbone = encoder_of(folders[model_type]), adapted_backbone(folders[model_type])
    batch = batch_of(encoder, [*all_talks_of(model_type).values()])
    features = backbone(**batch)
    loss = features.losses.mean()
    torch.testing.assert_close(loss, backbone.model(**batch).loss, **NEAR)
    loss.backward()
    assert all(weight.grad is not None for weight in backbone.parameters() if weight.requires_grad)
    assert projector_patterns(backbone.model) == ()


@families_in_turn
def test_every_linear_of_the_decoder_is_adapted_and_no_other(folders: Folders, family: str) -> None:
    model = open_backbone(str(folders[family])).model
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    decoder, modules = set(decoder_of(model).modules()), dict(model.named_modules())
    # Gemma 3n clamps its weight and multiplies by hand; HY 4's choose which tokens are seen
    bypassed = (".altup.correction_coefs", ".indexer.wq_b", ".indexer.wk", ".indexer.weights_proj")
    inside = [name for name in linears if modules[name] in decoder and not name.endswith(bypassed)]
    layers = [modules[name] for name in inside] + [layer for layer in decoder if isinstance(layer, torch.nn.Embedding)]
    reached = {id(weight) for layer in layers for weight in layer.parameters()}
    left = [weight for weight in decoder_of(model).parameters() if weight.dim() > 1 and id(weight) not in reached]
    assert bool(left) == bool(FAMILIES[family].unadapted)
    assert bool(projector_patterns(model)) == FAMILIES[family].projector
    names = apply_dora(model, DoRAConfig(targets=language_targets(model), rank=2, alpha=5.0))
    assert names == inside
    assert len(names) == FAMILIES[family].adapted


@families_in_turn
def test_an_answer_sees_nothing_after_it(folders: Folders, family: str) -> None:
    encoder, backbone = encoder_of(folders[family]), adapted_backbone(folders[family])
    sample = sample_of(encoder, TALKS["one picture"])
    closing = int((sample.labels != IGNORED_LABEL).nonzero()[-1])
    other = sample.input_ids.clone()
    other[closing] = encoder.tokenizer.convert_tokens_to_ids("?")  # the token that closes the answer
    collate = Collator(encoder.pad_token_id)
    first, second = (
        backbone(**inputs_of(collate([replace(sample, input_ids=ids)])), keep_logits=True).logits
        for ids in (sample.input_ids, other)
    )
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


@families_in_turn
def test_frozen_parts_beside_the_decoder_stay_in_eval(folders: Folders, family: str) -> None:
    backbone = adapted_backbone(folders[family])
    decoder = {id(module) for module in decoder_of(backbone.model).modules()}
    for name, module in backbone.model.named_modules():
        if id(module) in decoder:
            assert module.training, name
        elif not any(weight.requires_grad for weight in module.parameters()) and not list(module.children()):
            assert not module.training or not list(module.parameters()), name
