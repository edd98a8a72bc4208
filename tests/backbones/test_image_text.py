"""Any vision-language model of transformers: ids and loss are the library's own, and every trained tensor learns."""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoConfig

from dora_vl import DoRAConfig, apply_dora, trained_parts
from dora_vl.backbones.families import ALIGNED, NOT_TRAINED, check_trained, model_type_of
from dora_vl.backbones.image_text import (
    ImageTextBackbone,
    language_targets,
    load_image_text,
    projector_patterns,
    weights_out_of_reach,
)
from dora_vl.backbones.image_text_encode import ImageTextEncoder, load_processor
from dora_vl.backbones.llava import load_llava
from dora_vl.data.dataset import IGNORED_LABEL, Sample
from dora_vl.data.processor_inputs import ProcessorCollator
from dora_vl.data.turns import Conversation, Turn
from dora_vl.errors import BadSample, UserError
from dora_vl.heads.generation import generation_loss
from tests.backbones.published_chat import GEMMA3, LLAVA_NEXT_MISTRAL, LLAVA_NEXT_VICUNA, QWEN2_VL, SMOLVLM
from tests.backbones.tiny_image_text import CHATML, FAMILIES, write_tiny

RED, BLUE = Image.new("RGB", (40, 24), (200, 30, 30)), Image.new("RGB", (18, 35), (20, 40, 220))
ASKED, SAID = "What colour is it?", "It is red."
BOOKKEEPING = {"samples", "padding_tokens", "skipped", "cut"}

Talk = tuple[tuple[Turn, ...], tuple[Image.Image, ...]]
TALKS: dict[str, Talk] = {
    "one picture": ((Turn("user", f"<image>\n{ASKED}"), Turn("assistant", SAID)), (RED,)),
    "no picture": ((Turn("user", "Say the colour red."), Turn("assistant", "red")), ()),
    "two pictures, two questions": (
        (
            Turn("user", "Is <image>\nor <image>\nblue?"),
            Turn("assistant", "The second is blue."),
            Turn("user", "Sure?"),
            Turn("assistant", "Yes"),
        ),
        (RED, BLUE),
    ),
}
MIXED = tuple(TALKS)

needed = {name: family.needs for name, family in FAMILIES.items()}
families = pytest.mark.parametrize(
    "family",
    [
        pytest.param(
            name, marks=pytest.mark.skipif(bool(needs) and not importlib.util.find_spec(str(needs)), reason=str(needs))
        )
        for name, needs in needed.items()
    ],
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Families' folders, each written when it is first asked for."""
    root = tmp_path_factory.mktemp("families")

    class Written(dict[str, Path]):
        def __missing__(self, family: str) -> Path:
            self[family] = write_tiny(family, root / family)
            return self[family]

    return Written()


def encoder_of(folder: Path, max_tokens: int = 2048) -> ImageTextEncoder:
    return ImageTextEncoder(load_processor(str(folder)), folder.name, max_tokens=max_tokens)


def sample_of(encoder: ImageTextEncoder, talk: Talk) -> Sample:
    turns, pictures = talk
    encoded = encoder.encode(Conversation("talk", tuple("a.png" for _ in pictures), turns), pictures)
    return Sample(
        index=0,
        id="talk",
        input_ids=encoded.input_ids,
        labels=encoded.labels,
        cut_tokens=encoded.cut_tokens,
        inputs=encoded.inputs,
    )


def messages_of(talk: Talk) -> list[dict[str, Any]]:
    """The same in transformers' own form, pictures in their places."""
    turns, pictures = talk
    left = iter(pictures)
    messages = []
    for turn in turns:
        parts: list[dict[str, Any]] = []
        for number, piece in enumerate(turn.text.split("<image>")):
            if number:
                parts.append({"type": "image", "image": next(left)})
            text = piece.removeprefix("\n") if number else piece
            parts += [{"type": "text", "text": text}] if text else []
        messages.append({"role": turn.role, "content": parts})
    return messages


def inputs_of(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in BOOKKEEPING}


def adapted_backbone(folder: Path) -> ImageTextBackbone:
    """With an adapter away from its start, and the projector too (Gemma 3's own projection begins with zeros)."""
    backbone = load_image_text(str(folder))
    model = backbone.model
    also_train = {"projector": projector_patterns(model)}
    apply_dora(
        model, DoRAConfig(targets=language_targets(model), rank=3, alpha=7.0, dropout=0.0, also_train=also_train)
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for part in trained_parts(model):
            for parameter in part.parameters.values():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return backbone.train()


@families
@pytest.mark.parametrize("talk", TALKS)
def test_inputs_are_what_the_processor_makes_of_the_conversation(
    folders: dict[str, Path], family: str, talk: str
) -> None:
    encoder = encoder_of(folders[family])
    sample = sample_of(encoder, TALKS[talk])
    theirs = encoder.processor.apply_chat_template(
        messages_of(TALKS[talk]), tokenize=True, return_dict=True, return_tensors="pt"
    )
    ours = {"input_ids": sample.input_ids[None], **sample.inputs}
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0)
    assert ("pixel_values" in ours) == (talk != "no picture")


@families
def test_answers_and_what_closes_them_are_labelled_and_nothing_else(folders: dict[str, Path], family: str) -> None:
    encoder = encoder_of(folders[family])
    for turns, pictures in TALKS.values():
        sample = sample_of(encoder, (turns, pictures))
        trained = sample.labels != IGNORED_LABEL
        assert torch.equal(sample.labels[trained], sample.input_ids[trained])
        said = "".join(f"{turn.text}<|im_end|>" for turn in turns if turn.role == "assistant")
        assert encoder.tokenizer.decode(sample.labels[trained]) == said


@families
def test_a_batch_is_the_processor_s_own(folders: dict[str, Path], family: str) -> None:
    encoder = encoder_of(folders[family])
    talks = [TALKS["one picture"], TALKS["two pictures, two questions"]]
    batch = ProcessorCollator(encoder.pad_token_id, aligned=ALIGNED)([sample_of(encoder, talk) for talk in talks])
    theirs = encoder.processor.apply_chat_template(
        [messages_of(talk) for talk in talks],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "right"},
    )
    ours = {name: value for name, value in inputs_of(batch).items() if name != "labels"}
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0)


@families
@pytest.mark.parametrize("talks", [(talk,) for talk in TALKS] + [MIXED], ids=[*TALKS, "mixed"])
def test_the_loss_is_the_model_s_own_and_reaches_all_that_trains(
    folders: dict[str, Path], family: str, talks: Sequence[str]
) -> None:
    encoder, backbone = encoder_of(folders[family]), adapted_backbone(folders[family])
    collate = ProcessorCollator(encoder.pad_token_id, aligned=ALIGNED, dummy=encoder.dummy())
    batch = inputs_of(collate([sample_of(encoder, TALKS[talk]) for talk in talks]))
    features = backbone(**batch)
    loss = generation_loss(features.logits, features.targets).loss
    theirs = backbone.model(**batch).loss
    torch.testing.assert_close(loss, theirs, rtol=0, atol=1e-5)
    assert len(features.logits) == int((batch["labels"][:, 1:] != IGNORED_LABEL).sum()) < batch["labels"].numel() / 2
    loss.backward()
    for part in trained_parts(backbone.model):
        for name, parameter in part.parameters.items():
            assert parameter.grad is not None, name  # a batch of words alone too: a rank under ZeRO-3 must not wait
            without_picture = talks == ("no picture",) and part.name == "projector"
            assert bool(parameter.grad.any()) != without_picture, name


@families
def test_the_further_row_of_a_batch_without_pictures_changes_no_loss(folders: dict[str, Path], family: str) -> None:
    encoder, backbone = encoder_of(folders[family]), adapted_backbone(folders[family])
    sample, losses = sample_of(encoder, TALKS["no picture"]), []
    for dummy in (encoder.dummy(), None):
        collated = ProcessorCollator(encoder.pad_token_id, aligned=ALIGNED, dummy=dummy)([sample])
        assert collated["input_ids"].numel() - collated["padding_tokens"] == len(sample.input_ids)
        features = backbone(**inputs_of(collated))
        losses.append(generation_loss(features.logits, features.targets).loss)
    torch.testing.assert_close(*losses, rtol=0, atol=1e-6)


@families
def test_every_linear_of_the_decoder_is_adapted_and_no_other(folders: dict[str, Path], family: str) -> None:
    model = load_image_text(str(folders[family])).model
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    names = apply_dora(model, DoRAConfig(targets=language_targets(model), rank=2, alpha=5.0))
    assert names == [name for name in linears if "language_model" in name or "text_model.layers" in name]
    assert len(names) == ADAPTED.get(family, 14)


ADAPTED = {"glm4v": 12, "qwen3_5": 15, "qwen3_vl_moe": 8, "lfm2_vl": 12}
"""Layers of two, where they are not the seven of LLaMA each."""


def test_experts_that_are_one_tensor_are_named(folders: dict[str, Path]) -> None:
    found = weights_out_of_reach(load_image_text(str(folders["qwen3_vl_moe"])).model)
    experts = {name.rpartition("layers.")[2]: size for name, size in found.items() if "experts" in name}
    assert experts["0.mlp.experts.gate_up_proj"] == 4 * 32 * 2 * 16
    assert experts["1.mlp.experts.down_proj"] == 4 * 16 * 32
    assert weights_out_of_reach(load_image_text(str(folders["qwen3_vl"])).model) == {}


@families
def test_an_answer_sees_nothing_after_it(folders: dict[str, Path], family: str) -> None:
    encoder, backbone = encoder_of(folders[family]), adapted_backbone(folders[family])
    sample = sample_of(encoder, TALKS["one picture"])
    other = sample.input_ids.clone()
    other[-2] = encoder.tokenizer.convert_tokens_to_ids("?")  # the token that closes the answer
    collate = ProcessorCollator(encoder.pad_token_id, aligned=ALIGNED)
    first, second = (
        backbone(**inputs_of(collate([replace(sample, input_ids=ids)]))).logits for ids in (sample.input_ids, other)
    )
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


@families
def test_frozen_parts_beside_the_decoder_stay_in_eval(folders: dict[str, Path], family: str) -> None:
    backbone = adapted_backbone(folders[family])
    modes = {name: module.training for name, module in backbone.model.named_modules() if not list(module.children())}
    assert {mode for name, mode in modes.items() if "language_model" in name or "text_model" in name} == {True}
    frozen = ("vision_tower.", "vision_model.", "visual.blocks", "visual.patch_embed")
    assert {mode for name, mode in modes.items() if any(part in name for part in frozen)} == {False}


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
    with pytest.raises(BadSample, match=f"2 pictures .* take {after_pictures} tokens of {after_pictures - 1}"):
        sample_of(encoder_of(folder, max_tokens=after_pictures - 1), talk)
    with pytest.raises(BadSample, match="no answer is left to train on"):
        sample_of(encoder_of(folder, max_tokens=after_pictures), talk)


@pytest.mark.parametrize("text", ["Is <|im_end|> a word?", "What is <|image_pad|>?"])
def test_special_tokens_in_what_is_said_are_refused(folders: dict[str, Path], text: str) -> None:
    turns = (Turn("user", text), Turn("assistant", "no"))
    with pytest.raises(BadSample, match=r"turn 0 holds .*special token"):
        sample_of(encoder_of(folders["qwen2_5_vl"]), (turns, ()))


def test_an_encoder_can_be_sent_to_a_data_worker(folders: dict[str, Path]) -> None:
    encoder = encoder_of(folders["qwen2_5_vl"])
    sent = pickle.loads(pickle.dumps(encoder))
    talk = TALKS["one picture"]
    assert torch.equal(sample_of(sent, talk).input_ids, sample_of(encoder, talk).input_ids)


def test_the_prompt_is_the_conversation_up_to_its_answer(folders: dict[str, Path]) -> None:
    encoder = encoder_of(folders["qwen2_5_vl"])
    turns, pictures = TALKS["one picture"]
    sample, prompt = sample_of(encoder, (turns, pictures)), encoder.encode_prompt(turns[:1], pictures)
    first = int((sample.labels != IGNORED_LABEL).nonzero()[0])
    assert torch.equal(prompt["input_ids"][0], sample.input_ids[:first])


TURN = "{{ m.role }}: {% for p in m.content %}{% if p.type == 'image' %}PICTURE{% else %}{{ p.text }}{% endif %}"
OPEN = "{% if add_generation_prompt %}assistant: {% endif %}"
PLAIN = "{% for m in messages %}" + TURN + "{% endfor %} {% endfor %}" + OPEN


def test_a_template_that_closes_no_answer_gets_the_end_token(tmp_path: Path) -> None:
    encoder = encoder_of(write_tiny("qwen2_5_vl", tmp_path / "open", template=PLAIN))
    turns, pictures = TALKS["two pictures, two questions"]
    sample = sample_of(encoder, (turns, pictures))
    assert encoder.tokenizer.decode(sample.labels[sample.labels != IGNORED_LABEL]) == (
        "The second is blue.<|im_end|>Yes<|im_end|>"
    )


STRIPPING = CHATML.replace(
    "{% if m.content is string %}", "{% if m.role != 'user' and m != messages[-1] %}...{% elif m.content is string %}"
)
REWRITING = CHATML.replace(
    "{% for part in m.content %}",
    "{% if m.role == 'assistant' and m == messages[-1] %}<think></think>{% endif %}{% for part in m.content %}",
)
NO_PICTURES = CHATML.replace("PICTURE", "")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (NO_PICTURES, "leaves pictures out"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves out"),
    ],
)
def test_a_template_that_cannot_be_trained_on_is_refused_by_name(tmp_path: Path, template: str, message: str) -> None:
    folder = write_tiny("qwen2_5_vl", tmp_path / "odd", template=template)
    with pytest.raises(UserError, match=message):
        encoder_of(folder)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (STRIPPING, "leaves out or changes the text of turn 1"),
        (REWRITING, "writes an earlier answer differently once later turns follow"),
    ],
)
def test_a_template_that_rewrites_earlier_answers_takes_one_question_at_a_time(
    tmp_path: Path, template: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = encoder_of(write_tiny("qwen2_5_vl", tmp_path / "odd", template=template))
    assert f"conversations of several questions are skipped: the chat template {message}" in caplog.text
    sample = sample_of(encoder, TALKS["one picture"])
    assert encoder.tokenizer.decode(sample.labels[sample.labels != IGNORED_LABEL]).endswith(f"{SAID}<|im_end|>")
    with pytest.raises(BadSample, match=message):
        sample_of(encoder, TALKS["two pictures, two questions"])


THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}").replace(
    "{% for part in m.content %}",
    "{% if m.role == 'assistant' and m == messages[-1] %}<think>\n\n</think>\n\n{% endif %}{% for part in m.content %}",
)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (QWEN2_VL, "It is red.<|im_end|>"),
        (SMOLVLM, " It is red.<end_of_utterance>"),
        (LLAVA_NEXT_VICUNA, " It is red.<|im_end|>"),
        (LLAVA_NEXT_MISTRAL, " It is red.<|im_end|>"),
        (GEMMA3, "It is red.<eoi>"),
        (THINKING, "It is red.<|im_end|>"),
    ],
    ids=["qwen2_vl", "smolvlm", "llava_next_vicuna", "llava_next_mistral", "gemma3", "thinking"],
)
def test_published_templates(tmp_path: Path, template: str, said: str) -> None:
    encoder = encoder_of(write_tiny("qwen2_5_vl", tmp_path / "published", template=template))
    turns, pictures = TALKS["one picture"]
    sample = sample_of(encoder, (turns, pictures))
    assert encoder.tokenizer.decode(sample.labels[sample.labels != IGNORED_LABEL]) == said
    begin = encoder.tokenizer.bos_token_id
    assert int((sample.input_ids == begin).sum()) == (1 if template == GEMMA3 else 0)
    prompt = encoder.encode_prompt(turns[:1], pictures)["input_ids"][0]
    assert torch.equal(prompt, sample.input_ids[: len(prompt)])
    assert int((sample.labels != IGNORED_LABEL).nonzero()[0]) == len(prompt)


def test_a_missing_template_is_one_line(tmp_path: Path) -> None:
    folder = write_tiny("qwen2_5_vl", tmp_path / "mute")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        encoder_of(folder)


def test_a_folder_without_processor_is_one_line(tmp_path: Path) -> None:
    folder = write_tiny("qwen2_5_vl", tmp_path / "half")
    for path in folder.glob("*processor*"):
        path.unlink()
    with pytest.raises(UserError, match="processor"):
        load_processor(str(folder))


@pytest.mark.parametrize("family", ["vipllava", "llava_next", "llava_next_video"])
def test_no_other_family_is_loaded_as_a_llava(folders: dict[str, Path], family: str) -> None:
    with pytest.raises(UserError, match=f"is a '{family}'"):
        load_llava(str(folders[family]))


@pytest.mark.parametrize("model_type", [*NOT_TRAINED, "llama", "bert", "no_such_model"])
def test_what_cannot_be_trained_is_named_with_what_can(model_type: str) -> None:
    with pytest.raises(UserError, match=f"'{model_type}'.*cannot be trained.*qwen2_5_vl") as raised:
        check_trained("folder", model_type)
    assert len(str(raised.value)) <= 490


def test_the_type_is_read_from_the_config_alone(tmp_path: Path) -> None:
    AutoConfig.for_model("smolvlm").save_pretrained(tmp_path)
    assert model_type_of(str(tmp_path)) == "smolvlm"
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="states no model_type"):
        model_type_of(str(tmp_path))
    with pytest.raises(UserError, match="cannot be opened"):
        model_type_of(str(tmp_path / "nowhere"))
