"""What users do with a PEFT model: each flow once on PEFT's model and once on its accelerated copy."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from dora_vl.adapters.peft_model import accelerate_peft, restore_peft
from tests.adapters.foreign_files import tiny_llama
from tests.adapters.peft_folders import moved_peft

IDS = torch.randint(32, (4, 7), generator=torch.Generator().manual_seed(0))
X = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(1))
TARGETS = ["q_proj", "down_proj"]
DORA, LORA = {"use_dora": True}, {"use_dora": False}

Flow = Callable[..., list[Tensor]]


def twins(settings: dict) -> tuple[nn.Module, nn.Module]:
    """PEFT's model with two adapters, and the same one accelerated; both have run once, so that norms are kept."""
    plain = moved_peft(tiny_llama(), **settings).eval()
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
def logits(model: nn.Module, **named) -> Tensor:
    return model(IDS, **named).logits


def gradients(model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return [parameter.grad for _, parameter in sorted(model.named_parameters()) if parameter.grad is not None]


def everything(model: nn.Module) -> list[Tensor]:
    return [logits(model), *gradients(model.train())]


def layer_of(model: nn.Module) -> nn.Module:
    return model.base_model.model.model.layers[0].self_attn.q_proj


# -- the flows -------------------------------------------------------------------------------------------------


def merged(model: nn.Module, **named) -> list[Tensor]:
    return [logits(model.merge_and_unload(**named))]


def unloaded(model: nn.Module) -> list[Tensor]:
    return [logits(model.unload())]


def weighted(model: nn.Module, kind: str) -> list[Tensor]:
    model.add_weighted_adapter(["default", "other"], [0.3, 0.6], "mix", combination_type=kind)
    model.set_adapter("mix")
    return everything(model)


def deleted_other(model: nn.Module) -> list[Tensor]:
    model.delete_adapter("other")
    return everything(model)


def deleted_active(model: nn.Module) -> list[Tensor]:
    model.delete_adapter("default")
    return [logits(model)]


def deleted_and_added_again(model: nn.Module) -> list[Tensor]:
    model.set_adapter("other")
    model.delete_adapter("default")
    torch.manual_seed(4)
    model.add_adapter("default", LoraConfig(r=2, target_modules=["q_proj", "k_proj"], init_lora_weights=False))
    model.set_adapter("default")
    return everything(model)


def mixed_batch(model: nn.Module) -> list[Tensor]:
    return [logits(model, adapter_names=["default", "other", "__base__", "other"]), *everything(model)]


def in_parallel(model: nn.Module) -> list[Tensor]:
    return [logits(nn.DataParallel(model))]


def copied(model: nn.Module) -> list[Tensor]:
    return everything(copy.deepcopy(model))


def pickled(model: nn.Module) -> list[Tensor]:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return everything(torch.load(file, weights_only=False))


def checkpointed(model: nn.Module, *, reentrant: bool) -> list[Tensor]:
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return gradients(model.train())


def under_autocast(model: nn.Module) -> list[Tensor]:
    """In two contexts: torch 2.8 keeps the weights that the first run cast without a gradient, and PEFT's get none."""
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        return [found, *gradients(model.train())]


def cast(model: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    return everything(model.to(dtype))


def half_base(model: nn.Module) -> list[Tensor]:
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    return everything(model)


def called_with_others(model: nn.Module, wrap: Callable[[Tensor], Tensor], part: str) -> list[Tensor]:
    """Two sets of other tensors in turn, then the model's own again."""
    found = []
    for factor in (1.1, 0.9):
        others = {name: wrap(p.detach() * factor) for name, p in model.named_parameters() if part in name}
        found.append(torch.func.functional_call(model, others, (IDS,)).logits.detach())
    assert (found[0] - found[1]).abs().max() > 1e-4
    return [*found, *everything(model)]


def parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def functional_gradient(model: nn.Module) -> list[Tensor]:
    own = {name: p.detach() for name, p in model.named_parameters() if "lora_" in name and "default" in name}
    loss = torch.func.grad(lambda p: torch.func.functional_call(model, p, (IDS,)).logits.square().mean())
    return list(loss(own).values())


def vectorised(model: nn.Module) -> list[Tensor]:
    return [torch.func.vmap(layer_of(model))(X).detach()]


def gradient_of_each_row(model: nn.Module) -> list[Tensor]:
    layer = layer_of(model)
    return [torch.func.vmap(torch.func.grad(lambda x: layer(x).square().sum()))(X)]


def inference_then_training(model: nn.Module) -> list[Tensor]:
    with torch.inference_mode():
        found = model(IDS).logits.clone()
    return [found.clone(), *gradients(model.train())]


def generated(model: nn.Module) -> list[Tensor]:
    return [model.generate(input_ids=IDS, max_new_tokens=5, do_sample=False, pad_token_id=0).double()]


def loaded(model: nn.Module, *, assign: bool) -> list[Tensor]:
    model.load_state_dict({key: tensor * 1.1 for key, tensor in model.state_dict().items()}, assign=assign)
    return everything(model)


def adapter_loaded(model: nn.Module) -> list[Tensor]:
    set_peft_model_state_dict(model, {key: value * 1.2 for key, value in get_peft_model_state_dict(model).items()})
    return everything(model)


def swapped_hot(model: nn.Module, folder: Path) -> list[Tensor]:
    before = logits(model)
    model.save_pretrained(folder)
    with torch.no_grad():
        for name, own in model.named_parameters():
            if "lora_A.default" in name:
                own.mul_(3.0)
    moved = logits(model)
    hotswap_adapter(model, str(folder), "default")
    torch.testing.assert_close(logits(model), before)
    return [moved, *everything(model)]


def edited_in_place(model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        for name, own in model.named_parameters():
            if "lora_A" in name or "q_proj.base_layer" in name:
                own.mul_(1.3)
    return everything(model)


def rescaled(model: nn.Module, by: float) -> list[Tensor]:
    with rescale_adapter_scale(model, by):
        inside = everything(model)
    return [*inside, *everything(model.eval())]


def trained_in_part(model: nn.Module, part: str) -> list[Tensor]:
    for name, own in model.named_parameters():
        own.requires_grad_(part in name)
    return everything(model)


def one_vector(model: nn.Module) -> list[Tensor]:
    return [layer_of(model)(X[0, 0]).detach().flatten()]  # PEFT puts a batch of one in front


def half(dtype: torch.dtype) -> Flow:
    return lambda model: cast(model, dtype)


COARSE = 3e-2
"""Relative: two roads through bfloat16 or float16."""
FLOWS: dict[str, tuple[Flow, dict, float]] = {
    "merge_and_unload": (merged, DORA, 1e-5),
    "merge_and_unload safe": (lambda model: merged(model, safe_merge=True), DORA, 1e-5),
    "merge two": (lambda model: merged(model, adapter_names=["default", "other"]), DORA, 1e-5),
    "unload": (unloaded, DORA, 1e-5),
    **{f"weighted {k}": (lambda model, k=k: weighted(model, k), LORA, 1e-4) for k in ("linear", "svd", "cat")},
    **{f"weighted DoRA {k}": (lambda model, k=k: weighted(model, k), DORA, 1e-4) for k in ("linear", "svd", "cat")},
    "delete another": (deleted_other, DORA, 1e-5),
    "delete the active one": (deleted_active, DORA, 1e-5),
    "delete and add again": (deleted_and_added_again, DORA, 1e-5),
    "mixed batch": (mixed_batch, LORA, 1e-5),
    "modules_to_save": (everything, {**DORA, "modules_to_save": ["lm_head"]}, 1e-5),
    "lora_bias": (everything, {**LORA, "lora_bias": True}, 1e-5),
    "DataParallel": (in_parallel, DORA, 1e-5),
    "deepcopy": (copied, DORA, 1e-5),
    "pickle": (pickled, DORA, 1e-5),
    "checkpointing": (lambda model: checkpointed(model, reentrant=False), DORA, 1e-5),
    "reentrant checkpointing": (lambda model: checkpointed(model, reentrant=True), DORA, 1e-5),
    "autocast": (under_autocast, DORA, COARSE),
    "bfloat16": (half(torch.bfloat16), DORA, COARSE),
    "float16": (half(torch.float16), DORA, COARSE),
    "float64": (half(torch.float64), DORA, 1e-12),
    "bfloat16 base": (half_base, DORA, COARSE),
    "functional_call, tensors": (lambda model: called_with_others(model, lambda t: t, ""), DORA, 1e-5),
    "functional_call, parameters": (lambda model: called_with_others(model, parameter, ""), DORA, 1e-5),
    "functional_call, adapter alone": (lambda model: called_with_others(model, lambda t: t, "lora_"), DORA, 1e-5),
    "functional_call, parameters of LoRA": (lambda model: called_with_others(model, parameter, "lora_"), LORA, 1e-5),
    "func.grad": (functional_gradient, DORA, 1e-5),
    "func.vmap": (vectorised, DORA, 1e-5),
    "func.vmap of func.grad": (gradient_of_each_row, DORA, 1e-5),
    "inference mode, then training": (inference_then_training, DORA, 1e-5),
    "generate": (generated, DORA, 0.0),
    "load_state_dict": (lambda model: loaded(model, assign=False), DORA, 1e-5),
    "load_state_dict, assign": (lambda model: loaded(model, assign=True), DORA, 1e-5),
    "set_peft_model_state_dict": (adapter_loaded, DORA, 1e-5),
    "edit in place": (edited_in_place, DORA, 1e-5),
    "rescaled": (lambda model: rescaled(model, 0.4), DORA, 1e-5),
    "rescaled to nothing": (lambda model: rescaled(model, 0.0), DORA, 1e-5),
    "B alone trains": (lambda model: trained_in_part(model, "lora_B"), DORA, 1e-5),
    "the base trains": (lambda model: trained_in_part(model, "base_layer"), DORA, 1e-5),
    "one vector": (one_vector, DORA, 1e-5),
}


@pytest.mark.parametrize("name", FLOWS)
def test_flow_is_pefts(name):
    flow, settings, tolerance = FLOWS[name]
    plain, fast = twins(settings)
    assert_all_close(flow(fast), flow(plain), tolerance)


def assert_all_close(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in wanted]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * float(other.abs().max()))


def test_hot_swapping_is_pefts(tmp_path):
    plain, fast = (model for model in twins(LORA))
    assert_all_close(swapped_hot(fast, tmp_path / "fast"), swapped_hot(plain, tmp_path / "plain"), 1e-5)


def test_a_second_derivative_is_refused_in_words():
    """The backward pass is written out once; a gradient penalty would need it to be differentiable."""
    _, fast = twins(DORA)
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(layer_of(fast)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.square().sum().backward()


def test_deleted_adapters_are_let_go():
    _, fast = twins(DORA)
    fast.delete_adapter("other")
    torch.manual_seed(0)
    fast.add_adapter("third", LoraConfig(r=2, use_dora=True, target_modules=TARGETS))
    fast.set_adapter("third")
    logits(fast)
    assert set(vars(layer_of(fast))["_dora_vl_core"].cores) == {"default", "third"}


# -- values that change behind torch's counters -----------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_averages_swapped_in_and_vectors_written_back_are_followed(training):
    """PEFT computes its norm at every pass, so that whatever writes through `.data` is right there; here too."""
    plain, model = twins(DORA)
    close = {"rtol": 1e-4, "atol": 1e-5}
    for factor in (0.7, 1.3):
        for one in (plain, model):
            one.train(training)
            logits(one)
            for parameter in one.parameters():
                if parameter.requires_grad:
                    parameter.data.copy_(factor * parameter.data + 0.01)
        torch.testing.assert_close(logits(model), logits(plain), **close)
        for one in (plain, model):
            trained = [parameter for parameter in one.parameters() if parameter.requires_grad]
            vector_to_parameters(parameters_to_vector(trained).detach() * factor, trained)
        torch.testing.assert_close(logits(model), logits(plain), **close)
        for one in (plain, model):
            for name, parameter in one.named_parameters():
                if "base_layer.weight" in name:
                    parameter.data.mul_(1.1)
        torch.testing.assert_close(logits(model), logits(plain), **close)
    restore_peft(model)
    assert {type(parameter) for parameter in model.parameters()} == {nn.Parameter}
