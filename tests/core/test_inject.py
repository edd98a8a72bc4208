"""Where adapters go, what trains, and what is refused with one clear line."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from dora_vl.core import DoRAConfig, apply_dora, merge_dora, strip_adapters, trained_parts
from dora_vl.core.linear import DoRALinear
from dora_vl.errors import UserError
from tests.core.dense_dora import move


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


def config(**changes) -> DoRAConfig:
    return DoRAConfig(**{"targets": ("text.*_proj",), "rank": 2, "alpha": 6.0, "dropout": 0.0, **changes})


def test_trained_parts_are_named_and_vectors_do_not_decay():
    model = Small()
    apply_dora(model, config(also_train={"projector": ("projector.*",)}))
    parts = {(part.name, part.weight_decay): set(part.parameters) for part in trained_parts(model)}
    assert parts[("projector", True)] == {"projector.0.weight", "projector.2.weight"}
    assert parts[("projector", False)] == {"projector.0.bias", "projector.2.bias"}
    assert ("dora.magnitude", True) not in parts
    assert len(parts[("dora.A", True)]) == len(parts[("dora.B", True)]) == len(parts[("dora.magnitude", False)]) == 4
    everything = set().union(*parts.values())
    assert everything == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ("text.*.k_proj",)}, r"targets.*'text\.\*\.k_proj' matches none of 8 names, such as"),
        ({"targets": ("text.*.norm",)}, "matches none"),
        ({"targets": ("q_proj",)}, r"'\*\.q_proj'"),
        ({"also_train": {"projector": ("projectr.*",)}}, r"also_train\.projector: pattern 'projectr\.\*' matches none"),
        ({"also_train": {"a": ("projector.0.*",), "b": ("projector.*",)}}, r"projector\.0\.weight would train twice"),
        (
            {"also_train": {"a": ("text.0.q_proj.weight",)}},
            r"is the frozen weight of the adapted layer text\.0\.q_proj",
        ),
        ({"also_keep": ("nothing",)}, "also_keep: pattern 'nothing'"),
        ({"rank_pattern": {"text.7.*": 4}}, r"rank_pattern.*'text\.7\.\*' matches none"),
        ({"alpha_pattern": {"vision.*": 4.0}}, r"alpha_pattern.*'vision\.\*' matches none"),
        ({"magnitude_targets": ("text.0.q_proj",)}, "is in targets and in magnitude_targets"),
        ({"method": "lora", "magnitude_targets": ("vision.*_proj",)}, "magnitude_targets stand beside"),
        ({"method": "full", "targets": ("scale*",)}, "matches none"),
        ({"method": "full", "targets": ("projector.1",)}, "hold no parameters"),
        ({"init": "pissa", "rank": 7}, r"text\.0\.q_proj has rank 7, above the smaller side of its weight \[6, 6\]"),
    ],
)
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_contradictions_are_refused_by_name_and_change_nothing(changes, message, init):
    model = Small()
    model.vision.requires_grad_(False)
    modules, flags = list(model.named_modules()), [parameter.requires_grad for parameter in model.parameters()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        apply_dora(model, config(**{"init": init, **changes}))
    assert list(model.named_modules()) == modules
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    apply_dora(model, config())
    with pytest.raises(UserError, match="adapted"):
        apply_dora(model, config())


@pytest.mark.parametrize(
    "changes",
    [
        {"targets": ()},
        {"rank": 0},
        {"alpha": 0.0},
        {"alpha": float("nan")},
        {"dropout": 1.0},
        {"rank_pattern": {"*": 0}},
        {"init": "orthogonal", "rank": 3},
        {"method": "dvora", "init": "pissa"},
    ],
)
def test_impossible_settings_are_refused(changes):
    with pytest.raises(UserError, match="adapter: "):
        config(**changes)


def test_rank_and_alpha_patterns_and_magnitude_targets():
    model = Small()
    changes = {
        "rank_pattern": {"text.1.*": 3},
        "alpha_pattern": {"text.0.q*": 1.0},
        "magnitude_targets": ("vision.*_proj",),
    }
    apply_dora(model, config(**changes))
    assert model.text[1].q_proj.lora_A.shape == (3, 6)
    assert model.text[0].q_proj.lora_A.shape == (2, 6)
    assert model.text[0].q_proj.scale() == 0.5
    assert model.text[0].v_proj.scale() == 3.0
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


def test_half_precision_extras_train_in_float32_and_answer_in_half():
    model = Small().bfloat16()
    x = torch.randn(2, 6).bfloat16()
    expected = model(x)
    apply_dora(
        model, config(also_train={"projector": ("projector.*",), "bias": ("text.0.q_proj.bias", "text.*.norm.*")})
    )
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(dtypes.values()) == {torch.float32}
    assert model.text[0].q_proj.weight.dtype == torch.bfloat16
    assert model.text[1].q_proj.bias.dtype == torch.bfloat16
    found = model(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)
    found.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.q, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.q(self.table(ids)))


def test_tied_extra_trains_once_in_float32_and_stays_tied():
    model = Tied().bfloat16()
    apply_dora(model, DoRAConfig(targets=("q",), rank=2, also_train={"table": ("table.weight",)}))
    assert model.head.weight is model.table.weight
    assert model.table.weight.dtype == torch.float32
    output = model(torch.tensor([[1, 2]]))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert model.table.weight.grad.dtype == torch.float32


def test_training_what_is_tied_to_an_adapted_weight_is_refused():
    with pytest.raises(UserError, match=r"table.weight.*head"):
        apply_dora(Tied(), DoRAConfig(targets=("head",), rank=2, also_train={"table": ("table.weight",)}))


def test_on_the_meta_device_everything_is_counted():
    with torch.device("meta"):
        model = Small()
    for method in ("dora", "lora", "magnitude", "dvora"):
        twin = copy.deepcopy(model)
        apply_dora(twin, config(method=method, magnitude_targets=()))
        count = sum(p.numel() for p in twin.parameters() if p.requires_grad)
        each = {"dora": 24 + 6, "lora": 24, "magnitude": 6, "dvora": 2 + 6 + 6}[method]
        assert count == 4 * each, method


def test_merged_model_is_refused_for_training():
    model = Small()
    apply_dora(model, config())
    merge_dora(model)
    with pytest.raises(RuntimeError, match="would not train"):
        model.train()(torch.randn(2, 6))
    with torch.no_grad():
        model(torch.randn(2, 6))


def test_whole_model_survives_deepcopy_and_pickle():
    model = Small()
    apply_dora(model, config(also_train={"projector": ("projector.*",)}))
    move(model)
    x = torch.randn(2, 6)
    expected = model.eval()(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        assert [part.name for part in trained_parts(twin)] == [part.name for part in trained_parts(model)]
        assert next(iter(trained_parts(twin)[0].parameters.values())) is not next(
            iter(trained_parts(model)[0].parameters.values())
        )


def test_strip_puts_plain_layers_back():
    model = Small()
    x = torch.randn(2, 6)
    apply_dora(model, config())
    move(model)
    expected = model.eval()(x)
    merge_dora(model)
    strip_adapters(model)
    assert type(model.text[0].q_proj) is nn.Linear
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    assert set(model.state_dict()) == set(Small().state_dict())


@pytest.mark.parametrize(
    ("setting", "value", "named"),
    [
        ("method", "LoRA", "lora"),
        ("init", "PiSSA", "pissa"),
        ("dropout_mode", "peft", "whole_change"),
        ("rank_scaling", "none", "linear"),
        ("kinds", ("lineer",), "linear"),
        ("kinds", "linear", "('linear',)"),
        ("targets", "*q_proj", "('*q_proj',)"),
    ],
)
def test_an_unknown_choice_and_a_text_for_several_are_refused_with_what_is_taken(setting, value, named):
    with pytest.raises(UserError, match=f"adapter: {setting} is ") as refused:
        unchecked(**{setting: value}).__post_init__()
    assert named in str(refused.value).partition("must be")[2]


def unchecked(**changes) -> DoRAConfig:
    """A config whose `__init__`, the one place where the tests' own type checker looks, did not run."""
    made = object.__new__(DoRAConfig)
    vars(made).update({**vars(config()), **changes})
    return made


def test_attention_that_bypasses_its_projection_is_refused():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(6, 2), "q": nn.Linear(6, 6)})
    with pytest.raises(UserError, match=r"attention\.out_proj"):
        apply_dora(model, DoRAConfig(targets=("attention.out_proj",)))
