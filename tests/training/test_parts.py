"""What trains, from where and at which rate: an adapter to start from, groups, normalisation, and the tables."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from dora_vl.adapters.folder import save_adapter
from dora_vl.backbones.model import open_backbone
from dora_vl.backbones.vlbart import DORA_TARGETS, KEPT_ROWS, also_trained
from dora_vl.core import DoRAConfig, apply_dora, trained_parts
from dora_vl.core.config import AdaptedPart
from dora_vl.core.trainable import adapted_layers
from dora_vl.errors import SettingError, UserError
from dora_vl.run.settings import Decayed, OptimConfig, RunConfig
from dora_vl.run.settings_parser import read_run_file
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.parts import LearningRates, adapt, parameter_groups, rates_of, trained_table, with_decay
from tests.backbones.tiny_vlbart import tiny
from tests.training.tiny_run import logged_losses, trained, weights_of, write_run, write_tiny_data

CONFIG = DoRAConfig(rank=4, alpha=6.0, targets=("first", "second"), alpha_pattern={"second": 10.0})


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.ModuleDict({"first": nn.Linear(8, 6), "second": nn.Linear(6, 5)}).eval()


def outputs(adapted: nn.Module, rows: Tensor) -> Tensor:
    parts: Any = adapted
    return parts["second"](torch.tanh(parts["first"](rows)))


def moved(config: DoRAConfig = CONFIG) -> nn.Module:
    """An adapted model whose every trained tensor is away from its start."""
    adapted = model()
    adapt(adapted, config)
    with torch.no_grad():
        for _, layer in adapted_layers(adapted):
            for parameter in layer._parameters.values():
                if parameter is not None and parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
            layer.forget_norms()
    return adapted


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapter(moved(), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_run_starts_where_the_folder_ended(folder: Path) -> None:
    started, rows = model(), torch.randn(7, 8)
    adapt(started, CONFIG, initial=str(folder))
    torch.testing.assert_close(outputs(started, rows), outputs(moved(), rows))


@pytest.mark.parametrize("with_recipe", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        {"alpha": 8.0},
        {"alpha_pattern": {}},
        {"rank": 3},
        {"rank_scaling": "sqrt"},
        {"init": "pissa"},
        {"method": "lora"},
    ],
    ids=str,
)
def test_another_scale_is_refused_and_another_dropout_is_not(folder, change, with_recipe) -> None:
    if not with_recipe:  # as PEFT writes it
        (folder / "recipe.json").unlink()
    with pytest.raises(SettingError) as error:
        adapt(model(), replace(CONFIG, **change), initial=str(folder))
    assert error.value.key.startswith("adapter.initial")
    adapt(model(), replace(CONFIG, dropout=0.2), initial=str(folder))


@pytest.mark.parametrize("leaf", ["lora_B.weight", "lora_magnitude_vector"])
def test_what_is_no_number_is_no_start(folder: Path, leaf: str) -> None:
    """Training would go on from it, and every loss be NaN."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = f"base_model.model.second.{leaf}"
    tensors[name].view(-1)[1] = float("inf")
    save_file(tensors, file)
    with pytest.raises(UserError):
        adapt(model(), CONFIG, initial=str(folder))


def test_a_folder_without_factors_needs_no_configuration(tmp_path: Path) -> None:
    whole = DoRAConfig(method="full", targets=("second",))
    save_adapter(moved(whole), tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "recipe.json").read_text())["adapter"]["method"] == "full"
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    config = replace(CONFIG, targets=("first",), alpha_pattern={}, also_train={"head": ("second.*",)})
    started, ended = model(), moved(whole)
    adapt(started, config, initial=str(tmp_path / "adapter"))
    assert torch.equal(started.get_parameter("second.weight"), ended.get_parameter("second.weight"))


KEPT = replace(CONFIG, targets=("first",), alpha_pattern={}, also_keep=("table.weight[-3:]",))


def with_table(seed: int) -> nn.Module:
    network = model()
    torch.manual_seed(seed)
    network.add_module("table", nn.Embedding(7, 4))
    return network


@pytest.mark.parametrize("trains", [False, True])
def test_rows_that_a_folder_carries_are_taken_over(tmp_path: Path, trains: bool) -> None:
    """As a VL-BART's picture tokens: random, frozen, and other ones in every base; the table may train now."""
    ended, started = with_table(1), with_table(2)
    adapt(ended, KEPT)
    save_adapter(ended, tmp_path / "adapter")
    base = started.get_parameter("table.weight").detach().clone()
    config = replace(KEPT, also_keep=(), also_train={"table": ("table.weight",)}) if trains else KEPT
    adapt(started, config, initial=str(tmp_path / "adapter"))
    expected = torch.cat([base[:-3], ended.get_parameter("table.weight")[-3:]])
    assert torch.equal(started.get_parameter("table.weight"), expected)


def test_frozen_tensors_of_a_folder_must_be_the_bases(tmp_path: Path) -> None:
    """They would not be in the run's own folder: the base alone can hold them."""
    ended = model()
    adapt(ended, replace(CONFIG, targets=("first",), alpha_pattern={}, also_train={"head": ("second.bias",)}))
    save_adapter(ended, tmp_path / "adapter")
    without = replace(CONFIG, targets=("first",), alpha_pattern={})
    adapt(model(), without, initial=str(tmp_path / "adapter"))  # untrained: as in the base
    with torch.no_grad():
        ended.get_parameter("second.bias")[2] += 0.5
    save_adapter(ended, tmp_path / "adapter")
    with pytest.raises(UserError):
        adapt(model(), without, initial=str(tmp_path / "adapter"))


def test_each_part_has_its_rate_only_matrices_decay_and_each_parameter_has_one_group() -> None:
    """The more exact name of a rate counts, and magnitudes do not follow B's ratio."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 4), nn.LayerNorm(4))
    sections = {"vision": AdaptedPart(targets=("1",), rank=3), "other": AdaptedPart(targets=("2",))}
    apply_dora(model, DoRAConfig(targets=("0",), rank=2, parts=sections, also_train={"projector": ("3.*", "0.bias")}))
    rates = {"vision": 1e-5, "vision.magnitude": 7e-5, "magnitude": 5e-4}
    optim = OptimConfig(rates=rates, projector_learning_rate=2e-5, b_learning_rate_ratio=4.0)
    parts = trained_parts(model)
    groups = parameter_groups(parts, rates_of(optim, 1e-3, parts), weight_decay=0.1)
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
        rates_of(OptimConfig(projector_learning_rate=1e-5, rates={"projector": 1e-5}), 1e-3, ())
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
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(10, 20), nn.Linear(20, 30, bias=False), nn.LayerNorm(10)


def test_a_line_for_each_part() -> None:
    model = Small()
    parts = {"later": AdaptedPart(targets=("second",), rank=3)}
    apply_dora(model, DoRAConfig(targets=("first",), rank=2, parts=parts, also_train={"norms": ("norm.*",)}))
    table = trained_table(model, trained_parts(model), LearningRates(1e-3, {"later": 2e-5}))
    total = sum(parameter.numel() for parameter in model.parameters())
    cells = {line[:30].split("  ")[0].strip(): line.split()[1:] for line in str(table).splitlines()}
    assert cells["dora.A"] == ["1", "20", f"{20 / total:.3%}", "2", "0.001"]
    assert cells["later.B"] == ["1", "90", f"{90 / total:.3%}", "3", "2e-05"]
    assert cells["later.magnitude"] == ["1", "30", f"{30 / total:.3%}", "2e-05"]
    assert cells["norms"] == ["1", "20", f"{20 / total:.3%}", "0.001"]
    trained = 20 + 40 + 20 + 60 + 90 + 30 + 20
    assert cells["trained"] == [f"{trained:,}", f"{trained / total:.3%}"]
    assert cells["all"] == [f"{total:,}", "100.000%"]


PROJECTOR = "model.multi_modal_projector.linear_2.bias"


def micro_batches(config: RunConfig, size: int) -> list[dict[str, Any]]:
    pipeline = DecoderPipeline(config)
    arguments = pipeline.arguments()
    data = pipeline.data(pipeline.load(), arguments)
    samples: Any = data.train
    return [dict(data.collate([samples[i] for i in range(start, start + size)])) for start in range(0, 2 * size, size)]


@pytest.mark.parametrize("normalisation", ["micro_batch", "step_tokens"])
def test_loss_and_gradient_equal_the_step_written_out(tmp_path: Path, tiny_llava: Path, normalisation: str) -> None:
    data = write_tiny_data(tmp_path / "data", samples=4)
    run_file = write_run(tmp_path / "run.yaml", tiny_llava, data, training={"use_cpu": True})
    config = read_run_file(run_file, "--data.packing=plain")
    backbone = open_backbone(str(tiny_llava))
    bias = backbone.model.get_parameter(PROJECTOR)
    before = bias.detach().clone()
    sums, counts = [], []
    for batch in micro_batches(config, 2):
        # The library's own forward, all positions, shifted here.
        logits = backbone.model(**{k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")}).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        sums.append(functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        counts.append(int((targets != -100).sum()))
    assert counts[0] != counts[1]  # else the two ways would agree
    by_batch = (sums[0] / counts[0] + sums[1] / counts[1]) / 2
    by_token = (sums[0] + sums[1]) / sum(counts)
    assert abs(float((by_batch - by_token).detach())) > 1e-4
    expected = by_batch if normalisation == "micro_batch" else by_token
    (gradient,) = torch.autograd.grad(expected, [bias])

    folder = trained(
        run_file,
        f"--optim.loss_normalisation={normalisation}",
        "--optim.projector_learning_rate=1.0",
        "--training.optim=sgd",
        "--training.learning_rate=1.0",
        "--training.warmup_steps=0",
        "--training.lr_scheduler_type=constant",
        "--training.max_grad_norm=0",
        "--training.max_steps=1",
        "--training.per_device_train_batch_size=2",
        "--training.gradient_accumulation_steps=2",
        "--training.train_sampling_strategy=sequential",
        "--data.group_by_modality_length=false",
    )
    assert logged_losses(folder) == [pytest.approx(float(expected.detach()), abs=1e-5)]
    after = weights_of(folder)[f"base_model.model.{PROJECTOR}"]
    torch.testing.assert_close(before - after, gradient, atol=1e-6, rtol=1e-4)
