"""`dora-vl merge`: adapters folded into their base, compared with them, and with `--check` certified by answers."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from os import getpid
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from dora_vl.adapters.adapter import CLOSED_ANSWERS, Adapter, base_of, refuse_other_base, write_adapter
from dora_vl.adapters.base_weights import BaseWeights, config_in, skeleton
from dora_vl.adapters.combine import combine
from dora_vl.adapters.convert_command import add_reading_arguments, reading_options
from dora_vl.adapters.files import DTYPES
from dora_vl.adapters.folder import CONFIG_FILE, WEIGHTS_FILE, load_adapter
from dora_vl.adapters.merge import SHARD_BYTES, merge_to_folder, refuse_target
from dora_vl.adapters.quantised_base import as_trained
from dora_vl.adapters.read import read_any
from dora_vl.errors import UserError, one_line
from dora_vl.evaluation.certificate import (
    CHECK_HELP,
    FAILED_STATUS,
    add_check_options,
    as_model,
    checked,
    planned_check,
    unmerged_source,
)
from dora_vl.files import opening

RESULT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROWS, TOKENS = 3, 12
"""Of the texts that are compared."""
ROUNDING = {False: 1e-3, True: 5e-2}
"""Largest difference, as a share of the largest logit, by whether weights are stored in less than float32."""

DESCRIPTION = f"""\
Writes base + adapter as a plain model folder: sharded safetensors, configuration, tokenizer and processor. Computed in
float32, one tensor in memory at a time, so a 7B model needs no second copy.

  dora-vl merge --adapter runs/llava/adapter --to llava-merged
  dora-vl merge --adapter adapter --base llava-1.5-7b/ --dtype float16 --to merged

Several adapters merge with weights: W' = W + sum of weight * (W'_i - W). Weight 1 of one adapter is that adapter.

  dora-vl merge --adapter a --adapter b --weight 0.7 --weight 0.3 --base BASE --to merged

The result's logits for a few drawn texts are compared with those of base and adapter (exit status 1 where they differ
by more than rounding); --no-check leaves this out.

{CHECK_HELP}

  dora-vl merge --adapter runs/llava/adapter --to llava-merged --check 50
  dora-vl merge --adapter adapter --to merged --check --questions test.jsonl --images pictures --most-different 0.02
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `dora-vl merge`."""
    parser.add_argument("--adapter", type=Path, action="append", required=True, metavar="DIR", help="may come often")
    parser.add_argument("--weight", type=float, action="append", metavar="W", help="one for each --adapter; default 1")
    parser.add_argument(
        "--to", type=Path, required=True, metavar="FOLDER", help="model folder to write; an earlier merge is replaced"
    )
    parser.add_argument("--base", type=Path, metavar="FOLDER", help="default: what the adapter says it was trained on")
    parser.add_argument("--dtype", choices=sorted(RESULT_DTYPES), help="of the result; default: each tensor's own")
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
    add_check_options(parser)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is merged into what; everything that was asked for has been read and fits.

    Attributes:
        adapters: as they were given.
        adapter: the one that is merged: the given one, or their combination.
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
    """
    options = reading_options(arguments)
    adapters = [read_any(source, options) for source in arguments.adapter]
    base = arguments.base or base_of(adapters[0])
    refuse(arguments.to, base)
    if not arguments.any_base:
        for adapter in adapters:
            refuse_other_base(adapter.recipe, base, adapter.source)
    recipes = {adapter.source: adapter.recipe for adapter in adapters}
    open_base = BaseWeights if arguments.base_values == "stored" else partial(as_trained, recipes=recipes)
    weights = arguments.weight or [1.0] * len(adapters)
    if len(weights) != len(adapters):
        raise UserError(f"{len(adapters)} times --adapter and {len(weights)} times --weight; give one for each")
    adapter = adapters[0]
    if len(adapters) > 1 or weights != [1.0]:
        names = [str(index) for index in range(len(adapters))]
        with open_base(base) as opened:
            adapter = combine(
                dict(zip(names, adapters, strict=True)), dict(zip(names, weights, strict=True)), opened
            ).adapter
    return Plan(adapters=adapters, adapter=adapter, base=base, open_base=open_base)


def merge(found: Plan, arguments: argparse.Namespace) -> Iterator[str]:
    """Merges; yields the lines to print."""
    adapter, dtype = found.adapter, RESULT_DTYPES[arguments.dtype] if arguments.dtype else None
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


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Merges, and checks where that is asked for; yields the lines to print."""
    check = planned_check(arguments, arguments.adapter[0])
    merging = plan(arguments)
    if check is None:
        yield from merge(merging, arguments)
        yield from compared(merging, arguments) if arguments.check is None else ()
        return
    with adapter_folder(merging, arguments) as folder:
        source = unmerged_source(check, folder, merging.base, arguments.template)
        yield from merge(merging, arguments)
        merged = as_model(source, arguments.to)
        yield from checked(check, source, "merged", lambda: merged, arguments.to, about(merging, arguments))


def compared(plan: Plan, arguments: argparse.Namespace) -> Iterator[str]:
    """The merged folder's logits beside those of base and adapter, for drawn tokens without pictures.

    Raises:
        SystemExit: with status 1, they differ by more than rounding.
    """
    result: Path = arguments.to
    beside = f"{result}: not compared with base and adapter"
    if reason := _incomparable(plan):
        yield f"{beside}, {reason}"
        return
    try:
        with adapter_folder(plan, arguments) as folder:
            expected, _ = _logits(plan.base, folder)
        found, dtype = _logits(result, None)
    except UserError as error:
        yield f"{beside}: {error}"
        return
    share = float((found - expected).abs().max() / expected.abs().max())
    yield f"{result}: logits for {ROWS} drawn texts differ from base and adapter's by {share:.1e} of the largest"
    if not share <= ROUNDING[dtype.itemsize < torch.float32.itemsize]:
        yield f"{result}: that is more than rounding, so this is not the trained model: do not use it"
        raise SystemExit(FAILED_STATUS)


def _incomparable(plan: Plan) -> str:
    """Why the two are not opened here; nothing where they are."""
    if any(adapter.recipe.get("quantisation") for adapter in plan.adapters):
        return "whose base was quantised for training (--check compares answers)"
    if plan.adapter.input_axis:
        return "whose magnitudes are one an input column"
    model = skeleton(config_in(plan.base))
    if model is None:
        return "of whose class transformers has none"
    needed = sum(parameter.numel() for parameter in model.parameters()) * torch.float32.itemsize
    free = psutil.virtual_memory().available
    return f"which takes {needed:,} bytes in float32, and {free:,} are free" if needed > free else ""


@torch.no_grad()
def _logits(folder: Path, adapter: Path | None) -> tuple[Tensor, torch.dtype]:
    """Logits in float32 for drawn tokens, none of them special, and the narrowest dtype that weights are stored in."""
    shell = skeleton(config_in(folder))
    with opening(f"{folder} cannot be opened"):
        model = type(shell).from_pretrained(folder, dtype=torch.float32).eval()
    if adapter is not None:
        load_adapter(model, adapter)
    words, special = model.config.get_text_config().vocab_size, _special(model.config.to_dict())
    plain = torch.tensor([word for word in range(words // 4, words) if word not in special])
    ids = plain[torch.randint(len(plain), (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))]
    both = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with BaseWeights(folder) as stored:
        dtypes = {DTYPES[tensor.dtype] for tensor in stored.tensors.values() if DTYPES[tensor.dtype].is_floating_point}
    try:
        logits = model(input_ids=ids, **both).logits
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"a {type(model).__name__} takes no text alone ({one_line(str(error))})") from error
    return logits, min(dtypes, key=lambda dtype: dtype.itemsize)


def _special(config: Mapping[str, Any]) -> set[object]:
    """Ids of tokens that stand for something else than text."""
    ids: set[object] = set()
    for name, value in config.items():
        if isinstance(value, dict) and name.endswith("_config"):
            ids |= _special(value)
        elif "token" in name:
            ids.update(value if isinstance(value, list) else [value])
    return ids


def about(plan: Plan, arguments: argparse.Namespace) -> Mapping[str, object]:
    """What a certificate says of where the weights come from."""
    weights = arguments.weight or [1.0] * len(plan.adapters)
    return {
        "adapters": {one.source: weight for one, weight in zip(plan.adapters, weights, strict=True)},
        "base": str(plan.base),
        "result": str(arguments.to),
        "weights": arguments.dtype or "as in the base",
    }


@contextmanager
def adapter_folder(plan: Plan, arguments: argparse.Namespace) -> Iterator[Path]:
    """The folder of the adapter that is merged; written for the time being where it is a combination or foreign."""
    given = arguments.adapter[0]
    if plan.adapter is plan.adapters[0] and all((given / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE)):
        yield given
        return
    target: Path = arguments.to
    folder = target.with_name(f".{target.name}.adapter-{getpid()}")
    try:
        # with what the first one's recipe says of how its model is asked
        asked = {name: value for name, value in plan.adapters[0].recipe.items() if name != "adapter"}
        write_adapter(replace(plan.adapter, recipe={**asked, **plan.adapter.recipe}), folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
