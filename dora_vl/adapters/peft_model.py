"""`accelerate_peft(model)`: a PEFT model on this core's forward pass, with PEFT's own parameters.

PEFT's DoRA builds the whole B A at every forward pass, and takes a second frozen product while dropout is on. Here
each of its linear layers gets this core's arithmetic: the norm once per optimizer step from the factors, one frozen
product, and a backward pass that only keeps x, A x and W x. The parameters are PEFT's objects, so the optimizer, the
state dictionary, `save_pretrained`, `merge_and_unload` and `set_adapter` go on as before.

One thing differs, in training with dropout only: PEFT drops elements of the input of the *whole change*
((g - 1) W x too), which is what costs the second product; `dropout_mode="low_rank"` drops them only from B A x.
Both are the same in expectation, and the same without dropout and in eval; `"whole_change"` is PEFT's for DoRA layers.
A LoRA layer's dropout is the same in distribution in either mode; one seed draws another mask here than in PEFT.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dora_vl.core import DoRAConfig, DoRALinear
from dora_vl.core.config import DropoutMode
from dora_vl.core.layer import CountedParameter, count_edits
from dora_vl.errors import UserError

try:
    from peft.tuners.lora.variants import DoraLinearVariant
except ImportError:
    raise UserError(f"PEFT {peft.__version__} has no LoRA variants; accelerate_peft needs 0.16 or newer") from None

log = logging.getLogger(__name__)

_STATE = "_dora_vl_core"
PARAMETERS = (nn.Parameter, CountedParameter)


@dataclass(frozen=True)
class Acceleration:
    """Says what `accelerate_peft` did."""

    layers: tuple[str, ...]
    """These layers, by full name, now run on this core."""
    left: dict[str, str]
    """Maps layers that stay on PEFT's own forward pass to the reason."""


@dataclass
class _CoreState:
    """This core's layers over PEFT's parameters; not a module, so that PEFT's layer gets no new child."""

    dropout_mode: DropoutMode
    cores: dict[str, tuple[DoRALinear, _Operands]] = field(default_factory=dict)
    """Maps an adapter's name to the layer over it, built when it first runs, and that layer's operands."""


class AcceleratedLinear(PeftLinear):
    """PEFT's linear LoRA or DoRA layer with this core's forward pass where that computes the same."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Computes y for the active adapter; runs PEFT's own forward pass for whatever this core does not do."""
        if args or kwargs or reason_to_leave(self) is not None:
            return super().forward(x, *args, **kwargs)
        if torch.compiler.is_compiling():
            core = _kept_layer(self)
        else:
            # The transforms of torch.func cannot see into this core's own backward pass (as in `layer.is_traced`).
            core = None if torch._C._are_functorch_transforms_active() else _core_layer(self, _active_adapter(self))
        return super().forward(x) if core is None else core(x)

    def _get_name(self) -> str:
        return PeftLinear.__name__  # get_layer_status reads the layer's type out of what is printed

    def extra_repr(self) -> str:
        """Returns what `print(model)` shows beside PEFT's own."""
        return "accelerated by dora_vl"

    def forget_norms(self, *, frozen: bool = False) -> None:
        """Drops what this core keeps, after a change that leaves no trace in torch: a kernel that writes by address."""
        for core, _ in _state(self).cores.values():
            core.forget_norms(frozen=frozen)

    def train(self, mode: bool = True) -> AcceleratedLinear:
        """Switches this core's layers too, which a compiled graph cannot do."""
        super().train(mode)
        for core, _ in _state(self).cores.values():
            core.train(mode)
        return self


def accelerate_peft(model: nn.Module, *, dropout_mode: DropoutMode = "low_rank") -> Acceleration:
    """Makes the linear LoRA and DoRA layers of a PEFT model use this core's forward pass.

    Layers that this core would compute differently stay as they are and are named in the result: quantised bases,
    convolutions and embeddings, LoRA variants other than DoRA, several active adapters at once. The question is
    asked again at every forward pass, so `set_adapter`, `disable_adapter` and merging keep working. Call it before
    wrapping in DDP or DeepSpeed; the model is changed in place.
    """
    done: list[str] = []
    left: dict[str, str] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        reason = reason_to_leave(layer)
        if reason is not None:
            left[name] = reason
            continue
        assert isinstance(layer, PeftLinear)
        layer.__class__ = AcceleratedLinear
        vars(layer)[_STATE] = _CoreState(dropout_mode)
        for adapter in layer.lora_A:
            if _reason_in_adapter(layer, adapter) is None:
                _core_layer(layer, adapter)
        done.append(name)
    if not done and not left:
        raise ValueError("the model has no PEFT LoRA layer; call get_peft_model(model, LoraConfig(...)) first")
    for reason, count in Counter(left.values()).items():
        log.warning("%d layers stay on PEFT's own forward pass: %s", count, reason)
    return Acceleration(tuple(done), left)


def restore_peft(model: nn.Module) -> int:
    """Undoes `accelerate_peft`; returns how many layers are PEFT's own again."""
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, AcceleratedLinear)]
    for layer in layers:
        count_edits(layer.parameters(), counted=False)
        del vars(layer)[_STATE]
        layer.__class__ = PeftLinear
    return len(layers)


def reason_to_leave(layer: object) -> str | None:
    """Says why PEFT's own forward pass must run on this layer now; None if this core computes the same."""
    if type(layer) not in {PeftLinear, AcceleratedLinear}:
        return f"{type(layer).__module__.rpartition('.')[2]}.{type(layer).__name__} is not a plain linear LoRA layer"
    assert isinstance(layer, PeftLinear)
    base = layer.get_base_layer()
    if type(base) is not nn.Linear:
        return f"its base is a {type(base).__name__}, not nn.Linear"
    if layer.disable_adapters or layer.merged:
        return "its adapters are disabled or merged"
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1:
        return f"{len(active)} adapters are active on it; one is needed"
    if base.weight.requires_grad:
        return "its base weight trains"
    if base.weight.numel() == 0 or type(base.weight) not in PARAMETERS or base.weight.device.type == "meta":
        return "its base weight is sharded or offloaded"
    if "forward" in base.__dict__ or base._forward_hooks or base._forward_pre_hooks:
        return "its base layer has hooks of its own"
    return _reason_in_adapter(layer, active[0])


def _reason_in_adapter(layer: PeftLinear, active: str) -> str | None:
    """Says why an adapter keeps PEFT's own forward pass; None if it need not."""
    variant = layer.lora_variant.get(active)
    if variant is not None and variant is not DoraLinearVariant and not isinstance(variant, DoraLinearVariant):
        return f"LoRA variant {variant} is not DoRA"
    if layer.lora_bias.get(active):
        return "it has lora_bias"
    if not isinstance(layer.lora_dropout[active], (nn.Dropout, nn.Identity)):
        return f"its dropout is a {type(layer.lora_dropout[active]).__name__}"
    if layer.scaling[active] <= 0:
        return f"its scale is {layer.scaling[active]}"
    operands = _operands(layer, active)
    tensors = (operands.lora_A, operands.lora_B, operands.magnitude)
    if not all(tensor is None or type(tensor) in PARAMETERS for tensor in tensors):
        return "its adapter's tensors are not parameters, as in torch.func.functional_call"
    return None


@dataclass(frozen=True)
class _Operands:
    """Holds what PEFT's layer computes with now; parameters, but for the tensors of `functional_call`."""

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor | None
    scale: float
    dropout: float

    def are(self, other: _Operands) -> bool:
        """Tells whether both are the same tensors, scale and dropout, by comparisons that a graph can guard."""
        same_weights = self.weight is other.weight and self.bias is other.bias
        same_adapter = self.lora_A is other.lora_A and self.lora_B is other.lora_B and self.magnitude is other.magnitude
        return same_weights and same_adapter and (self.scale, self.dropout) == (other.scale, other.dropout)


def _operands(layer: PeftLinear, adapter: str) -> _Operands:
    base: Any = layer.get_base_layer()
    parts: tuple[Any, Any, Any] = layer.lora_A[adapter], layer.lora_B[adapter], layer.lora_dropout[adapter]
    magnitudes: Any = layer.lora_magnitude_vector
    return _Operands(
        weight=base.weight,
        bias=base.bias,
        lora_A=parts[0].weight,
        lora_B=parts[1].weight,
        magnitude=magnitudes[adapter].weight if adapter in magnitudes else None,
        scale=layer.scaling[adapter],
        dropout=float(parts[2].p) if isinstance(parts[2], nn.Dropout) else 0.0,
    )


def _state(layer: PeftLinear) -> _CoreState:
    return layer.__dict__[_STATE]  # torch.compile of torch 2.8 cannot trace `vars`


def _active_adapter(layer: PeftLinear) -> str:
    return next(name for name in layer.active_adapters if name in layer.lora_A)


def _core_layer(layer: PeftLinear, adapter: str) -> DoRALinear:
    """Returns the layer over an adapter's parameters, built again when PEFT has put others in their place."""
    state, operands = _state(layer), _operands(layer, adapter)
    core, built_over = state.cores.get(adapter, (None, None))
    if core is None or built_over is None or not built_over.are(operands):
        core = _over(operands, state.dropout_mode)
        remaining = {name: pair for name, pair in state.cores.items() if name in layer.lora_A}
        state.cores = {**remaining, adapter: (core, operands)}
    if core.training != layer.training:
        core.train(layer.training)
    return core


def _kept_layer(layer: PeftLinear) -> DoRALinear | None:
    """Returns the layer over the active adapter; None if it must be built first, which no graph can hold."""
    adapter = _active_adapter(layer)
    if adapter not in _state(layer).cores:
        return None
    core, built_over = _state(layer).cores[adapter]
    return core if core.training == layer.training and built_over.are(_operands(layer, adapter)) else None


def _over(operands: _Operands, dropout_mode: DropoutMode) -> DoRALinear:
    rank, columns = operands.lora_A.shape
    config = DoRAConfig(
        targets=("*",),
        method="lora" if operands.magnitude is None else "dora",
        rank=rank,
        alpha=operands.scale * rank,
        dropout=operands.dropout,
        dropout_mode=dropout_mode,
    )
    # Built without memory and without drawing a number, then given PEFT's tensors.
    empty = nn.Linear(columns, len(operands.weight), bias=operands.bias is not None, device="meta")
    core = DoRALinear(empty, config)
    for leaf in ("weight", "bias", "lora_A", "lora_B", "magnitude"):
        setattr(core, leaf, getattr(operands, leaf))
    core.forget_norms(frozen=True)
    count_edits(core.tensors())
    return core
