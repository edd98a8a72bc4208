"""The passes of a linear layer on a CPU as compiled operations, `cpu_step.cpp`, where there is a compiler.

Between the matrix products a DoRA layer does little, but in Python that little is some forty operations a layer and
step, a twentieth of the step of a 135M-parameter model; and the gain is applied in three passes over memory where one
would do. Compiled, a layer is one operation each way, and its norm is taken while the frozen weight is in the cache.

The source is compiled at the first pass that is large enough to gain by it, once for a machine (about 20 seconds), by
torch's own extension builder, into its cache. Without a compiler, or with DORA_VL_CPU_STEP=0, `functional.py` runs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from dora_vl.core import functional
from dora_vl.core.fast.dropout import Dropped
from dora_vl.core.fast.products import ROW_HALVES, triton_kernels
from dora_vl.core.gain import SHARD_MARKS, is_plain_parameter

if TYPE_CHECKING:
    from dora_vl.core.layer import AdaptedLayer
    from dora_vl.core.linear import ProductLayer


log = logging.getLogger(__name__)

SWITCH = "DORA_VL_CPU_STEP"
"""Set to 0 in the environment before the first pass, nothing is compiled and `functional.py` runs everywhere."""
SMALLEST_OUTPUT = 2**16
"""Numbers of an output below which nothing is compiled: a toy would wait for what it cannot gain."""
DTYPES = frozenset({torch.float32, torch.bfloat16})
SMALLEST_WEIGHT = 2**18
"""The same for a pass without a graph, whose gain is in its calls and not in its rows."""
SOURCE = Path(__file__).with_name("cpu_step.cpp")
# No fast-math: a NaN stays one. Without traps and errno, loops with a comparison or a root run in vector registers.
FINISHED = "finished.so"
"""The library's name in its folder once it is whole: another process may be half through the one beside it."""
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")


def compiled_pass(
    layer: ProductLayer,
    x: Float[Tensor, "*batch in_"],
    weight: Float[Tensor, "out in_"],
    bias: Float[Tensor, " out"] | None,
    dropped: Dropped | None,
) -> Float[Tensor, "*batch out"] | None:
    """The layer's output with its graph; None where `functional.py` must run, since this pass does not know the case.

    It knows float32 and bfloat16 on a CPU, whole plain parameters, a detached norm, and no rows that need care.
    """
    if not _is_worth_it(layer, x, weight):
        return None
    operations = compiled_operations()
    if operations is None:
        return None
    assert layer.magnitude is not None
    kept = layer.compiled_gain
    due = kept is None or not layer.still_holds(kept[1])
    if due or kept is None:
        kept = layer.compiled_gain = [torch.empty(len(weight)) for _ in range(3)], layer.snapshot()
    gain, snapshot = kept
    if gain is None:  # found unsound since the last change
        return None
    rows = x.reshape(-1, x.shape[-1])
    halves = (
        rows.is_contiguous() and ROW_HALVES.halves(len(rows), weight.t(), bias),
        ROW_HALVES.halves(len(rows), weight, None),
    )
    dropout = (1.0, None, None, None)
    if dropped is not None:
        masked = dropped.shared_copy(rows)
        dropout = (1 - dropped.probability, masked, dropped.positions, dropped.shared_taken(rows))
    parameters = (layer.lora_A, layer.lora_B, layer.magnitude)
    frozen = layer.weight_norms_squared()
    output, sound = operations.adapted_product(
        x, weight, bias, *parameters, frozen, gain, due, layer.scale(), *dropout, *halves
    )
    if not sound:
        layer.compiled_gain = None, snapshot
        return None
    return cast(Tensor, output)


def output_is_compiled(layer: ProductLayer, dtype: torch.dtype) -> bool:
    """Whether `adapted_output` gives this layer's output without a graph, for as long as its tensors stay the same."""
    large = dtype in DTYPES and layer.weight.numel() >= SMALLEST_WEIGHT
    return large and _is_plain(layer) and compiled_operations() is not None


def _is_worth_it(layer: ProductLayer, x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype in DTYPES
        and x.dtype == weight.dtype
        and x.numel() // max(x.shape[-1], 1) * len(weight) >= SMALLEST_OUTPUT
        and layer.adapter.detach_norm
        and not torch.is_autocast_enabled("cpu")
        and _is_plain(layer)
    )


def _is_plain(layer: ProductLayer) -> bool:
    trained = (layer.lora_A, layer.lora_B, layer.magnitude)
    return layer.weight.device.type == "cpu" and all(
        is_plain_parameter(one) and SHARD_MARKS.isdisjoint(vars(one)) for one in (layer.weight, *trained)
    )


@cache
def compiled_operations() -> Any | None:
    """The namespace `torch.ops.dora_vl_cpu`, compiled if it never was; None where it cannot be, said once."""
    if os.environ.get(SWITCH) == "0":
        return None
    if shutil.which(os.environ.get("CXX", "c++")) is None or importlib.util.find_spec("ninja") is None:
        log.info("no C++ compiler or no ninja: the DoRA step runs in Python, a few per cent slower")
        return None
    try:
        _compile()
    except (RuntimeError, OSError, ImportError) as failure:  # what the builder raises, and the loader
        log.warning("the compiled DoRA step could not be built, Python runs, a few per cent slower: %.300s", failure)
        return None
    return torch.ops.dora_vl_cpu


def _compile() -> None:
    """Loads the operations, built where no process of this machine built them yet.

    A finished library is loaded by itself: the builder compares its sources by path and time, and would compile anew,
    with all other processes waiting, for each checkout or environment that shares the cache.
    """
    from torch.utils.cpp_extension import get_default_build_root

    name = f"dora_vl_cpu_{_identity()}"
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root(), name)
    finished = folder / FINISHED
    if finished.exists():
        if not hasattr(torch.ops.dora_vl_cpu, "adapted_product"):  # a second registration would end the process
            torch.ops.load_library(str(finished))
        return
    log.info("compiling the DoRA step for this machine, once (about 20 seconds; %s=0 turns it off)", SWITCH)
    _build(name, folder)
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as copy:
        copy.write((folder / f"{name}.so").read_bytes())
    Path(copy.name).replace(finished)


def _build(name: str, folder: Path) -> None:
    from torch.utils.cpp_extension import load

    folder.mkdir(parents=True, exist_ok=True)
    path = os.environ.get("PATH", "")
    # The builder looks for ninja on the path, where it is only in an activated environment.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), path])
    try:
        load(
            name,
            [str(SOURCE)],
            extra_cflags=list(FLAGS),
            build_directory=str(folder),
            is_python_module=False,
            verbose=False,
        )
    finally:
        os.environ["PATH"] = path


def _identity() -> str:
    """Names the build by all that it depends on: a home folder may be shared by machines of several kinds."""
    processor = platform.processor() or platform.machine()
    flags = Path("/proc/cpuinfo")
    if flags.exists():
        processor += next((line for line in flags.read_text().splitlines() if line.startswith("flags")), "")
    parts = (SOURCE.read_text(), *FLAGS, torch.__version__, processor)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


# Adapted layers as `torch.compile` should see them: plain operations and one opaque one for the norm.
#
# The eager path keeps norms between calls and draws dropout by position, neither of which a graph can hold. Here the
# compiler fuses and chooses what to keep, and the norm is computed in every pass, so it is never stale.


def compiled_linear(layer: ProductLayer, input: Float[Tensor, "*batch in_"]) -> Float[Tensor, "*batch out"]:
    """y = g (W x + s B A x) + b without Python state, so that no graph breaks."""
    factors, weight, bias = layer.factors(), layer.as_matrix(layer.weight), layer.bias
    dropping = layer.training and factors is not None
    dropped = F.dropout(input, layer.adapter.dropout) if dropping else input
    product = F.linear(input, weight)
    output = product if bias is None else product + bias.to(product.dtype)
    low_rank = None
    if factors is not None:
        a, b = (factor.to(product.dtype) for factor in factors)
        low_rank = layer.scale() * F.linear(F.linear(dropped.to(product.dtype), a), b)
    whole_change = dropping and layer.adapter.dropout_mode == "whole_change"
    frozen = F.linear(dropped, weight) if whole_change else product
    return functional.changed_output(output, frozen, low_rank, compiled_gain(layer))


def compiled_gain(layer: AdaptedLayer) -> Float[Tensor, " out"] | None:
    """g of any adapted layer, its norm computed in the graph; None for LoRA."""
    magnitude, factors = layer.magnitude, layer.factors()
    if magnitude is None:
        return None
    kept = layer._norms_squared
    # Not what eager passes keep, since no graph sees that W was edited; a quantised weight stays as it is.
    squared = layer.frozen_norms_squared() if layer.weight_is_readable or kept is None else kept[0]
    if factors is None:
        return functional.gain(magnitude, functional.root(squared))
    with torch.autocast(layer.weight.device.type, enabled=False):
        return functional.gain(magnitude, _norms(layer, squared, *factors))


def _norms(layer: AdaptedLayer, squared: Tensor, a: Tensor, b: Tensor) -> Float[Tensor, " out"]:
    """n, with its gradient where `detach_norm` is off; an opaque layer's rows that cancel are not taken dense here."""

    def live() -> Tensor:
        on_A = layer.frozen_on_rows(a)
        return functional.root(functional.factored_norms_squared(squared, a, b, on_A, layer.scale()))

    if not layer.weight_is_readable:
        norms = live()
        return norms.detach() if layer.adapter.detach_norm else norms
    weight = layer.as_matrix(layer.weight).detach()
    norms = safe_norms(weight, squared, a.detach(), b.detach(), layer.scale())
    if layer.adapter.detach_norm:
        return norms
    differentiable = live()
    return norms + (differentiable - differentiable.detach())


@torch.library.custom_op(
    "dora_vl::safe_norms",
    mutates_args=(),
    schema="(Tensor weight, Tensor squared, Tensor a, Tensor b, float scale) -> Tensor",
)
def safe_norms(weight: Tensor, squared: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """n of each row, rows that cancel taken dense; their number is known only at run time, which no graph can hold."""
    return trusted_norms(weight, squared, a, b, scale)


def trusted_norms(weight: Tensor, squared: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`safe_norms` without the door of a graph around it.

    Asking for the rows that cancel is free on CPU. On CUDA it would stop the host in every layer and rule CUDA graphs
    out, so kernels decide there for themselves; only where there are none (float64, no Triton) is it asked for.
    """
    kernels = triton_kernels(weight)
    if kernels is not None:
        return kernels.norms(weight, squared, a, b, scale)
    on_A = F.linear(a.to(weight.dtype), weight)
    norms, cancelled = functional.direction_norms(
        squared, functional.factored_norms_squared(squared, a, b, on_A, scale)
    )
    if cancelled.numel():
        dense = functional.dense_direction(weight[cancelled], a, b[cancelled], scale)
        norms = norms.index_copy(0, cancelled, functional.root(dense.square().sum(dim=1)))
    return norms.clone()


@safe_norms.register_fake
def _(weight: Tensor, squared: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.empty_like(squared)
