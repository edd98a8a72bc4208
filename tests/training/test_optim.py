"""Parameter groups: each part at its own rate; vectors never decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dora_vl.backbones.vlbart import DORA_TARGETS, KEPT_ROWS, also_trained
from dora_vl.core import DoRAConfig, apply_dora, trained_parts
from dora_vl.core.config import AdaptedPart
from dora_vl.errors import UserError
from dora_vl.training.optim import Decayed, LearningRates, learning_rates, parameter_groups, with_decay
from tests.backbones.tiny_vlbart import tiny


def adapted() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4))
    config = DoRAConfig(targets=("0",), rank=2, also_train={"projector": ("1.*", "2.*")})
    apply_dora(model, config)
    return model


def test_each_part_has_its_rate_and_only_matrices_decay() -> None:
    rates = learning_rates(1e-3, projector=2e-5, magnitude=5e-4, b_ratio=16.0)
    groups = parameter_groups(trained_parts(adapted()), rates, weight_decay=0.1)
    found = {(group["name"], group["lr"], group["weight_decay"]): len(group["params"]) for group in groups}
    assert found == {
        ("dora.A", 1e-3, 0.1): 1,
        ("dora.B", 1.6e-2, 0.1): 1,
        ("dora.magnitude", 5e-4, 0.0): 1,
        ("projector", 2e-5, 0.1): 1,
        ("projector", 2e-5, 0.0): 3,
    }


def test_every_trained_parameter_is_in_exactly_one_group() -> None:
    model = adapted()
    groups = parameter_groups(trained_parts(model), learning_rates(1e-3), weight_decay=0.0)
    grouped = [id(one) for group in groups for one in group["params"]]
    assert sorted(grouped) == sorted(id(one) for one in model.parameters() if one.requires_grad)
    torch.optim.AdamW(groups, lr=1e-3)


def rates_of(rates: LearningRates, model: nn.Module) -> dict[str, float]:
    return {group["name"]: group["lr"] for group in parameter_groups(trained_parts(model), rates, weight_decay=0.0)}


def test_magnitudes_do_not_follow_the_ratio_of_b() -> None:
    assert rates_of(learning_rates(1e-3, b_ratio=16.0), adapted())["dora.magnitude"] == 1e-3


def in_parts() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 4), nn.LayerNorm(4))
    parts = {"eyes": AdaptedPart(targets=("1",), rank=3), "hands": AdaptedPart(targets=("2",))}
    apply_dora(model, DoRAConfig(targets=("0",), rank=2, parts=parts, also_train={"norm": ("3.*",)}))
    return model


def test_the_more_exact_name_of_a_rate_counts() -> None:
    by_part = {"eyes": 1e-5, "eyes.magnitude": 7e-5, "magnitude": 5e-4, "norm": 3e-5}
    assert rates_of(learning_rates(1e-3, b_ratio=4.0, by_part=by_part), in_parts()) == {
        "dora.A": 1e-3, "dora.B": 4e-3, "dora.magnitude": 5e-4,
        "eyes.A": 1e-5, "eyes.B": 4e-5, "eyes.magnitude": 7e-5,
        "hands.A": 1e-3, "hands.B": 4e-3, "hands.magnitude": 5e-4,
        "norm": 3e-5,
    }  # fmt: skip


@pytest.mark.parametrize("unknown", ["eye", "eyes.magnitud", "projector"])
def test_a_rate_for_a_part_that_does_not_train_is_refused(unknown: str) -> None:
    said = f"a learning rate is set for {unknown}, but what trains is dora, eyes, hands, norm"
    with pytest.raises(UserError, match=said) as refused:
        parameter_groups(trained_parts(in_parts()), learning_rates(1e-3, by_part={unknown: 1e-5}), weight_decay=0.0)
    assert ("did you mean eyes" in str(refused.value)) == unknown.startswith("eye")


def test_a_rate_that_is_said_twice_is_refused() -> None:
    with pytest.raises(UserError, match=r"optim\.rates\.projector and optim\.projector_learning_rate say the same"):
        learning_rates(1e-3, projector=1e-5, by_part={"projector": 1e-5})


DECODER = ("self_attn", "encoder_attn")
ATTENTIONS = (
    *((f"model.encoder.layers.{n}", "self_attn") for n in (0, 1)),
    *((f"model.decoder.layers.{n}", attention) for n in (0, 1) for attention in DECODER),
)
VISION = "model.encoder.visual_embedding"
MATRICES = {
    *(f"{layer}.{attention}.{p}_proj.lora_{f}" for layer, attention in ATTENTIONS for p in "qv" for f in "AB"),
    f"{VISION}.feat_embedding.0.weight",
    f"{VISION}.absolute_vis_pos_embedding.0.weight",
    f"{VISION}.img_order_embedding.weight",
}
VECTORS = {
    *(f"{layer}.{attention}.{p}_proj.magnitude" for layer, attention in ATTENTIONS for p in "qv"),
    *(f"{layer}.{attention}_layer_norm.weight" for layer, attention in ATTENTIONS),
    *(f"model.{side}.layers.{n}.final_layer_norm.weight" for side in ("encoder", "decoder") for n in (0, 1)),
    *(f"model.{side}.layernorm_embedding.weight" for side in ("encoder", "decoder")),
    f"{VISION}.feat_embedding.1.weight",
    f"{VISION}.absolute_vis_pos_embedding.1.weight",
}
"""What decays in VL-T5's optimizer beside the matrices: all whose name has neither "bias" nor "LayerNorm.weight"."""


@pytest.mark.parametrize(("decayed", "expected"), [("matrices", MATRICES), ("all_but_biases", MATRICES | VECTORS)])
def test_what_decays_in_a_vlbart_as_in_the_published_image_run(decayed: Decayed, expected: set[str]) -> None:
    model = tiny()
    trained = also_trained(model.settings, biases=True, norm_weights=True)
    apply_dora(model, DoRAConfig(targets=DORA_TARGETS, rank=2, also_train=trained, also_keep=KEPT_ROWS))
    names = {id(one): name for name, one in model.named_parameters()}
    parts = with_decay(trained_parts(model), decayed)
    groups = parameter_groups(parts, learning_rates(1e-3, magnitude=5e-4), weight_decay=0.01)
    found = {names[id(one)]: group["weight_decay"] for group in groups for one in group["params"]}
    assert len(VECTORS) == 26
    assert len(found) == 101 == sum(len(group["params"]) for group in groups)
    assert {name for name, decay in found.items() if decay == 0.01} == expected
    assert {decay for name, decay in found.items() if name not in expected} == {0.0}
    rates = {names[id(one)]: group["lr"] for group in groups for one in group["params"]}
    assert {name for name, rate in rates.items() if rate == 5e-4} == {n for n in VECTORS if n.endswith("magnitude")}
