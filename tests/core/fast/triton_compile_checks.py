"""The kernels become machine code for cards that are not here, within the shared memory and registers they are given.

Run by test_triton_kernels.py in a process of its own, not in the interpreter. Triton brings NVIDIA's assembler, so
this needs no GPU; it says that the kernels compile and what they take, and nothing of results or times.
"""

from __future__ import annotations

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
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
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


def output_case(dtype: torch.dtype, rank: int, precision: str) -> tuple[TiledKernel, dict[str, str], dict[str, Any]]:
    size = torch.empty((), dtype=dtype).element_size()
    names = ("product", "y", "hidden", "factor", "bias", "minus_one")
    constants = {"HAS_BIAS": True, "HAS_LOW_RANK": True, "WIDE_DOT": False, "PRECISION": precision}
    constants["BLOCK_RANK"] = min(padded(rank), kernels.RANK_BLOCK_BYTES // size)
    return kernels.OUTPUT, dict.fromkeys(names, POINTERS[dtype]), constants


def backward_case(dtype: torch.dtype, rank: int, precision: str) -> tuple[TiledKernel, dict[str, str], dict[str, Any]]:
    types = dict.fromkeys(("dy", "kept", "bias", "factor", "minus_one", "dz"), POINTERS[dtype])
    types |= dict.fromkeys(("dh", "magnitude_parts", "bias_parts"), "*fp32") | {"scale": "fp32"}
    flags = dict.fromkeys(("HAS_KEPT", "HAS_BIAS", "SUM_BIAS", "HAS_LOW_RANK"), True)
    return kernels.BACKWARD, types, {**flags, "WIDE_DOT": False, "PRECISION": precision, "BLOCK_RANK": padded(rank)}


def fitting(tiled: TiledKernel, dtype: torch.dtype, constants: dict[str, Any], rows: int) -> list[Config]:
    tensors = {name: torch.empty(1, dtype=dtype) for name in ("factor", "dy", "minus_one", "changed")}
    return tiled.fitting({"rows": rows, **tensors, **constants})


def assert_fixed_tile_fits(folder, case, dtype, rank, precision, rows, capability):
    tiled, types, constants = case(dtype, rank, precision)
    config = fitting(tiled, dtype, constants, rows)[0]
    done = compiled(tiled.kernel, types, constants, config, capability)
    assert done.metadata.shared <= 99 * 1024
    assert spilled(done, folder) <= SPILLED_BYTES, config


needs_tool = pytest.mark.skipif(not TOOL.is_file(), reason="this Triton brings no cuobjdump")


@needs_tool
@pytest.mark.parametrize("rank", [16, 256])
@pytest.mark.parametrize("case", [output_case, backward_case])
def test_the_fixed_tile_compiles_and_spills_nothing(tmp_path, case, rank):
    assert_fixed_tile_fits(tmp_path, case, torch.bfloat16, rank, "tf32", rows=4096, capability=90)


@needs_tool
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("rows", [1, 4096])
@pytest.mark.parametrize(("dtype", "rank"), [(torch.bfloat16, 128), (torch.float16, 64), (torch.float32, 16)])
@pytest.mark.parametrize("case", [output_case, backward_case])
def test_on_other_cards_and_in_other_dtypes(tmp_path, case, dtype, rank, rows, capability):
    precision = "ieee" if dtype == torch.float32 else "tf32"
    assert_fixed_tile_fits(tmp_path, case, dtype, rank, precision, rows, capability)


@needs_tool
@pytest.mark.slow
def test_exact_float32_of_a_large_rank(tmp_path):
    assert_fixed_tile_fits(tmp_path, output_case, torch.float32, 384, "tf32x3", rows=4096, capability=90)


@pytest.mark.slow
@pytest.mark.parametrize("case", [output_case, backward_case])
@pytest.mark.parametrize("rank", [16, 128])
def test_every_tile_that_is_timed_compiles(case, rank):
    tiled, types, constants = case(torch.bfloat16, rank, "tf32")
    for config in fitting(tiled, torch.bfloat16, constants, 4096):
        assert compiled(tiled.kernel, types, constants, config, 90).metadata.shared <= 99 * 1024, config


def other_case(name: str, dtype: torch.dtype, rank: int) -> tuple[Any, dict[str, str], dict[str, Any], Config]:
    """The kernels without a choice of tiles, and the masked product in its fixed one."""
    pointer, block = POINTERS[dtype], {"PRECISION": "tf32", "WIDE_DOT": False, "BLOCK_RANK": min(padded(rank), 32)}
    if name == "sums":
        types = dict.fromkeys(("magnitude_parts", "bias_parts", "per_magnitude", "dh_parts", "dm", "db"), "*fp32")
        flags = dict.fromkeys(("HAS_KEPT", "SUM_BIAS", "SUM_HIDDEN"), True)
        blocks = {"BLOCK_PARTS": 32, "BLOCK_OUT": kernels.SUMMED_COLUMNS, "BLOCK_HIDDEN": kernels.SUMMED_HIDDEN}
        return kernels._sums_kernel, types | {"dh": pointer}, flags | blocks, Config({})
    if name == "masked copy":
        tile = {"BLOCK_ROWS": kernels.COPIED_ROWS, "BLOCK_COLUMNS": kernels.COPIED_COLUMNS}
        return kernels._masked_copy_kernel, {"source": pointer, "copy": pointer, "seed": "*i64"}, tile, Config({})
    if name == "masked product":
        types = dict.fromkeys(("base", "changed", "hidden", "factor"), pointer) | {"seed": "*i64"}
        config = fitting(kernels.MASKED_PRODUCT, dtype, block, 4096)[0]
        return kernels.MASKED_PRODUCT.kernel, types, block, config
    if name == "squared norms":
        types = {"frozen": "*fp32", "squared": "*fp32", "scale": "fp32"}
        types |= dict.fromkeys(("factor", "weight_on_A", "gram"), pointer)
        return kernels._squared_kernel, types, {**block, "BLOCK_ROWS": kernels.ROWS}, Config({})
    types = dict.fromkeys(("frozen", "squared", "lora_A", "lora_B", "trusted"), "*fp32") | {"weight": pointer}
    types |= {"scale": "fp32", "cancellation": "fp32"}
    tile = {"BLOCK_ROWS": kernels.CAREFUL_ROWS, "BLOCK_COLUMNS": kernels.CAREFUL_COLUMNS, "BLOCK_RANK": 32}
    return kernels._careful_kernel, types, tile, Config({})


@needs_tool
@pytest.mark.parametrize("capability", [90, *(pytest.param(one, marks=pytest.mark.slow) for one in (80, 89, 100, 120))])
@pytest.mark.parametrize("name", ["sums", "masked copy", "masked product", "squared norms", "careful norms"])
def test_the_other_kernels(tmp_path, name, capability):
    done = compiled(*other_case(name, torch.bfloat16, 128), capability=capability)
    assert done.metadata.shared <= 99 * 1024
    assert spilled(done, tmp_path) <= SPILLED_BYTES


def test_sizes_of_one_become_constants_in_a_launch():
    """Triton compiles an argument that is 1 into the kernel; rank 1 and a single row of decoding are such."""
    tiled, types, constants = output_case(torch.bfloat16, 1, "tf32")
    config = fitting(tiled, torch.bfloat16, constants, 1)[0]
    assert compiled(tiled.kernel, types, {**constants, "rows": 1, "rank": 1}, config, 90).asm["cubin"]
    tiled, types, constants = backward_case(torch.bfloat16, 1, "tf32")
    assert compiled(tiled.kernel, types, {**constants, "rows": 1, "rank": 1}, config, 90).asm["cubin"]
    kernel, types, constants, config = other_case("masked product", torch.bfloat16, 1)
    assert compiled(kernel, types, {**constants, "rows": 1, "rank": 1}, config, 90).asm["cubin"]
    for name in ("masked copy", "sums", "squared norms", "careful norms"):
        kernel, types, constants, config = other_case(name, torch.bfloat16, 1)
        ones = {one: 1 for one in ("rows", "rank", "parts", "splits", "column_stride") if one in kernel.arg_names}
        assert compiled(kernel, types, {**constants, **ones}, config, 90).asm["cubin"], name
