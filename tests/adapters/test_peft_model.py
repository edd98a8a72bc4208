"""`accelerate_peft`: what users do with a PEFT model and its accelerated copy; convolutions and PEFT, both ways."""

import contextlib
import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora.conversion import convert_to_lora
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn

from dora_vl.adapters.folder import load_adapter, save_adapter
from dora_vl.adapters.peft_model import AcceleratedLinear, accelerate_peft, restore_peft
from dora_vl.core import DoRAConfig, adapted_layers, apply_dora
from dora_vl.errors import UserError
from tests.adapters.foreign_files import tiny_llama
from tests.adapters.peft_folders import moved_peft
from tests.core.dense_dora import move_layer, unchanged

IDS = torch.randint(32, (4, 7), generator=torch.Generator().manual_seed(0))
X = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(1))
TARGETS = ["q_proj", "down_proj"]
DORA, LORA = {"use_dora": True}, {"use_dora": False}

Flow = Callable[[Any], list[Tensor]]


def twins(settings: dict[str, Any]) -> tuple[Any, Any]:
    """PEFT's model with two adapters, and the same one accelerated; both have run once, so that norms are kept."""
    model = tiny_llama()
    if settings.get("bias"):
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.bias = nn.Parameter(0.1 * torch.randn(module.out_features))
    plain = moved_peft(model, **{key: value for key, value in settings.items() if key != "bias"}).eval()
    plain.add_adapter("other", LoraConfig(r=3, lora_alpha=5, use_dora=settings["use_dora"], target_modules=TARGETS))
    torch.manual_seed(9)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if ".other." in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    fast = copy.deepcopy(plain)
    assert len(accelerate_peft(fast).layers) == (0 if settings.get("lora_bias") else 4)
    for model in (plain, fast):
        logits(model)
    return plain, fast


@torch.no_grad()
def logits(model: Any, **named: Any) -> Tensor:
    return model(IDS, **named).logits


def gradients(model: Any) -> list[Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return [parameter.grad for _, parameter in sorted(model.named_parameters()) if parameter.grad is not None]


def everything(model: Any) -> list[Tensor]:
    return [logits(model), *gradients(model.train())]


def layer_of(model: Any) -> Any:
    return model.base_model.model.model.layers[0].self_attn.q_proj


# -- the flows -------------------------------------------------------------------------------------------------


def after(*changes: Callable[[Any], object]) -> Flow:
    """Everything of a model that was changed."""

    def flow(model: Any) -> list[Tensor]:
        for change in changes:
            change(model)
        return everything(model)

    return flow


def weighted(kind: str) -> Flow:
    shares = {"adapters": ["default", "other"], "weights": [0.3, 0.6], "adapter_name": "mix"}
    return after(lambda m: m.add_weighted_adapter(**shares, combination_type=kind), lambda m: m.set_adapter("mix"))


def added_again(model: Any) -> None:
    torch.manual_seed(4)
    model.add_adapter("default", LoraConfig(r=2, target_modules=["q_proj", "k_proj"], init_lora_weights=False))
    model.set_adapter("default")


def switched(model: Any) -> list[Tensor]:
    """Other adapters, both, none, half the scale, and merged and unmerged."""
    scenes = []

    def look(change: Callable[[], object]) -> None:
        change()
        scenes.append(logits(model))

    def scale(factor: float) -> None:
        for module in model.modules():
            if isinstance(module, PeftLinear):
                module.set_scale("default", factor)

    look(lambda: model.set_adapter("other"))
    with model.disable_adapter():
        look(lambda: None)
    look(lambda: model.base_model.set_adapter(["default", "other"]))
    look(lambda: model.set_adapter("default"))
    look(lambda: scale(0.5))
    look(model.merge_adapter)
    look(model.unmerge_adapter)
    look(lambda: scale(1.0))
    assert all((scenes[0] - scene).abs().max() > 1e-3 for scene in scenes[1:])
    return scenes


def pickled(model: Any) -> list[Tensor]:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return everything(torch.load(file, weights_only=False))


def checkpointed(*, reentrant: bool) -> Flow:
    def flow(model: Any) -> list[Tensor]:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        return gradients(model.train())

    return flow


def under_autocast(model: Any) -> list[Tensor]:
    """In two contexts: torch 2.8 keeps the weights that the first run cast without a gradient, and PEFT's get none."""
    with torch.autocast("cpu", torch.bfloat16):
        first = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        return [first, *gradients(model.train())]


def called_with_others(wrap: Callable[[Tensor], Tensor], part: str) -> Flow:
    """Two sets of other tensors in turn, then the model's own again."""

    def flow(model: Any) -> list[Tensor]:
        outputs = []
        for factor in (1.1, 0.9):
            others = {name: wrap(p.detach() * factor) for name, p in model.named_parameters() if part in name}
            outputs.append(torch.func.functional_call(model, others, (IDS,)).logits.detach())
        assert (outputs[0] - outputs[1]).abs().max() > 1e-4
        return [*outputs, *everything(model)]

    return flow


def parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def functional_gradient(model: Any) -> list[Tensor]:
    own = {name: p.detach() for name, p in model.named_parameters() if "lora_" in name and "default" in name}
    loss = torch.func.grad(lambda p: torch.func.functional_call(model, p, (IDS,)).logits.square().mean())
    return list(loss(own).values())


def inference_then_training(model: Any) -> list[Tensor]:
    with torch.inference_mode():
        first = model(IDS).logits.clone()
    return [first.clone(), *gradients(model.train())]


def loaded(*, assign: bool) -> Flow:
    return after(lambda m: m.load_state_dict({k: 1.1 * v for k, v in m.state_dict().items()}, assign=assign))


@torch.no_grad()
def edit(model: Any) -> None:
    for name, own in model.named_parameters():
        if "lora_A" in name or "q_proj.base_layer" in name:
            own.mul_(1.3)


@torch.no_grad()
def halve_base(model: Any) -> None:
    for name, own in model.named_parameters():
        if "lora_" not in name:
            own.data = own.data.bfloat16()


def rescaled(by: float) -> Flow:
    def flow(model: Any) -> list[Tensor]:
        with rescale_adapter_scale(model, by):
            inside = everything(model)
        return [*inside, *everything(model.eval())]

    return flow


def only_trains(part: str) -> Callable[[Any], object]:
    return lambda model: [own.requires_grad_(part in name) for name, own in model.named_parameters()]


OF_DORA: dict[str, Flow] = {
    "everything": everything,
    "switching": switched,
    "merge_and_unload": lambda model: [logits(model.merge_and_unload())],
    "merge safely": lambda model: [logits(model.merge_and_unload(safe_merge=True))],
    "merge two": lambda model: [logits(model.merge_and_unload(adapter_names=["default", "other"]))],
    "unload": lambda model: [logits(model.unload())],
    **{f"weighted {kind}": weighted(kind) for kind in ("linear", "svd", "cat")},
    "delete another": after(lambda model: model.delete_adapter("other")),
    "delete the active one": lambda model: [model.delete_adapter("default"), logits(model)][1:],
    "delete and add again": after(lambda m: m.set_adapter("other"), lambda m: m.delete_adapter("default"), added_again),
    "DataParallel": lambda model: [logits(nn.DataParallel(model))],
    "deepcopy": lambda model: everything(copy.deepcopy(model)),
    "pickle": pickled,
    "checkpointing": checkpointed(reentrant=False),
    "reentrant checkpointing": checkpointed(reentrant=True),
    "autocast": under_autocast,
    **{str(kind): after(lambda m, kind=kind: m.to(kind)) for kind in (torch.bfloat16, torch.float16, torch.float64)},
    "bfloat16 base": after(halve_base),
    "functional_call, tensors": called_with_others(lambda tensor: tensor, ""),
    "functional_call, parameters": called_with_others(parameter, ""),
    "functional_call, adapter alone": called_with_others(lambda tensor: tensor, "lora_"),
    "func.grad": functional_gradient,
    "func.vmap": lambda model: [torch.func.vmap(layer_of(model))(X).detach()],
    "func.vmap of func.grad": lambda m: [torch.func.vmap(torch.func.grad(lambda x: layer_of(m)(x).square().sum()))(X)],
    "inference mode, then training": inference_then_training,
    "generate": lambda m: [m.generate(input_ids=IDS, max_new_tokens=5, do_sample=False, pad_token_id=0).double()],
    "load_state_dict": loaded(assign=False),
    "load_state_dict, assign": loaded(assign=True),
    "set_peft_model_state_dict": after(
        lambda m: set_peft_model_state_dict(m, {k: 1.2 * v for k, v in get_peft_model_state_dict(m).items()})
    ),
    "edit in place": after(edit),
    "rescaled": rescaled(0.4),
    "rescaled to nothing": rescaled(0.0),
    "B alone trains": after(only_trains("lora_B")),
    "the base trains": after(only_trains("base_layer")),
    "one vector": lambda model: [layer_of(model)(X[0, 0]).detach().flatten()],  # PEFT's is a batch of one
}
OF_LORA: dict[str, Flow] = {
    **{f"weighted {kind}": weighted(kind) for kind in ("linear", "svd", "cat")},
    "mixed batch": lambda m: [logits(m, adapter_names=["default", "other", "__base__", "other"]), *everything(m)],
    "functional_call, parameters": called_with_others(parameter, "lora_"),
}
FLOWS: list[tuple[str, Flow, dict[str, Any]]] = [
    *((name, flow, DORA) for name, flow in OF_DORA.items()),
    *((f"LoRA {name}", flow, LORA) for name, flow in OF_LORA.items()),
    *(
        (str(m), everything, {**DORA, **m})
        for m in ({"bias": True}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]})
    ),
    *((f"LoRA {more}", everything, {**LORA, **more}) for more in ({"bias": True}, {"lora_bias": True})),
]
TOLERANCES = {"autocast": 3e-2, "torch.bfloat16": 3e-2, "torch.float16": 3e-2, "bfloat16 base": 3e-2, "switching": 1e-4,
              "torch.float64": 1e-12, "generate": 0.0}  # fmt: skip
"""Relative, where it is not 1e-5: two roads through bfloat16 or float16, or through an SVD."""


@pytest.mark.parametrize(("name", "flow", "settings"), FLOWS, ids=[name for name, *_ in FLOWS])
def test_flow_is_pefts(name, flow, settings):
    plain, fast = twins(settings)
    coarser = "weighted" in name or "bias" in settings
    assert_all_close(flow(fast), flow(plain), 1e-4 if coarser else TOLERANCES.get(name, 1e-5))


def assert_all_close(ours: list[Tensor], pefts: list[Tensor], tolerance: float) -> None:
    assert [tensor.dtype for tensor in ours] == [tensor.dtype for tensor in pefts]
    for own, theirs in zip(ours, pefts, strict=True):
        torch.testing.assert_close(own, theirs, rtol=0, atol=tolerance * float(theirs.abs().max()))


def test_hot_swapping_is_pefts(tmp_path):
    def swapped(model: Any, folder: Path) -> list[Tensor]:
        before = logits(model)
        model.save_pretrained(folder)
        edit(model)
        moved = logits(model)
        hotswap_adapter(model, str(folder), "default")
        return [before, moved, *everything(model)]

    plain, fast = twins(LORA)
    assert_all_close(swapped(fast, tmp_path / "fast"), swapped(plain, tmp_path / "plain"), 1e-5)


# -- what differs from PEFT, and what stays its own ---------------------------------------------------------------


def test_whole_change_dropout_is_pefts_with_the_same_mask():
    wrapped = moved_peft(tiny_llama(), lora_dropout=0.4).train()
    torch.manual_seed(7)
    before = [gradient.clone() for gradient in gradients(wrapped)]
    accelerate_peft(wrapped, dropout_mode="whole_change")
    torch.manual_seed(7)
    assert_all_close(gradients(wrapped), before, 1e-5)


def test_parameters_state_and_saved_files_stay_pefts(tmp_path):
    wrapped = moved_peft(tiny_llama())
    state, parameters = wrapped.state_dict(), dict(wrapped.named_parameters())
    modules = [name for name, _ in wrapped.named_modules()]
    wrapped.save_pretrained(tmp_path / "before")
    accelerate_peft(wrapped)
    assert [name for name, _ in wrapped.named_modules()] == modules
    assert all(own is parameters[name] for name, own in wrapped.named_parameters())
    assert all(torch.equal(tensor, state[key]) for key, tensor in wrapped.state_dict().items())
    assert wrapped.state_dict().keys() == state.keys()
    logits(wrapped)
    wrapped.save_pretrained(tmp_path / "after")
    files = [(tmp_path / side / "adapter_model.safetensors").read_bytes() for side in ("before", "after")]
    assert files[0] == files[1]
    layer = next(module for module in wrapped.modules() if isinstance(module, PeftLinear))
    assert type(layer) is AcceleratedLinear
    assert restore_peft(wrapped) == 4
    assert type(layer) is PeftLinear
    assert {type(own) for own in wrapped.parameters()} == {nn.Parameter}
    assert not any(key.startswith("_dora_vl") for key in vars(layer))
    assert restore_peft(wrapped) == 0


def test_a_second_derivative_is_refused():
    """The backward pass is written out once; a gradient penalty would need it to be differentiable."""
    _, fast = twins(DORA)
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(layer_of(fast)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.square().sum().backward()


def test_layers_that_cannot_go_are_named_and_stay_pefts():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 6)
            self.q_proj = nn.Linear(6, 5)
            self.frozen_hook = nn.Linear(6, 5)

        def forward(self, ids: Tensor) -> Tensor:
            return self.q_proj(self.embed(ids)) + self.frozen_hook(self.embed(ids))

    model = Pair()
    model.frozen_hook.register_forward_hook(lambda module, inputs, output: output * 2)
    wrapped = moved_peft(model, target_modules=["embed", "q_proj", "frozen_hook"]).eval()
    ids = torch.arange(4)
    expected = wrapped(ids)
    done = accelerate_peft(wrapped)
    assert done.layers == ("base_model.model.q_proj",)
    assert set(done.left) == {"base_model.model.embed", "base_model.model.frozen_hook"}
    torch.testing.assert_close(wrapped(ids), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="PEFT"):
        accelerate_peft(nn.Linear(2, 2))


@torch.no_grad()
@pytest.mark.parametrize("float32_adapters", [True, False])
def test_bfloat16_is_as_near_to_the_truth_as_pefts(float32_adapters):
    """Logits of a bfloat16 model move by up to 1 of 33 under `accelerate_peft`: both sides round, neither is off.

    One layer against float64 (one rounding of the result alone would be 1.66e-3): PEFT 3.5e-3 with bfloat16 adapters
    and 2.3e-3 with float32 ones, whose whole low-rank path it computes in float32; here 2.9e-3 in either case.
    """
    torch.manual_seed(0)
    wrapped = get_peft_model(
        nn.Sequential(nn.Linear(576, 768)).to(torch.bfloat16),
        LoraConfig(r=16, lora_alpha=32, use_dora=True, target_modules=["0"]),
        autocast_adapter_dtype=float32_adapters,
    ).eval()
    layer: Any = wrapped.base_model.model[0]
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    m = layer.lora_magnitude_vector.default.weight
    a.copy_(a.bfloat16())
    b.copy_((torch.randn(b.shape) * 0.02).bfloat16())
    m.copy_((m * (1 + 0.05 * torch.randn(m.shape))).bfloat16())
    x = torch.randn(256, 576).bfloat16()
    direction = layer.base_layer.weight.double() + 2 * b.double() @ a.double()
    gain = m.double() / direction.norm(dim=1)
    expected = gain * (x.double() @ direction.t()) + layer.base_layer.bias.double()
    theirs = wrapped(x).double() - expected
    accelerate_peft(wrapped)
    ours = wrapped(x).double() - expected
    assert float(ours.norm()) < (1.5 if float32_adapters else 1.0) * float(theirs.norm())
    assert float(ours.norm()) < 3.5e-3 * float(expected.norm())
    assert abs(float((ours * expected).sum())) < 2e-4 * float(expected.square().sum())  # no gain or loss of scale


@pytest.mark.parametrize("rank", [3, 8, 16])
def test_pefts_conversion_to_lora_loses_the_magnitudes(rank: int) -> None:
    """What docs/export.md warns of, for as long as PEFT does so; a merge keeps them."""
    wrapped = moved_peft(tiny_llama()).eval()
    expected = logits(wrapped)
    config, factors = convert_to_lora(wrapped, rank=rank)
    converted = get_peft_model(tiny_llama(), config).eval()
    assert not set_peft_model_state_dict(converted, factors).unexpected_keys
    without = moved_peft(tiny_llama(), use_dora=False).eval()
    torch.testing.assert_close(logits(converted), logits(without), rtol=1e-5, atol=1e-5)
    assert (logits(converted) - expected).abs().max() > 0.03
    torch.testing.assert_close(logits(wrapped.merge_and_unload()), expected, rtol=1e-5, atol=1e-5)


MODES = ("zeros", "reflect", "replicate", "circular")
SIDES = (9, 11)


class One(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


@st.composite
def convolutions(draw) -> nn.Module:
    """A convolution of one or two dimensions whose settings differ by axis."""
    dims = draw(st.integers(1, 2))

    def axes(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(least, most), min_size=dims, max_size=dims)))

    padding = draw(st.sampled_from(["numbers", "same", "valid"]))
    torch.manual_seed(draw(st.integers(0, 99)))
    return (nn.Conv1d, nn.Conv2d)[dims - 1](
        6,
        4,
        axes(1, 3),
        stride=1 if padding == "same" else axes(1, 2),
        padding=axes(0, 2) if padding == "numbers" else padding,
        dilation=axes(1, 2),
        padding_mode=draw(st.sampled_from(MODES)),
        bias=draw(st.booleans()),
    )


def is_beyond_peft(conv: Any) -> bool:
    """Whether it has what PEFT's A leaves out: a dilation that moves something, or a padding of other values."""
    spread = any(step > 1 and size > 1 for step, size in zip(conv.dilation, conv.kernel_size, strict=True))
    widest = max(conv.kernel_size) - 1
    pads = {"same": widest, "valid": 0}[conv.padding] if isinstance(conv.padding, str) else max(conv.padding)
    return spread or (conv.padding_mode != "zeros" and pads > 0)


def adapted(conv: nn.Module, method: str, alpha: float = 4.0) -> nn.Module:
    model = One(copy.deepcopy(conv))
    config = DoRAConfig(targets=("conv",), kinds=("conv",), rank=3, alpha=alpha, dropout=0.0, method=method)
    apply_dora(model, config)
    for _, layer in adapted_layers(model):
        move_layer(layer)
    return model.eval()


def assert_same(output: torch.Tensor, expected: torch.Tensor) -> None:
    error = {torch.float64: 1e-10, torch.float32: 1e-6}[expected.dtype] * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(output, expected, rtol=0, atol=error)


def peft_type(folder) -> str:
    return json.loads((folder / "adapter_config.json").read_text())["peft_type"]


def pefts_output(conv: nn.Module, folder, x: torch.Tensor) -> torch.Tensor:
    return PeftModel.from_pretrained(One(copy.deepcopy(conv)), folder).eval()(x).detach()


def rewritten(folder, field: str, value: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))


@settings(max_examples=30, deadline=None)
@given(convolutions(), st.sampled_from(["dora", "lora"]), st.sampled_from([torch.float32, torch.float64]))
def test_peft_computes_the_same_or_refuses(tmp_path_factory, conv, method, dtype):
    folder = tmp_path_factory.mktemp("conv") / "adapter"
    conv = conv.to(dtype)
    x = torch.randn(2, 6, *SIDES[: conv.weight.ndim - 2], dtype=dtype)
    ours = adapted(conv, method)
    expected = ours(x).detach()
    save_adapter(ours, folder)
    again = One(copy.deepcopy(conv))
    load_adapter(again, folder)
    torch.testing.assert_close(again.eval()(x), expected, rtol=0, atol=0)
    if peft_type(folder) == "LORA":
        assert_same(pefts_output(conv, folder, x), expected)
        return
    with pytest.raises(KeyError):
        pefts_output(conv, folder, x)
    # Not refused without need: under PEFT's name it is another result, or sizes that do not match.
    rewritten(folder, "peft_type", "LORA")
    with contextlib.suppress(RuntimeError):
        assert (pefts_output(conv, folder, x) - expected).abs().max() > 1e-3 * expected.abs().max()


@settings(max_examples=20, deadline=None)
@given(convolutions(), st.booleans())
def test_a_folder_of_pefts_loads_with_its_numbers_or_is_refused(tmp_path_factory, conv, use_dora):
    folder = tmp_path_factory.mktemp("conv") / "adapter"
    theirs = moved_peft(One(copy.deepcopy(conv)), target_modules=["conv"], use_dora=use_dora).eval()
    theirs.save_pretrained(folder)
    x = torch.randn(2, 6, *SIDES[: conv.weight.ndim - 2])
    model = One(copy.deepcopy(conv)).eval()
    if is_beyond_peft(conv):
        # So does a model that is adapted already.
        for other in (model, adapted(conv, "dora" if use_dora else "lora", alpha=7.0)):
            with unchanged(other), pytest.raises(UserError):
                load_adapter(other, folder)
    else:
        load_adapter(model, folder)
        assert_same(model.eval()(x).detach(), theirs(x).detach())
