"""Experts that are one tensor: DoRA in each equals a dense DoRA written out over transformers' own forward, float64."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import GptOssConfig, MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from dora_vl import DoRAConfig, apply_dora, load_adapter, merge_dora, save_adapter, strip_adapters, trained_parts
from dora_vl.core import adapted_layers, unmerge_dora
from dora_vl.core.gain import gain_of
from dora_vl.core.other_layers import AdaptedExperts
from dora_vl.errors import UserError
from tests.core.dense_dora import move_trained

EXPERTS, TOKENS, SIZES = 5, 23, {"hidden_size": 7}
KINDS: Mapping[str, Callable[[], nn.Module]] = {
    "qwen3_moe": lambda: Qwen3MoeExperts(
        Qwen3MoeConfig(num_experts=EXPERTS, moe_intermediate_size=6, hidden_act="silu", **SIZES)
    ),
    "gpt_oss": lambda: GptOssExperts(GptOssConfig(num_local_experts=EXPERTS, intermediate_size=6, **SIZES)),
    "nemotron_h": lambda: NemotronHExperts(
        NemotronHConfig(
            n_routed_experts=EXPERTS, moe_intermediate_size=6, moe_latent_size=None, mlp_hidden_act="relu2", **SIZES
        )
    ),
}
kinds = pytest.mark.parametrize("kind", KINDS)


class Layer(nn.Module):
    def __init__(self, kind: str, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = KINDS[kind]()
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=0.5)
        self.to(dtype)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, index, weights)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Routed so that expert 3 gets no row."""
    torch.manual_seed(5)
    x = torch.randn(TOKENS, 7, dtype=dtype, requires_grad=True)
    scores = torch.rand(TOKENS, EXPERTS, dtype=dtype)
    scores[:, 3] = -1
    weights, index = scores.topk(2)
    return x, index, weights.requires_grad_()


def config(**changes: Any) -> DoRAConfig:
    settings = {"targets": ("experts.*",), "kinds": ("experts",), "rank": 2, "alpha": 5.0, "dropout": 0.0, **changes}
    return DoRAConfig(**settings)


def adapted(kind: str = "qwen3_moe", **changes: Any) -> Any:
    model = Layer(kind)
    assert len(apply_dora(model, config(**changes))) in (1, 2)
    move_trained(model)
    return model


def dense(model: nn.Module, base: nn.Module, *, detached: bool = True) -> dict[str, Tensor]:
    """W' of each adapted weight, written out: m V / ||V|| in each expert, V = W + s B A."""
    weights: dict[str, Tensor] = {}
    for name, layer in dict[str, Any](adapted_layers(model)).items():
        direction = base.get_parameter(name).mT if layer.transposed else base.get_parameter(name)
        if layer.lora_A is not None:
            change = torch.einsum("eor,eri->eoi", layer.lora_B, layer.lora_A)
            direction = direction + layer.adapter.alpha / layer.adapter.rank * change
        if layer.magnitude is not None:
            norm = (direction**2).sum(-1, keepdim=True).sqrt()
            direction = layer.magnitude.unsqueeze(-1) / (norm.detach() if detached else norm) * direction
        weights[name] = direction.mT if layer.transposed else direction
    return weights


@kinds
@pytest.mark.parametrize("changes", [{}, {"method": "lora"}, {"method": "magnitude"}, {"detach_norm": False}], ids=str)
def test_output_and_gradients_equal_the_dense_form(kind, changes):
    model, base, (x, index, weights) = adapted(kind, **changes), Layer(kind), inputs()
    ours = model(x, index, weights)
    theirs = functional_call(base, dense(model, base, detached=changes.get("detach_norm", True)), (x, index, weights))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    leaves: dict[str, Tensor] = {"x": x, "weights": weights}
    leaves.update((name, leaf) for part in trained_parts(model) for name, leaf in part.parameters.items())
    seed = torch.randn_like(ours)
    gradients = (torch.autograd.grad(output, list(leaves.values()), seed) for output in (ours, theirs))
    for name, gradient, expected in zip(leaves, *gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-10, msg=name)
        assert float(expected.abs().max()) > 0, name


@kinds
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)]
)
@torch.no_grad()
def test_nothing_changes_at_the_start(kind, dtype, tolerance):
    model, base = Layer(kind, dtype), Layer(kind, dtype)
    apply_dora(model, config())
    for _, layer in adapted_layers(model):
        assert torch.equal(gain_of(layer), torch.ones_like(gain_of(layer)))
    torch.testing.assert_close(model(*inputs(dtype)), base(*inputs(dtype)), rtol=tolerance, atol=tolerance)


@kinds
@torch.no_grad()
def test_merging_gives_plain_experts_with_the_same_output_and_unmerging_the_base(kind):
    model, base, args = adapted(kind), Layer(kind), inputs()
    before = model(*args)
    merge_dora(model)
    torch.testing.assert_close(model(*args), before, rtol=1e-11, atol=1e-11)
    unmerge_dora(model)
    assert torch.equal(model(*args), before)
    merge_dora(model)
    strip_adapters(model)
    assert type(model.experts) is type(base.experts)
    assert model.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(model(*args), before, rtol=1e-11, atol=1e-11)


def test_rows_that_cancel_are_taken_dense():
    model, base, args = adapted(rank=6), Layer("qwen3_moe"), inputs()
    layer, weight = model.experts.down_proj, base.experts.down_proj
    with torch.no_grad():  # V is nearly 0 in two rows of two experts
        layer.lora_A[[1, 4]] = torch.eye(6, dtype=torch.float64)
        for index in ((1, 2), (4, 5)):
            layer.lora_B[index] = -weight[index] / layer.adapter.scale * (1 - 1e-6)
    expected = functional_call(base, dense(model, base), args)
    torch.testing.assert_close(model(*args), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["low_rank", "whole_change"])
@torch.no_grad()
def test_dropout_keeps_the_mean_and_acts_in_training_alone(mode):
    model, args = adapted(dropout=0.4, dropout_mode=mode, targets=("*.down_proj",)), inputs()
    expected = model.eval()(*args)
    model.train()
    torch.manual_seed(2)
    draws = torch.stack([model(*args) for _ in range(100)])
    assert float(draws.std(0).max()) > 1e-3
    torch.testing.assert_close(draws.mean(0), expected, rtol=0, atol=6 * float(draws.std(0).max()) / 100**0.5)


@pytest.mark.parametrize("changes", [{"init": "pissa"}, {"method": "dvora"}], ids=str)
def test_what_experts_cannot_is_refused_and_the_model_is_as_it_was(changes):
    model = Layer("qwen3_moe")
    with pytest.raises(UserError):
        apply_dora(model, config(**changes))
    assert type(model.experts) is Qwen3MoeExperts


TINY = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}


def tiny_mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**TINY, num_key_value_heads=1, num_local_experts=4)).eval()


def tiny_qwen() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    experts = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**TINY, num_key_value_heads=1, **experts)).eval()


@pytest.mark.parametrize("tiny", [tiny_mixtral, tiny_qwen])
def test_a_model_saves_and_loads_bit_by_bit(tiny: Callable[[], Any], tmp_path: Path):
    model, ids = tiny(), torch.arange(24).view(2, 12) % 40
    targets, ranks = ("*.q_proj", "*.mlp.experts.*"), {"*.1.mlp.experts.down_proj": 2}
    names = apply_dora(
        model.train(), config(targets=targets, kinds=("linear", "experts"), rank=3, alpha=7.0, rank_pattern=ranks)
    )
    assert sum("experts" in name for name in names) == 4
    assert sum(isinstance(module, AdaptedExperts) for module in model.modules()) == 2
    move_trained(model, amount=0.05)
    save_adapter(model.eval(), tmp_path / "adapter")
    other = tiny()
    assert load_adapter(other, tmp_path / "adapter") == names
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert torch.equal(other(input_ids=ids).logits, expected)
        merge_dora(other, keep_base=False)
        strip_adapters(other)
        other.save_pretrained(tmp_path / "merged")
        merged = type(other).from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    decayed = {part.name: part.weight_decay for part in trained_parts(model)}
    assert decayed == {"dora.A": True, "dora.B": True, "dora.magnitude": False}
