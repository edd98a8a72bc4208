"""The backbone of every decoder and family: transformers' own loss, nothing needless computed, packed rows likewise."""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from accelerate.utils import send_to_device
from PIL import Image
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Llama4ForCausalLM, Llama4TextConfig, PreTrainedModel

from dora_vl import DoRAConfig, apply_dora, trained_parts
from dora_vl.backbones import frozen_outputs
from dora_vl.backbones.base import decoder_of, model_inputs
from dora_vl.backbones.capped_head import HeadPlace
from dora_vl.backbones.encoder import Encoder
from dora_vl.backbones.families.targets import language_targets, projector_patterns
from dora_vl.backbones.frozen_outputs import find_parts, with_stored_outputs
from dora_vl.backbones.model import DecoderBackbone, check_packing, open_backbone
from dora_vl.backbones.packed_attention import OwnPositions
from dora_vl.backbones.specs import LanguageSource
from dora_vl.backbones.tower_sources import write_language_model
from dora_vl.data.batches import Collator, stacked
from dora_vl.data.columns import Packing
from dora_vl.data.samples import IGNORED_LABEL, Sample
from dora_vl.data.turns import Turn
from dora_vl.errors import UserError
from dora_vl.heads import next_token
from tests.backbones.conversations import (
    BLUE,
    LONG,
    RED,
    SHORT,
    TALKS,
    VIDEO_TALKS,
    Conversation,
    adapt,
    adapted_backbone,
    all_talks_of,
    batch_of,
    encoder_of,
    inputs_of,
    processor_inputs,
    rounds,
    sample_of,
    talks_of,
)
from tests.backbones.tiny_families.table import FAMILIES, LANGUAGE_MODELS_IN_TURN, families_in_turn, param
from tests.backbones.tiny_image_text import VIDEO, VIDEO_FAMILIES
from tests.backbones.tiny_language import FAMILIES as LANGUAGE_FAMILIES
from tests.backbones.tiny_language import SIZES, tiny_language, write_tiny_language

IMAGE = 60
PICTURE = [IMAGE] * 4
ROWS = {(1, 7, *PICTURE, 8, 9, 10, 2): 2, (1, *PICTURE, 11, *PICTURE, 12, 2): 2, (1, 20, 21, 2): 2}
"""Tokens -> how many at the end are labelled."""
DUMMY = (1, *PICTURE)


def pixels(count: int, *, seed: int = 5) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def llava_samples() -> list[Sample]:
    samples = []
    for number, (row, answered) in enumerate(ROWS.items()):
        ids, count = torch.tensor(row), row.count(IMAGE) // 4
        labels = torch.where(torch.arange(len(ids)) >= len(ids) - answered, ids, IGNORED_LABEL)
        inputs = {"pixel_values": pixels(count, seed=number)} if count else {}
        samples.append(Sample(ids, labels, index=number, id=str(number), inputs=inputs))
    return samples


def language_samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    samples = []
    for number, length in enumerate((9, 4, 7, 3, 5)):
        ids = torch.randint(3, 59, (length,), generator=generator)
        labels = ids.clone()
        labels[: 1 + number % 3] = IGNORED_LABEL
        samples.append(Sample(ids, labels, index=number, id=str(number)))
    return samples


def with_stored(samples: list[Sample], backbone: DecoderBackbone) -> list[Sample]:
    """The same with the frozen tower's stored outputs in the place of pixels."""
    model, first = backbone.model, next(sample for sample in samples if sample.inputs)
    pair = model_inputs(model, Collator(0)([first, first]))
    parts = backbone.frozen_parts = find_parts(model, frozen_outputs.inputs_of(model, first), pair)
    return [
        with_stored_outputs(sample, parts.outputs_of(model, frozen_outputs.inputs_of(model, sample)))
        if sample.inputs
        else sample
        for sample in samples
    ]


def gradients(backbone: DecoderBackbone, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    backbone.zero_grad()
    loss = backbone(**inputs_of(batch)).losses.sum()
    loss.backward()
    return loss, {name: leaf.grad.clone() for name, leaf in backbone.model.named_parameters() if leaf.grad is not None}


@pytest.mark.parametrize("family", ["llava", *LANGUAGE_FAMILIES])
@pytest.mark.parametrize("side", ["right", "left"])
def test_equal_to_transformers_on_each_row_alone(backbone: DecoderBackbone, family: str, side: Any) -> None:
    samples = llava_samples() if family == "llava" else language_samples()
    backbone = backbone if family == "llava" else DecoderBackbone(tiny_language(family))
    heads: list[torch.Size] = []
    head = backbone.model.get_output_embeddings()
    head.register_forward_hook(lambda _, args, __: heads.append(args[0].shape[:-1]))  # pyright: ignore
    batch = inputs_of(Collator(0, pad_side=side)(samples))
    output = backbone(**batch, keep_logits=True)
    assert heads == [(1, len(output.targets))]  # labelled positions alone
    assert not head._forward_pre_hooks  # pyright: ignore
    last = backbone(**{**batch, "labels": None}, keep_logits=True)
    assert last.targets.tolist() == [IGNORED_LABEL] * len(samples)
    for number, sample in enumerate(samples):
        alone = backbone.model(input_ids=sample.input_ids[None], **sample.inputs).logits[0]
        labelled = (sample.labels[1:] != IGNORED_LABEL).nonzero().flatten()
        torch.testing.assert_close(output.logits[output.samples == number], alone[labelled], rtol=1e-4, atol=1e-4)
        assert torch.equal(output.targets[output.samples == number], sample.labels[1:][labelled])
        torch.testing.assert_close(last.logits[number], alone[-1], rtol=1e-4, atol=1e-4)


class TestPictures:
    @pytest.mark.parametrize("stored", [False, True])
    def test_words_alone_give_the_projector_zeros(self, backbone: DecoderBackbone, stored: bool) -> None:
        """Under ZeRO-3 every rank has to run the modules that a rank with pictures runs, no more and no less."""
        ran: list[str] = []
        adapt(backbone.model)
        backbone.train()
        ids = torch.tensor(DUMMY)
        dummy = Sample(ids, torch.full_like(ids, IGNORED_LABEL), inputs={"pixel_values": pixels(1)})
        dummy = with_stored([dummy], backbone)[0] if stored else dummy
        encoder = backbone.model.get_submodule("model.vision_tower.encoder")
        encoder.register_forward_hook(lambda *_: ran.append("tower"))
        words, expected = llava_samples()[2], gradients(backbone, Collator(0)(llava_samples()[2:]))
        loss, grads = gradients(backbone, Collator(0, dummy=dummy)([words]))
        assert ran == ([] if stored else ["tower"])
        torch.testing.assert_close(loss, expected[0])
        for name, gradient in grads.items():
            if "projector" in name:
                assert torch.equal(gradient, torch.zeros_like(gradient))
            else:
                torch.testing.assert_close(gradient, expected[1][name], rtol=1e-4, atol=1e-6)


class TestGenerate:
    def test_a_batch_answers_as_each_prompt_alone(self, backbone: DecoderBackbone) -> None:
        # A random model may say the picture's token, which as an input would need a picture.
        options: dict[str, Any] = {"max_new_tokens": 6, "options": {"eos_token_id": 999, "suppress_tokens": [IMAGE]}}
        prompts = inputs_of(Collator(0, pad_side="left")(llava_samples()))
        del prompts["labels"]
        together = backbone.generate(**prompts, **options)
        assert together.shape == (3, 6)
        for number, sample in enumerate(llava_samples()):
            ids = sample.input_ids[None]
            alone = backbone.generate(ids, torch.ones_like(ids), **sample.inputs, **options)
            assert torch.equal(alone[0], together[number])
            for token in alone[0].tolist():  # greedy by the whole forward pass, without any cache
                logits = backbone(ids, torch.ones_like(ids), **sample.inputs, keep_logits=True).logits
                logits[0, IMAGE] = -torch.inf
                assert int(logits[0].argmax()) == token
                ids = torch.cat([ids, torch.tensor([[token]])], 1)

    def test_beams_of_the_run_as_transformers_searches(self) -> None:
        model = tiny_language()
        batch = Collator(0, pad_side="left")(language_samples())
        backbone = DecoderBackbone(model, generation={"num_beams": 2})
        together = backbone.generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=4)
        for row, sample in zip(together, language_samples(), strict=True):
            ids = sample.input_ids
            expected = model.generate(ids[None], max_new_tokens=4, num_beams=2, do_sample=False)[0][len(ids) :]
            assert torch.equal(row[: len(expected)], expected)


def test_a_language_model_is_written_once_and_opens_everywhere(tmp_path: Path) -> None:
    source = write_tiny_language(tmp_path / "source")
    written = tmp_path / "new" / "base"
    write_language_model(LanguageSource(folder=str(source), dtype="bfloat16"), written)
    plain = AutoModelForCausalLM.from_pretrained(written)
    assert plain.dtype == torch.bfloat16
    ids = AutoTokenizer.from_pretrained(written)("the correct answer", return_tensors="pt").input_ids
    expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)(ids).logits
    assert torch.equal(plain(ids).logits, expected)
    assert open_backbone(str(written)).model.dtype == torch.float32
    assert str(tmp_path) not in (written / "config.json").read_text()
    with pytest.raises(UserError):
        write_language_model(LanguageSource(folder=str(source)), written)


@pytest.mark.parametrize("missing", ["config.json", "weights"])
def test_a_broken_folder_is_one_line(backbone: DecoderBackbone, tmp_path: Path, missing: str) -> None:
    if missing == "weights":
        backbone.model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["text_config"]["num_hidden_layers"] = 3
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError):
        open_backbone(str(tmp_path))


def test_the_layers_and_head_of_a_causal_model_inside_a_model_are_found() -> None:
    config = Llama4TextConfig(
        **{**SIZES, "intermediate_size": 32, "intermediate_size_mlp": 32},
        **{"vocab_size": 40, "head_dim": 8, "num_local_experts": 2},
    )
    torch.manual_seed(0)
    model = Llama4ForCausalLM(config).eval()
    assert decoder_of(model) is model.model  # transformers' own answer is the model
    assert language_targets(model)[0] == "model.layers.*.self_attn.q_proj"
    ids = torch.randint(1, 40, (2, 7))
    losses = DecoderBackbone(model)(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).losses
    expected = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(losses.mean(), expected)


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
    collate = replace(encoder.collate, dummy=dummy, dummy_video=encoder.dummy_video(4))
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


INSIDE = {"granite_docling", "chameleon", "gemma3n", "mistral_large4", "muse_glimmer", "muse_spark", "inkling2"} | {
    *("inkling2_loop", "nemotron_h_omni", "gemma2", "cohere", "cohere2")
}
"""These scale, cap or mask what their head gives."""


@pytest.mark.parametrize("family", [*families_in_turn.args[1], *LANGUAGE_MODELS_IN_TURN])
def test_both_ways_to_the_scores_agree(folders: Folders, family: str) -> None:
    encoder, backbone = encoder_of(folders[family]), adapted_backbone(folders[family])
    batch = batch_of(encoder, [*all_talks_of(family).values()])
    assert (backbone.head_place == "inside") == (family in INSIDE)
    ways, places = [], get_args(HeadPlace)
    for place in places[places.index(backbone.head_place) :]:  # a later one is right for an earlier one's models too
        backbone.head_place = place
        backbone.zero_grad()
        losses = backbone(**batch).losses
        losses.mean().backward()  # before the next pass: Gemma 3n clamps its weights in place in each
        kept = backbone(**batch, keep_logits=True)
        gradients = [weight.grad for weight in backbone.parameters() if weight.grad is not None]
        ways.append((losses, kept.losses, kept.logits, *gradients))
    for way in ways[1:]:
        torch.testing.assert_close(way, ways[0], rtol=1e-4, atol=1e-6)


@families_in_turn
def test_every_linear_of_the_decoder_is_adapted_and_no_other(folders: Folders, family: str) -> None:
    model = open_backbone(str(folders[family])).model
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    decoder, modules = set(decoder_of(model).modules()), dict(model.named_modules())
    # Gemma 3n clamps its weight and multiplies by hand; an indexer's layers choose which tokens are seen
    inside = [
        name
        for name in linears
        if modules[name] in decoder and not name.endswith(".altup.correction_coefs") and ".indexer." not in name
    ]
    layers = [modules[name] for name in inside] + [layer for layer in decoder if isinstance(layer, torch.nn.Embedding)]
    reached = {id(weight) for layer in layers for weight in layer.parameters()}
    left = [weight for weight in decoder_of(model).parameters() if weight.dim() > 1 and id(weight) not in reached]
    assert bool(left) == bool(FAMILIES[family].unadapted)
    assert bool(projector_patterns(model)) == FAMILIES[family].projector
    names = apply_dora(model, DoRAConfig(targets=language_targets(model), rank=2, alpha=5.0))
    assert names == inside
    assert len(names) == FAMILIES[family].adapted


@families_in_turn
def test_frozen_parts_beside_the_decoder_stay_in_eval(folders: Folders, family: str) -> None:
    backbone = adapted_backbone(folders[family])
    decoder = {id(module) for module in decoder_of(backbone.model).modules()}
    for name, module in backbone.model.named_modules():
        if id(module) in decoder:
            assert module.training, name
        elif not any(weight.requires_grad for weight in module.parameters()) and not list(module.children()):
            assert not module.training or not list(module.parameters()), name


@pytest.fixture(autouse=True)
def losses_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a published vocabulary."""
    monkeypatch.setattr(next_token, "SMALL_VOCABULARY", 0)


GREEN = Image.new("RGB", BLUE.size, (30, 180, 40))
SINGLE = torch.float32
NAMES = {id(RED): "red.png", id(BLUE): "blue.png", id(GREEN): "green.png"}


def conversation(question: str, answer: str, *pictures: Image.Image) -> Conversation:
    return (Turn("user", "<image>\n" * len(pictures) + question), Turn("assistant", answer)), pictures


ALIKE = (
    conversation("What colour is it?", "It is red.", BLUE),
    conversation("What is it?", "Two it is.", BLUE),
    conversation("What is it?", "None", BLUE),
)
OTHERS = (conversation("Which is blue?", "Two.", GREEN, BLUE), conversation("Is it red?", "No.", GREEN))
WORDS = (conversation("Say it.", "red"),)


def samples_of(encoder: Encoder, conversations: Sequence[Conversation]) -> list[Sample]:
    return [
        replace(
            sample_of(encoder, conversation),
            index=row,
            id=str(row),
            media=tuple(NAMES[id(image)] for image in conversation[1]),
        )
        for row, conversation in enumerate(conversations)
    ]


@contextmanager
def double_precision(backbone: DecoderBackbone) -> Iterator[None]:
    """Everything in float64, also what models cast to float32: norms, rotations, softmax."""
    backbone.model.set_experts_implementation("eager")
    backbone.double()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("float", "float32"):
            patch.setattr(torch, name, torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(SINGLE)


def trained(
    backbone: DecoderBackbone, collate: Collator, groups: Sequence[Sequence[Sample]]
) -> tuple[float, dict[str, torch.Tensor], int]:
    """The sum of the losses of all labels, every gradient, and how many tokens went through."""
    backbone.zero_grad()
    total, tokens = 0.0, 0
    for group in groups:
        batch = inputs_of(collate(group))
        tokens += batch["input_ids"].numel()
        features = backbone(**batch)
        loss = features.losses.sum()
        loss.backward()
        total += loss.item()
    gradients = {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        for name, weight in backbone.named_parameters()
        if weight.requires_grad
    }
    return total, gradients, tokens


def check_same_training(
    backbone: DecoderBackbone, encoder: Encoder, samples: Sequence[Sample], *, shares: bool
) -> None:
    """Packed and as trees, loss and every gradient are those of a row for each sample."""
    with double_precision(backbone):
        plain = trained(backbone, encoder.collate, [[sample] for sample in samples])
        kinds: tuple[Packing, ...] = ("packed", "trees")
        for kind in kinds:
            rows = trained(backbone, replace(encoder.collate, packing=kind), [samples])
            assert rows[0] == pytest.approx(plain[0], rel=1e-10)
            for name, gradient in plain[1].items():
                torch.testing.assert_close(rows[1][name], gradient, rtol=1e-8, atol=1e-10)
            assert (rows[2] < plain[2]) == (shares and kind == "trees")
    assert any(bool(gradient.any()) for gradient in plain[1].values())


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["", "reentrant", "checkpointing"])
@families_in_turn
def test_rows_of_several_samples_train_the_same(folders: Folders, family: str, checkpointing: bool | None) -> None:
    encoder, backbone = encoder_of(folders[family]), adapted_backbone(folders[family])
    kind, reason = check_packing(backbone, encoder, "trees")
    assert backbone.training
    assert (kind, reason is None) == (("plain", False) if FAMILIES[family].plain_rows else ("trees", True)), reason
    if kind == "plain":
        return
    if family == "nemotron_h_omni":
        pytest.skip("its decoder computes in float32 whatever it is given; the scores above are alike")
    takes_words = FAMILIES[family].format != "paligemma"
    samples = samples_of(encoder, (*ALIKE, *OTHERS, *(WORDS if takes_words else ())))
    if checkpointing is not None:
        backbone.model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    check_same_training(backbone, encoder, samples, shares=takes_words)


@pytest.mark.parametrize("family", [param(name, is_slow=name != "qwen2_5_vl") for name in VIDEO_FAMILIES])  # pyright: ignore
def test_questions_about_a_video_train_the_same(folders: Folders, family: str) -> None:
    encoder, backbone = (make(folders[f"{family}{VIDEO}"]) for make in (encoder_of, adapted_backbone))
    kind, reason = check_packing(backbone, encoder, "trees")
    assert kind == "trees", reason
    conversations: list[Conversation] = [
        (rounds(f"<video>\n{question}?", answer), (), (LONG,))
        for question, answer in (("Is it", "No."), ("Why", "Red."))
    ]
    names = [("long",), ("long",)]
    if not VIDEO_FAMILIES[family].one_length:
        conversations.append((rounds("<video>\nIs it?", "Yes."), (), (SHORT,)))
        names.append(("short",))
    if not VIDEO_FAMILIES[family].one_kind:
        conversations += [(rounds("<image>\nIs it?", "Yes."), (BLUE,), ()), VIDEO_TALKS["no video"]]
        names += [("blue",), ()]
    samples = [
        replace(sample_of(encoder, conversation), index=number, id=str(number), media=media)
        for number, (conversation, media) in enumerate(zip(conversations, names, strict=True))
    ]
    check_same_training(backbone, encoder, samples, shares=True)


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS_IN_TURN)
def test_packed_words_train_the_same(folders: Folders, model_type: str) -> None:
    encoder, backbone = encoder_of(folders[model_type]), adapted_backbone(folders[model_type])
    kind, reason = check_packing(backbone, encoder, "packed")
    assert kind == "packed", reason
    samples = samples_of(encoder, [(rounds(f"Say it {word}.", word), ()) for word in ("red", "is green or blue", "no")])
    check_same_training(backbone, encoder, samples, shares=False)


def test_rows_that_a_model_misreads_are_not_taken(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, backbone = encoder_of(folders["qwen3_vl"]), adapted_backbone(folders["qwen3_vl"])
    with monkeypatch.context() as patch:
        patch.setattr(OwnPositions, "by_sample", lambda *_: None)
        kind, reason = check_packing(backbone, encoder, "trees")
        assert (kind, bool(reason)) == ("plain", True)
    monkeypatch.setattr(backbone.packed_attention, "set_forest", lambda forest: None)
    assert check_packing(backbone, encoder, "packed")[0] == "plain"


def test_logits_that_a_model_changes_in_place_are_the_loss_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_language().eval().requires_grad_(False)
    forward = model.forward

    def masked(*arguments: object, **named: object) -> object:
        output = forward(*arguments, **named)
        output.logits[..., 10:30] = -1e4
        return output

    monkeypatch.setattr(model, "forward", masked)
    batch = inputs_of(Collator(0)(language_samples()))
    kept = batch["labels"].where((batch["labels"] < 10) | (batch["labels"] >= 30), torch.tensor(IGNORED_LABEL))
    expected = torch.nn.functional.cross_entropy(
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].flatten(0, 1),
        kept[:, 1:].flatten(),
    )
    torch.testing.assert_close(DecoderBackbone(model)(**{**batch, "labels": kept}).losses.mean(), expected)


def test_a_copy_attends_along_packed_rows_as_well() -> None:
    backbone, batch = (
        DecoderBackbone(tiny_language().eval()),
        inputs_of(Collator(0, packing="packed")(language_samples())),
    )
    with torch.no_grad():
        first, second = (each(**batch).losses for each in (backbone, copy.deepcopy(backbone)))
    assert torch.equal(first, second)


def kernel_losses(kernel: str, device: str, kinds: Sequence[Packing]) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Losses of each kind of rows in the order of samples, and a gradient where the kernel has one there."""
    model = tiny_language(hidden_size=64)  # flex attention takes heads of at least 16
    model.set_attn_implementation(kernel)
    backbone, results = DecoderBackbone(model.to(device).train()), []
    samples = [replace(sample, media=("alike",)) for sample in language_samples()]
    differs = kernel != "flex_attention" or device != "cpu"  # it has no backward pass on a CPU
    for kind in kinds:
        batch = send_to_device(inputs_of(Collator(0, packing=kind)(samples)), device)
        with torch.set_grad_enabled(differs):
            features = backbone(**batch)
        sums = torch.zeros(len(samples), device=device).index_add(0, features.samples, features.losses)
        weight = model.get_decoder().layers[0].self_attn.k_proj.weight
        results.append((sums.detach(), torch.autograd.grad(sums.sum(), weight)[0] if differs else None))
    return results


@pytest.mark.parametrize(
    ("kernel", "device"),
    [
        ("eager", "cpu"),
        pytest.param("flex_attention", "cpu", marks=pytest.mark.slow),
        *(pytest.param(kernel, "cuda", marks=pytest.mark.gpu) for kernel in ("sdpa", "eager", "flex_attention")),
    ],
)
def test_every_kernel_that_takes_a_mask_follows_rows(kernel: str, device: str) -> None:
    plain, *others = kernel_losses(kernel, device, ("plain", "packed", "trees"))
    for rows in others:
        torch.testing.assert_close(rows[0], plain[0], rtol=1e-4, atol=1e-4)
        if plain[1] is not None:
            torch.testing.assert_close(rows[1], plain[1], rtol=1e-3, atol=1e-4)


def test_a_call_of_the_model_itself_follows_no_earlier_trees() -> None:
    model = tiny_language()
    backbone = DecoderBackbone(model.train())
    samples = [replace(sample, media=("alike",)) for sample in language_samples()]
    batch = inputs_of(Collator(0, packing="trees")(samples))
    words = torch.randint(1, 20, (1, 40), generator=torch.Generator().manual_seed(2))

    def alone() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=words).logits

    before = alone()
    backbone(**batch)
    torch.testing.assert_close(alone(), before, rtol=0, atol=0)
    backbone(**batch)
    assert model.generate(input_ids=words, max_new_tokens=2, do_sample=False).shape[1] > 40
