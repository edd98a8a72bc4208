"""The backbone gives what transformers' own LLaVA gives, and never trains or computes what it need not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from dora_vl.backbones.llava import ALSO_TRAIN, DORA_TARGETS, LlavaBackbone, llava_config, load_llava
from dora_vl.core import DoRAConfig, apply_dora
from dora_vl.data.batches import Collator
from dora_vl.data.samples import IGNORED_LABEL, Sample
from dora_vl.errors import UserError
from tests.backbones.conftest import tiny_llava_config

IMAGE, PAD = 60, 0
PICTURE = [IMAGE] * 4
ROWS = [
    [1, 7, *PICTURE, 8, 9, 10, 2],
    [1, *PICTURE, 11, *PICTURE, 12, 2],
    [1, 20, 21, 2],
]
ANSWER_STARTS = [8, 10, 2]
PICTURES = 3


def batch(rows: list[list[int]] = ROWS, *, left: bool = False) -> dict[str, Tensor]:
    """Padded rows, the last tokens of each labelled."""
    length = max(map(len, rows))
    ids, mask, labels = [], [], []
    for row in rows:
        start = ANSWER_STARTS[ROWS.index(row)]
        padding = [PAD] * (length - len(row))
        label = [-100] * start + row[start:]
        ids.append(padding + row if left else row + padding)
        mask.append([0] * len(padding) + [1] * len(row) if left else [1] * len(row) + [0] * len(padding))
        labels.append([-100] * len(padding) + label if left else label + [-100] * len(padding))
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "labels": torch.tensor(labels)}


def pixels(count: int = PICTURES) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def adapted(backbone: LlavaBackbone) -> LlavaBackbone:
    apply_dora(backbone.model, DoRAConfig(targets=DORA_TARGETS, rank=2, dropout=0.0, also_train=ALSO_TRAIN))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in backbone.model.named_parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.05)
            assert weight.requires_grad or "lora" not in name
    return backbone


@pytest.mark.parametrize("left", [False, True])
def test_equal_to_transformers_at_every_labelled_position(backbone: LlavaBackbone, left: bool) -> None:
    inputs = batch(left=left)
    got = backbone(**inputs, pixel_values=pixels())
    for number, row in enumerate(ROWS):
        start = ANSWER_STARTS[number]
        pictures = row.count(IMAGE) // 4
        first = sum(other.count(IMAGE) // 4 for other in ROWS[:number])
        # One row by itself, without any padding, is what both sides of padding have to equal.
        alone = backbone.model(
            input_ids=torch.tensor([row]),
            attention_mask=torch.ones(1, len(row), dtype=torch.long),
            pixel_values=pixels()[first : first + pictures] if pictures else None,
        ).logits[0, start - 1 : -1]
        torch.testing.assert_close(got.logits[got.rows == number], alone, rtol=1e-4, atol=1e-4)
        assert got.targets[got.rows == number].tolist() == row[start:]


def test_only_labelled_positions_reach_the_head(backbone: LlavaBackbone) -> None:
    seen: list[torch.Size] = []
    backbone.model.lm_head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    got = backbone(**batch(), pixel_values=pixels())
    assert seen == [got.hidden.shape]
    assert len(got.hidden) == sum(len(row) - start for row, start in zip(ROWS, ANSWER_STARTS, strict=True))


def test_without_labels_the_last_token_of_each_row(backbone: LlavaBackbone) -> None:
    for left in (False, True):
        inputs = batch(left=left)
        inputs.pop("labels")
        got = backbone(**inputs, pixel_values=pixels())
        assert got.rows.tolist() == [0, 1, 2]
        assert got.targets.tolist() == [-100] * 3
        alone = backbone.model(input_ids=torch.tensor([ROWS[2]])).logits[0, -1]
        torch.testing.assert_close(got.logits[2], alone, rtol=1e-4, atol=1e-4)


def test_cached_features_equal_the_live_path_exactly(backbone: LlavaBackbone) -> None:
    live = backbone(**batch(), pixel_values=pixels())
    features = backbone.picture_features(pixels())
    assert features.shape == (PICTURES, *backbone.feature_shape)
    assert not features.requires_grad
    assert torch.equal(backbone(**batch(), image_features=features).logits, live.logits)


@pytest.mark.parametrize(
    ("rows", "pictures", "said"),
    [
        (ROWS, 2, "12 picture tokens in the batch, but 2 pictures of 4 features each"),
        (ROWS, None, "12 picture tokens in the batch, but 0 pictures of 4 features each"),
        ([ROWS[2]], 1, "0 picture tokens in the batch, but 1 pictures of 4 features each"),
        (ROWS[:1], 2, "4 picture tokens in the batch, but 2 pictures of 4 features each"),
    ],
)
@pytest.mark.parametrize("cached", [False, True])
def test_counts_of_pictures_and_placeholders_must_agree(
    backbone: LlavaBackbone, rows: list[list[int]], pictures: int | None, said: str, cached: bool
) -> None:
    given = {} if pictures is None else {"pixel_values": pixels(pictures)}
    if cached and pictures is not None:
        given = {"image_features": backbone.picture_features(given["pixel_values"])}
    inputs = batch(rows)
    with pytest.raises(UserError, match=said):
        backbone(**inputs, **given)
    with pytest.raises(UserError, match=said):
        backbone.generate(inputs["input_ids"], inputs["attention_mask"], **given)


class TestTraining:
    """What gets a gradient, and that gradients are right."""

    def loss(self, backbone: LlavaBackbone, **inputs: Tensor) -> Tensor:
        got = backbone(**inputs)
        return F.cross_entropy(got.logits, got.targets, reduction="sum")

    def test_a_frozen_tower_gets_none_and_stays_in_eval(self, backbone: LlavaBackbone) -> None:
        adapted(backbone).train()
        assert backbone.model.model.language_model.training
        assert not any(module.training for module in backbone.tower.modules())
        self.loss(backbone, **batch(), pixel_values=pixels()).backward()
        for name, weight in backbone.model.named_parameters():
            assert (weight.grad is not None) == weight.requires_grad, name
        projector = backbone.model.model.multi_modal_projector.linear_1.weight.grad
        assert projector is not None
        assert float(projector.abs().sum()) > 0

    def test_a_tower_that_trains_gets_gradients(self, backbone: LlavaBackbone) -> None:
        backbone.train()
        assert backbone.tower.training
        self.loss(backbone, **batch(), pixel_values=pixels()).backward()
        assert backbone.tower.encoder.layers[0].mlp.fc1.weight.grad is not None

    @pytest.mark.parametrize("source", ["pixel_values", "image_features"])
    def test_text_only_gives_the_projector_zeros(self, backbone: LlavaBackbone, source: str) -> None:
        runs: list[str] = []
        adapted(backbone).train()
        backbone.picture_source = source  # pyright: ignore
        backbone.tower.register_forward_hook(lambda *_: runs.append("tower"))
        inputs = batch([ROWS[2]])
        got = backbone(**inputs)
        F.cross_entropy(got.logits, got.targets).backward()
        for weight in backbone.model.model.multi_modal_projector.parameters():
            assert weight.grad is not None
            assert torch.equal(weight.grad, torch.zeros_like(weight))
        # Under ZeRO-3 every rank has to run the modules that a rank with pictures runs, no more and no less.
        assert runs == (["tower"] if source == "pixel_values" else [])
        alone = backbone.model(input_ids=torch.tensor([ROWS[2]])).logits[0, 1:-1]
        torch.testing.assert_close(got.logits, alone, rtol=1e-5, atol=1e-5)

    def test_a_row_of_padding_alone_gives_finite_zero_gradients(self, backbone: LlavaBackbone) -> None:
        adapted(backbone).train()
        got = backbone(
            input_ids=torch.tensor([[PAD]]), attention_mask=torch.tensor([[1]]), labels=torch.tensor([[-100]])
        )
        assert got.logits.shape == (0, 64)
        (got.logits.sum() * 0).backward()
        for weight in backbone.model.parameters():
            if weight.requires_grad:
                assert weight.grad is not None
                assert torch.equal(weight.grad, torch.zeros_like(weight))

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("with_projector", [False, True])
    def test_checkpointing_changes_no_gradient(
        self, backbone: LlavaBackbone, reentrant: bool, with_projector: bool
    ) -> None:
        adapted(backbone).train()
        for weight in backbone.model.model.multi_modal_projector.parameters():
            weight.requires_grad_(with_projector)
        inputs = {**batch(), "pixel_values": pixels()}
        self.loss(backbone, **inputs).backward()
        plain = {name: w.grad.clone() for name, w in backbone.model.named_parameters() if w.grad is not None}
        backbone.zero_grad()
        backbone.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        assert any(getattr(module, "gradient_checkpointing", False) for module in backbone.model.modules())
        self.loss(backbone, **inputs).backward()
        again = {name: w.grad for name, w in backbone.model.named_parameters() if w.grad is not None}
        assert plain.keys() == again.keys()
        assert any("language_model.layers.0" in name for name in plain)
        for name, gradient in plain.items():
            torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-6)

    def test_padding_on_either_side_gives_the_same_gradients(self, backbone: LlavaBackbone) -> None:
        adapted(backbone).train()
        gradients = []
        for left in (False, True):
            backbone.zero_grad()
            self.loss(backbone, **batch(left=left), pixel_values=pixels()).backward()
            gradients.append({n: w.grad.clone() for n, w in backbone.model.named_parameters() if w.grad is not None})
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5)


class Collected(BaseStreamer):
    """Keeps what a streamer is given."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


class TestGenerate:
    """Greedy decoding with a cache equals the full forward, alone and in a batch."""

    def prompts(self) -> dict[str, Tensor]:
        inputs = batch(left=True)
        inputs.pop("labels")
        return inputs

    def test_a_batch_answers_as_each_prompt_alone(self, backbone: LlavaBackbone) -> None:
        inputs, features = self.prompts(), backbone.picture_features(pixels())
        # A random model may say the picture's token, which as an input would need a picture.
        options = {"max_new_tokens": 6, "eos_token_id": 999, "suppress_tokens": [IMAGE]}
        together = backbone.generate(**inputs, image_features=features, **options)
        assert together.shape == (3, 6)
        first = 0
        for number, row in enumerate(ROWS):
            count = row.count(IMAGE) // 4
            own = features[first : first + count] if count else None
            first += count
            ids = torch.tensor([row])
            alone = backbone.generate(ids, torch.ones_like(ids), image_features=own, **options)
            assert alone[0].tolist() == together[number].tolist()
            written = list(row)
            for token in alone[0].tolist():  # greedy by the whole forward pass, without any cache
                sequence = torch.tensor([written])
                logits = backbone(sequence, torch.ones_like(sequence), image_features=own).logits
                logits[0, IMAGE] = -torch.inf
                assert int(logits[0].argmax()) == token
                written.append(token)

    def test_pictures_as_pixels_give_the_same(self, backbone: LlavaBackbone) -> None:
        options = {"max_new_tokens": 4, "eos_token_id": 999}
        live = backbone.generate(**self.prompts(), pixel_values=pixels(), **options)
        stored = backbone.generate(**self.prompts(), image_features=backbone.picture_features(pixels()), **options)
        assert torch.equal(live, stored)

    def test_streams_the_new_tokens_only(self, backbone: LlavaBackbone) -> None:
        streamer = Collected()
        ids = torch.tensor([ROWS[2]])
        new = backbone.generate(ids, torch.ones_like(ids), max_new_tokens=5, streamer=streamer, eos_token_id=999)
        assert streamer.ids == new[0].tolist()
        assert streamer.ended

    def test_stops_at_the_end_token(self, backbone: LlavaBackbone) -> None:
        ids = torch.tensor([ROWS[2]])
        first = int(backbone.generate(ids, torch.ones_like(ids), max_new_tokens=1)[0, 0])
        new = backbone.generate(ids, torch.ones_like(ids), max_new_tokens=9, eos_token_id=first)
        assert new[0].tolist() == [first]


def test_adapters_go_to_the_language_model_alone(backbone: LlavaBackbone) -> None:
    vision_linears = {
        name
        for name, module in backbone.model.model.vision_tower.named_modules()
        if isinstance(module, torch.nn.Linear) and name.split(".")[-1] in {"q_proj", "k_proj", "v_proj"}
    }
    assert len(vision_linears) == 9  # the same last names are there to be hit
    names = apply_dora(backbone.model, DoRAConfig(targets=DORA_TARGETS, also_train=ALSO_TRAIN))
    assert len(names) == 2 * 7
    assert all(name.startswith("model.language_model.layers.") for name in names)
    assert not [name for name, weight in backbone.tower.named_parameters() if weight.requires_grad]
    assert not backbone.model.lm_head.weight.requires_grad


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_sharing_a_picture_changes_neither_loss_nor_gradients(backbone: LlavaBackbone, kernel: str) -> None:
    adapted(backbone).train()
    backbone.model.set_attn_implementation(kernel)
    features = torch.randn(2, *backbone.feature_shape, generator=torch.Generator().manual_seed(2))
    texts = [("a", [8, 9, 10, 2], 3), ("b", [11, 12, 2], 1), ("a", [8, 21, 22, 23, 2], 2), ("a", [30, 31], 1)]
    samples = []
    for number, (picture, text, answered) in enumerate(texts):
        ids = torch.tensor([1, 7, *PICTURE, *text])
        labels = torch.where(torch.arange(len(ids)) >= len(ids) - answered, ids, IGNORED_LABEL)
        of_picture = features[0 if picture == "a" else 1]
        samples.append(Sample(number, str(number), ids, labels, features=(of_picture,), images=(picture,)))

    def run(collate: Collator) -> tuple[int, Tensor, dict[str, Tensor]]:
        batch = collate(samples)
        inputs = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        backbone.zero_grad()
        got = backbone(**inputs)
        loss = F.cross_entropy(got.logits, got.targets)
        loss.backward()
        gradients = {name: one.grad.clone() for name, one in backbone.named_parameters() if one.grad is not None}
        return batch["input_ids"].numel(), loss.detach(), gradients

    apart, shared = run(Collator(PAD)), run(Collator(PAD, share_pictures_by=IMAGE))
    assert shared[0] < apart[0]
    torch.testing.assert_close(shared[1], apart[1], rtol=1e-5, atol=1e-6)
    assert len(apart[2]) > 10
    for name, gradient in apart[2].items():
        torch.testing.assert_close(shared[2][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_kernel_that_takes_no_mask_is_refused(backbone: LlavaBackbone) -> None:
    backbone.model.model.language_model.config._attn_implementation = "flash_attention_2"
    layout = torch.ones(1, 3, 4, dtype=torch.int64)
    with pytest.raises(UserError, match=r"share_pictures.* needs .*sdpa or eager"):
        backbone(torch.ones(1, 4).long(), torch.ones(1, 4).long(), layout=layout)


@pytest.mark.parametrize(
    ("field", "value"),
    [("text_config", 3), ("vision_config", []), ("image_seq_length", "x"), ("image_token_index", {})],
)
def test_a_config_of_wrong_types_is_one_line(tmp_path: Path, field: str, value: object) -> None:
    tiny_llava_config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    with pytest.raises(UserError, match=rf"cannot be opened as a LLaVA: .*{field}") as error:
        llava_config(str(tmp_path))
    assert len(str(error.value)) < 500


def test_weights_that_do_not_fit_the_config_are_one_line(backbone: LlavaBackbone, tmp_path: Path) -> None:
    backbone.model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["vision_config"]["num_channels"] = 4
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="cannot be opened as a LLaVA: RuntimeError: ") as error:
        load_llava(str(tmp_path))
    assert len(str(error.value)) < 500
