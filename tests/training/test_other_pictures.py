"""Pairs that look: the chosen answer under another picture, drawn or named by the data, is one more rejected answer."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_vl.backbones.encoder import Encoder, open_encoder
from dora_vl.backbones.model import language_targets, open_backbone
from dora_vl.core import DoRAConfig, apply_dora
from dora_vl.data.batches import Collator
from dora_vl.data.pictures import MediaFolder
from dora_vl.data.samples import ConversationDataset, Sample
from dora_vl.data.table import load_rows
from dora_vl.data.video import Uniform
from dora_vl.heads.preferences import Scale
from dora_vl.run.base import VideoReading
from dora_vl.training.pipeline import PreferenceLoss
from dora_vl.training.reference import Reference
from dora_vl.training.run_samples import RowEncoder
from tests.backbones.image_text_conversations import inputs_of
from tests.backbones.tiny_image_text import write_tiny
from tests.training.test_preference_loss import disturb
from tests.training.test_preference_run import key_of, write_pairs
from tests.training.tiny_run import assert_same_weights, decoder_run, logged, skipped_by, trained, write_run

MDPO: dict[str, Any] = {"loss": {"dpo": 1.0, "anchor": 1.0}, "exchange_pictures": True, "beta": 0.5}


def sample_of(dataset: ConversationDataset, index: int) -> Sample:
    sample = dataset[index]
    assert isinstance(sample, Sample)
    return sample


def samples(base: Path, path: Path, seed: int | None = 3, *, encoder: Encoder | None = None) -> ConversationDataset:
    folder = MediaFolder(path.parent)
    rows = RowEncoder(
        encoder=encoder or open_encoder(str(base), max_tokens=256),
        folder=folder,
        videos=VideoReading(folder=folder, sampling=Uniform(1)),
        compares=True,
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
        chosen, rejected, exchanged = sample.rows()
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
    assert [len(sample_of(dataset, index).rows()) for index in range(4)] == [3, 2, 3, 3]
    named = sample_of(dataset, 2).rows()
    assert [row.media for row in named] == [(rows[2]["image"],), (rows[5]["image"],), (rows[5]["image"],)]
    assert not any(row.exchanged for row in named)
    batch = Collator(0, packing="trees", compares=True)([dataset[index] for index in range(4)])
    answers = batch["answers"]
    assert answers["pairs"].T.tolist() == [[0, 1], [3, 4], [5, 6], [5, 7], [8, 9]]
    assert answers["of_pictures"].T.tolist() == [[0, 2], [8, 10]]
    assert answers["keys"][:5] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_a_run_learns_to_look_and_stored_outputs_serve_it(tmp_path: Path, tiny_llava: Path) -> None:
    run_file = write_run(
        tmp_path / "run.yaml",
        tiny_llava,
        write_pairs(tmp_path / "data"),
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


def test_answers_about_the_datas_own_other_pictures(tmp_path: Path, tiny_llava: Path) -> None:
    """ms-swift's `rejected_images`: what differs is the picture alone, of which some are missing."""
    path = write_pairs(tmp_path / "data")
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    swift = []
    for number, row in enumerate(rows):
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}]
        images = {"images": [row["image"]], "rejected_images": [rows[number - 1]["image"]]}
        swift.append({"messages": turns, **images})
    swift[7]["rejected_images"] = ["nowhere.png"]
    path.write_text(json.dumps(swift))
    run_file = write_run(
        tmp_path / "run.yaml",
        tiny_llava,
        path,
        data={"cache_features": True, "max_bad_share": 0.1},
        objective={"loss": "dpo", "beta": 0.5},
        training={"learning_rate": 2e-2, "max_steps": 10, "per_device_train_batch_size": 6},
    )
    folder = trained(run_file)
    assert logged(folder)[0]["rewards/margin"] == pytest.approx(0, abs=1e-6) != logged(folder)[-1]["rewards/margin"]
    (reason,) = skipped_by(folder).values()
    assert "nowhere.png" in reason


def test_where_nothing_could_be_compared_the_setting_is_refused(tmp_path: Path, tiny_llava: Path) -> None:
    path = write_pairs(tmp_path / "data")
    run_file = write_run(tmp_path / "run.yaml", tiny_llava, path, objective=MDPO)
    assert key_of(decoder_run(run_file, "--objective.loss=orpo")) == "objective.exchange_pictures"
    streamed = ("--data.streaming=true", "--data.group_by_modality_length=false")
    assert key_of(decoder_run(run_file, *streamed)) == "objective.exchange_pictures"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([{**row, "image": rows[0]["image"]} for row in rows]))
    assert key_of(decoder_run(run_file)) == "objective.exchange_pictures"


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
    loss = PreferenceLoss(backbone.train(), objective=MDPO["loss"], scale=Scale(beta=0.5), reference=reference)
    outputs = [
        loss(**inputs_of(Collator(encoder.pad_token_id, packing=packing, compares=True)(items)))
        for packing in ("trees", "plain")
    ]
    assert outputs[0]["rewards/picture_margin"].abs() > 1e-3
    for name in ("loss", "rewards/picture_margin", "rewards/margin"):
        torch.testing.assert_close(outputs[0][name], outputs[1][name], rtol=1e-4, atol=1e-5)
