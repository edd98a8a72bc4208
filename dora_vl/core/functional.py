"""DoRA's equation, written once (arXiv 2402.09353, equation 5), without the dense product.

Letters, as in the paper, used in this file alone, for one adapted linear layer:

    W [out, in]   frozen weight           b [out]      bias, outside the equation
    A [rank, in]  B [out, rank]           s            alpha / rank (or alpha / sqrt(rank))
    m [out]       magnitude               V = W + s B A       the direction before normalisation
    n [out]       n_i = ||V_i||_2, the norm of each output row of V
    g [out]       g = m / n

    y = g * (W x + s B A x) + b           merged:  W' = g * V, b unchanged

The paper writes W as [in, out] and says "column-wise"; with torch's [out, in] that is one norm a row.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from dora_vl.core.fast.dropout import Dropped
from dora_vl.core.fast.products import frozen_product, scaled_product, triton_kernels
from dora_vl.core.gain import CANCELLATION, NORM_RANGE, Gain, apply_gain

NORM_CHUNK_ROWS = 1024
"""Rows of W turned to float32 at a time, so that a norm never needs a second copy of the weight."""
NORM_CHUNK_NUMBERS = 2**18
"""Numbers of B turned to float32 at a time: 1 MiB, which stays in a core's cache."""
NARROW = 64
"""Ranks below it take B's gradient as [rank, out], twice as fast on CPU; from there on turning it costs more."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms and gains: float32, or float64 for float64 weights."""
    return torch.promote_types(dtype, torch.float32)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast asks for; None where it is off, or unknown to the device (meta)."""
    is_on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if is_on else None


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Leaves autocast, where it is on."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)


def row_norms_squared(weight: Float[Tensor, "out in_"]) -> Float[Tensor, " out"]:
    """||W_i||^2 of each output row in float32, read a block of rows at a time."""
    dtype = accumulation_dtype(weight.dtype)
    blocks = weight.detach().split(NORM_CHUNK_ROWS)
    return torch.cat([block.to(dtype).square().sum(dim=1) for block in blocks])


def direction_norms(
    weight_norms_squared: Float[Tensor, " out"], norms_squared: Float[Tensor, " out"]
) -> tuple[Float[Tensor, " out"], Int[Tensor, " cancelled"]]:
    """n from n^2, and the rows where its terms cancel too far to be trusted."""
    cancelled = (norms_squared.detach() <= CANCELLATION * weight_norms_squared).nonzero().flatten()
    return root(norms_squared) if cancelled.numel() else norms_squared.sqrt(), cancelled


def factored_norms_squared(
    weight_norms_squared: Float[Tensor, " out"],
    lora_A: Float[Tensor, "rank in_"],
    lora_B: Float[Tensor, "out rank"],
    weight_on_A: Float[Tensor, "rank out"],
    scale: float,
) -> Float[Tensor, " out"]:
    """n_i^2 = ||W_i||^2 + 2 s B_i.(W A^T + s/2 B A A^T)_i; memory out*rank + rank^2, never out*in.

    `weight_on_A` is the frozen layer applied to A's rows, A W^T, so no weight is read here: quantised and
    sharded layers need nothing more. Differentiable in A and B.

    The products take A and B as the forward pass does, in the frozen layer's dtype, so n belongs to the direction that
    is used; at rank 128 that is also four times as fast on CPU as in float32. Sums over rows are float32.
    """
    dtype = torch.promote_types(weight_on_A.dtype, NORM_RANGE)
    a, b = (factor.to(weight_on_A.dtype).to(dtype) for factor in (lora_A, lora_B))
    on_A = weight_on_A.t().to(dtype, copy=True)  # it is the caller's, and would be overwritten
    (squared,) = with_growth(weight_norms_squared[None], b[None], on_A[None], (a @ a.t())[None], scale)
    return squared


def with_growth(
    weight_norms_squared: Float[Tensor, "layers out"],
    lora_B: Float[Tensor, "layers out rank"],
    weight_on_A: Float[Tensor, "layers out rank"],
    gram: Float[Tensor, "layers rank rank"],
    scale: float,
) -> Float[Tensor, "layers out"]:
    """n^2 of layers of one shape from W A^T, which is overwritten, and A A^T; all but ||W_i||^2 in one dtype."""
    half = weight_on_A.baddbmm_(lora_B, gram * (scale / 2))
    dtype, rows = weight_norms_squared.dtype, max(1, NORM_CHUNK_NUMBERS // half.shape[-1])
    blocks = zip(*(factor.flatten(end_dim=1).split(rows) for factor in (lora_B, half)), strict=True)
    change = torch.cat([torch.linalg.vecdot(b.to(dtype), grown.to(dtype)) for b, grown in blocks])
    return torch.add(weight_norms_squared, change.view_as(weight_norms_squared), alpha=2 * scale)


def root(squared: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """Square root that is 0, with gradient 0 and not infinite, where rounding or a zero row leaves no length."""
    positive = squared > 0
    return torch.where(positive, squared, 1.0).sqrt() * positive


def dense_direction(
    weight: Float[Tensor, "rows in_"],
    lora_A: Float[Tensor, "rank in_"] | None,
    lora_B: Float[Tensor, "rows rank"] | None,
    scale: float,
) -> Float[Tensor, "rows in_"]:
    """V = W + s B A in float32, for merging and for the few rows whose factored norm cancels."""
    dtype = accumulation_dtype(weight.dtype)
    if lora_A is None or lora_B is None:
        return weight.to(dtype)
    return weight.to(dtype) + scale * (lora_B.to(dtype) @ lora_A.to(dtype))


def gain(
    magnitude: Float[Tensor, "*experts out"], norms: Float[Tensor, "*experts out"]
) -> Float[Tensor, "*experts out"]:
    """g = m / n; a row of V that is all zero has no direction and keeps g = 1 instead of 0/0."""
    smallest = torch.finfo(norms.dtype).tiny
    return torch.where(norms > 0, magnitude.to(norms.dtype) / norms.clamp_min(smallest), 1.0)


def merged_weight(
    weight: Float[Tensor, "out in_"],
    lora_A: Float[Tensor, "rank in_"] | None,
    lora_B: Float[Tensor, "out rank"] | None,
    magnitude: Float[Tensor, " out"] | None,
    scale: float,
) -> Float[Tensor, "out in_"]:
    """W' = m V / ||V||, or V without a magnitude (LoRA), computed in float32, in W's dtype."""
    direction = dense_direction(weight, lora_A, lora_B, scale)
    if magnitude is not None:
        direction = gain(magnitude, root(row_norms_squared(direction))).unsqueeze(1) * direction
    return direction.to(weight.dtype)


class AdaptedProduct(torch.autograd.Function):
    """y = g (W x + s B A x) + b with one product of W, keeping x, h = s A x and y alone for the backward pass.

    z = (y - b) / g is rebuilt from y, so that m's gradient costs no third [rows, out] tensor; only rows where that
    would lose digits keep their z, and where y was edited in place since, z is computed again. W gets no gradient: it
    is frozen by construction. `gain` None is plain LoRA, A and B None is a magnitude alone. `dropped` masks the
    low-rank path's input, and x is then kept masked, with what was taken from it.
    """

    @staticmethod
    def forward(  # noqa: PLR0913 - the operands of the equation
        ctx: Any,
        x: Float[Tensor, "*batch in_"],
        weight: Float[Tensor, "out in_"],
        bias: Float[Tensor, " out"] | None,
        lora_A: Float[Tensor, "rank in_"] | None,
        lora_B: Float[Tensor, "out rank"] | None,
        magnitude: Float[Tensor, " out"] | None,
        gain: Gain | None,
        scale: float,
        dropped: Dropped | None,
    ) -> Float[Tensor, "*batch out"]:
        """Runs the layer; every operand but A, B and m in the dtype of x."""
        kept_input = x
        rows = masked = x.reshape(-1, x.shape[-1])
        y = frozen_product(rows, weight.t(), bias)
        hidden = saved_y = fragile_z = positions = taken = None
        ctx.probability = None
        if lora_A is not None:
            if dropped is not None:
                ctx.probability, positions = dropped.probability, dropped.positions
                masked, scale = dropped.shared_copy(rows), scale / (1 - dropped.probability)
                kept_input = x if dropped.is_seed else masked  # a seed's mask can be drawn again
            hidden = scaled_product(masked, lora_A.to(x.dtype).t(), scale)
        y = changed_product_(y, hidden, lora_B, bias, gain)
        # No view of y, which torch lets nobody edit in place, but the same memory with another count of edits.
        output = torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))
        if gain is not None and magnitude is not None and magnitude.requires_grad and not output.is_inference():
            # The probe shares the count of edits, without the memory.
            saved_y, ctx.probe, ctx.version = y, output.detach(), output._version
            ctx.probe.data = output.new_empty(0)
            taken = None if dropped is None or hidden is None else dropped.shared_taken(rows)
            if gain.fragile is not None:
                fragile_z = some_of_product(rows, hidden, weight, lora_B, gain.fragile.rows)
        # Dropped positions too are saved, not kept as an attribute: a checkpoint lets go of saved tensors alone.
        ctx.save_for_backward(kept_input, weight, bias, lora_A, lora_B, hidden, saved_y, fragile_z, positions, taken)
        ctx.gain, ctx.scale, ctx.input_shape = gain, scale, x.shape
        return output

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - `once_differentiable` hides the names
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x, b, A, B and m."""
        x, weight, bias, lora_A, lora_B, hidden, y, fragile_z, positions, taken = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])
        dropped = None if positions is None else Dropped(ctx.probability, positions)
        gain, needs = ctx.gain, ctx.needs_input_grad
        dy = grad_outputs[0].reshape(-1, grad_outputs[0].shape[-1])
        edited = y is not None and ctx.probe._version != ctx.version
        kernels = None if gain is None else triton_kernels(dy)
        pass_ = backward_pass if kernels is None else kernels.backward_pass
        with_sum = bias is not None and (needs[2] or (kernels is None and y is not None))
        dz, dh, dm, db = pass_(dy, None if edited else y, lora_B, bias, gain, ctx.scale, with_bias_sum=with_sum)
        if edited and gain is not None:
            whole_rows = rows if dropped is None else dropped.restored(rows, taken)
            z = some_of_product(whole_rows, hidden, weight, lora_B)
            dm = (dy * z).sum(dim=0) * (gain.per_magnitude * gain.full)
        if gain is not None and dm is not None and fragile_z is not None:
            dm[gain.fragile.rows] = (dy[:, gain.fragile.rows] * fragile_z).sum(dim=0) * gain.fragile.per_norm
        dx = frozen_product(dz, weight) if needs[0] else None
        dA = dB = None
        if hidden is not None and dh is not None:
            # Contiguous in the same copy: a gradient laid out unlike its parameter would be copied once more.
            dB = dz.t() @ hidden if hidden.shape[1] >= NARROW else (hidden.t() @ dz).t()
            dB = dB.to(lora_B.dtype, memory_format=torch.contiguous_format)
            if lora_A.requires_grad:
                masked = dropped.apply(rows) if dropped is not None and dropped.is_seed else rows
                dA = (dh.t() @ masked).to(lora_A.dtype)
            if dx is not None:
                a = lora_A.to(dz.dtype)
                dx = dx.addmm_(dh, a) if dropped is None else dropped.add_product_(dx, dh, a)
        if dx is not None:
            dx = dx.view(ctx.input_shape)
        return dx, None, db if needs[2] else None, dA, dB, dm, None, None, None


def changed_product_(
    y: Float[Tensor, "rows out"],
    hidden: Float[Tensor, "rows rank"] | None,
    lora_B: Float[Tensor, "out rank"] | None,
    bias: Float[Tensor, " out"] | None,
    gain: Gain | None,
) -> Float[Tensor, "rows out"]:
    """Makes g (W x + h B^T) + b of W x + b, in place; `hidden` is h = s A x."""
    kernels = None if gain is None else triton_kernels(y)
    if kernels is not None and gain is not None:
        return kernels.adapted_output(y, hidden, lora_B, bias, gain.minus_one, in_place=True)
    if hidden is not None and lora_B is not None:
        y.addmm_(hidden, lora_B.to(y.dtype).t())
    return y if gain is None else apply_gain(y, bias, gain.minus_one)


def some_of_product(
    rows: Float[Tensor, "rows in_"],
    hidden: Float[Tensor, "rows rank"] | None,
    weight: Float[Tensor, "out in_"],
    lora_B: Float[Tensor, "out rank"] | None,
    index: Int[Tensor, " some"] | slice = slice(None),
) -> Float[Tensor, "rows some"]:
    """z = W x + h B^T of some output rows, or of all, from a product of their own."""
    z = rows @ weight[index].t()
    if hidden is not None and lora_B is not None:
        z.addmm_(hidden, lora_B[index].to(z.dtype).t())
    return z


def backward_pass(
    dy: Float[Tensor, "rows out"],
    y: Float[Tensor, "rows out"] | None,
    lora_B: Float[Tensor, "out rank"] | None,
    bias: Float[Tensor, " out"] | None,
    gain: Gain | None,
    scale: float,
    *,
    with_bias_sum: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """dz = g dy, dh = s dz B, dm and db; dL/dm_i = sum over rows of dy_i z_i / n_i, with z = (y - b) / g.

    Sums taken outside the fused pass stay in the activations' dtype, whose reduction accumulates in float32: asking
    for a float32 sum of a half-precision tensor is thirty times slower on CPU.
    """
    if gain is not None and y is not None and dy.device.type == "cpu" and dy.numel():
        # What batch normalisation in evaluation mode gives backward for mean 0 and variance 1: two passes over memory
        # instead of five, and torch's CPU kernel takes half-precision activations with float32 gains.
        mean, variance = torch.zeros_like(gain.full), torch.ones_like(gain.full)
        fused, operands = torch.ops.aten.native_batch_norm_backward, (dy.contiguous(), y.contiguous())
        dz, dm, db = fused(*operands, gain.full, mean, variance, None, None, False, 0.0, (True, True, True))
    else:
        dz = dy if gain is None else torch.addcmul(dy, dy, gain.minus_one)
        dm = None if y is None else (dy * y).sum(dim=0)
        db = dy.sum(dim=0) if with_bias_sum else None
    if dm is not None and gain is not None:
        if bias is not None and db is not None:
            dtype = gain.per_magnitude.dtype
            dm = dm.to(dtype) - bias.to(dtype) * db.to(dtype)
        dm = dm * gain.per_magnitude
    dh = None if lora_B is None else scaled_product(dz, lora_B.to(dz.dtype), scale)
    return dz, dh, dm, db


def changed_output(
    output: Float[Tensor, "*shape"],
    frozen: Float[Tensor, "*shape"],
    low_rank: Float[Tensor, "*shape"] | None,
    gain: Float[Tensor, "*broadcast"] | None,
) -> Float[Tensor, "*shape"]:
    """y = (W x + b) + (g - 1) W x + g s B A x, in torch's own autograd; bitwise the frozen output where g = 1.

    `output` is W x + b, `frozen` is W x, `low_rank` is s B A x. With dropout on the input of the last two this is
    dropout on the whole change, as PEFT and the reference have it, at the price of a second product of W.
    """
    if gain is None:
        return output if low_rank is None else output + low_rank
    change = (gain - 1).to(output.dtype) * frozen
    if low_rank is not None:
        change = change + gain.to(output.dtype) * low_rank
    return output + change


@torch.library.custom_op(
    "dora_vl::safe_norms",
    mutates_args=(),
    schema="(Tensor weight, Tensor squared, Tensor a, Tensor b, float scale) -> Tensor",
)
def safe_norms(weight: Tensor, squared: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """n of each row for a graph; rows that cancel are taken dense, and no graph can hold their number."""
    return trusted_norms(weight, squared, a, b, scale)


def trusted_norms(weight: Tensor, squared: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`safe_norms` without the door of a graph around it.

    Asking for the rows that cancel is free on CPU. On CUDA it would stop the host in every layer and rule CUDA graphs
    out, so kernels decide there for themselves; only where there are none (float64, no Triton) is it asked for.
    """
    kernels = triton_kernels(weight)
    if kernels is not None:
        return kernels.norms(weight, squared, a, b, scale)
    on_A = torch.nn.functional.linear(a.to(weight.dtype), weight)
    norms, cancelled = direction_norms(squared, factored_norms_squared(squared, a, b, on_A, scale))
    if cancelled.numel():
        dense = dense_direction(weight[cancelled], a, b[cancelled], scale)
        norms = norms.index_copy(0, cancelled, root(dense.square().sum(dim=1)))
    return norms.clone()


@safe_norms.register_fake
def _(weight: Tensor, squared: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.empty_like(squared)
