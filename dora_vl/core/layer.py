"""The base class of adapted layers: A, B and magnitude, and what a layer keeps between passes.

A gain is computed once per optimizer step and read in every pass. It becomes invalid after an optimizer step, after any
edit, and when a tensor is replaced. Two signals are needed, since neither sees everything. A parameter's `_version` and
`data_ptr` stay the same under DeepSpeed ZeRO 0-3 when the engine updates it (measured); torch's optimizer post-hook
fires at every step of every optimizer, DeepSpeed's included (checked under ZeRO 1, 2, 3), and needs no Trainer.
Everything else is an edit, which torch counts in the tensor's version, or another tensor. Torch does not count what
goes through a parameter's `.data`: `CountedParameter` does, which every parameter becomes that a value is kept from.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dora_vl.core import functional
from dora_vl.core.config import DoRAConfig
from dora_vl.shapes import Float


def is_traced() -> bool:
    """Tells whether a graph is recorded or a transform of `torch.func` runs, for which nothing cached may be used."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


class OptimizerSteps:
    """Optimizer steps of this process, counted from the call of `watch_optimizers` on."""

    count = 0


@cache
def watch_optimizers() -> None:
    """Starts counting; called by the first adapted layer, so that importing changes nothing."""

    def advance(*_: object) -> None:
        OptimizerSteps.count += 1

    register_optimizer_step_post_hook(advance)


SHARD_MARKS = frozenset({"ds_status", "_fsdp_flattened"})
"""DeepSpeed ZeRO-3 and FSDP1 replace `.data` of parameters with these attributes at every pass, values unchanged."""


class CountedParameter(nn.Parameter):
    """A parameter whose edits through `.data` count; a plain one becomes it, and stays the object that others hold.

    A momentum teacher is kept by `p.data.mul_().add_()`, averaged weights are swapped in by `p.data.copy_`, weights are
    synchronised and loaded by it, hand-written optimizers step by `p.data.add_`, and `vector_to_parameters` assigns
    `p.data`. No torch counter moves for any of them.
    """

    data_replaced = 0
    """Counts how often `.data` was assigned."""

    @property
    def data(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Returns the values, without a graph and with this parameter's count of edits."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        torch.Tensor.data.__set__(self, value)  # pyright: ignore[reportAttributeAccessIssue]
        self.data_replaced += 1


def count_edits(tensors: Iterable[Tensor | None], *, counted: bool = True) -> None:
    """Counts edits through `.data` of the plain parameters among some tensors from now on, or no longer."""
    before, after = (nn.Parameter, CountedParameter) if counted else (CountedParameter, nn.Parameter)
    for tensor in tensors:
        if type(tensor) is before:
            tensor.__class__ = after  # pyright: ignore[reportAttributeAccessIssue] - one is a kind of the other


def edits_of(tensor: Tensor) -> tuple[int, int]:
    """Returns what an edit changes: the count of in-place edits, a shard's too, and what `p.data = ...` replaces.

    Tensors made under `inference_mode` count none.
    """
    if tensor.is_inference():
        return -1, 0
    local = getattr(tensor, "_local_tensor", None)  # what `dcp.load` and `to_local()` write to under a `DTensor`
    if local is not None:
        return tensor._version + local._version, 0
    if isinstance(tensor, CountedParameter) and SHARD_MARKS.isdisjoint(vars(tensor)):
        return tensor._version, tensor.data_replaced
    return tensor._version, 0


class Snapshot:
    """The state of the tensors, and whatever else, that a value was computed from.

    The tensors are held weakly and compared as objects: an address or an `id` may come again, and another tensor may
    have the same version.
    """

    __slots__ = ("_also", "_edits", "_tensors")

    def __init__(self, tensors: Iterable[Tensor | None], *also: object) -> None:
        present = [tensor for tensor in tensors if tensor is not None]
        count_edits(present)
        self._tensors = [weakref.ref(tensor) for tensor in present]
        self._edits = [edits_of(tensor) for tensor in present]
        self._also = also

    def holds(self, tensors: Iterable[Tensor | None], *also: object) -> bool:
        """Tells whether these are the same tensors, unchanged, and the rest is equal."""
        if self._also != also:
            return False
        present = [tensor for tensor in tensors if tensor is not None]
        return (
            len(present) == len(self._tensors)
            and all(ref() is tensor for ref, tensor in zip(self._tensors, present, strict=True))
            and self._edits == [edits_of(tensor) for tensor in present]
        )


FROZEN = "||W||^2"
"""The norms that depend only on the frozen weight are cached under this name."""
Self = TypeVar("Self", bound="AdaptedLayer")
Value = TypeVar("Value")


class AdaptedLayer(nn.Module):
    """A frozen layer with DoRA, LoRA or only a magnitude (`config.method`), in the layer's own place.

    A kind of layer (linear, convolution, embedding, opaque) says how its weight reads as a matrix [out, in] and how
    its own forward pass goes. `weight` and `bias` keep their names and are the same parameters, so a base checkpoint
    has the same keys before and after, and a sharded engine gathers everything at one module. A, B and the magnitude
    are float32 over a half-precision base. The norm is computed once per optimizer step, whatever the number of
    micro-batches and checkpoint recomputations.
    """

    weight: Tensor
    bias: Tensor | None
    name = "an adapted layer"
    """The layer's full name in the model that `apply_dora` adapted."""
    FILE_LEAVES: ClassVar[Mapping[str, str]] = {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
        "magnitude": "lora_magnitude_vector",
    }
    """Maps the name of each trained tensor here to its name in the adapter file (PEFT's)."""
    experts: int = 0
    """Counts the matrices of a mixture in the layer's weight; 0 means that it is one matrix."""
    weight_is_readable: ClassVar[bool] = True
    """True where `weight` holds the values that multiply the input; False where they are quantised."""

    def start_adapter(self, base: nn.Module, config: DoRAConfig) -> None:
        """Sets up the adapter; the layer's weight and sizes must already be set."""
        watch_optimizers()
        self.adapter = config
        self._shards: dict[str, Tensor] = {}
        # In a tuple, so that torch does not see it: the layer that was here before, for `original_layer`.
        self._replaced = (base,)
        self.merged = False
        self.training = base.training
        self.base_weight: Tensor | None = None  # a copy of W while the adapter is merged
        self.kept: dict[str, tuple[Any, Snapshot]] = {}
        self.weight.requires_grad_(False)
        self.lora_A: nn.Parameter | None = None
        self.lora_B: nn.Parameter | None = None
        self.magnitude: nn.Parameter | None = None
        self.create_parameters()
        with torch.no_grad():
            if config.method != "lora":  # by the arithmetic that will compute n, so that g is 1 to the last bit
                self.magnitude = nn.Parameter(functional.safe_sqrt(self.weight_norms_squared()).clone())
        count_edits(self.tensors())

    @torch.no_grad()
    def create_parameters(self) -> None:
        """Creates A and B with B A = 0 as `adapter.init` says; with `pissa` A is 0 until `apply_dora` sets both."""
        if self.adapter.method == "magnitude":
            return
        shape_A, shape_B = self.factor_shapes(self.adapter.rank)
        dtype, device = functional.accumulation_dtype(self.compute_dtype()), self.weight.device
        self.lora_A = nn.Parameter(torch.zeros(shape_A, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(shape_B, dtype=dtype, device=device))
        for matrix in () if device.type == "meta" else self.lora_A if self.experts else [self.lora_A]:
            if self.adapter.init == "kaiming":
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
            elif self.adapter.init == "gaussian":
                nn.init.normal_(matrix, std=1 / self.adapter.rank)

    # -- what a kind of layer says about itself --------------------------------------------------------------

    def matrix_shape(self) -> tuple[int, int]:
        """Returns (out, in) of the weight as a matrix."""
        raise NotImplementedError

    def as_matrix(self, weight: Tensor) -> Float[Tensor, "*experts out in_"]:
        """Returns a weight in this layer's own layout as a matrix [out, in]; a view where it can be."""
        return weight

    def from_matrix(self, matrix: Float[Tensor, "out in_"]) -> Tensor:
        """Undoes `as_matrix`, which is its own inverse where it transposes or does nothing."""
        return self.as_matrix(matrix)

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the shapes of A and B as they are stored and saved (PEFT's)."""
        rows, columns = self.matrix_shape()
        return (rank, columns), (rows, rank)

    def magnitude_file_shape(self) -> tuple[int, ...]:
        """Returns the magnitude's shape in the adapter file (PEFT's); it is [out] in memory."""
        return (self.matrix_shape()[0],)

    def setting_beyond_peft(self) -> str | None:
        """Names a setting of the layer that PEFT's low-rank path leaves out, which would change its result."""
        return None

    def compute_dtype(self) -> torch.dtype:
        """Returns the dtype that the frozen weight multiplies in."""
        return self.weight.dtype

    def factors(self) -> tuple[Float[Tensor, "*experts rank in_"], Float[Tensor, "*experts out rank"]] | None:
        """Returns A and B as matrices, with their gradients; None if there is only a magnitude."""
        return None if self.lora_A is None or self.lora_B is None else (self.lora_A, self.lora_B)

    def frozen_matrix(self) -> Float[Tensor, "*experts out in_"]:
        """Returns W as it was before a merge; a quantised layer computes it at each call."""
        return self.as_matrix(self.weight if self.base_weight is None else self.base_weight)

    def frozen_product(self, rows: Float[Tensor, "*experts rows in_"]) -> Float[Tensor, "*experts out rows"]:
        """Computes W A^T of rows A, without the bias: all that the norm needs to know of W."""
        weight = self.frozen_matrix()
        return weight @ rows.to(weight.dtype).mT

    def frozen_norms_squared(self) -> Float[Tensor, "*experts out"]:
        """Computes ||W_i||^2 of every row."""
        return functional.row_norms_squared(self.frozen_matrix())

    def frozen_tensors(self) -> list[Tensor | None]:
        """Lists the tensors that W is made of."""
        return [self.weight if self.base_weight is None else self.base_weight, self._shards.get("weight")]

    # -- what is cached between passes -----------------------------------------------------------------------

    def tensors(self) -> list[Tensor | None]:
        """Lists weight, bias and what trains, with the shards they were gathered from.

        torch's parametrizations replace a parameter by a property that returns a new tensor at each access, so nothing
        cached is ever valid for such a layer.
        """
        parameters = self._parameters
        names = ("weight", "bias", *self.FILE_LEAVES)
        return [
            *(parameters[name] if name in parameters else getattr(self, name) for name in names),
            *self._shards.values(),
        ]

    def cached(self, name: str, compute: Callable[[], Value], *depends_on: object) -> Value:
        """Caches a value without a gradient until the layer's tensors, settings, `depends_on` or the step change."""
        tensors, depends_on = self.tensors(), (OptimizerSteps.count, self.adapter, *depends_on)
        value, snapshot = self.kept.get(name, (None, None))
        if snapshot is None or not snapshot.holds(tensors, *depends_on):
            with torch.no_grad():
                value = compute()
            self.kept[name] = value, Snapshot(tensors, *depends_on)
        return cast(Value, value)

    def weight_norms_squared(self) -> Float[Tensor, "*experts out"]:
        """Returns ||W_i||^2 in float32, computed once, since W is frozen, and again after an edit."""
        tensors = self.frozen_tensors()
        if FROZEN not in self.kept or not self.kept[FROZEN][1].holds(tensors):
            self.kept[FROZEN] = self.frozen_norms_squared(), Snapshot(tensors)
        return self.kept[FROZEN][0]

    def forget_norms(self, *, frozen: bool = False) -> None:
        """Drops what was computed from A, B and the magnitude, after a change that torch does not count.

        Call it when a kernel that writes by address changed them. ||W_i||^2 is kept, so it is cheap enough for every
        step; pass `frozen=True` if W itself was changed that way.
        """
        stay = () if frozen else (FROZEN,)
        self.kept = {name: value for name, value in self.kept.items() if name in stay}

    def compute_norms(self) -> Float[Tensor, "*experts out"]:
        """Computes n without a gradient."""
        factors, squared = self.factors(), self.weight_norms_squared()
        if factors is None:
            return functional.safe_sqrt(squared)
        operands = self.frozen_matrix().detach(), squared, *factors
        with functional.without_autocast(self.weight.device):
            if not self.experts:
                return functional.norms(*operands, self.adapter.scale)
            return torch.stack(
                [functional.norms(*expert, self.adapter.scale) for expert in zip(*operands, strict=True)]
            )

    def refuse_merging(self, name: str) -> None:
        """Raises a `UserError` that names the layer where `weight` cannot hold merged values."""

    def refuse_what_would_not_train(self) -> None:
        """Raises a `RuntimeError` if a merged adapter or the frozen weight should train and would not."""
        if not torch.is_grad_enabled():
            return
        if self.merged and self.training:
            raise RuntimeError("the adapter is merged into the weight and would not train; unmerge_dora(model) first")
        if self.merged or torch._C._are_functorch_transforms_active():  # these ask for every gradient
            return
        # FSDP1 puts views of all its parameters here, which require a gradient as one.
        if any(isinstance(tensor, nn.Parameter) and tensor.requires_grad for tensor in self.frozen_tensors()):
            raise RuntimeError(
                f"{self.name}: its adapted weight stays frozen: requires_grad_(False), or take it out of targets"
            )

    def original_layer(self) -> nn.Module:
        """Returns the layer that was here before, with the weights as they are now, merged or not."""
        (base,) = self._replaced
        base.weight, base.bias = self.weight, self.bias  # pyright: ignore[reportArgumentType]
        return base.train(self.training)

    # -- what invalidates cached values ----------------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        """Remembers a shard that is replaced by the whole tensor.

        FSDP2 puts the gathered tensor, the same object at each pass, in the place of its shard (a `DTensor`) and back.
        An edit between two passes is an edit of the shard, so the shard's version tells of it.
        """
        before = vars(self).get("_parameters", {}).get(name)
        if isinstance(before, Tensor) and is_traceable_wrapper_subclass(before):
            self._shards[name] = cast(Tensor, before)
        super().__setattr__(name, value)

    def train(self: Self, mode: bool = True) -> Self:
        """Switches dropout and, when the mode really changes, drops the cached norm.

        Trainers call `train()` before every micro-batch; dropping it then would cost a norm each.
        """
        if mode != self.training:
            self.forget_norms()
        super().train(mode)
        return self

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.forget_norms(frozen=True)
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any, **kwargs: Any) -> None:
        self.forget_norms(frozen=True)  # before, because torch swaps no tensor that something refers to weakly
        super()._load_from_state_dict(state_dict, prefix, *rest, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves cached values out of a copy or a pickle, since they are not valid for other tensors."""
        return {**vars(self), "kept": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A pickled layer may wake in a process where no layer was built, so that nothing counts steps yet.
        super().__setstate__(state)
        watch_optimizers()

    def extra_repr(self) -> str:
        """Returns what `print(model)` shows."""
        adapter = self.adapter
        return f"{super().extra_repr()}, method={adapter.method}, rank={adapter.rank}, scale={adapter.scale:g}"
