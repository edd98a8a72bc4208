"""Runs that learn from better answers, chosen, under another picture or drawn and rewarded; and what is refused."""

import json
import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_vl.backbones.encoder import Encoder, open_encoder
from dora_vl.backbones.families.targets import language_targets
from dora_vl.backbones.model import open_backbone
from dora_vl.core import DoRAConfig, apply_dora
from dora_vl.data.batches import Collator
from dora_vl.data.pictures import MediaFolder
from dora_vl.data.samples import ConversationDataset, Sample
from dora_vl.data.table import load_rows
from dora_vl.data.video import Uniform
from dora_vl.heads.preferences import Hyperparameters
from dora_vl.run.base import VideoReading
from dora_vl.run.folder import DRAWN, read_log
from dora_vl.training.opened import AnswersEncoder
from dora_vl.training.run import run
from dora_vl.training.ways.preferences import PreferenceLoss
from dora_vl.training.ways.way import Reference
from tests.backbones.conversations import inputs_of
from tests.backbones.tiny_image_text import write_tiny
from tests.training.launched import launch
from tests.training.test_preference_loss import disturb
from tests.training.tiny_run import (
    MakeRun,
    assert_same_weights,
    check_resume,
    decoder_run,
    json_of,
    logged,
    losses_of,
    refused,
    refused_key,
    trained,
    write_pairs,
    write_run,
    write_tiny_data,
    write_tiny_llava,
)


@pytest.fixture
def of_pairs(tmp_path: Path, tiny_llava: Path) -> MakeRun:
    return partial(write_run, tmp_path / "run.yaml", tiny_llava, write_pairs(tmp_path / "data"))


RATES = {"learning_rate": 2e-2, "max_steps": 10, "per_device_train_batch_size": 6}


def test_a_run_learns_to_prefer_and_says_so(of_pairs: MakeRun) -> None:
    run_file = of_pairs(training=RATES, objective={"loss": "dpo", "beta": 0.5})
    lines = logged(trained(run_file))
    assert lines[0]["rewards/margin"] == pytest.approx(0, abs=1e-6)
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert lines[-1]["rewards/margin"] > 0.2
    assert lines[-1]["rewards/accuracy"] > 0.8
    assert lines[-1]["rewards/chosen"] > lines[-1]["rewards/rejected"]


@pytest.mark.parametrize(
    "objective", [{"dpo": 0.8, "bco": 0.2, "sft": 1.0}, pytest.param("orpo", marks=pytest.mark.slow)]
)
def test_stored_outputs_and_plain_rows_train_the_same(of_pairs: MakeRun, objective: Any) -> None:
    run_file = of_pairs(objective={"loss": objective}, training={"max_steps": 3})
    folders = [
        trained(run_file, name="trees"),
        trained(run_file, "--data.cache_features=true", name="stored"),
        trained(run_file, "--data.packing=plain", "--data.group_by_modality_length=false", name="plain"),
    ]
    first = [[line["loss"] for line in logged(folder)] for folder in folders]
    assert first[1] == pytest.approx(first[0], rel=1e-4)
    assert_same_weights(folders[0], folders[1], atol=2e-5)
    assert len(first[2]) == 3


def test_a_resumed_run_has_the_reference_of_its_start(of_pairs: MakeRun) -> None:
    """Also in a second epoch: the reference's log-probabilities of the first one come back."""
    training = {"save_strategy": "steps", "save_steps": 8, "max_steps": 10, "lr_scheduler_type": "constant"}
    whole, stopped = check_resume(of_pairs(training=training, objective={"loss": "dpo"}), step=8)
    states = [json_of(run / "checkpoint-10/state/random-0.json") for run in (whole, stopped)]
    assert sorted(states[0]["kept"]["reference"]) == sorted(states[1]["kept"]["reference"])
    assert len(states[0]["kept"]["reference"]) == 2 * 24


@pytest.mark.slow
def test_two_ranks_exchange_their_shards_for_the_reference(tmp_path: Path, of_pairs: MakeRun) -> None:
    """Two steps of a second epoch among them, where the reference's log-probabilities are known."""
    training = {"max_steps": 8, "per_device_train_batch_size": 2, "train_sampling_strategy": "sequential"}
    run_file = of_pairs(
        data={"group_by_modality_length": False}, training=training, objective={"loss": "dpo", "beta": 0.5}
    )

    def launched(name: str, *settings: str, ranks: int) -> Path:
        launch(run_file, f"--training.output_dir={tmp_path / name}", *settings, ranks=ranks)
        return tmp_path / name

    alone = launched("one", "--training.deepspeed=zero0", "--training.gradient_accumulation_steps=2", ranks=1)
    assert losses_of(alone)[0] - losses_of(alone)[-1] > 0.02
    for name, sharding in (("zero2", "deepspeed=zero2"), ("zero3", "deepspeed=zero3"), ("fsdp", "fsdp=true")):
        folder = launched(name, f"--training.{sharding}", ranks=2)
        # Gradients of what a pair's answers share nearly cancel, and Adam takes their rounding for a direction.
        torch.testing.assert_close(losses_of(folder)[:2], losses_of(alone)[:2], atol=1e-4, rtol=0)
        torch.testing.assert_close(losses_of(folder), losses_of(alone), atol=1e-2, rtol=0)
        for line, expected in zip(logged(folder), logged(alone), strict=True):
            assert line["rewards/margin"] == pytest.approx(expected["rewards/margin"], abs=3e-2)


def test_answers_called_good_or_bad(tmp_path: Path, tiny_llava: Path) -> None:
    path = write_pairs(tmp_path / "data")
    rows = [
        {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen", "image": row["image"]}
        for row in json.loads(path.read_text())
        for kind in ("chosen", "rejected")
    ]
    path.write_text(json.dumps(rows))
    run_file = write_run(
        tmp_path / "run.yaml", tiny_llava, path, training=RATES, objective={"loss": "kto", "beta": 0.5}
    )
    asked = path.with_name("asked.json")
    asked.write_text(json.dumps([*rows[:8], {**rows[8], "completion": ""}]))
    test = [f"--evaluation.file={asked}", "--evaluation.forgetting=false"]
    run(decoder_run(run_file, *test))
    lines = logged(tmp_path / "run")
    assert lines[-1]["rewards/chosen"] > 0.05 > lines[-1]["rewards/rejected"]
    entry = json_of(tmp_path / "run/metrics.json")["sets"]["asked"]
    assert (entry["n"], sorted(entry["not_scored"])) == (4, [f"row {number}" for number in (2, 4, 6, 8, 9)])
    new = f"--training.output_dir={tmp_path / 'new'}"
    assert refused_key(run_file, new, "--objective.loss=dpo") == "objective.loss"
    assert refused_key(run_file, new, "--objective.loss=sft", "--objective.beta=0.1") == "objective.loss"
    alone = "training.per_device_train_batch_size"  # without answers to other prompts
    assert refused_key(run_file, new, f"--{alone}=1") == alone
    both = f"--data.train=[{path}, {write_pairs(tmp_path / 'pairs')}]"
    assert refused_key(run_file, new, both, "--objective.loss=bco") == "objective.loss"


def test_data_and_loss_must_fit(tmp_path: Path, tiny_llava: Path) -> None:
    pairs = write_run(tmp_path / "pairs.yaml", tiny_llava, write_pairs(tmp_path / "pairs"))
    assert refused_key(pairs) == "objective.loss"
    chosen = trained(pairs, "--data.columns={chosen: completion}", "--training.max_steps=1", name="chosen")
    assert len(logged(chosen)) == 1
    plain = write_run(tmp_path / "plain.yaml", tiny_llava, write_tiny_data(tmp_path / "plain", samples=8))
    assert refused_key(plain, "--objective.loss=ipo") == "objective.loss"


MDPO: dict[str, Any] = {"loss": {"dpo": 1.0, "anchor": 1.0}, "exchange_pictures": True, "beta": 0.5}


def sample_of(dataset: ConversationDataset, index: int) -> Sample:
    sample = dataset[index]
    assert isinstance(sample, Sample)
    return sample


def samples(base: Path, path: Path, seed: int | None = 3, *, encoder: Encoder | None = None) -> ConversationDataset:
    folder = MediaFolder(path.parent)
    rows = AnswersEncoder(
        encoder=encoder or open_encoder(str(base), max_tokens=256),
        folder=folder,
        videos=VideoReading(folder=folder, sampling=Uniform(1)),
        exchange=seed,
    )
    table = load_rows(str(path))
    return rows.dataset(table, table.stored)


def test_another_picture_is_drawn_by_seed_and_sample(tiny_llava: Path, tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "data")
    dataset, other = samples(tiny_llava, path), samples(tiny_llava, path, seed=4)
    in_worker: ConversationDataset = pickle.loads(pickle.dumps(dataset))
    drawn = []
    for index in reversed(range(len(dataset))):
        sample = sample_of(dataset, index)
        chosen, rejected, exchanged = sample.texts()
        assert [row.weight for row in (chosen, rejected, exchanged)] == [1, -1, -1]
        assert [row.exchanged for row in (chosen, rejected, exchanged)] == [False, False, True]
        assert chosen.media == rejected.media != exchanged.media
        assert torch.equal(exchanged.labels[exchanged.labels >= 0], chosen.labels[chosen.labels >= 0])
        assert not torch.equal(exchanged.inputs["pixel_values"], chosen.inputs["pixel_values"])
        assert sample_of(in_worker, index).others[-1].media == exchanged.media
        drawn.append((exchanged.media, sample_of(other, index).others[-1].media))
    assert len({media for media, _ in drawn}) > 8
    assert sum(media == with_other_seed for media, with_other_seed in drawn) < 8


def test_words_alone_get_none_and_the_batch_says_what_is_compared(tiny_llava: Path, tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "data")
    rows = json.loads(path.read_text())
    del rows[1]["image"]
    rows[2]["rejected_images"] = [rows[5]["image"]]
    rows[2]["rejected"] = [rows[2]["rejected"], "white it"]
    path.write_text(json.dumps(rows))
    dataset = samples(tiny_llava, path)
    assert [len(sample_of(dataset, index).texts()) for index in range(4)] == [3, 2, 3, 3]
    named = sample_of(dataset, 2).texts()
    assert [row.media for row in named] == [(rows[2]["image"],), (rows[5]["image"],), (rows[5]["image"],)]
    assert not any(row.exchanged for row in named)
    batch = Collator(0, packing="trees", compares=True)([dataset[index] for index in range(4)])
    answers = batch["answers"]
    assert answers["pairs"].T.tolist() == [[0, 1], [3, 4], [5, 6], [5, 7], [8, 9]]
    assert answers["of_pictures"].T.tolist() == [[0, 2], [8, 10]]
    assert answers["keys"][:5] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_a_run_learns_to_look_and_stored_outputs_serve_it(of_pairs: MakeRun) -> None:
    run_file = of_pairs(
        objective={**MDPO, "beta": 4.0},
        optim={"projector_learning_rate": 5e-2},
        training={"learning_rate": 2e-2, "max_steps": 30, "per_device_train_batch_size": 12},
    )
    lines = logged(trained(run_file, name="trees"))
    assert lines[0]["loss"] == pytest.approx(3 * 0.6931, abs=1e-3)
    assert lines[0]["rewards/picture_margin"] == pytest.approx(0, abs=1e-5)
    assert lines[-1]["rewards/picture_margin"] > 0.5
    few = ("--training.max_steps=3", "--optim.projector_learning_rate=1e-3")
    trees, stored = trained(run_file, *few, name="few"), trained(run_file, *few, "--data.cache_features=true", name="s")
    assert [line["loss"] for line in logged(stored)] == pytest.approx(
        [line["loss"] for line in logged(trees)], rel=1e-4
    )
    assert_same_weights(trees, stored, atol=5e-5)


def test_where_nothing_could_be_compared_the_setting_is_refused(of_pairs: MakeRun, tmp_path: Path) -> None:
    path, run_file = tmp_path / "data" / "train.json", of_pairs(objective=MDPO)
    streamed = ("--data.streaming=true", "--data.group_by_modality_length=false")
    assert refused_key(run_file, *streamed) == "objective.exchange_pictures"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([{**row, "image": rows[0]["image"]} for row in rows]))
    assert refused_key(run_file) == "objective.exchange_pictures"


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm"])
def test_trees_and_plain_rows_are_the_same_under_two_pictures(family: str, tmp_path: Path) -> None:
    base, path = tmp_path / "base", write_pairs(tmp_path / "data")
    write_tiny(family, base, width=64)
    encoder, backbone = open_encoder(str(base), max_tokens=512), open_backbone(str(base))
    encoder.take_positions_of(backbone.model)
    torch.manual_seed(3)
    targets = language_targets(backbone.model)
    apply_dora(backbone.model, DoRAConfig(targets=targets, rank=2, alpha=6.0, dropout=0.0))
    reference = Reference(backbone.model)
    disturb(backbone.model)
    dataset = samples(base, path, encoder=encoder)
    items = [sample_of(dataset, index) for index in range(4)]
    loss = PreferenceLoss(
        backbone.train(), losses=MDPO["loss"], hyperparameters=Hyperparameters(beta=0.5), reference=reference
    )
    outputs = [
        loss(**inputs_of(replace(encoder.collate, packing=packing, compares=True)(items)))
        for packing in ("trees", "plain")
    ]
    assert outputs[0]["rewards/picture_margin"].abs() > 1e-3
    for name in ("loss", "rewards/picture_margin", "rewards/margin"):
        torch.testing.assert_close(outputs[0][name], outputs[1][name], rtol=1e-4, atol=1e-5)


OWN = '''
def right_and_short(example, answer):
    """A point for the colour, another for a short answer."""
    return float(example.answers[0].text.split()[0] in answer) + float(len(answer) < 12)
'''
DRAWING = {"loss": "grpo", "group": 6, "max_new_tokens": 5}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose scores differ enough to be learned in a few steps."""
    folder = write_tiny_llava(tmp_path_factory.mktemp("base") / "base")
    weights = load_file(folder / "model.safetensors")
    weights["language_model.lm_head.weight"] *= 20
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """The adapter of a run that has seen a few answers, so that what it draws is sometimes right."""
    folder = tmp_path_factory.mktemp("begun")
    training = {"max_steps": 30, "learning_rate": 2e-2}
    return (
        trained(write_run(folder / "run.yaml", base, write_tiny_data(folder / "data"), training=training)) / "adapter"
    )


@pytest.fixture
def make(tmp_path: Path, base: Path, begun: Path) -> MakeRun:
    def write(**changes: Any) -> Path:
        (tmp_path / "own.py").write_text(OWN)
        objective = {
            **DRAWING,
            "rewards": {f"{tmp_path / 'own.py'}:right_and_short": 1.0},
            **changes.pop("objective", {}),
        }
        adapter = {"initial": str(begun), **changes.pop("adapter", {})}
        data = write_tiny_data(tmp_path / "data", samples=16)
        return write_run(tmp_path / "run.yaml", base, data, objective=objective, adapter=adapter, **changes)

    return write


def test_a_run_raises_its_reward_and_says_so(make: MakeRun) -> None:
    folder = trained(make(training={"max_steps": 24, "learning_rate": 5e-3, "lr_scheduler_type": "constant"}))
    lines = logged(folder)
    rewards = [line["rewards/mean"] for line in lines]
    assert sum(rewards[-8:]) / 8 > sum(rewards[:4]) / 4 + 0.15
    assert lines[0]["log_probs/gap"] < 1e-4  # the update sees what the rollout saw
    assert all(0 < line["answers/tokens"] <= 5 for line in lines)
    drawn = read_log(folder / DRAWN)
    assert [line["step"] for line in drawn] == list(range(1, 25))
    assert len(drawn[0]["answers"]) == 6
    assert len({answer["reward"] for answer in drawn[0]["answers"]}) > 1


@pytest.mark.slow
def test_all_weights_learn_in_half_precision(make: MakeRun, tmp_path: Path) -> None:
    """DeepSpeed's engine casts the batch's float32 numbers too."""
    adapter = {"method": "full", "initial": None, "targets": ["*.q_proj"]}
    training = {"max_steps": 2, "deepspeed": "zero0", "bf16": True, "output_dir": str(tmp_path / "run")}
    run_file = make(training=training, objective={"kl": 0.2}, adapter=adapter)
    launch(run_file, "--model.dtype=bfloat16", "--optim.projector_learning_rate=null", ranks=1, launcher="")
    assert all(0 <= line["log_probs/gap"] < 0.5 for line in logged(tmp_path / "run"))


def test_a_resumed_run_draws_the_same(make: MakeRun) -> None:
    training = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "lr_scheduler_type": "constant"}
    whole, stopped = check_resume(make(training=training, objective={"kl": 0.2}), step=2)
    assert read_log(stopped / DRAWN) == read_log(whole / DRAWN)
    assert [line["log_probs/kl"] > 0 for line in logged(whole)][1:] == [True] * 3


def test_stored_outputs_and_plain_rows_draw_and_learn_the_same(make: MakeRun) -> None:
    run_file = make(training={"max_steps": 2})
    trees = trained(run_file, name="trees")
    stored = trained(run_file, "--data.cache_features=true", name="stored")
    assert read_log(stored / DRAWN) == read_log(trees / DRAWN)
    assert_same_weights(trees, stored, atol=2e-5)


@pytest.mark.slow
def test_two_ranks_draw_and_learn_as_one(make: MakeRun, tmp_path: Path) -> None:
    training = {"max_steps": 4, "per_device_train_batch_size": 2, "train_sampling_strategy": "sequential"}
    run_file = make(data={"group_by_modality_length": False}, training=training)
    alone, zero0, zero2 = (tmp_path / name for name in ("one", "zero0", "zero2"))
    accumulated = "--training.gradient_accumulation_steps=2"
    launch(run_file, f"--training.output_dir={alone}", accumulated, "--training.deepspeed=zero0", ranks=1)
    launch(run_file, f"--training.output_dir={zero0}", "--training.deepspeed=zero0", ranks=2)
    launch(run_file, f"--training.output_dir={zero2}", "--training.deepspeed=zero2", ranks=2)
    for folder in (zero0, zero2):
        torch.testing.assert_close(losses_of(folder), losses_of(alone), atol=1e-2, rtol=0)
        for line, expected in zip(logged(folder)[:2], logged(alone), strict=False):
            assert line["rewards/mean"] == pytest.approx(expected["rewards/mean"], abs=1e-5)
            assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (("--objective.rewards={nowhere.py:reward: 1}",), "objective.rewards"),
        (("--objective.rewards={format: 1}", "--objective.format=("), "objective.format"),
    ],
)
def test_what_cannot_be_rewarded_is_refused(make: MakeRun, settings: tuple[str, ...], key: str) -> None:
    assert refused_key(make(), *settings) == key


def test_a_row_without_choices_is_told_before_weights_are_read(make: MakeRun, tmp_path: Path) -> None:
    rows = [{"id": f"q{number}", "question": "Which?", "choices": ["red", "blue"], "answer": "red"} for number in "12"]
    (tmp_path / "rows.json").write_text(json.dumps([*rows, {"id": "free", "question": "Which?", "answer": "red"}]))
    settings = f"--data.train={tmp_path / 'rows.json'}", "--objective.rewards={choice: 1}"
    assert "free" in str(refused(decoder_run(make(), *settings)))


def test_pairs_are_not_rewarded(make: MakeRun, tmp_path: Path) -> None:
    assert refused_key(make(), f"--data.train={write_pairs(tmp_path / 'pairs')}") == "objective.loss"
