"""What `dora-vl merge` and `dora-vl export` do: adapters into their base, or into what another server takes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from dora_vl.adapters.adapter import CLOSED_ANSWERS, Adapter, base_of, refuse_other_base, write_adapter
from dora_vl.adapters.base_weights import BaseWeights, config_in, skeleton
from dora_vl.adapters.combine import combine
from dora_vl.adapters.convert_command import reading_options
from dora_vl.adapters.exports import ADAPTER, BASE, export_for_vllm, refuse_unserved_base
from dora_vl.adapters.files import CONFIG_FILE, WEIGHTS_FILE, refuse_to_replace
from dora_vl.adapters.foreign import GGUF_KINDS
from dora_vl.adapters.gguf import export_gguf, refuse_gguf_base, refuse_gguf_target
from dora_vl.adapters.merge import SHARD_BYTES, merge_to_folder, refuse_target
from dora_vl.adapters.quantised_base import as_trained
from dora_vl.adapters.read import read_any
from dora_vl.backbones import register_towers
from dora_vl.backbones.base import head_of
from dora_vl.backbones.loading import load_tokenizer
from dora_vl.backbones.places import resolved_layers
from dora_vl.errors import UserError
from dora_vl.evaluation.merge_check import as_model, check_answers, check_logits, planned_check, unmerged_source
from dora_vl.evaluation.open_model import folder_of_gguf
from dora_vl.files import unfinished


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is merged into what, all read: `adapter` is the given one or the combination of `adapters`."""

    adapters: list[Adapter]
    adapter: Adapter
    base: Path
    open_base: Callable[[Path], BaseWeights]


def plan_merge(arguments: argparse.Namespace, refuse: Callable[[Path, Path], None] = refuse_target) -> Plan:
    """Reads the adapters, finds their base, and refuses a result that may not be written there."""
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


def merge(plan: Plan, arguments: argparse.Namespace) -> Iterator[str]:
    """Merges; yields the lines to print."""
    adapter, dtype = plan.adapter, getattr(torch, arguments.dtype) if arguments.dtype else None
    merged = merge_to_folder(
        adapter,
        plan.base,
        arguments.to,
        dtype=dtype,
        shard_bytes=arguments.shard_bytes or SHARD_BYTES,
        open_base=plan.open_base,
    )
    yield (
        f"{arguments.to}: {merged.layers} layers merged, {merged.replaced} other tensors taken from the adapter, "
        f"{merged.files} files, {merged.bytes:,} bytes"
    )
    if adapter.answer_heads:
        tasks = ", ".join(adapter.recipe[CLOSED_ANSWERS])
        yield f"{arguments.to}: it has the closed answer lists of {tasks} with their heads"


def merge_and_check(arguments: argparse.Namespace) -> Iterator[str]:
    """Merges, and checks unless that is switched off; yields the lines to print."""
    check = planned_check(arguments, arguments.adapter[0])
    plan = plan_merge(arguments)
    unmerged, target = partial(adapter_folder, plan, arguments), arguments.to
    if check is None:
        yield from merge(plan, arguments)
        if arguments.check is None:
            yield from check_logits(plan.adapters, plan.base, unmerged, target, about(plan, arguments))
        return
    with unmerged() as folder:
        source = unmerged_source(check, folder, plan.base, arguments.template)
        yield from merge(plan, arguments)
        merged = as_model(source, target)
        yield from check_answers(check, source, lambda: merged, target, about(plan, arguments))


def about(plan: Plan, arguments: argparse.Namespace) -> Mapping[str, object]:
    """Returns what `check.json` says of where the weights come from."""
    weights = arguments.weight or [1.0] * len(plan.adapters)
    return {
        "adapters": {adapter.source: weight for adapter, weight in zip(plan.adapters, weights, strict=True)},
        "base": str(plan.base),
        "result": str(arguments.to),
        "weights": arguments.dtype or "as in the base",
    }


@contextmanager
def adapter_folder(plan: Plan, arguments: argparse.Namespace) -> Iterator[Path]:
    """The folder of the adapter that is merged; written for the time being where it is a combination or foreign."""
    first = arguments.adapter[0]
    if plan.adapter is plan.adapters[0] and all((first / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE)):
        yield first
        return
    target: Path = arguments.to
    with unfinished(target) as scratch:
        # with what the first one's recipe says of how its model is asked
        prompt = {name: value for name, value in plan.adapters[0].recipe.items() if name != "adapter"}
        folder = scratch / "adapter"
        write_adapter(replace(plan.adapter, recipe={**prompt, **plan.adapter.recipe}), folder)
        yield folder


def export_and_check(arguments: argparse.Namespace) -> Iterator[str]:
    """Exports as another server takes it, and checks where that is asked for; yields the lines to print."""
    if len(arguments.adapter) > 1:
        raise UserError("one adapter is exported at a time; dora-vl merge folds several into one base")
    if arguments.gguf is not None and arguments.dtype is not None:
        raise UserError(f"--dtype is of --for vllm; --gguf takes its own number type: {', '.join(GGUF_KINDS)}")
    if arguments.text_only and (arguments.gguf is None or arguments.check is not None):
        raise UserError("--text-only is of --gguf, without --check: questions about pictures are not asked of it")
    check = planned_check(arguments, arguments.adapter[0])
    plan = plan_merge(arguments, partial(_refuse, arguments))
    write = _write_for_vllm if arguments.gguf is None else _write_gguf
    if check is None:
        yield from write(plan, arguments)
        return
    target: Path = arguments.to
    with adapter_folder(plan, arguments) as folder:
        source = unmerged_source(check, folder, plan.base, arguments.template)
        yield from write(plan, arguments)
        if arguments.gguf is None:
            base = target / BASE if (target / BASE).is_dir() else plan.base
            exported = partial(unmerged_source, check, target / ADAPTER, base, arguments.template)
            yield from check_answers(check, source, exported, target, about(plan, arguments))
            return
        weights = {**about(plan, arguments), "weights": f"GGUF {arguments.gguf}"}
        with unfinished(target) as read_back:
            model = read_back / "model"
            gguf = partial(folder_of_gguf, target, plan.base, model)
            yield from check_answers(check, source, lambda: as_model(source, gguf()), target, weights)


def _refuse(arguments: argparse.Namespace, target: Path, base: Path) -> None:
    """Refuses a target that may not be replaced, and a base that cannot be exported."""
    if arguments.gguf is not None:
        refuse_gguf_target(target)
        refuse_gguf_base(base, text_only=arguments.text_only)
    else:
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


def _write_gguf(plan: Plan, arguments: argparse.Namespace) -> Iterator[str]:
    tokenizer = load_tokenizer(str(plan.base))
    options = {"kind": arguments.gguf, "text_only": arguments.text_only, "open_base": plan.open_base}
    exported = export_gguf(plan.adapter, plan.base, arguments.to, tokenizer, **options)
    for name, size in exported.files.items():
        yield f"{arguments.to / name}: {exported.architecture if name == 'model.gguf' else 'clip'}, {size:,} bytes"
    for line in exported.warnings:
        yield f"{arguments.to}: {line}"
