"""Merging as `dora-vl merge` does it: adapters folded into their base, as a plain model folder that any tool opens."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from dora_vl.adapters.adapter import CLOSED_ANSWERS, Adapter
from dora_vl.adapters.base_weights import BaseWeights
from dora_vl.adapters.combine import combine
from dora_vl.adapters.convert_command import add_reading_arguments, reading_options
from dora_vl.adapters.merge_folder import SHARD_BYTES, merge_to_folder, refuse_target
from dora_vl.adapters.provenance import base_of, refuse_other_base
from dora_vl.adapters.quantised_base import as_trained
from dora_vl.adapters.read import read_any
from dora_vl.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

DESCRIPTION = """\
Writes base + adapter as a plain model folder: sharded safetensors, configuration, tokenizer and processor. Computed in
float32, one tensor in memory at a time, so a 7B model needs no second copy.

  dora-vl merge --adapter runs/llava/adapter --to llava-merged
  dora-vl merge --adapter adapter --base llava-1.5-7b/ --dtype float16 --to merged

Several adapters merge with weights: W' = W + sum of weight * (W'_i - W). Weight 1 of one adapter is that adapter.

  dora-vl merge --adapter a --adapter b --weight 0.7 --weight 0.3 --base BASE --to merged
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `dora-vl merge`."""
    parser.add_argument("--adapter", type=Path, action="append", required=True, metavar="DIR", help="may come often")
    parser.add_argument("--weight", type=float, action="append", metavar="W", help="one for each --adapter; default 1")
    parser.add_argument(
        "--to", type=Path, required=True, metavar="FOLDER", help="model folder to write; an earlier merge is replaced"
    )
    parser.add_argument("--base", type=Path, metavar="FOLDER", help="default: what the adapter says it was trained on")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="of the result; default: each tensor's own")
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES, metavar="N", help="largest output file")
    parser.add_argument(
        "--base-values",
        choices=("trained", "stored"),
        default="trained",
        help="of a base that was quantised for training: trained (default) merges into the values after quantisation, "
        "so that the result is the trained model; stored into the folder's own, which the adapter never saw",
    )
    parser.add_argument("--any-base", action="store_true", help="accept a base whose content hash differs")
    add_reading_arguments(parser)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is merged into what; everything that was asked for has been read and fits.

    Attributes:
        adapters: as they were given.
        adapter: the one that is merged: the given one, or their combination.
        base: the base's folder.
        open_base: gives the values that are merged into.
    """

    adapters: list[Adapter]
    adapter: Adapter
    base: Path
    open_base: Callable[[Path], BaseWeights]


def plan(arguments: argparse.Namespace, refuse: Callable[[Path, Path], None] = refuse_target) -> Plan:
    """Reads the adapters and finds their base.

    Args:
        refuse: raises where the result may not be written over what is there, given its folder and the base's.

    Raises:
        UserError: as reading, combining and `refuse`; or the base is another than the one trained on.
    """
    options = reading_options(arguments)
    adapters = [read_any(source, options) for source in arguments.adapter]
    base = arguments.base or base_of(adapters[0])
    refuse(arguments.to, base)
    if not arguments.any_base:
        for adapter in adapters:
            refuse_other_base(adapter.recipe, base, adapter.source)
    open_base = _opener(adapters, stored=arguments.base_values == "stored")
    adapter = _one(adapters, arguments.weight or [1.0] * len(adapters), base, open_base)
    return Plan(adapters=adapters, adapter=adapter, base=base, open_base=open_base)


def merge(found: Plan, arguments: argparse.Namespace) -> Iterator[str]:
    """Merges; yields the lines to print."""
    adapter, dtype = found.adapter, DTYPES[arguments.dtype] if arguments.dtype else None
    merged = merge_to_folder(
        adapter, found.base, arguments.to, dtype=dtype, shard_bytes=arguments.shard_bytes, open_base=found.open_base
    )
    yield (
        f"{arguments.to}: {merged.layers} layers merged, {merged.replaced} other tensors taken from the adapter, "
        f"{merged.files} files, {merged.bytes:,} bytes"
    )
    if adapter.answer_heads:
        tasks = ", ".join(adapter.recipe[CLOSED_ANSWERS])
        yield f"{arguments.to}: it has the closed answer lists of {tasks} with their heads"


def _opener(adapters: list[Adapter], *, stored: bool) -> Callable[[Path], BaseWeights]:
    """What opens the base: with the values that the adapters were trained on, or with the stored ones."""
    if stored:
        return BaseWeights
    return partial(as_trained, recipes={adapter.source: adapter.recipe for adapter in adapters})


def _one(
    adapters: list[Adapter], weights: list[float], base: Path, open_base: Callable[[Path], BaseWeights]
) -> Adapter:
    if len(weights) != len(adapters):
        raise UserError(f"{len(adapters)} times --adapter and {len(weights)} times --weight; give one for each")
    if len(adapters) == 1 and weights == [1.0]:
        return adapters[0]
    by_name = {str(index): adapter for index, adapter in enumerate(adapters)}
    shares = {str(index): weight for index, weight in enumerate(weights)}
    with open_base(base) as opened:
        return combine(by_name, shares, opened).adapter
