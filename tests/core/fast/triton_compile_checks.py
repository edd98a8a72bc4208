"""The kernels become machine code for cards that are not here, within the shared memory and registers they are given.

Run by test_compiled.py in a process of its own, not in the interpreter. Triton brings NVIDIA's assembler, so
this needs no GPU; it says that the kernels compile and what they take, and nothing of results or times.
"""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, and interprets nothing", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dora_vl.core.fast import triton as kernels
from dora_vl.core.fast.triton import Config, TiledKernel, padded

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
SPILLED_BYTES = 128
"""A few numbers; where a tile is too large it is hundreds."""
TOOL = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], config: Config, capability: int) -> Any:
    """For arguments as a launch passes them: pointers to multiples of 16 bytes, sizes that are multiples of 16."""
    fixed = {**constants, **config.kwargs}
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or (signature[name] == "i32" and name in ("out", "rank", "columns"))
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=aligned)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def spilled(done: Any, folder: Path) -> int:
    """Bytes of a thread's stack."""
    (folder / "kernel.cubin").write_bytes(done.asm["cubin"])
    words = [str(TOOL), "--dump-resource-usage", str(folder / "kernel.cubin")]
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return int(re.findall(r"STACK:(\d+)", text)[0])


def case_of(name: str, dtype: torch.dtype, rank: int, precision: str = "tf32") -> tuple[Any, dict[str, str], dict]:
    """A kernel with the types of its tensors and its constants but tiles."""
    pointer, size = POINTERS[dtype], torch.empty((), dtype=dtype).element_size()
    products = {"WIDE_DOT": False, "PRECISION": precision, "BLOCK_RANK": min(padded(rank), 32)}
    floats = dict.fromkeys(("dh", "magnitude_parts", "bias_parts", "dh_parts", "dm", "db"), "*fp32")
    floats |= dict.fromkeys(("frozen", "squared", "trusted"), "*fp32") | {"scale": "fp32", "cancellation": "fp32"}
    names = ("product", "y", "hidden", "factor", "bias", "minus_one", "dy", "dz", "weight_on_A", "gram", "weight")
    types = {**dict.fromkeys(names, pointer), **floats}
    match name:
        case "output":
            block = min(padded(rank), kernels.RANK_BLOCK_BYTES // size)
            return kernels.OUTPUT, types, {**products, "HAS_BIAS": True, "BLOCK_RANK": block}
        case "backward":
            flags = {"HAS_BIAS": True, "HAS_LOW_RANK": True}
            return kernels.BACKWARD, types, {**products, **flags, "BLOCK_RANK": padded(rank)}
        case "sums":
            tile = {"BLOCK_PARTS": 32, "BLOCK_OUT": kernels.SUMMED_COLUMNS, "BLOCK_HIDDEN": kernels.SUMMED_HIDDEN}
            return kernels._sums_kernel, types | {"dh": pointer}, {"SUM_HIDDEN": True} | tile
        case "squared norms":
            return kernels._squared_kernel, types, {**products, "BLOCK_ROWS": kernels.ROWS}
    tile = {"BLOCK_ROWS": kernels.CAREFUL_ROWS, "BLOCK_COLUMNS": kernels.CAREFUL_COLUMNS, "BLOCK_RANK": 32}
    return kernels._careful_kernel, types | {"lora_A": "*fp32", "lora_B": "*fp32"}, tile


def tiles_of(kernel: Any, dtype: torch.dtype, constants: dict[str, Any], rows: int = 4096) -> list[Config]:
    """Those that fit, the fixed one first; of a kernel without a choice what needs none."""
    tensors = {name: torch.empty(1, dtype=dtype) for name in ("factor", "dy", "minus_one")}
    return kernel.fitting({"rows": rows, **tensors, **constants}) if isinstance(kernel, TiledKernel) else [Config({})]


def jit_of(kernel: Any) -> Any:
    return kernel.kernel if isinstance(kernel, TiledKernel) else kernel


def assert_fits(folder: Path, name: str, dtype: torch.dtype, rank: int, capability: int, **more: Any) -> None:
    """The fixed tile compiles and spills nothing."""
    kernel, types, constants = case_of(name, dtype, rank, more.get("precision", "tf32"))
    tile = tiles_of(kernel, dtype, constants, more.get("rows", 4096))[0]
    done = compiled(jit_of(kernel), types, constants, tile, capability)
    assert done.metadata.shared <= 99 * 1024
    assert spilled(done, folder) <= SPILLED_BYTES, tile


needs_tool = pytest.mark.skipif(not TOOL.is_file(), reason="this Triton brings no cuobjdump")
SINGLE = ("sums", "squared norms", "careful norms")


@needs_tool
@pytest.mark.parametrize(
    ("name", "rank"),
    [("output", 16), ("backward", 16), *((name, 128) for name in SINGLE)]
    + [pytest.param(name, 256, marks=pytest.mark.slow) for name in ("output", "backward")],
)
def test_the_fixed_tile_compiles_and_spills_nothing(tmp_path, name, rank):
    assert_fits(tmp_path, name, torch.bfloat16, rank, 90)


@needs_tool
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("rows", [1, 4096])
@pytest.mark.parametrize(("dtype", "rank"), [(torch.bfloat16, 128), (torch.float16, 64), (torch.float32, 16)])
@pytest.mark.parametrize("name", ["output", "backward"])
def test_on_other_cards_and_in_other_dtypes(tmp_path, name, dtype, rank, rows, capability):
    precision = "ieee" if dtype == torch.float32 else "tf32"
    assert_fits(tmp_path, name, dtype, rank, capability, precision=precision, rows=rows)


@pytest.mark.parametrize(
    "name", ["output", *(pytest.param(name, marks=pytest.mark.slow) for name in ("backward", *SINGLE))]
)
def test_sizes_of_one_become_constants_in_a_launch(name):
    """Triton compiles an argument that is 1 into the kernel; rank 1 and a single row of decoding are such."""
    kernel, types, constants = case_of(name, torch.bfloat16, 1)
    tile, kernel = tiles_of(kernel, torch.bfloat16, constants, 1)[0], jit_of(kernel)
    ones = {size: 1 for size in ("rows", "rank", "parts", "splits", "column_stride") if size in kernel.arg_names}
    assert compiled(kernel, types, {**constants, **ones}, tile, 90).asm["cubin"]
