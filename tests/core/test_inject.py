"""Where adapters go and how they start, what trains, what is refused, that all is undone and no more is changed."""

import copy
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dora_vl.core import DoRAConfig, apply_dora, merge_dora, strip_adapters
from dora_vl.core.linear import DoRALinear
from dora_vl.errors import UserError
from tests.core import dense_dora
from tests.core.dense_dora import move, unchanged


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.v_proj(torch.tanh(self.q_proj(x))))


class Small(nn.Module):
    """A text model, a vision tower with the same layer names, and a projector between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.text = nn.ModuleList([Attention(6), Attention(6)])
        self.vision = nn.ModuleList([Attention(6)])
        self.projector = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))
        self.register_buffer("scale_of_noise", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.projector(self.vision[0](x))
        for block in self.text:
            x = block(x)
        return x


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.q, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.q(self.table(ids)))


EXTRAS = {"projector": ("projector.*",), "bias": ("text.0.q_proj.bias", "text.*.norm.*")}


def config(**changes: Any) -> DoRAConfig:
    return DoRAConfig(**{"targets": ("text.*_proj",), "rank": 2, "alpha": 6.0, "dropout": 0.0, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"targets": ("text.*.k_proj",)},
        {"targets": ("q_proj",)},
        {"also_train": {"projector": ("projectr.*",)}},
        {"also_train": {"a": ("projector.0.*",), "b": ("projector.*",)}},
        {"also_keep": ("nothing",)},
        {"rank_pattern": {"text.7.*": 4}},
        {"magnitude_targets": ("text.0.q_proj",)},
        {"method": "lora", "magnitude_targets": ("vision.*_proj",)},
        {"method": "full", "targets": ("scale*",)},
        {"init": "pissa", "rank": 7},
    ],
    ids=str,
)
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_contradictions_are_refused_and_change_nothing(changes, init):
    model = Small()
    model.vision.requires_grad_(False)
    with unchanged(model), pytest.raises(UserError):
        apply_dora(model, config(**{"init": init, **changes}))
    apply_dora(model, config())
    with pytest.raises(UserError):  # a second adapter
        apply_dora(model, config())


@pytest.mark.parametrize(
    "changes",
    [
        {"targets": ()},
        {"rank": 0},
        {"alpha": float("nan")},
        {"alpha": 1e308},
        {"alpha_pattern": {"*q_proj": 1e308}},
        {"dropout": 1.0},
        {"method": "dvora", "init": "pissa"},
        {"method": "LoRA"},
        {"targets": "*q_proj"},
        {"rank": "8"},
        {"detach_norm": 1},
        {"parts": {"vision": {"targets": ("*",)}}},
        {"also_train": {"projector": "*.projector.*"}},
    ],
    ids=str,
)
def test_impossible_settings_and_unknown_choices_are_refused(changes):
    unchecked = object.__new__(DoRAConfig)  # whose `__init__`, where the tests' own type checker looks, did not run
    vars(unchecked).update({**vars(config()), **changes})
    with pytest.raises(UserError):
        unchecked.__post_init__()


def test_numpys_numbers_are_numbers():
    numbers: Any = {"rank": np.int64(4), "alpha": np.float32(8), "targets": ["*"]}
    assert DoRAConfig(**numbers).scale == 2


def test_rank_and_alpha_patterns_and_magnitude_targets():
    model = Small()
    patterns = {"rank_pattern": {"text.1.*": 3}, "alpha_pattern": {"text.0.q*": 1.0}}
    apply_dora(model, config(**patterns, magnitude_targets=("vision.*_proj",)))
    assert model.text[1].q_proj.lora_A.shape == (3, 6)
    assert model.text[0].q_proj.lora_A.shape == (2, 6)
    assert model.text[0].q_proj.adapter.scale == 0.5
    assert model.text[0].v_proj.adapter.scale == 3.0
    assert model.vision[0].q_proj.lora_A is None
    assert model.vision[0].q_proj.magnitude.requires_grad
    assert not model.vision[0].norm.weight.requires_grad


def test_one_module_under_two_names_is_adapted_under_both():
    shared = nn.Linear(6, 6)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(6, 6)})
    apply_dora(model, DoRAConfig(targets=("*",), rank=2))
    assert model["a"] is model["b"]
    assert isinstance(model["b"], DoRALinear)
    strip_adapters(model)
    assert model["a"] is model["b"] is shared


def test_attention_that_bypasses_its_projection_is_refused():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(6, 2), "q": nn.Linear(6, 6)})
    path = "torch.nn.modules.linear.NonDynamicallyQuantizableLinear"
    for changes in ({"targets": ("attention.out_proj",)}, {"targets": ("*",), "opaque_layers": (path,)}):
        with pytest.raises(UserError):
            apply_dora(model, config(**changes))


def test_half_precision_extras_train_in_float32_answer_in_half_and_go_back():
    model, x = Small().bfloat16(), torch.randn(2, 6).bfloat16()
    expected, dtypes = model(x), {name: parameter.dtype for name, parameter in model.named_parameters()}
    apply_dora(model, config(also_train=EXTRAS))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert model.text[0].q_proj.weight.dtype == model.text[1].q_proj.bias.dtype == torch.bfloat16
    output = model(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, rtol=3e-2, atol=3e-2)
    output.float().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in trained)
    strip_adapters(model)
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == dtypes
    hooks = [(m._forward_hooks, m._forward_pre_hooks, m._forward_pre_hooks_with_kwargs) for m in model.modules()]
    assert not any(any(of_module) for of_module in hooks)
    assert torch.equal(model(x), expected)


class Projecting(nn.Module):
    """As Gemma 3's projector: a norm inside, and a product with a matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.matrix = nn.LayerNorm(6), nn.Parameter(torch.randn(6, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.norm(x) @ self.matrix).type_as(x)


def test_a_module_with_modules_and_weights_of_its_own_trains_over_a_half_precision_base():
    model, x = nn.ModuleDict({"projector": Projecting(), "q": nn.Linear(5, 5)}).bfloat16(), torch.randn(2, 6).bfloat16()
    wide = copy.deepcopy(model).float()
    apply_dora(model, config(targets=("q",), also_train={"projector": ("projector.*",)}))
    output = model["projector"](x)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, wide["projector"](x.float()).bfloat16())  # rounded once, at the door
    output.float().sum().backward()
    assert model["projector"].matrix.grad.dtype == model["projector"].norm.weight.grad.dtype == torch.float32
    strip_adapters(model)
    assert model["projector"](x).dtype == model["projector"].matrix.dtype == torch.bfloat16


def test_a_trained_bias_over_a_half_precision_base_is_merged_beside():
    model, x = Small().bfloat16().eval(), torch.randn(2, 6).bfloat16()
    apply_dora(model, config(also_train={"bias": ("text.*.q_proj.bias",)}))
    move(model)
    with torch.no_grad():
        model.text[0].q_proj.bias.add_(1.5)
        expected = model(x)
        merge_dora(model)
        torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.05)


def test_a_tied_extra_trains_once_in_float32_and_stays_tied():
    model, ids = Tied().bfloat16(), torch.tensor([[1, 2]])
    apply_dora(model, DoRAConfig(targets=("q",), rank=2, also_train={"table": ("table.weight",)}))
    assert model.head.weight is model.table.weight
    assert model.table.weight.dtype == torch.float32
    output = model(ids)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert model.table.weight.grad.dtype == torch.float32
    strip_adapters(model)
    assert model.head.weight is model.table.weight
    assert model(ids).dtype == model.table.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("changes", [{"also_train": {"table": ("table.weight",)}}, {"init": "pissa"}], ids=str)
def test_what_would_change_a_weight_tied_to_an_adapted_one_is_refused(changes):
    with pytest.raises(UserError):
        apply_dora(Tied(), DoRAConfig(targets=("head",), rank=2, **changes))


def test_strip_refuses_what_pissa_left_of_a_weight_until_it_is_merged():
    model, x = Small(), torch.randn(2, 6)
    base = model(x)
    apply_dora(model, config(init="pissa"))
    with unchanged(model), pytest.raises(UserError):
        strip_adapters(model)
    merge_dora(model)
    strip_adapters(model)
    torch.testing.assert_close(model(x), base, rtol=1e-4, atol=1e-5)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


@pytest.mark.parametrize("detach_norm", [True, False])
def test_dvora_equals_the_written_out_computation(detach_norm):
    model, x = Two().double(), torch.randn(4, 6, dtype=torch.float64)
    before = model(x)
    apply_dora(model, dense_dora.config(rank=3, method="dvora", detach_norm=detach_norm))
    assert torch.equal(model(x), before)
    with torch.no_grad():
        for layer in (model.up, model.down):
            layer.lambda_b.normal_()
            layer.lambda_d.normal_()
            layer.magnitude.mul_(1.3)
    model(x).square().sum().backward()
    leaves, hidden = {}, x
    random_A, random_B = model.dvora_shared.random_A, model.dvora_shared.random_B
    assert not random_A.requires_grad
    for name in ("up", "down"):
        layer = getattr(model, name)
        d, b, m = (p.detach().clone().requires_grad_() for p in (layer.lambda_d, layer.lambda_b, layer.magnitude))
        leaves[name] = {"lambda_d": d, "lambda_b": b, "magnitude": m}
        rows, columns = layer.weight.shape
        direction = layer.weight + torch.diag(b) @ random_B[:rows] @ torch.diag(d) @ random_A[:, :columns]
        norm = direction.norm(dim=1)
        gain = m / (norm.detach() if detach_norm else norm)
        hidden = hidden @ (gain.unsqueeze(1) * direction).t() + layer.bias
        hidden = torch.tanh(hidden) if name == "up" else hidden
    torch.testing.assert_close(model(x), hidden, rtol=1e-10, atol=1e-10)
    hidden.square().sum().backward()
    for name, values in leaves.items():
        for leaf, value in values.items():
            gradient = getattr(getattr(model, name), leaf).grad
            torch.testing.assert_close(gradient, value.grad, rtol=1e-10, atol=1e-10, msg=f"{name} {leaf}")


def test_dvora_random_matrices_come_from_the_seed_under_a_root_that_calls_its_children():
    matrices, x = [], torch.randn(4, 6)
    for seed in (1, 1, 2):
        model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5))
        before = model(x)
        apply_dora(model, dense_dora.config(rank=3, method="dvora", random_seed=seed))
        assert torch.equal(model(x), before)
        matrices.append(model.dvora_shared.random_A)
    assert torch.equal(matrices[0], matrices[1])
    assert not torch.equal(matrices[0], matrices[2])


@pytest.mark.parametrize("init", ["gaussian", "pissa"])
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_every_start_leaves_the_output_as_it_was(init, method):
    model, x = Two().double(), torch.randn(4, 6, dtype=torch.float64)
    before = model(x)
    apply_dora(model, dense_dora.config(rank=4, init=init, method=method))
    torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-10)
    assert (float(model.up.lora_B.detach().abs().max()) > 0) == (init != "gaussian")


def test_pissa_holds_the_largest_singular_values():
    model = Two().double()
    weight = model.up.weight.detach().clone()
    apply_dora(model, dense_dora.config(targets=("up",), init="pissa"))
    singular = torch.linalg.svdvals(weight)
    torch.testing.assert_close(torch.linalg.svdvals(3 * (model.up.lora_B @ model.up.lora_A))[:2], singular[:2])
    torch.testing.assert_close(torch.linalg.svdvals(model.up.weight)[0], singular[2])


LOOKS = """
import os, signal, sys, threading, types
import torch, peft, transformers
from torch import nn
from torch.optim import optimizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

SPACES = (torch, torch.nn, torch.nn.functional, torch.Tensor, nn.Module, nn.Linear, nn.Parameter, torch.optim.Optimizer,
          torch.autograd, transformers, transformers.PreTrainedModel, peft, peft.PeftModel)
MODULE_HOOKS = [name for name in vars(nn.modules.module) if name.startswith('_global')]


def kept(space):
    return {name: value for name, value in vars(space).items() if not isinstance(value, types.ModuleType)}


def process():
    return {
        'finders': (list(sys.meta_path), list(sys.path), list(sys.path_hooks)),
        'process': (sys.excepthook, dict(os.environ), [signal.getsignal(n) for n in range(1, 32)]),
        'threads': threading.active_count(),
        'tables': (dict(CONFIG_MAPPING._extra_content), dict(MODEL_MAPPING._extra_content)),
        'torch': (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()),
        'module hooks': {name: list(getattr(nn.modules.module, name) or ()) for name in MODULE_HOOKS},
        'optimizer hooks before a step': list(optimizer._global_optimizer_pre_hooks),
        **{space.__name__: kept(space) for space in SPACES},
    }


def changed(before, now):
    return sorted(name for name in before if before[name] != now[name])


before, steps = process(), len(optimizer._global_optimizer_post_hooks)
import dora_vl
assert changed(before, process()) == [], changed(before, process())
assert len(optimizer._global_optimizer_post_hooks) == steps
from dora_vl.core import DoRAConfig, apply_dora
import dora_vl.adapters.peft_model
model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
apply_dora(model, DoRAConfig(targets=('*',)))
model(torch.randn(2, 6)).sum().backward()
assert changed(before, process()) == [], changed(before, process())
assert len(optimizer._global_optimizer_post_hooks) == steps + 1
apply_dora(nn.Sequential(nn.Linear(6, 5)), DoRAConfig(targets=('*',)))
assert len(optimizer._global_optimizer_post_hooks) == steps + 1
"""


def test_nothing_of_the_process_changes() -> None:
    done = subprocess.run([sys.executable, "-c", LOOKS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
