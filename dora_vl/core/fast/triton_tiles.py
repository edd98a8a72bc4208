# pyright: reportMissingImports=false
"""How the Triton kernels are launched: on their tensors' device, in tiles from a small space, in torch's precision.

The first call for a bucket of shapes times the tiles of the space once with `triton.autotune`, into scratch memory and
never into a caller's buffer; later calls are plain launches of the winner. Row counts are bucketed by powers of two, so
that batches of variable length are timed some ten times at most in a run, and not at every step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton import Config
from triton.testing import do_bench

SWITCH = "DORA_VL_TRITON_TILES"
"""Set to `fixed` in the environment, one configuration stands for all: sums in one order, and nothing is timed.

`torch.use_deterministic_algorithms(True)` does the same."""
MOST_ROWS = 16384
"""Row counts from here on share one bucket."""
SHARED_BYTES = 99 * 1024
"""Of a block on the smallest supported cards (capability 8.6 and 8.9), where torch does not say."""
ACCUMULATORS = 128
"""Float32 numbers of accumulator a thread may hold, of its 255 registers."""
LARGEST_EXACT_RANK = 64
"""Float32 products of more ranks take three TF32 products, whose digits are float32's, in place of scalar ones."""


@dataclass(frozen=True)
class Operands:
    """What one launch is given, by the kernel's own names."""

    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, int | float]
    constants: Mapping[str, Any]

    def device(self) -> torch.device:
        """Where the kernel runs."""
        return next(iter(self.tensors.values())).device

    def everything(self) -> dict[str, Any]:
        """As keyword arguments."""
        return {**self.tensors, **self.numbers, **self.constants}


@dataclass
class TiledKernel:
    """A kernel with the tiles that it may run in."""

    kernel: Any
    space: Sequence[Config]
    """What is timed; the first that fits is the fixed choice, so the most moderate stands first."""
    fits: Callable[[Config, Mapping[str, Any]], bool]
    """Whether a configuration fits into shared memory and registers."""
    keys: Sequence[str]
    """The kernel's arguments on which the timing hangs, besides dtypes and the card; `rows` counts by its bucket."""
    _chosen: dict[tuple[object, ...], Config] = field(default_factory=dict)

    def config(self, operands: Operands, grid: Callable[..., Any], scratch: Callable[[], Operands]) -> Config:
        """The tiles for these operands; timed on `scratch`, whose outputs nobody reads."""
        if not _may_time(operands.device()):
            return self.fixed(operands)
        card = _card(operands.device())
        case = (card, *self._case(operands))
        if case not in self._chosen:
            tuner = _tuner(self, card)
            with on_device(operands.device()):
                tuner[grid](**scratch().everything())
            self._chosen[case] = tuner.best_config
        return self._chosen[case]

    def _case(self, operands: Operands) -> list[object]:
        named = {**operands.numbers, **operands.constants}
        named["rows"] = row_bucket(int(named["rows"]))
        return [named[name] for name in self.keys] + [one.dtype for one in operands.tensors.values()]

    def fixed(self, operands: Operands) -> Config:
        """The first of the space that fits."""
        return self.fitting(operands.everything())[0]

    def fitting(self, named: Mapping[str, Any]) -> list[Config]:
        """Those of the space that fit; the last, which is the smallest, where none does."""
        return [config for config in self.space if self.fits(config, named)] or [self.space[-1]]

    def launch(self, operands: Operands, grid: Callable[..., Any], config: Config) -> None:
        """Runs the kernel once."""
        with on_device(operands.device()):
            self.kernel[grid](**operands.everything(), **config.all_kwargs())


_TUNERS: dict[tuple[int, object], Any] = {}


def _tuner(tiled: TiledKernel, card: object) -> Any:
    """One autotuner for each kernel and kind of card: its own cache knows shapes alone."""
    found = _TUNERS.get((id(tiled), card))
    if found is None:
        found = triton.autotune(
            configs=list(tiled.space),
            key=list(tiled.keys),
            prune_configs_by={"early_config_prune": partial(_pruned, tiled)},
            do_bench=partial(do_bench, warmup=5, rep=20),
        )(tiled.kernel)
        _TUNERS[id(tiled), card] = found
    return found


def _pruned(tiled: TiledKernel, configs: Sequence[Config], positional: Mapping[str, Any], **named: Any) -> list[Config]:
    return tiled.fitting({**positional, **named})


def _may_time(device: torch.device) -> bool:
    """Not where one configuration or determinism is asked for, nor while a CUDA graph is recorded, nor on a CPU."""
    if device.type != "cuda" or os.environ.get(SWITCH) == "fixed" or torch.are_deterministic_algorithms_enabled():
        return False
    return not torch.cuda.is_current_stream_capturing()


def tiles(*shapes: tuple[int, int, int, int]) -> list[Config]:
    """A space from rows and columns of a tile, warps and pipeline stages; the few-row ones stand last."""
    return [
        Config({"BLOCK_ROWS": rows, "BLOCK_OUT": out}, num_warps=warps, num_stages=stages)
        for rows, out, warps, stages in shapes
    ]


def row_bucket(rows: int) -> int:
    """The next power of two, between 16 and `MOST_ROWS`."""
    return min(max(16, triton.next_power_of_2(rows)), MOST_ROWS)


def padded(rank: int) -> int:
    """A power of two, 16 at least: the least that the tensor cores take."""
    return max(16, triton.next_power_of_2(rank))


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors' in a model spread over several."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def fits_on_chip(config: Config, rows: int, operand_bytes: int, accumulators: int, device: torch.device) -> bool:
    """By shared memory and registers, and no more rows than there are: decoding has one.

    Args:
        config: With `BLOCK_ROWS` and `BLOCK_OUT`.
        rows: Of the activations.
        operand_bytes: What a product reads at a time.
        accumulators: Float32 sums of a program.
        device: Whose memory counts.
    """
    tile = config.kwargs["BLOCK_ROWS"] * config.kwargs["BLOCK_OUT"]
    exchanged = 4 * tile  # a tile changes its layout through shared memory
    return (
        config.kwargs["BLOCK_ROWS"] <= max(16, triton.next_power_of_2(rows))
        and accumulators + tile <= ACCUMULATORS * 32 * config.num_warps
        and config.num_stages * operand_bytes + exchanged <= shared_bytes(device)
    )


def shared_bytes(device: torch.device) -> int:
    """Shared memory that a block may ask for on this device."""
    if device.type != "cuda":
        return SHARED_BYTES
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", SHARED_BYTES)


def programs_wanted(device: torch.device) -> int:
    """Enough for every multiprocessor of the device to have two."""
    if device.type != "cuda":
        return 4
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def cast_factor(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A or B in the activations' dtype, once a call: every block of rows reads it."""
    return factor.detach().to(dtype).contiguous()


def dot_precision(dtype: torch.dtype, rank: int) -> str:
    """Of a kernel's products: what torch is told for its own float32 ones; half precision has but one.

    `ieee` runs on the scalar units, which is no loss while the pass is bound by memory; from larger ranks on
    `tf32x3` gives float32's digits on the tensor cores.
    """
    if dtype != torch.float32 or _torch_precision() == "tf32":
        return "tf32"
    return "ieee" if rank <= LARGEST_EXACT_RANK else "tf32x3"


def _torch_precision() -> str:
    matmul = torch.backends.cuda.matmul
    try:
        return str(matmul.fp32_precision)  # from torch 2.9 on
    except AttributeError:
        return "tf32" if matmul.allow_tf32 else "ieee"
