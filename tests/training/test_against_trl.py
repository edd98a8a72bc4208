"""The losses of TRL 1.16, by its own code: on the same log-probabilities, and on the same adapted model with pictures.

TRL is no dependency of this project; without it nothing here runs.
"""

import copy
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from datasets import Dataset
from transformers import AutoProcessor

from dora_vl.backbones.encoder import open_encoder
from dora_vl.backbones.families.targets import language_targets, projector_patterns
from dora_vl.backbones.model import open_backbone
from dora_vl.core import DoRAConfig, apply_dora
from dora_vl.heads.objectives import OBJECTIVES
from dora_vl.heads.preferences import Answers, Hyperparameters
from dora_vl.training.ways.preferences import PreferenceLoss
from dora_vl.training.ways.way import Reference
from tests.backbones.conversations import inputs_of
from tests.training.test_preference_loss import EXAMPLES, PICTURES, disturb, items
from tests.training.tiny_run import write_tiny_llava

trl = pytest.importorskip("trl", minversion="1.16")
cpo, orpo, kto = map(pytest.importorskip, ("trl.experimental.cpo", "trl.experimental.orpo", "trl.trainer.kto_trainer"))

BETA, MARGIN = 0.3, 0.7
LENGTHS = (3, 5, 2, 7, 1, 4)
PAIRS = torch.tensor([(0, 3), (1, 4), (2, 5)]).T
OF_DPO_TRAINER = {"dpo": "sigmoid", "ipo": "ipo", "bco": "bco_pair", "apo_zero": "apo_zero", "sft": "sft"}
MASK = torch.arange(8) <= torch.tensor(LENGTHS)[:, None]
MASK[:, 0] = False
"""Tokens of each answer behind a prompt of one token."""


def trainer(**settings: Any) -> Any:
    """What the loss of a trainer of TRL's reads of it."""
    accelerator = MagicMock(device=torch.device("cpu"))
    accelerator.gather_for_metrics = accelerator.gather = lambda value: value
    usual: dict[str, Any] = {"ld_alpha": None, "f_divergence_type": "reverse_kl", "alpha": 0.0, "label_smoothing": 0.0}
    usual |= {"use_weighting": False, "aux_loss_enabled": False, "precompute_ref_logps": True, "loss_weights": [1.0]}
    usual |= {"simpo_gamma": MARGIN, "desirable_weight": 1.0, "undesirable_weight": 1.0, "_tp_size": 1}
    model = SimpleNamespace(training=True)
    metrics = {"train": defaultdict(list)}
    counted = {"_total_train_tokens": 0, "_metrics": metrics}
    return SimpleNamespace(accelerator=accelerator, model=model, beta=BETA, **usual, **counted, **settings)


def outputs_of(log_probs: torch.Tensor) -> Any:
    nothing = torch.zeros_like(log_probs)
    return SimpleNamespace(log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())


def theirs(name: str, log_probs: torch.Tensor, reference: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """A loss of TRL's from the log-probabilities of each token; the first three answers are preferred."""
    sums, tokens = log_probs.sum(1), torch.tensor(LENGTHS)
    of_tokens = -log_probs[:3].sum() / tokens[:3].sum()
    inputs: dict[str, Any] = {"input_ids": torch.ones_like(MASK).long(), "completion_mask": MASK.long()}
    inputs["attention_mask"] = inputs["input_ids"]
    if name in OF_DPO_TRAINER:
        held = trainer(loss_types=[OF_DPO_TRAINER[name]])
        inputs |= {"ref_chosen_logps": reference[:3], "ref_rejected_logps": reference[3:]}
        return trl.DPOTrainer._compute_loss(held, lambda **_: outputs_of(log_probs), inputs, False)
    if name == "kto":
        held = trainer(loss_type="kto", calculate_KL=True)
        held._compute_kl_logps = lambda _, batch: others
        inputs |= {"label": torch.arange(6) < 3, "ref_logps": reference, "ref_KL_logps": reference}
        return kto.KTOTrainer._compute_loss(held, lambda **_: outputs_of(log_probs), inputs, False)
    if name == "orpo":
        means = sums / tokens
        return of_tokens - orpo.ORPOTrainer.odds_ratio_loss(trainer(), means[:3], means[3:])[0].mean()
    values = sums / tokens if name == "simpo" else sums
    held = trainer(loss_type="simpo" if name == "simpo" else "sigmoid")
    return cpo.CPOTrainer.cpo_loss(held, values[:3], values[3:])[0].mean() + (of_tokens if name == "cpo" else 0)


@pytest.mark.parametrize("name", sorted(name for name, row in OBJECTIVES.items() if row.loss and name != "anchor"))
def test_loss_and_gradient_are_trls(name: str) -> None:
    generator = torch.Generator().manual_seed(2)
    tokens = -torch.rand(6, 7, generator=generator) * 3 * MASK[:, 1:]
    log_probs = tokens.requires_grad_()
    reference = log_probs.detach().sum(1) + torch.randn(6, generator=generator)
    others = reference + 0.4
    weights = torch.tensor([1.0] * 3 + [-1.0] * 3)
    answers = Answers(log_probs.sum(1), reference, torch.tensor(LENGTHS).float(), weights, PAIRS)
    loss = OBJECTIVES[name].loss
    assert loss is not None
    ours = loss(answers, Hyperparameters(beta=BETA, margin=MARGIN, kl=0.4))
    expected = theirs(name, log_probs, reference, others)
    torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)
    gradients = [torch.autograd.grad(value, log_probs, retain_graph=True)[0] for value in (ours, expected)]
    kept = MASK[:, 1:]
    torch.testing.assert_close(gradients[0][kept], gradients[1][kept], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["dpo", "ipo", "bco"])
def test_a_model_with_pictures_has_the_loss_that_trls_trainer_computes(name: str, tmp_path: Path) -> None:
    base = write_tiny_llava(tmp_path / "base")
    encoder, backbone = open_encoder(str(base), max_tokens=512), open_backbone(str(base))
    parts = {"projector": projector_patterns(backbone.model)}
    torch.manual_seed(3)
    config = DoRAConfig(targets=language_targets(backbone.model), rank=2, alpha=6.0, dropout=0.0, also_train=parts)
    apply_dora(backbone.model, config)
    reference, before = Reference(backbone.model), copy.deepcopy(backbone.model).eval()
    disturb(backbone.model)
    model = copy.deepcopy(backbone.model)
    samples = items(encoder)
    rows: list[dict[str, Any]] = []
    for sample, example in zip(samples, EXAMPLES, strict=True):
        tokens = [encoder.tokenizer.convert_ids_to_tokens(row.input_ids[row.labels >= 0]) for row in sample.texts()]
        chosen, *rejected = ("".join(answer).replace("\u0120", " ") for answer in tokens)
        prompt = encoder.prompts.render(example.turns[:-1], generation_prompt=True).text
        images = [PICTURES[picture] for picture in example.images]
        rows += [{"prompt": prompt, "chosen": chosen, "rejected": text, "images": images} for text in rejected]
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"),
        beta=BETA,
        loss_type=[OF_DPO_TRAINER[name]],
        max_length=None,
        report_to=[],
        use_cpu=True,
        bf16=False,
        remove_unused_columns=False,
        gradient_checkpointing=False,
    )
    processor: Any = AutoProcessor.from_pretrained(base)
    held = trl.DPOTrainer(
        model, before, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=processor
    )
    batch = held.data_collator([dict(row) for row in rows])
    chosen, rejected = ([row for sample in samples for row in part(sample)] for part in (_chosen, _rejected))
    for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], [*chosen, *rejected], strict=True):
        assert ids[mask.bool()].tolist() == row.input_ids.tolist()
    batch["pixel_values"] = torch.cat([row.inputs["pixel_values"] for row in (*chosen, *rejected)])
    trained = {key for key, weight in backbone.model.named_parameters() if weight.requires_grad}
    for key, weight in model.named_parameters():
        weight.requires_grad_(key in trained)
    expected = held.compute_loss(model, batch)
    expected.backward()
    ours = PreferenceLoss(
        backbone.train(), losses={name: 1.0}, hyperparameters=Hyperparameters(beta=BETA), reference=reference
    )
    for packing in ("trees", "plain"):
        ours.zero_grad()
        loss = ours(**inputs_of(replace(encoder.collate, packing=packing, compares=True)(samples)))["loss"]
        torch.testing.assert_close(loss, expected, rtol=2e-5, atol=2e-5)
        loss.backward()
        for key, weight in model.named_parameters():
            if key in trained:
                gradient = backbone.model.get_parameter(key).grad
                torch.testing.assert_close(gradient, weight.grad, rtol=2e-3, atol=2e-5)


def _chosen(sample: Any) -> list[Any]:
    """TRL's batch holds the chosen answer again beside each rejected one."""
    first, *others = sample.texts()
    return [first] * len(others)


def _rejected(sample: Any) -> list[Any]:
    return sample.texts()[1:]
