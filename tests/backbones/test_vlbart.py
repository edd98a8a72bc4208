"""VL-BART: published numbers, picture tokens, names, original files, a composed one, and texts longer than it reads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from dora_vl.adapters.files import read_tensors
from dora_vl.adapters.folder import load_adapter, save_adapter
from dora_vl.backbones.base import max_positions
from dora_vl.backbones.model import DecoderBackbone
from dora_vl.backbones.pieces import Prompt, Seq2SeqEncoder
from dora_vl.backbones.specs import SmallLanguageModel, VlBartSpec
from dora_vl.backbones.tower_sources import measured, small_tokenizer
from dora_vl.backbones.vlbart import (
    DORA_TARGETS,
    KEPT_ROWS,
    VlBartBackbone,
    add_picture_tokens,
    also_trained,
    as_original,
    compose_vlbart,
    load_original,
    load_vlbart,
)
from dora_vl.backbones.vlbart_model import grid_boxes, pool_grid, strip_boxes
from dora_vl.core import DoRAConfig, apply_dora, trained_parts
from dora_vl.data.example import Answer, Example, write_examples
from dora_vl.errors import BadSample, UserError
from dora_vl.evaluation.assistant import check_room
from tests.backbones.tiny_vlbart import batch, meta_bart_base, tiny, write_features
from tests.core.dense_dora import move_trained


@pytest.mark.parametrize(
    ("width", "method", "norms", "trained", "total"),
    [
        (2048, "lora", False, 8_786_688, 148_234_752),
        (2048, "dora", True, 8_838_912, 148_262_400),
        (512, "lora", False, 7_607_040, 147_055_104),
        (512, "dora", False, 7_634_688, 147_082_752),
    ],
)
def test_the_published_numbers_of_parameters(width: int, method: str, norms: bool, trained: int, total: int) -> None:
    model = meta_bart_base(feature_width=width)
    extras = also_trained(model.settings, biases=True, norm_weights=norms)
    config = DoRAConfig(method=method, rank=128, targets=DORA_TARGETS, also_train=extras, also_keep=KEPT_ROWS)
    assert len(apply_dora(model, config)) == 36
    assert sum(weight.numel() for part in trained_parts(model) for weight in part.parameters.values()) == trained
    assert sum(weight.numel() for weight in model.parameters()) == total


def test_a_pooled_cell_is_the_maximum_of_its_window() -> None:
    features = torch.randn(2, 49, 5)
    pooled = pool_grid(features, 6).view(2, 6, 6, 5)
    grid = features.view(2, 7, 7, 5)
    for row in range(6):
        for column in range(6):
            window = grid[:, row : row + 2, column : column + 2].flatten(1, 2).amax(1)
            assert torch.equal(pooled[:, row, column], window)
    with pytest.raises(UserError):
        pool_grid(torch.zeros(1, 50, 5), 6)


def test_grid_boxes_are_the_cells_edges_row_by_row() -> None:
    boxes = grid_boxes(7, None)
    torch.testing.assert_close(boxes[8], torch.tensor([1 / 7, 2 / 7, 1 / 7, 2 / 7]))
    torch.testing.assert_close(boxes[1], torch.tensor([1 / 7, 2 / 7, 0.0, 1 / 7]))
    pooled = grid_boxes(7, 6)
    torch.testing.assert_close(pooled[5], torch.tensor([5 / 7, 1.0, 0.0, 2 / 7]))
    torch.testing.assert_close(pooled[-1], torch.tensor([5 / 7, 1.0, 5 / 7, 1.0]))


def test_strip_boxes_are_the_frames_side_by_side() -> None:
    boxes = strip_boxes(24, 2)
    torch.testing.assert_close(boxes[0], torch.tensor([0.0, 1 / 12, 0.0, 1 / 2]))
    torch.testing.assert_close(boxes[3], torch.tensor([1 / 12, 2 / 12, 1 / 2, 1.0]))
    torch.testing.assert_close(boxes[4:8], boxes[:4] + torch.tensor([1 / 6, 1 / 6, 0.0, 0.0]))
    torch.testing.assert_close(boxes[23], torch.tensor([11 / 12, 1.0, 1 / 2, 1.0]))
    torch.testing.assert_close(strip_boxes(5, 1)[:, 0], torch.arange(5) / 5)
    with pytest.raises(UserError):
        strip_boxes(23, 2)


BOXES = {"zeros": torch.zeros(4, 4), "grid": grid_boxes(2, None), "strip": strip_boxes(4, 1)}


@pytest.mark.parametrize(("norm", "boxes"), [("each", "zeros"), ("sum", "grid"), ("none", "strip")])
def test_picture_tokens_equal_the_sum_written_out(norm: str, boxes: str) -> None:
    model = tiny(visual_norm=norm, pooled_side=None, boxes=boxes)
    visual, corners = model.model.encoder.visual_embedding, BOXES[boxes]
    features = torch.randn(2, 2, 4, 8)
    tokens = model.model.encoder.visual_tokens(features)
    area = (corners[:, 1] - corners[:, 0]) * (corners[:, 3] - corners[:, 2])
    shared = model.model.shared.weight
    for image in range(2):
        for token in range(4):
            seen = visual.feat_embedding[0](features[:, image, token])
            position = visual.absolute_vis_pos_embedding[0](torch.cat([corners[token], area[token : token + 1]]))
            if norm == "each":
                seen, position = visual.feat_embedding[1](seen), visual.absolute_vis_pos_embedding[1](position)
            expected = seen + position + visual.img_order_embedding.weight[image] + shared[-1 - token]
            expected = visual.layer_norm(expected) if norm == "sum" else expected
            torch.testing.assert_close(tokens[:, image * 4 + token], expected)


def logits_of(backbone: VlBartBackbone, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = backbone(**inputs, keep_logits=True).logits
    assert logits is not None
    return logits


def test_labelled_positions_equal_the_whole_decoder() -> None:
    backbone, inputs = VlBartBackbone(tiny()), batch()
    output = backbone(**inputs, keep_logits=True)
    labels = inputs["labels"]
    encoded, mask = backbone.encode(inputs["input_ids"], inputs["attention_mask"], inputs["features"])
    assert mask[0].tolist() == [1] * 4 + [0] * 2 + [1] * 36
    whole = backbone.model(
        encoder_outputs=(encoded,), attention_mask=mask, decoder_input_ids=backbone.shifted(labels)
    ).logits
    torch.testing.assert_close(output.logits, whole[labels != -100])
    assert backbone.shifted(labels)[0].tolist() == [2, int(labels[0, 0]), int(labels[0, 1]), 1]
    assert output.samples.tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2]


def test_padding_changes_nothing() -> None:
    backbone, inputs = VlBartBackbone(tiny()), batch()
    alone = {name: tensor[:1] for name, tensor in inputs.items()}
    alone["input_ids"], alone["attention_mask"] = alone["input_ids"][:, :4], alone["attention_mask"][:, :4]
    torch.testing.assert_close(
        backbone(**alone, keep_logits=True).logits,
        backbone(**inputs, keep_logits=True).logits[:2],
        atol=1e-5,
        rtol=1e-4,
    )


def test_likelihoods_are_sums_of_token_log_probabilities_and_beams_find_them() -> None:
    backbone, inputs = VlBartBackbone(tiny()), batch()
    labels = inputs.pop("labels")
    likelihoods = backbone.likelihoods(**inputs, candidates=labels)
    assert likelihoods.shape == (3, 3)
    for row in range(3):
        row_inputs = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        for choice in range(3):
            scores = backbone(**row_inputs, labels=labels[choice : choice + 1])
            expected = -scores.losses.sum()
            torch.testing.assert_close(likelihoods[row, choice], expected, atol=1e-4, rtol=1e-4)
    greedy = backbone.generate(**inputs, max_length=5)
    assert greedy.shape[1] <= 5
    first = backbone(**inputs, labels=greedy[:, 1:2], keep_logits=True).logits.argmax(-1)
    assert torch.equal(first, greedy[:, 1])
    beams = backbone.generate(**inputs, max_length=5, num_beams=3)
    by_beam = backbone.likelihoods(**inputs, candidates=beams[:, 1:].masked_fill(beams[:, 1:] == 1, -100)).diagonal()
    assert bool(torch.isfinite(by_beam).all())


def test_a_saved_folder_gives_the_same_and_holds_the_shared_rows_once(tmp_path: Path) -> None:
    model, inputs = tiny(), batch()
    before = logits_of(VlBartBackbone(model), inputs)
    model.save_pretrained(tmp_path / "base")
    names = set(load_file(tmp_path / "base" / "model.safetensors"))
    assert "model.shared.weight" in names
    assert not any("obj_order_embedding" in name or "embed_tokens" in name or "lm_head" in name for name in names)
    again = load_vlbart(tmp_path / "base")
    assert torch.equal(logits_of(again, inputs), before)
    assert again.model.model.encoder.visual_embedding.obj_order_embedding.weight is again.model.model.shared.weight
    with pytest.raises(UserError):
        load_vlbart(tmp_path / "nothing")


def test_an_adapter_folder_carries_the_random_rows_along(tmp_path: Path) -> None:
    model = tiny(seed=0)
    extras = also_trained(model.settings, biases=True, norm_weights=True)
    config = DoRAConfig(rank=4, alpha=6.0, dropout=0.0, targets=DORA_TARGETS, also_train=extras, also_keep=KEPT_ROWS)
    apply_dora(model, config)
    move_trained(model)
    expected = logits_of(VlBartBackbone(model.eval()), batch())
    save_adapter(model, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert tensors["base_model.model.model.shared.weight[-200:]"].shape == (200, 16)
    base = tiny(seed=0)
    with torch.no_grad():
        base.model.shared.weight[-200:] = torch.randn(200, 16)  # another draw of the added tokens
    load_adapter(base, tmp_path / "adapter")
    torch.testing.assert_close(logits_of(VlBartBackbone(base.eval()), batch()), expected)
    other = tiny(seed=0, vocab_size=150)  # too few rows
    with pytest.raises(UserError, match=r"shared\.weight\[-200:\]"):
        load_adapter(other, tmp_path / "adapter")


def saved(model: torch.nn.Module) -> dict[str, Tensor]:
    """As `torch.save(model.state_dict())` of a DDP run: five names of one tensor, a buffer, a prefix."""
    return {f"module.{name}": tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("norm", ["each", "sum", "none"])
def test_the_layout_is_read_from_the_keys(norm: Any, tmp_path: Path) -> None:
    model = tiny(seed=3, visual_norm=norm)
    file, adapted = saved(model), "module.model.encoder.layers.0.self_attn.q_proj"
    file[f"{adapted}.weight_v"] = file.pop(f"{adapted}.weight")  # as NVlabs' DoRA, whose adapter is left out
    file |= {f"{adapted}.{leaf}": torch.ones(2) for leaf in ("weight_m", "lora_A", "lora_B", "lora_As.vqa.x")}
    torch.save(file, tmp_path / "Epoch30.pth")
    state = as_original(read_tensors(tmp_path / "Epoch30.pth"), source="Epoch30.pth")
    assert state.visual_norm == norm
    assert state.feature_width == 8
    other = tiny(seed=4, visual_norm=norm)
    load_original(other, state)
    assert torch.equal(logits_of(VlBartBackbone(other), batch()), logits_of(VlBartBackbone(model), batch()))


def test_it_loads_strictly_and_names_what_does_not_fit() -> None:
    state = saved(tiny())
    del state["module.model.decoder.layers.1.fc1.bias"]
    state["module.surplus.weight"] = torch.zeros(2)
    with pytest.raises(UserError, match=r"model\.decoder\.layers\.1\.fc1\.bias"):
        load_original(tiny(), as_original(state, source="LAST.pth"))
    with pytest.raises(UserError):
        as_original({"model.shared.weight": torch.zeros(2, 2)}, source="bart.pth")
    with pytest.raises(UserError):
        load_original(tiny(feature_width=9), as_original(saved(tiny()), source="LAST.pth"))


def test_token_ids_are_those_of_the_original() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, **{f"w{number}": number for number in range(4, 50265)}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")))
    add_picture_tokens(tokenizer)
    assert len(tokenizer) == 50465
    ids = {"<extra_id_99>": 50265, "<extra_id_0>": 50364, "<vis_extra_id_99>": 50365, "<vis_extra_id_0>": 50464}
    assert {name: tokenizer.convert_tokens_to_ids(name) for name in ids} == ids


TEXTS = ("what color is the circle?", "blue", "circle")
SCALES = torch.tensor([1.0, 5.0, 0.5, 3.0])
CENTRES = torch.tensor([10.0, -2.0, 0.0, 7.0])


def spec_of(tmp_path: Path, standardise: str | None = None) -> VlBartSpec:
    write_examples(tmp_path / "texts.jsonl", [Example(id="1", question=TEXTS[0], answers=(Answer(text=TEXTS[1]),))])
    small = SmallLanguageModel(
        texts=(str(tmp_path / "texts.jsonl"),), vocabulary=300, width=16, layers=1, heads=2, feedforward=8
    )
    return VlBartSpec(small=small, feature_width=4, pooled_side=None, seed=3, standardise=standardise)


def test_a_composed_model_begins_with_standardised_features(tmp_path: Path) -> None:
    numbers = torch.randn(50, 2, 4, generator=torch.Generator().manual_seed(0)) * SCALES + CENTRES
    features = write_features(tmp_path / "features", numbers)
    compose_vlbart(spec_of(tmp_path), tmp_path / "plain")
    compose_vlbart(spec_of(tmp_path, standardise=str(features)), tmp_path / "standardised")
    plain, changed = (
        load_vlbart(tmp_path / name).model.model.encoder.visual_embedding.feat_embedding[0]
        for name in ("plain", "standardised")
    )
    mean, spread = measured(features)
    assert torch.allclose(mean, CENTRES, atol=1.5)
    assert torch.allclose(spread / SCALES, torch.ones(4), atol=0.25)
    raw = torch.randn(5, 4) * SCALES + CENTRES
    assert torch.allclose(changed(raw), plain((raw - mean) / spread), atol=1e-5)
    assert not torch.allclose(changed(raw), plain(raw), atol=0.05)


def test_an_answers_word_is_the_token_that_it_is_in_a_question() -> None:
    encoder = Seq2SeqEncoder(small_tokenizer(iter(TEXTS * 3), vocabulary=320, leading_space=True))
    ids = encoder.tokenizer(TEXTS[0], add_special_tokens=False).input_ids
    assert encoder.first_token("circle") in ids
    assert encoder.decode(encoder.labels("circle", max_tokens=9)[0]) == "circle"


WORDS = "hello there how are you [Subs] [Q] is it red?"
POSITIONS = 64
"""Of the tiny VL-BART, where bart-base has 1,024."""


@pytest.fixture(scope="module")
def encoder() -> Seq2SeqEncoder:
    return Seq2SeqEncoder(small_tokenizer(iter([WORDS] * 4), vocabulary=310), max_positions=POSITIONS)


@pytest.mark.parametrize("max_tokens", [None, 600])
@pytest.mark.parametrize("subtitles", ["", " hello there" * 200])
def test_the_longest_text_of_a_vlbart_is_what_its_encoder_reads(encoder, max_tokens, subtitles) -> None:
    question = "[Q] is it red?" if subtitles else "[Q] is it red? " * 40
    prompt = Prompt(subtitles_before="[Subs]", subtitles=subtitles, text=question)
    ids, cut = encoder.encode(prompt, max_tokens=max_tokens)
    whole, nothing = Seq2SeqEncoder(encoder.tokenizer).encode(prompt, max_tokens=None)
    assert (len(ids), cut, nothing) == (POSITIONS, len(whole) - POSITIONS, 0)
    if subtitles:  # they go first, the question stays
        assert str(encoder.tokenizer.decode(ids.tolist())).endswith("[Q] is it red?</s>")
    backbone, features = VlBartBackbone(tiny()), torch.randn(1, 1, 4, 8)
    labels, _ = encoder.labels("hello " * 100, max_tokens=500)
    assert len(labels) == POSITIONS
    scores = backbone.likelihoods(ids[None], torch.ones_like(ids)[None], features, labels[None])
    assert scores.isfinite().all()
    longest = backbone.generate(ids[None], torch.ones_like(ids)[None], features, max_length=POSITIONS + 9)
    assert longest.shape[1] <= POSITIONS
    with pytest.raises(IndexError):  # what happened before
        backbone.encode(whole[None], torch.ones_like(whole)[None], features)


def test_a_prompt_that_leaves_no_room_for_its_answer_is_refused_with_both_numbers() -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_positions=24, n_embd=8, n_layer=1, n_head=2, vocab_size=50, bos_token_id=1, eos_token_id=None)
    backbone = DecoderBackbone(GPT2LMHeadModel(config).eval())
    positions = max_positions(backbone.config)
    ids = torch.arange(18)[None] + 2
    check_room(18, 6, positions, "q1")
    assert backbone.generate(ids, torch.ones_like(ids), max_new_tokens=6).shape == (1, 6)
    with pytest.raises(BadSample) as error:
        check_room(19, 6, positions, "q2")
    assert error.value.sample_id == "q2"
    check_room(10**6, 6, None, "q3")  # a model that states no number
