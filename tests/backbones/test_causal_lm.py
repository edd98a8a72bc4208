"""A causal language model: equal to transformers' own forward, packed as unpacked, adapted where the paper adapts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from dora_vl import DoRAConfig, apply_dora
from dora_vl.backbones.causal_lm import (
    PAPER_TARGETS,
    CausalLMBackbone,
    LanguageSource,
    load_causal_lm,
    write_causal_lm,
)
from dora_vl.backbones.generation import generation_loss
from dora_vl.data.batches import Collator
from dora_vl.data.samples import IGNORED_LABEL, Sample
from dora_vl.errors import UserError
from tests.backbones.tiny_language import FAMILIES, tiny_language, write_tiny_language

LENGTHS = (9, 4, 7, 3, 5)


def samples_of(lengths: tuple[int, ...] = LENGTHS) -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, 300, (length,), generator=generator)
        labels = ids.clone()
        labels[: number % 3] = IGNORED_LABEL  # some train on everything, the first token included
        made.append(Sample(index=number, id=str(number), input_ids=ids, labels=labels))
    return made


def inputs(batch: Any) -> dict[str, torch.Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels", "layout") if name in batch}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_equal_to_transformers_at_every_labelled_position(family: str, side: Any) -> None:
    model = tiny_language(family)
    batch = Collator(0, pad_side=side)(samples_of())
    features = CausalLMBackbone(model)(**inputs(batch))
    mask = batch["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    whole = model(input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions)
    targets = batch["labels"][:, 1:]
    there = targets != IGNORED_LABEL
    torch.testing.assert_close(features.logits, whole.logits[:, :-1][there], atol=1e-5, rtol=1e-4)
    assert torch.equal(features.targets, targets[there])
    assert features.hidden.shape == (int(there.sum()), 32)
    assert len(model.get_output_embeddings()._forward_pre_hooks) == 0  # nothing of it stays behind


def test_without_labels_the_last_position_of_each_row() -> None:
    model = tiny_language()
    batch = Collator(0)(samples_of())
    features = CausalLMBackbone(model)(batch["input_ids"], batch["attention_mask"])
    for row, sample in enumerate(samples_of()):
        alone = model(input_ids=sample.input_ids.unsqueeze(0)).logits[0, -1]
        torch.testing.assert_close(features.logits[row], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("family", "kernel"), [("llama", "sdpa"), ("llama", "eager"), ("gemma2", "eager")])
def test_packed_is_unpacked(family: str, kernel: str) -> None:
    """Logits to 1e-5, loss and gradients: block-diagonal attention, and positions that start again."""
    model = tiny_language(family)
    model.set_attn_implementation(kernel)
    backbone = CausalLMBackbone(model)
    plain, packed = Collator(0)(samples_of()), Collator(0, pack=True)(samples_of())
    assert len(packed["input_ids"]) == 4  # 9, 7, 5 + 4, 3: rows as long as the longest sample
    assert packed["padding_tokens"] < plain["padding_tokens"]
    assert packed["samples"] == plain["samples"] == 5
    found = {name: backbone(**inputs(batch)) for name, batch in (("plain", plain), ("packed", packed))}
    order = {name: sort_by_token(one) for name, one in found.items()}
    assert torch.equal(*(found[name].targets[order[name]] for name in found))
    left, right = (found[name].logits[order[name]] for name in found)
    torch.testing.assert_close(left, right, atol=1e-5, rtol=0)
    losses = {name: generation_loss(one.logits, one.targets).loss for name, one in found.items()}
    torch.testing.assert_close(losses["plain"], losses["packed"], atol=1e-6, rtol=0)
    weight = model.model.layers[0].self_attn.k_proj.weight
    gradients = [torch.autograd.grad(loss, [weight])[0] for loss in losses.values()]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_packed_without_boundaries_would_differ() -> None:
    model = tiny_language()
    packed = Collator(0, pack=True)(samples_of())
    backbone = CausalLMBackbone(model)
    with_layout = backbone(**inputs(packed)).logits
    without = backbone(**{**inputs(packed), "layout": None}).logits
    assert float((with_layout - without).abs().max().detach()) > 0.1


def sort_by_token(features: Any) -> torch.Tensor:
    """Labelled positions in an order that does not depend on rows: by target, then by first logit."""
    keys = features.targets.double() * 1e6 + features.logits[:, 0].double()
    return keys.argsort()


def test_a_row_of_several_samples_needs_a_kernel_with_masks() -> None:
    model = tiny_language()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match=r"data\.packing.*sdpa or eager"):
        CausalLMBackbone(model)(**inputs(Collator(0, pack=True)(samples_of())))


def test_a_sliding_window_is_not_lost_in_silence() -> None:
    model = tiny_language("gemma2")
    model.set_attn_implementation("eager")
    model.config.sliding_window = 8
    with pytest.raises(UserError, match=r"rows of 9 tokens .* sees 8"):
        CausalLMBackbone(model)(**inputs(Collator(0, pack=True)(samples_of())))


def test_generates_as_transformers_does_and_alike_in_a_batch() -> None:
    model = tiny_language()
    backbone = CausalLMBackbone(model, generation={"num_beams": 2})
    prompts = [sample.input_ids for sample in samples_of()]
    alone = [model.generate(ids.unsqueeze(0), max_new_tokens=4, num_beams=2, do_sample=False)[0] for ids in prompts]
    batch = Collator(0, pad_side="left")(samples_of())
    together = backbone.generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=4)
    for row, ids, one in zip(together, prompts, alone, strict=True):
        expected = one[len(ids) :]
        assert torch.equal(row[: len(expected)], expected)


def test_the_papers_five_projections_and_nothing_else() -> None:
    model = tiny_language()
    names = apply_dora(model, DoRAConfig(targets=PAPER_TARGETS, rank=2, alpha=4.0))
    assert len(names) == 5 * 2
    assert {name.rsplit(".", 1)[1] for name in names} == {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}


def test_gradients_reach_the_first_layer_with_recomputation() -> None:
    model = tiny_language()
    apply_dora(model, DoRAConfig(targets=PAPER_TARGETS, rank=2, alpha=4.0))
    model.gradient_checkpointing_enable({"use_reentrant": True})
    backbone = CausalLMBackbone(model).train()
    features = backbone(**inputs(Collator(0)(samples_of())))
    functional.cross_entropy(features.logits, features.targets).backward()
    gradient = model.model.layers[0].self_attn.q_proj.magnitude.grad
    assert gradient is not None
    assert float(gradient.abs().max()) > 0


def test_a_source_is_written_once_and_opens_everywhere(tmp_path: Path) -> None:
    source = write_tiny_language(tmp_path / "source")
    written = tmp_path / "new" / "base"
    write_causal_lm(LanguageSource(folder=str(source), dtype="bfloat16"), written)
    plain = AutoModelForCausalLM.from_pretrained(written)
    assert plain.dtype == torch.bfloat16
    ids = AutoTokenizer.from_pretrained(written)("the correct answer", return_tensors="pt").input_ids
    expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)(ids).logits
    assert torch.equal(plain(ids).logits, expected)
    assert load_causal_lm(str(written)).model.dtype == torch.float32
    assert str(tmp_path) not in (written / "config.json").read_text()
    with pytest.raises(UserError, match="exists already"):
        write_causal_lm(LanguageSource(folder=str(source)), written)


def test_what_is_no_language_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.base .* cannot be opened as a causal language model"):
        load_causal_lm(str(tmp_path))
