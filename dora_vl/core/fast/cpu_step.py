"""The passes of an adapted linear layer on a CPU as compiled operations, `cpu_step.cpp`, where there is a compiler.

Between the matrix products a DoRA layer does little, but in torch's operations that little is three passes over memory
where one would do, and for a decoded token a dozen calls that cost more than their arithmetic.

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
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

SWITCH = "DORA_VL_CPU_STEP"
"""If the environment sets it to 0 before the first pass, nothing is compiled and `functional.py` runs everywhere."""
SMALLEST = 2**16
"""Outputs and weights of fewer numbers run eagerly: a toy model would wait for the compiler and gain nothing."""
DTYPES = frozenset({torch.float32, torch.bfloat16})
SOURCE = Path(__file__).with_name("cpu_step.cpp")
FINISHED = "finished-{}.so"
"""A whole library gets this name, with its content's hash: another process may still be writing the one beside it."""
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
"""fast-math is off: a NaN stays one. Without traps and errno, loops with a comparison or a root are vectorised."""


def is_usable(dtype: torch.dtype, numbers: int) -> bool:
    """Tells whether a pass over an output or a weight of this size runs compiled."""
    return dtype in DTYPES and numbers >= SMALLEST and compiled_operations() is not None


def output(
    product: Tensor, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, gain: Any, scale: float
) -> tuple[Tensor, Tensor]:
    """Computes `functional.output`, compiled."""
    return torch.ops.dora_vl_cpu.output(product, x, a, b, bias, gain.full, scale)


def gradients(
    dy: Tensor, product: Tensor, b: Tensor, bias: Tensor | None, gain: Any, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes `functional.gradients`, compiled."""
    return torch.ops.dora_vl_cpu.gradients(dy, product, b, bias, gain.full, scale)


def factor_gradients(
    dy: Tensor, x: Tensor, hidden: Tensor, dh: Tensor, lora_B: Tensor, sums: Tensor, gain: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `functional.factor_gradients`, compiled."""
    operands = (dy, x, hidden, dh, lora_B, sums, gain.full, gain.per_norm)
    dA, dB, dm = torch.ops.dora_vl_cpu.factor_gradients(*operands)
    return dA.to(lora_B.dtype), dB.to(lora_B.dtype), dm


def gains(magnitude: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """Computes g and 1 / n of `functional.gains`, compiled."""
    return torch.ops.dora_vl_cpu.gains(magnitude, norms)


def norms(weight: Tensor, weight_norms_squared: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """Computes `functional.norms`, compiled."""
    return torch.ops.dora_vl_cpu.norms(weight, weight_norms_squared, lora_A, lora_B, scale)


@cache
def compiled_operations() -> Any | None:
    """Returns the namespace `torch.ops.dora_vl_cpu`, compiled at the first call; None if that fails (logged once)."""
    if os.environ.get(SWITCH) == "0":
        return None
    if shutil.which(os.environ.get("CXX", "c++")) is None or importlib.util.find_spec("ninja") is None:
        log.info("no C++ compiler or no ninja: the DoRA step runs in Python, a few per cent slower")
        return None
    try:
        _compile()
        _register_flop()
    except (RuntimeError, OSError, ImportError) as failure:  # what the builder raises, and the loader
        log.warning("the compiled DoRA step could not be built, Python runs, a few per cent slower: %.300s", failure)
        return None
    return torch.ops.dora_vl_cpu


def _register_flop() -> None:
    """Tells torch's FlopCounterMode the products inside the compiled operations; it sees shapes in place of tensors."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    operations: Any = torch.ops.dora_vl_cpu
    if operations.output in flop_registry:
        return

    @register_flop_formula(operations.output)
    def output_flop(product: Any, x: Any, a: Any, *_: Any, **__: Any) -> int:
        return 2 * x[0] * a[0] * (a[1] + product[1])

    @register_flop_formula(operations.gradients)
    def gradients_flop(dy: Any, product: Any, b: Any, *_: Any, **__: Any) -> int:
        return 2 * dy[0] * b[0] * b[1]

    @register_flop_formula(operations.factor_gradients)
    def factor_gradients_flop(dy: Any, x: Any, hidden: Any, *_: Any, **__: Any) -> int:
        return 2 * dy[0] * hidden[1] * (x[1] + dy[1])


def _compile() -> None:
    """Loads the operations, built where no process of this machine built them yet.

    A finished library is loaded by itself: the builder compares its sources by path and time, and would compile anew,
    with all other processes waiting, for each checkout or environment that shares the cache.
    """
    from torch.utils.cpp_extension import get_default_build_root, load

    # The name holds all that the build depends on: a home folder may be shared by machines of several kinds.
    processor, flags = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if flags.exists():
        processor += next((line for line in flags.read_text().splitlines() if line.startswith("flags")), "")
    parts = "\0".join((SOURCE.read_text(), *FLAGS, torch.__version__, processor))
    name = f"dora_vl_cpu_{hashlib.sha256(parts.encode()).hexdigest()[:16]}"
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root(), name)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    finished = list(folder.glob(FINISHED.format("*")))
    for path in (folder, *finished):
        if path.stat().st_uid not in (0, os.getuid()) or path.stat().st_mode & 0o022:
            raise PermissionError(f"{path} may have been written by others; remove it")
    for library in finished:
        if library.name == FINISHED.format(hashlib.sha256(library.read_bytes()).hexdigest()):
            if not hasattr(torch.ops.dora_vl_cpu, "output"):  # a second registration would end the process
                torch.ops.load_library(str(library))
            return
    log.info("compiling the DoRA step for this machine, once (about 20 seconds; %s=0 turns it off)", SWITCH)
    path = os.environ.get("PATH", "")
    # The builder looks for ninja on the path, where it is only in an activated environment.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), path])
    try:
        load(name, [str(SOURCE)], extra_cflags=list(FLAGS), build_directory=str(folder), is_python_module=False)
    finally:
        os.environ["PATH"] = path
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as copy:
        copy.write(built := (folder / f"{name}.so").read_bytes())
    Path(copy.name).replace(folder / FINISHED.format(hashlib.sha256(built).hexdigest()))
