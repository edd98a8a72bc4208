"""Preferences and rewards on pictures: losses against written-out ones, trees like plain rows, and the reference."""

import copy
import os
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.distributed.tensor import DTensor

from dora_vl.adapters.folder import load_adapter, save_adapter
from dora_vl.backbones.encoder import Encoder, open_encoder
from dora_vl.backbones.families.targets import language_targets, projector_patterns
from dora_vl.backbones.model import DecoderBackbone, open_backbone
from dora_vl.core import DoRAConfig, adapted_layers, apply_dora, trained_parts
from dora_vl.data.example import Example
from dora_vl.data.samples import Sample
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample
from dora_vl.evaluation.assistant import Assistant
from dora_vl.heads import next_token
from dora_vl.heads.objectives import OBJECTIVES
from dora_vl.heads.preferences import Hyperparameters
from dora_vl.run.folder import DRAWN, read_log
from dora_vl.run.launch import gather_to_write, shard
from dora_vl.training.ways.preferences import PreferenceLoss, mean_over_ranks
from dora_vl.training.ways.rewards import RewardLoss
from dora_vl.training.ways.rollouts import ModelAnswers, Rollouts
from dora_vl.training.ways.supervised import NextTokenLoss
from dora_vl.training.ways.way import Reference
from tests.backbones.conversations import BLUE, RED, inputs_of
from tests.backbones.tiny_language import tiny_language

EXAMPLES = (
    Example(
        "a", ("red",), (Turn("user", "<image>\nSay the colour."), Turn("assistant", "It is red.")), rejected=("blue",)
    ),
    Example(
        "b", ("red",), (Turn("user", "<image>\nWhat is it?"), Turn("assistant", "red")), rejected=("No", "It is two.")
    ),
    Example(
        "c", ("blue",), (Turn("user", "<image>\nSay it."), Turn("assistant", "blue")), rejected=("It is a red one.",)
    ),
)
HYPER = Hyperparameters(beta=0.3)
PICTURES: dict[str, Image.Image] = {"red": RED, "blue": BLUE}


@pytest.fixture
def encoder(tiny_llava: Path) -> Encoder:
    return open_encoder(str(tiny_llava), max_tokens=512)


@pytest.fixture
def backbone(tiny_llava: Path) -> DecoderBackbone:
    backbone = open_backbone(str(tiny_llava))
    targets, projector = language_targets(backbone.model), {"projector": projector_patterns(backbone.model)}
    torch.manual_seed(3)
    apply_dora(backbone.model, DoRAConfig(targets=targets, rank=2, alpha=6.0, dropout=0.0, also_train=projector))
    return backbone.train()


def items(encoder: Encoder, examples: Sequence[Example] = EXAMPLES) -> list[Sample]:
    return [
        Sample(**vars(encoder.encode_answers(row, [PICTURES[name] for name in row.images])), index=index, id=row.id)
        for index, row in enumerate(examples)
    ]


def disturb(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=generator).to(weight.dtype) * 0.05)


def result(loss: PreferenceLoss, batches: Sequence[dict[str, Any]]) -> tuple[float, dict[str, torch.Tensor]]:
    loss.zero_grad()
    values = [loss(**batch) for batch in batches]
    total = torch.stack([value["loss"] for value in values]).sum()
    total.backward()
    gradients = {name: weight.grad.clone() for name, weight in loss.named_parameters() if weight.grad is not None}
    return total.item(), gradients


def batch_of(encoder: Encoder, samples: Sequence[Sample], packing: Any) -> dict[str, Any]:
    return inputs_of(replace(encoder.collate, packing=packing, compares=True)(samples))


@pytest.mark.parametrize("name", sorted(name for name, row in OBJECTIVES.items() if row.loss))
def test_trees_and_plain_rows_are_the_same(name: str, encoder: Encoder, backbone: DecoderBackbone) -> None:
    reference = Reference(backbone.model)
    disturb(backbone.model)
    loss = PreferenceLoss(backbone, losses={name: 1.0}, hyperparameters=HYPER, reference=reference)
    samples = items(encoder)
    trees, plain = (result(loss, [batch_of(encoder, samples, packing)]) for packing in ("trees", "plain"))
    assert trees[0] == pytest.approx(plain[0], rel=1e-4)
    assert trees[1].keys() == plain[1].keys()
    for parameter, gradient in plain[1].items():
        torch.testing.assert_close(trees[1][parameter], gradient, rtol=2e-3, atol=2e-5)


def test_loss_is_that_of_two_models_and_single_rows(encoder: Encoder, backbone: DecoderBackbone) -> None:
    before, reference = copy.deepcopy(backbone), Reference(backbone.model)
    disturb(backbone.model)
    samples = items(encoder)

    def log_prob(model: DecoderBackbone, sample: Sample) -> tuple[torch.Tensor, int]:
        inputs = {name: value for name, value in sample.inputs.items() if name != "attention_mask"}
        with torch.no_grad():
            logits = model.model(input_ids=sample.input_ids[None], **inputs).logits[0, :-1].log_softmax(-1)
        targets = sample.labels[1:]
        return logits[targets >= 0].gather(1, targets[targets >= 0, None]).sum(), int((targets >= 0).sum())

    pairs, learned, tokens = list[tuple[float, float]](), 0.0, 0
    for item in samples:
        rows = [(log_prob(backbone, row), log_prob(before, row)) for row in item.texts()]
        chosen, *others = [0.3 * float(now[0] - then[0]) for now, then in rows]
        pairs += [(chosen, other) for other in others]
        learned, tokens = learned + float(rows[0][0][0]), tokens + rows[0][0][1]

    def log_sigmoid(value: float) -> float:
        return float(torch.nn.functional.logsigmoid(torch.tensor(value)))

    each = [-0.8 * log_sigmoid(w - o) - 0.2 * (log_sigmoid(w) + log_sigmoid(-o)) for w, o in pairs]
    expected = sum(each) / len(each) - learned / tokens
    margins = [w - o for w, o in pairs]
    loss = PreferenceLoss(
        backbone, losses={"dpo": 0.8, "bco": 0.2, "sft": 1.0}, hyperparameters=HYPER, reference=reference
    )
    output = loss(**batch_of(encoder, samples, "trees"))
    assert output["loss"].item() == pytest.approx(expected, rel=1e-4)
    assert output["rewards/margin"].item() == pytest.approx(sum(margins) / len(margins), rel=1e-3)
    assert output["labelled_tokens"].item() == sum(
        int((row.labels != -100).sum()) for item in samples for row in item.texts()
    )


def test_prompt_and_picture_stand_once_for_all_answers(encoder: Encoder) -> None:
    samples = items(encoder)
    trees, plain = (batch_of(encoder, samples, packing) for packing in ("trees", "plain"))
    assert len(trees["pixel_values"]) == 2
    assert len(plain["pixel_values"]) == 7
    assert trees["input_ids"].numel() < 0.6 * plain["input_ids"].numel()
    assert trees["weights"].tolist() == [1, -1, 1, -1, -1, 1, -1]


@pytest.mark.parametrize("packing", ["trees", "plain"])
def test_kto_measures_by_answers_to_other_prompts(packing: Any, encoder: Encoder, backbone: DecoderBackbone) -> None:
    reference, before = Reference(backbone.model), copy.deepcopy(backbone)
    disturb(backbone.model)
    samples = items(encoder)
    batch = inputs_of(replace(encoder.collate, packing=packing, compares=True, unmatched=True)(samples))
    assert batch["weights"].tolist() == [1, -1, 0, 1, -1, -1, 0, 1, -1, 0]
    loss = PreferenceLoss(backbone, losses={"kto": 1.0}, hyperparameters=HYPER, reference=reference)
    value = loss(**batch)["loss"].item()

    def gain(prompt: Example, text: str) -> float:
        pictures = [PICTURES[name] for name in prompt.images]
        sample = Sample(**vars(encoder.encode_choice(prompt.turns[:1], text, pictures)))
        batch, sums = inputs_of(encoder.collate([sample])), []
        with torch.no_grad():
            sums = [-model(**batch).losses.sum().item() for model in (backbone, before)]
        return sums[0] - sums[1]

    others = [gain(EXAMPLES[number], EXAMPLES[number - 1].turns[-1].text) for number in range(3)]
    level = max(0.0, sum(others) / len(others))
    values = [
        1 - torch.sigmoid(torch.tensor(sign * 0.3 * (gain(row, text) - level))).item()
        for row in EXAMPLES
        for sign, text in ((1, row.turns[-1].text), *((-1, text) for text in row.rejected))
    ]
    assert value == pytest.approx(sum(values) / len(values), rel=1e-4)


def test_kto_takes_no_answer_to_the_same_prompt(encoder: Encoder) -> None:
    samples = items(encoder)
    collate = replace(encoder.collate, packing="plain", compares=True, unmatched=True)
    assert collate(samples[:1])["weights"].tolist() == [1, -1]
    good, bad, other = samples[0], replace(samples[0], index=1), samples[1]
    batch = collate([other, good, bad])
    unmatched = batch["labels"][(batch["weights"] == 0).nonzero().flatten()]
    answers_of_rows = [row[row >= 0].tolist() for row in unmatched]
    texts = [sample.labels[sample.labels >= 0].tolist() for sample in (good, other, other)]
    assert answers_of_rows == texts


def test_half_precision_of_an_engine_does_not_keep_the_reference_in_place(encoder: Encoder, tiny_llava: Path) -> None:
    """Autocast stores half-precision copies of weights by tensor, and does not see what is written to them."""
    backbone = open_backbone(str(tiny_llava))
    apply_dora(backbone.model, DoRAConfig(targets=language_targets(backbone.model), method="full"))
    reference = Reference(backbone.model)
    disturb(backbone.model)
    loss = PreferenceLoss(backbone, losses={"dpo": 1.0}, hyperparameters=HYPER, reference=reference)
    batch = batch_of(encoder, items(encoder), "trees")
    margin = loss(**batch)["rewards/margin"].item()
    assert abs(margin) > 0.01
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(**batch)["rewards/margin"].item() == pytest.approx(margin, abs=abs(margin) / 4)


def gradients_of(loss: PreferenceLoss, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Goes backward from a batch twice; returns the second loss, margin and gradients, whole."""
    for _ in range(2):
        loss.zero_grad()
        output = loss(**batch)
        output["loss"].backward()
    values = {"loss": output["loss"].detach(), "margin": output["rewards/margin"].detach()}
    for part in trained_parts(loss.backbone.model):
        for name, weight in part.parameters.items():
            assert weight.grad is not None
            gradient: Any = weight.grad
            values[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return values


def on_a_rank(rank: int, port: int, folder: Path) -> None:
    """Compares the loss of sharded weights with that of whole ones; both ranks have the same batch."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    encoder, values = open_encoder(str(folder), max_tokens=512), list[dict[str, torch.Tensor]]()
    for is_sharded in (False, True):
        backbone = open_backbone(str(folder))
        parts = {"projector": projector_patterns(backbone.model)}
        torch.manual_seed(3)
        apply_dora(
            backbone.model,
            DoRAConfig(targets=language_targets(backbone.model), rank=2, alpha=6.0, dropout=0.0, also_train=parts),
        )
        if is_sharded:
            shard(backbone.model, torch.device("cpu"))
        reference, generator = Reference(backbone.model), torch.Generator().manual_seed(1)
        for part in trained_parts(backbone.model):
            for weight in part.parameters.values():
                with torch.no_grad(), gather_to_write([weight]) as (whole,):
                    whole.add_(torch.randn(whole.shape, generator=generator) * 0.1)
        loss = PreferenceLoss(backbone, losses={"dpo": 1.0}, hyperparameters=HYPER, reference=reference)
        values.append(gradients_of(loss.train(), batch_of(encoder, items(encoder), "trees")))
    assert abs(values[0]["margin"].item()) > 1e-3
    z = mean_over_ranks(torch.tensor([[1.0, 9.0, 2.0], [6.0, 9.0, 9.0]][rank]), torch.tensor([True, False, not rank]))
    assert z.item() == 3.0  # of both ranks' three answers, not 1.5 and 6
    torch.testing.assert_close(values[1], values[0], rtol=1e-3, atol=1e-6)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_the_reference_of_sharded_weights_on_two_ranks(tiny_llava: Path) -> None:
    """FSDP2 may hold a projector whole from the pass before; the exchange must reach it all the same."""
    with socket.socket() as waiting:
        waiting.bind(("127.0.0.1", 0))
        port = waiting.getsockname()[1]
    torch.multiprocessing.start_processes(on_a_rank, args=(port, tiny_llava), nprocs=2, start_method="spawn")


def test_what_the_reference_says_is_kept_for_later_epochs(encoder: Encoder, backbone: DecoderBackbone) -> None:
    samples, collate = items(encoder), replace(encoder.collate, packing="trees", compares=True)
    epochs = [[samples[:2], samples[2:]], [samples[::2], samples[1:2]], [samples]]
    losses, calls = dict[bool, list[torch.Tensor]](), list[object]()
    start = copy.deepcopy(backbone.state_dict())
    for keeps in (False, True):
        reference = Reference(backbone.model)
        in_place, calls = reference.in_place, []
        reference.in_place = lambda calls=calls, in_place=in_place: calls.append(1) or in_place()
        loss = PreferenceLoss(backbone, losses={"dpo": 1.0}, hyperparameters=HYPER, reference=reference, keeps=keeps)
        optimizer = torch.optim.SGD([weight for weight in backbone.parameters() if weight.requires_grad], lr=0.5)
        losses[keeps] = []
        for batch in (inputs_of(collate(rows)) for epoch in epochs for rows in epoch):
            value = loss(**batch)["loss"]
            value.backward()
            losses[keeps].append(value.detach())
            optimizer.step()
            optimizer.zero_grad()
        assert len(calls) == (2 if keeps else 5)
        backbone.load_state_dict(start)
        for _, layer in adapted_layers(backbone.model):
            layer.forget_norms()
    torch.testing.assert_close(torch.stack(losses[True]), torch.stack(losses[False]), rtol=2e-5, atol=2e-5)
    assert abs(float(losses[True][0] - losses[True][-1])) > 1e-3


GROUP, LONGEST = 5, 6


def lengths_and_vowels(example: Example, answer: str) -> float:
    return 0.3 * len(answer) + sum(letter in "aeiou" for letter in answer)


def rollouts_of(encoder: Encoder, backbone: DecoderBackbone, folder: Path, **settings: Any) -> Rollouts:
    packing = settings.pop("packing", "trees")
    values: dict[str, Any] = {
        "loss": OBJECTIVES["grpo"].policy,
        "rewards": {
            "vowels": lambda examples, answers: [*map(lengths_and_vowels, examples, answers)],
            "length": lambda examples, answers: [float(len(answer)) for answer in answers],
        },
        "weights": {"vowels": 1.0, "length": -0.5},
        "keeps_all": False,
        **settings,
    }
    source = ModelAnswers(
        assistant=Assistant(backbone, encoder, while_training=True),
        max_new_tokens=LONGEST,
        never=values.pop("never", ()),
        autocast=None,
    )
    return Rollouts(
        source=source,
        encoder=encoder,
        device=torch.device("cpu"),
        collate=replace(encoder.collate, packing=packing, keeps_samples=True),
        example_of=lambda index: EXAMPLES[index],
        group=GROUP,
        max_new_tokens=LONGEST,
        seed=7,
        run_folder=folder,
        **values,
    )


def collated(encoder: Encoder) -> dict[str, Any]:
    return replace(encoder.collate, keeps_samples=True)(items(encoder))


def all_log_probs(model: DecoderBackbone, sample: Sample) -> torch.Tensor:
    """The log-probabilities of all tokens at a sample's labels, by transformers' model and the sample alone."""
    inputs = {name: value for name, value in sample.inputs.items() if name != "attention_mask"}
    logits = model.model(input_ids=sample.input_ids[None], **inputs).logits[0, :-1].log_softmax(-1)
    return logits[sample.labels[1:] >= 0]


def alone(model: DecoderBackbone, sample: Sample) -> torch.Tensor:
    """The log-probabilities of a sample's labels."""
    return all_log_probs(model, sample).gather(1, sample.labels[sample.labels >= 0][:, None])[:, 0]


@pytest.mark.parametrize(
    ("name", "packing"), [*((name, "trees") for name, row in OBJECTIVES.items() if row.policy), ("grpo", "plain")]
)
def test_loss_and_gradient_are_the_equation(name, packing, encoder, backbone, tmp_path) -> None:
    reference, before = Reference(backbone.model), copy.deepcopy(backbone)
    disturb(backbone.model)
    rollouts = rollouts_of(encoder, backbone, tmp_path, loss=OBJECTIVES[name].policy, packing=packing, keeps_all=True)
    batches = [rollouts.collate(several) for several in (items(encoder)[:1], items(encoder)[1:])]
    answered, divisor, numbers = rollouts.draw_batches(batches, step=4)
    module = RewardLoss(backbone, kl=0.3, reference=reference)
    outputs, trained = [], [weight for weight in backbone.model.parameters() if weight.requires_grad]
    gradients = [torch.zeros_like(weight) for weight in trained]
    for batch in answered:  # two micro-batches of a step
        outputs.append(module(**inputs_of(batch), num_items_in_batch=divisor))
        for gradient, more in zip(gradients, torch.autograd.grad(outputs[-1]["loss"], trained), strict=True):
            gradient += more

    rows = [row for batch in answered for item in batch["made_of"] for row in item.texts()]
    assert len(rows) == 3 * GROUP
    log_probs = [alone(backbone, row) for row in rows]
    with torch.no_grad():
        references = [alone(before, row) for row in rows]
    lengths = [len(values) for values in log_probs]
    texts = [encoder.decode(row.labels[row.labels >= 0]) for row in rows]
    rewards = [lengths_and_vowels(EXAMPLES[0], text) - 0.5 * len(text) for text in texts]
    assert numbers["rewards/mean"].item() == pytest.approx(sum(rewards) / len(rewards))
    total = torch.zeros(())
    for number, (now, then) in enumerate(zip(log_probs, references, strict=True)):
        group = rewards[number // GROUP * GROUP :][:GROUP]
        mean = sum(group) / GROUP
        advantage = rewards[number] - mean
        if name in ("grpo", "dapo"):
            advantage /= (sum((reward - mean) ** 2 for reward in group) / (GROUP - 1)) ** 0.5 + 1e-4
        if name == "rloo":
            advantage = rewards[number] - (sum(group) - rewards[number]) / (GROUP - 1)
        weight = {
            "grpo": 1 / (lengths[number] * len(rows)),
            "dr_grpo": 1 / (LONGEST * len(rows)),
            "dapo": 1 / sum(lengths),
            "rloo": 1 / len(rows),
        }[name]
        total = total - weight * (advantage * now - 0.3 * ((then - now).exp() - (then - now) - 1)).sum()
    expected = torch.autograd.grad(total, trained)
    for gradient, right in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, right, rtol=2e-3, atol=2e-5)
    assert max(output["log_probs/gap"].item() for output in outputs) < 1e-4
    assert sum(output["labelled_tokens"].item() for output in outputs) == sum(lengths)


def test_prompts_are_those_that_inference_asks(encoder: Encoder, backbone: DecoderBackbone, tmp_path: Path) -> None:
    rollouts = rollouts_of(encoder, backbone, tmp_path)
    (batch,), _, _ = rollouts.draw_batches([rollouts.collate(items(encoder))], step=0)
    for item, example in zip(batch["made_of"], EXAMPLES, strict=True):
        prompt = encoder.encode_prompt(example.turns[:1], [PICTURES[name] for name in example.images])
        for row in item.texts():
            start = int((row.labels >= 0).int().argmax())
            assert torch.equal(row.input_ids[:start], prompt.input_ids)
            assert torch.equal(row.labels[start:], row.input_ids[start:])


def test_no_picture_s_token_is_drawn(encoder: Encoder, backbone: DecoderBackbone, tmp_path: Path) -> None:
    (batch,), _, _ = rollouts_of(encoder, backbone, tmp_path).draw_batches([collated(encoder)], step=1)
    drawn = {
        token for item in batch["made_of"] for row in item.texts() for token in row.labels[row.labels >= 0].tolist()
    }
    rollouts = rollouts_of(encoder, backbone, tmp_path, never=drawn)
    (batch,), _, _ = rollouts.draw_batches([collated(encoder)], step=1)
    others = {token for item in batch["made_of"] for row in item.texts() for token in row.labels.tolist()} - {-100}
    assert others
    assert not others & drawn


def test_draws_depend_on_seed_and_step_alone(encoder: Encoder, backbone: DecoderBackbone, tmp_path: Path) -> None:
    rollouts = rollouts_of(encoder, backbone, tmp_path)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    ids = [rollouts.draw_batches([rollouts.collate(items(encoder))], step=step)[0][0]["input_ids"] for step in (2, 3)]
    assert torch.equal(torch.get_rng_state(), state)  # dropout goes on as if nothing was drawn
    torch.manual_seed(9)
    again = rollouts.draw_batches([rollouts.collate(items(encoder))], step=2)[0][0]["input_ids"]
    assert torch.equal(again, ids[0])
    assert ids[1].shape != again.shape or not torch.equal(ids[1], again)
    assert [line["step"] for line in read_log(tmp_path / DRAWN)] == [3, 4, 3]


def test_draws_follow_the_model_s_probabilities(encoder: Encoder, backbone: DecoderBackbone, tmp_path: Path) -> None:
    """First tokens of many draws against the softmax that they are drawn from, and their entropy."""
    disturb(backbone.model)
    (sample,) = items(encoder)[:1]
    rollouts = rollouts_of(encoder, backbone, tmp_path)
    counts, steps, numbers = torch.zeros(len(encoder.tokenizer)), 30, dict[str, torch.Tensor]()
    for step in range(steps):
        (batch,), _, numbers = rollouts.draw_batches([rollouts.collate([sample])], step=step)
        for row in batch["made_of"][0].texts():
            counts[row.labels[row.labels >= 0][0]] += 1
    start = int((sample.labels >= 0).int().argmax())
    inputs = {name: value for name, value in sample.inputs.items() if name != "attention_mask"}
    with torch.no_grad():
        chances = backbone.model(input_ids=sample.input_ids[None, :start], **inputs).logits[0, -1].softmax(-1)
    likely = chances.topk(len(chances) // 2).indices
    share, expected = counts[likely].sum().item() / (steps * GROUP), chances[likely].sum().item()
    assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / (steps * GROUP)) ** 0.5)
    assert numbers["answers/entropy"].item() == pytest.approx(-(chances * chances.log()).sum().item(), rel=0.05)


TARGETS = ("model.layers.*.self_attn.*_proj", "model.layers.*.mlp.down_proj")
IDS = torch.arange(2, 20).view(2, 9)
STARTS: dict[str, dict[str, Any]] = {
    "dora": {"method": "dora"},
    "lora": {"method": "lora"},
    "magnitude": {"method": "magnitude"},
    "pissa": {"method": "dora", "init": "pissa"},
    "norms beside it": {"method": "dora", "also_train": {"norms": ("model.norm.weight",)}},
    "an initial adapter": {"method": "dora"},
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def train(model: Any, steps: int = 3) -> None:
    weights = [weight for part in trained_parts(model) for weight in part.parameters.values()]
    optimizer = torch.optim.AdamW(weights, lr=0.05)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("start", STARTS)
def test_reference_is_the_model_that_training_began_with_and_training_goes_on(start: str, tmp_path: Path) -> None:
    torch.manual_seed(4)
    model: Any = tiny_language().train()
    apply_dora(model, DoRAConfig(rank=2, alpha=6.0, dropout=0.0, targets=TARGETS, **STARTS[start]))
    if start == "an initial adapter":
        begun = copy.deepcopy(model)
        train(begun)
        save_adapter(begun, tmp_path / "adapter")
        load_adapter(model, tmp_path / "adapter")
    second, alone, reference = copy.deepcopy(model), copy.deepcopy(model), Reference(model)
    for trains in (model, alone):
        train(trains)
    learned = logits(model)
    assert float((learned - logits(second)).abs().max()) > 0.01
    for _ in range(2):
        with reference.in_place():
            torch.testing.assert_close(logits(model), logits(second), rtol=0, atol=0)
        torch.testing.assert_close(logits(model), learned, rtol=0, atol=0)
    with pytest.raises(KeyError), reference.in_place():
        raise KeyError
    for trains in (model, alone):
        train(trains)
    torch.testing.assert_close(logits(model), logits(alone), rtol=0, atol=0)


def test_answers_that_are_too_long_are_refused_by_name(tiny_llava: Path) -> None:
    encoder = open_encoder(str(tiny_llava), max_tokens=24)
    long = replace(EXAMPLES[0], rejected=("It is red. " * 12,))
    with pytest.raises(BadSample) as error:
        items(encoder, [long])
    assert error.value.sample_id == "a"


@pytest.mark.parametrize("packing", ["trees", "plain"])
@pytest.mark.parametrize("smallest", [1, 4096])  # from which vocabulary on scores come in chunks
def test_chats_are_learned_by_how_far_the_model_is_from_its_start(
    packing: Any, smallest: int, encoder: Encoder, backbone: DecoderBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(next_token, "SMALL_VOCABULARY", smallest)
    talks = (("Say the colour.", "It is red."), ("What is it?", "It is a", "Say.", "blue red red"), ("It?", "no"))
    chats = [
        Example(str(number), (), tuple(map(Turn, ("user", "assistant") * (len(talk) // 2), talk)))
        for number, talk in enumerate(talks)
    ]
    samples = [Sample(**vars(encoder.encode(chat)), index=10 + number) for number, chat in enumerate(chats)]
    own = [replace(item, others=()) for item in items(encoder)]
    mixed = [samples[1], own[0], samples[0], own[2], own[1], samples[2]]
    before, reference = copy.deepcopy(backbone), Reference(backbone.model)
    disturb(backbone.model)
    batch = replace(encoder.collate, packing=packing, chats_from=10, dummy=encoder.dummy())(mixed)
    trained = [weight for weight in backbone.model.parameters() if weight.requires_grad]
    module = NextTokenLoss(backbone, step_tokens=False, reference=reference)
    for _ in range(2):  # the first pass finds out how the model scores
        output = module(**inputs_of(batch))
    gradients = torch.autograd.grad(output["loss"], trained)

    losses: list[torch.Tensor] = []
    for row in mixed:
        if row.index < 10:
            losses.append(-alone(backbone, row))
            continue
        with torch.no_grad():
            then = all_log_probs(before, row)
        losses.append((then.exp() * (then - all_log_probs(backbone, row))).sum(1))
    expected = torch.cat(losses).mean()
    assert output["loss"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert output["labelled_tokens"].item() == sum(map(len, losses))
    for gradient, right in zip(gradients, torch.autograd.grad(expected, trained), strict=True):
        torch.testing.assert_close(gradient, right, rtol=2e-3, atol=2e-5)
    module.eval()
    tokens = torch.cat([-alone(backbone, row) for row in mixed])
    assert module(**inputs_of(batch))["loss"].item() == pytest.approx(tokens.mean().item(), rel=1e-4)
