"""The base class of adapted layers: A, B and magnitude, when the norm is computed, and how the adapter merges."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dora_vl.core import functional
from dora_vl.core.config import DoRAConfig
from dora_vl.core.gain import OptimizerSteps, Snapshot, count_edits, watch_optimizers
from dora_vl.core.step import Gain
from dora_vl.shapes import Float, Int


def is_traced() -> bool:
    """Tells whether a graph is recorded or a transform of `torch.func` runs, for which nothing cached may be used."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def principal_factors(
    matrix: Float[Tensor, "out in_"], rank: int, scale: float
) -> tuple[Float[Tensor, "rank in_"], Float[Tensor, "out rank"]]:
    """Returns A and B such that s B A approximates `matrix` best at that rank, its singular values shared evenly."""
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    root = (singular[:rank] / scale).sqrt()
    return root.unsqueeze(1) * right[:rank], left[:, :rank] * root


def subtract_start(layer: AdaptedLayer, a: Tensor, b: Tensor) -> None:
    """Subtracts s B A from the frozen weight and remembers A and B, which the adapter folder then needs as well."""
    residual = functional.dense_direction(
        layer.as_matrix(layer.weight), a.flatten(1), b.flatten(1), -layer.adapter.scale
    )
    layer.weight.copy_(layer.from_matrix(residual).to(layer.weight.dtype))
    layer.register_buffer("start_A", a.detach().clone(), persistent=False)
    layer.register_buffer("start_B", b.detach().clone(), persistent=False)


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
        self._base_weight: Tensor | None = None
        self._kept: dict[str, tuple[Any, Snapshot]] = {}
        self.weight.requires_grad_(False)
        self.lora_A: nn.Parameter | None = None
        self.lora_B: nn.Parameter | None = None
        self.magnitude: nn.Parameter | None = None
        self.create_parameters()
        count_edits(self.tensors())

    @torch.no_grad()
    def create_parameters(self) -> None:
        """Creates A and B with B A = 0 as `adapter.init` says (`pissa`: A is 0 until `start_from`), and magnitudes."""
        if self.adapter.method != "magnitude":
            shape_A, shape_B = self.factor_shapes(self.adapter.rank)
            dtype, device = functional.accumulation_dtype(self.compute_dtype()), self.weight.device
            self.lora_A = nn.Parameter(torch.empty(shape_A, dtype=dtype, device=device))
            self.lora_B = nn.Parameter(torch.zeros(shape_B, dtype=dtype, device=device))
            if device.type != "meta":
                self._init_factor_a(self.lora_A)
        self.create_magnitude()

    def _init_factor_a(self, lora_A: Tensor) -> None:
        for matrix in lora_A if self.experts else [lora_A]:
            if self.adapter.init == "kaiming":
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
            elif self.adapter.init == "gaussian":
                nn.init.normal_(matrix, std=1 / self.adapter.rank)
            else:
                nn.init.zeros_(matrix)

    @torch.no_grad()
    def create_magnitude(self) -> None:
        """Creates m = ||V|| by the same arithmetic that will compute n, so that g is 1 to the last bit."""
        if self.adapter.method != "lora":
            self.magnitude = nn.Parameter(functional.safe_sqrt(self.weight_norms_squared()).clone())

    @torch.no_grad()
    def start_from(self, matrix: Float[Tensor, "out in_"]) -> None:
        """Gives A and B the principal factors of a matrix; no frozen weight changes."""
        assert self.lora_A is not None
        assert self.lora_B is not None
        matrix = matrix.detach().to(self.lora_A.dtype)
        start_A, start_B = principal_factors(matrix, self.adapter.rank, self.adapter.scale)
        self.lora_A.copy_(start_A.view_as(self.lora_A))
        self.lora_B.copy_(start_B.view_as(self.lora_B))

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

    def drops_whole_change(self) -> bool:
        """Tells whether training takes a second product of W, since dropout is on the input of (g - 1) W x as well."""
        adapter = self.adapter
        has_both = self.magnitude is not None and adapter.method != "magnitude"
        return has_both and adapter.dropout > 0 and adapter.dropout_mode == "whole_change"

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
        return self.as_matrix(self.weight if self._base_weight is None else self._base_weight)

    def frozen_product(self, rows: Float[Tensor, "*experts rows in_"]) -> Float[Tensor, "*experts out rows"]:
        """Computes W A^T of rows A, without the bias: all that the norm needs to know of W."""
        weight = self.frozen_matrix()
        return weight @ rows.to(weight.dtype).mT

    def frozen_norms_squared(self) -> Float[Tensor, "*experts out"]:
        """Computes ||W_i||^2 of every row."""
        return functional.row_norms_squared(self.frozen_matrix())

    def frozen_tensors(self) -> list[Tensor | None]:
        """Lists the tensors that W is made of."""
        return [self.weight if self._base_weight is None else self._base_weight, self._shards.get("weight")]

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
        value, snapshot = self._kept.get(name, (None, None))
        if snapshot is None or not snapshot.holds(tensors, *depends_on):
            with torch.no_grad():
                value = compute()
            self._kept[name] = value, Snapshot(tensors, *depends_on)
        return cast(Value, value)

    def weight_norms_squared(self) -> Float[Tensor, "*experts out"]:
        """Returns ||W_i||^2 in float32, computed once, since W is frozen, and again after an edit."""
        tensors = self.frozen_tensors()
        if FROZEN not in self._kept or not self._kept[FROZEN][1].holds(tensors):
            self._kept[FROZEN] = self.frozen_norms_squared(), Snapshot(tensors)
        return self._kept[FROZEN][0]

    def forget_norms(self, *, frozen: bool = False) -> None:
        """Drops what was computed from A, B and the magnitude, after a change that torch does not count.

        Call it when a kernel that writes by address changed them. ||W_i||^2 is kept, so it is cheap enough for every
        step; pass `frozen=True` if W itself was changed that way.
        """
        stay = () if frozen else (FROZEN,)
        self._kept = {name: value for name, value in self._kept.items() if name in stay}

    # -- norm and gain ---------------------------------------------------------------------------------------

    def norms(self) -> Float[Tensor, "*experts out"]:
        """Returns n without a gradient, computed once per optimizer step."""
        return self.cached("norms", self.compute_norms)

    def compute_norms(self) -> Float[Tensor, "*experts out"]:
        """Computes n without a gradient."""
        factors, squared = self.factors(), self.weight_norms_squared()
        if factors is None:
            return functional.safe_sqrt(squared)
        with functional.without_autocast(self.weight.device):
            return functional.norms(self.frozen_matrix().detach(), squared, *factors, self.adapter.scale)

    def norms_with_grad(self) -> Float[Tensor, "*experts out"]:
        """Computes n with its gradient in A and B; rows that cancel are computed from the dense V."""
        frozen, factors = self.weight_norms_squared(), self.factors()
        if factors is None:
            return functional.safe_sqrt(frozen)
        with functional.without_autocast(self.weight.device):
            squared = self.factored_norms_squared(frozen)
            norms, cancelled = functional.direction_norms(frozen.flatten(), squared.flatten())
            if cancelled.numel():
                dense = self._dense_rows(cancelled, *factors)
                norms = norms.index_copy(0, cancelled, functional.safe_sqrt(dense.square().sum(dim=1)))
        return norms.view_as(frozen)

    def factored_norms_squared(self, frozen: Float[Tensor, "*experts out"]) -> Float[Tensor, "*experts out"]:
        """Computes n^2 from ||W||^2 and the factors, with its gradient; exact except for rows that cancel."""
        a, b = cast("tuple[Tensor, Tensor]", self.factors())
        return functional.factored_norms_squared(frozen, a, b, self.frozen_product(a), self.adapter.scale)

    def _dense_rows(self, index: Int[Tensor, " rows"], a: Tensor, b: Tensor) -> Float[Tensor, "rows in_"]:
        """Computes the rows of V at these indices, counted over all experts."""
        return functional.dense_direction(self.frozen_matrix()[index], a, b[index], self.adapter.scale)

    def gain(self) -> Float[Tensor, "*experts out"] | None:
        """Computes g with its gradient in m (and through the norm, unless `detach_norm`); None for LoRA."""
        if self.magnitude is None:
            return None
        if is_traced():
            return functional.gain(self.magnitude, self._traced_norms())
        return functional.gain(self.magnitude, self.norms() if self.adapter.detach_norm else self.norms_with_grad())

    def current_gain(self, dtype: torch.dtype) -> Gain:
        """Returns the gain without a gradient for activations of a dtype, computed once per optimizer step."""

        def compute() -> Gain:
            numbers = math.prod(self.matrix_shape())
            return functional.gains(cast(Tensor, self.magnitude), self.compute_norms(), dtype, numbers)

        return self.cached("gain", compute, dtype)

    def operands(self, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
        """Returns A and B, and g - 1, with their gradients, in the activations' dtype."""
        factors, gain = self.factors(), self.gain()
        factors = None if factors is None else (factors[0].to(dtype), factors[1].to(dtype))
        return factors, None if gain is None else (gain - 1).to(dtype)

    def operands_without_graph(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Gain | None]:
        """Returns A, B and the gain for activations of a dtype; keeps them in eval, so that decoding casts nothing."""

        def compute() -> tuple[Tensor, Tensor, Gain | None]:
            a, b = cast("tuple[Tensor, Tensor]", self.factors())
            return a.to(dtype), b.to(dtype), None if self.magnitude is None else self.current_gain(dtype)

        return compute() if self.training else self.cached("operands", compute, dtype)

    def _traced_norms(self) -> Float[Tensor, "*experts out"]:
        """Computes n by plain operations and an opaque one, in every pass of a graph, so that it is never stale.

        Rows that cancel of a layer whose weight cannot be read are not taken dense here.
        """
        factors, detached = self.factors(), self.adapter.detach_norm
        # Not what eager passes keep, since no graph sees that W was edited; a quantised weight stays as it is.
        recompute = self.weight_is_readable or FROZEN not in self._kept
        squared = self.frozen_norms_squared() if recompute else self._kept[FROZEN][0]
        if factors is None:
            return functional.safe_sqrt(squared)
        with functional.without_autocast(self.weight.device):
            if self.weight_is_readable and detached:
                weight, (a, b) = self.as_matrix(self.weight).detach(), factors
                return functional.norms_in_graph(weight, squared, a.detach(), b.detach(), self.adapter.scale)
            live = functional.safe_sqrt(self.factored_norms_squared(squared))
            if not self.weight_is_readable:
                return live.detach() if detached else live
            weight, (a, b) = self.as_matrix(self.weight).detach(), factors
            norms = functional.norms_in_graph(weight, squared, a.detach(), b.detach(), self.adapter.scale)
            return norms + (live - live.detach())

    # -- merging ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self, *, keep_base: bool = True) -> None:
        """Folds the adapter into `weight`, computed in float32; with `keep_base`, `unmerge` restores it bit by bit."""
        if self.merged:
            return
        self._base_weight = self.weight.detach().clone() if keep_base else None
        self.weight.copy_(self.from_matrix(self.merged_matrix()))
        self.merged = True

    def merged_matrix(self) -> Float[Tensor, "*experts out in_"]:
        """Computes W' of the adapter as it is now."""
        a, b = self.factors() or (None, None)
        return functional.merged_weight(self.as_matrix(self.weight), a, b, self.magnitude, self.adapter.scale)

    def refuse_merging(self, name: str) -> None:
        """Raises a `UserError` that names the layer where `weight` cannot hold merged values."""

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts the base weight back."""
        if not self.merged:
            return
        if self._base_weight is None:
            raise RuntimeError("the base weight was not kept when merging; load the base model again")
        self.weight.copy_(self._base_weight)
        self._base_weight, self.merged = None, False
        self.forget_norms()

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
        return {**vars(self), "_kept": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A pickled layer may wake in a process where no layer was built, so that nothing counts steps yet.
        super().__setstate__(state)
        watch_optimizers()

    def extra_repr(self) -> str:
        """Returns what `print(model)` shows."""
        adapter = self.adapter
        return f"{super().extra_repr()}, method={adapter.method}, rank={adapter.rank}, scale={adapter.scale:g}"
