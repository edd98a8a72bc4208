"""What `dora-vl merge` and `dora-vl export` do: merge an adapter into its base, or convert it for another server."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from dora_vl.adapters.adapter import CLOSED_ANSWERS, Adapter, base_of, refuse_other_base, write_adapter
from dora_vl.adapters.base_weights import BaseWeights, config_in, skeleton
from dora_vl.adapters.convert_command import reading_options
from dora_vl.adapters.exports import ADAPTER, BASE, export_for_vllm, refuse_unserved_base
from dora_vl.adapters.files import CONFIG_FILE, WEIGHTS_FILE, refuse_to_replace
from dora_vl.adapters.foreign_formats import read_foreign_adapter
from dora_vl.adapters.merge import merge_to_folder, refuse_target
from dora_vl.adapters.quantised_base import as_trained
from dora_vl.backbones import register_towers
from dora_vl.backbones.base import head_of
from dora_vl.backbones.families.targets import resolved_layers
from dora_vl.errors import UserError
from dora_vl.evaluation.merge_check import as_model, check_answers, check_logits, planned_check, unmerged_source
from dora_vl.evaluation.open_model import ModelSource
from dora_vl.files import unfinished


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Holds what is merged into what, all read."""

    adapter: Adapter
    base: Path
    open_base: Callable[[Path], BaseWeights]


def plan_merge(arguments: argparse.Namespace, refuse: Callable[[Path, Path], None]) -> Plan:
    """Reads the adapter, finds its base, and refuses a result that may not be written there."""
    adapter = read_foreign_adapter(arguments.adapter, reading_options(arguments))
    base = arguments.base or base_of(adapter)
    refuse(arguments.to, base)
    if not arguments.any_base:
        refuse_other_base(adapter.recipe, base, adapter.source)
    recipes = {adapter.source: adapter.recipe}
    open_base = BaseWeights if arguments.base_values == "stored" else partial(as_trained, recipes=recipes)
    return Plan(adapter=adapter, base=base, open_base=open_base)


def merge(plan: Plan, arguments: argparse.Namespace) -> Iterator[str]:
    """Merges; yields the lines to print."""
    adapter, dtype = plan.adapter, getattr(torch, arguments.dtype) if arguments.dtype else None
    merged = merge_to_folder(adapter, plan.base, arguments.to, dtype=dtype, open_base=plan.open_base)
    yield (
        f"{arguments.to}: {merged.layers} layers merged, {merged.replaced} other tensors taken from the adapter, "
        f"{merged.files} files, {merged.bytes:,} bytes"
    )
    if adapter.answer_heads:
        tasks = ", ".join(adapter.recipe[CLOSED_ANSWERS])
        yield f"{arguments.to}: it has the closed answer lists of {tasks} with their heads"


def write_and_check(arguments: argparse.Namespace, *, for_vllm: bool = False) -> Iterator[str]:
    """Merges, or exports for vLLM, and checks unless that is switched off; yields the lines to print."""
    check, target = planned_check(arguments, arguments.adapter), arguments.to
    plan = plan_merge(arguments, _refuse_unserved if for_vllm else refuse_target)
    dtype = arguments.dtype or "as in the base"
    about = {"adapter": plan.adapter.source, "base": str(plan.base), "result": str(target), "weights": dtype}
    write, unmerged = _write_for_vllm if for_vllm else merge, partial(adapter_folder, plan, arguments)
    if check is None:
        yield from write(plan, arguments)
        if arguments.check is None and not for_vllm:
            yield from check_logits(plan.adapter, plan.base, unmerged, target, about)
        return
    with unmerged() as folder:
        source = unmerged_source(check, folder, plan.base, arguments.template)

        def written() -> ModelSource:
            if not for_vllm:
                return as_model(source, target)
            base = target / BASE if (target / BASE).is_dir() else plan.base
            return unmerged_source(check, target / ADAPTER, base, arguments.template)

        yield from write(plan, arguments)
        yield from check_answers(check, source, written, target, about)


@contextmanager
def adapter_folder(plan: Plan, arguments: argparse.Namespace) -> Iterator[Path]:
    """Yields the adapter's folder; a foreign adapter is written to a temporary one."""
    if all((arguments.adapter / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE)):
        yield arguments.adapter
        return
    with unfinished(arguments.to) as scratch:
        folder = scratch / "adapter"
        write_adapter(plan.adapter, folder)
        yield folder


def _refuse_unserved(target: Path, base: Path) -> None:
    """Refuses a target that may not be replaced, and a base that vLLM does not serve."""
    refuse_to_replace(target, ())
    refuse_unserved_base(config_in(base), base)


def _write_for_vllm(plan: Plan, arguments: argparse.Namespace) -> Iterator[str]:
    register_towers()
    model = skeleton(config_in(plan.base))
    if model is None:
        raise UserError(
            f"{plan.base} is of no class of transformers, and vLLM has none for it; dora-vl merge writes a plain folder"
        )
    head = head_of(model)
    exported = export_for_vllm(
        plan.adapter,
        plan.base,
        arguments.to,
        resolved_layers(model, "language"),
        head=next((name for name, module in model.named_modules() if module is head), None),
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        open_base=plan.open_base,
    )
    adapter, rank = arguments.to / ADAPTER, exported.max_lora_rank
    if exported.folded is None:
        yield f"{exported.base} is served as it is: nothing had to be folded into it"
    else:
        merged = exported.folded
        yield f"{exported.base}: {merged.replaced} tensors and {merged.layers} layers folded in, {merged.bytes:,} bytes"
    yield f"{adapter}: {exported.layers} layers"
    yield (
        f"vllm serve {exported.base} --enable-lora --max-lora-rank {rank} --lora-modules {arguments.to.name}={adapter}"
    )
    if exported.use_dora:
        yield "vLLM by itself refuses DoRA (use_dora): install dora-vl beside it, whose plugin applies magnitudes"
