"""Parameter groups, each part at its own rate, vectors never decay; and the tables before the first step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dora_vl.backbones.vlbart import DORA_TARGETS, KEPT_ROWS, also_trained
from dora_vl.core import DoRAConfig, apply_dora, trained_parts
from dora_vl.core.config import AdaptedPart
from dora_vl.errors import SettingError
from dora_vl.run.settings import Decayed, OptimConfig
from dora_vl.training.parts import LearningRates, parameter_groups, rates_of, trained_table, with_decay
from tests.backbones.tiny_vlbart import tiny


def in_parts() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 4), nn.LayerNorm(4))
    parts = {"vision": AdaptedPart(targets=("1",), rank=3), "other": AdaptedPart(targets=("2",))}
    apply_dora(model, DoRAConfig(targets=("0",), rank=2, parts=parts, also_train={"projector": ("3.*", "0.bias")}))
    return model


def test_each_part_has_its_rate_only_matrices_decay_and_each_parameter_has_one_group() -> None:
    """The more exact name of a rate counts, and magnitudes do not follow B's ratio."""
    model = in_parts()
    rates = {"vision": 1e-5, "vision.magnitude": 7e-5, "magnitude": 5e-4}
    optim = OptimConfig(rates=rates, projector_learning_rate=2e-5, b_learning_rate_ratio=4.0)
    groups = parameter_groups(trained_parts(model), rates_of(optim, 1e-3), weight_decay=0.1)
    assert {(group["name"], group["lr"], group["weight_decay"]): len(group["params"]) for group in groups} == {
        ("dora.A", 1e-3, 0.1): 1, ("dora.B", 4e-3, 0.1): 1, ("dora.magnitude", 5e-4, 0.0): 1,
        ("vision.A", 1e-5, 0.1): 1, ("vision.B", 4e-5, 0.1): 1, ("vision.magnitude", 7e-5, 0.0): 1,
        ("other.A", 1e-3, 0.1): 1, ("other.B", 4e-3, 0.1): 1, ("other.magnitude", 5e-4, 0.0): 1,
        ("projector", 2e-5, 0.0): 3,
    }  # fmt: skip
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)


def test_a_rate_that_is_said_twice_is_refused() -> None:
    with pytest.raises(SettingError) as error:
        rates_of(OptimConfig(projector_learning_rate=1e-5, rates={"projector": 1e-5}), 1e-3)
    assert error.value.key == "optim.rates.projector"


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
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parts = with_decay(trained_parts(model), decayed)
    groups = parameter_groups(parts, LearningRates(1e-3, {"magnitude": 5e-4}), weight_decay=0.01)
    decays = {names[id(parameter)]: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert len(VECTORS) == 26
    assert len(decays) == 101 == sum(len(group["params"]) for group in groups)
    assert {name for name, decay in decays.items() if decay == 0.01} == expected
    assert {decay for name, decay in decays.items() if name not in expected} == {0.0}
    rates = {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}
    assert {name for name, rate in rates.items() if rate == 5e-4} == {n for n in VECTORS if n.endswith("magnitude")}


# ---- tables


class Small(nn.Module):
    """A tied head, an untied linear, experts as one tensor, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 10)
        self.first, self.second, self.third = nn.Linear(10, 20), nn.Linear(20, 30, bias=False), nn.Linear(30, 10)
        self.experts = nn.ParameterDict({"down_proj": torch.zeros(4, 10, 5)})
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 50, bias=False)
        self.head.weight = self.tokens.weight


def with_tables() -> Small:
    model = Small()
    parts = {"later": AdaptedPart(targets=("second",), rank=3)}
    config = DoRAConfig(targets=("first",), rank=2, parts=parts, also_train={"norms": ("norm.*",)})
    apply_dora(model, config)
    return model


def rows(table: str) -> dict[str, list[str]]:
    return {line[:30].split("  ")[0].strip(): line.split()[1:] for line in table.splitlines()}


def test_a_line_for_each_part() -> None:
    model = with_tables()
    table = trained_table(model, trained_parts(model), LearningRates(1e-3, {"later": 2e-5}))
    total = sum(parameter.numel() for parameter in model.parameters())
    cells = rows(str(table))
    assert cells["dora.A"] == ["1", "20", f"{20 / total:.3%}", "2", "0.001"]
    assert cells["later.B"] == ["1", "90", f"{90 / total:.3%}", "3", "2e-05"]
    assert cells["later.magnitude"] == ["1", "30", f"{30 / total:.3%}", "2e-05"]
    assert cells["norms"] == ["1", "20", f"{20 / total:.3%}", "0.001"]
    trained = 20 + 40 + 20 + 60 + 90 + 30 + 20
    assert cells["trained"] == [f"{trained:,}", f"{trained / total:.3%}"]
    assert cells["all"] == [f"{total:,}", "100.000%"]
