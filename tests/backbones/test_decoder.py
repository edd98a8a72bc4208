"""The backbone of every decoder: equal to transformers' own forward, nothing computed or trained that need not be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Llama4ForCausalLM, Llama4TextConfig

from dora_vl.backbones import frozen_outputs
from dora_vl.backbones.base import decoder_of
from dora_vl.backbones.families.targets import language_targets
from dora_vl.backbones.frozen_outputs import find_parts, model_inputs, with_stored_outputs
from dora_vl.backbones.model import DecoderBackbone, open_backbone
from dora_vl.backbones.specs import LanguageSource
from dora_vl.backbones.tower_sources import write_language_model
from dora_vl.data.batches import Collator
from dora_vl.data.samples import IGNORED_LABEL, Sample
from dora_vl.errors import UserError
from tests.backbones.image_text_conversations import adapt, inputs_of
from tests.backbones.tiny_language import FAMILIES, SIZES, tiny_language, write_tiny_language

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


def backbone_of(family: str, llava: DecoderBackbone) -> tuple[DecoderBackbone, list[Sample]]:
    if family == "llava":
        return llava, llava_samples()
    return DecoderBackbone(tiny_language(family)), language_samples()


def gradients(backbone: DecoderBackbone, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    backbone.zero_grad()
    loss = backbone(**inputs_of(batch)).losses.sum()
    loss.backward()
    return loss, {name: leaf.grad.clone() for name, leaf in backbone.model.named_parameters() if leaf.grad is not None}


@pytest.mark.parametrize("family", ["llava", *FAMILIES])
@pytest.mark.parametrize("side", ["right", "left"])
def test_equal_to_transformers_on_each_row_alone(backbone: DecoderBackbone, family: str, side: Any) -> None:
    backbone, samples = backbone_of(family, backbone)
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
