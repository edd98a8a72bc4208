"""`dora-vl export`: a trained model in the form that a server of another kind takes."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from functools import partial
from os import getpid
from pathlib import Path

from dora_vl.adapters.base_weights import config_in, skeleton
from dora_vl.adapters.convert_command import add_reading_arguments
from dora_vl.adapters.exports import ADAPTER, BASE, export_for_vllm, refuse_unserved_base
from dora_vl.adapters.files import refuse_to_replace
from dora_vl.adapters.gguf import KINDS, check_package, export_gguf, refuse_gguf_base, refuse_gguf_target
from dora_vl.errors import UserError
from dora_vl.evaluation import merge_command
from dora_vl.evaluation.certificate import (
    CHECK_HELP,
    add_check_options,
    as_model,
    checked,
    planned_check,
    unmerged_source,
)
from dora_vl.evaluation.merge_command import RESULT_DTYPES, Plan, about, adapter_folder

DESCRIPTION = f"""\
Writes a trained model as another server takes it.

  dora-vl export --for vllm --adapter runs/llava/adapter --to served

vLLM serves adapters of the language model's linear layers, and nothing else that was trained: the projector, and what
was adapted in the vision tower, are folded into served/base; served/adapter holds the rest and stays an adapter.

  dora-vl export --gguf --adapter runs/llava/adapter --to gguf            half precision
  dora-vl export --gguf q8_0 --adapter runs/llava/adapter --to gguf       8 bits a weight

Merges into gguf/model.gguf, with tokenizer and chat template, and of a LLaVA with a CLIP or SigLIP tower into
gguf/mmproj.gguf too: what llama.cpp and its kin run.

{CHECK_HELP}
GGUF is read back by transformers for it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `dora-vl export`."""
    form = parser.add_mutually_exclusive_group(required=True)
    form.add_argument("--for", dest="server", choices=("vllm",), help="base folder and adapter for a server")
    form.add_argument("--gguf", nargs="?", const=KINDS[0], choices=KINDS, help=f"GGUF files (default: {KINDS[0]})")
    parser.add_argument("--adapter", type=Path, action="append", required=True, metavar="DIR", help="folder of a run")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument("--base", type=Path, metavar="FOLDER", help="default: what the adapter says it was trained on")
    parser.add_argument(
        "--dtype", choices=sorted(RESULT_DTYPES), help="--for vllm: of the base; default: each tensor's own"
    )
    parser.add_argument("--any-base", action="store_true", help="accept a base whose content hash differs")
    parser.set_defaults(weight=None, base_values="trained")
    add_reading_arguments(parser)
    add_check_options(parser)


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Exports, and checks where that is asked for; yields the lines to print."""
    if len(arguments.adapter) > 1:
        raise UserError("one adapter is exported at a time; dora-vl merge folds several into one base")
    if arguments.gguf is not None and arguments.dtype is not None:
        raise UserError(f"--dtype is of --for vllm; --gguf takes its own number type: {', '.join(KINDS)}")
    if arguments.gguf is not None:
        check_package()
    check = planned_check(arguments, arguments.adapter[0])
    plan = merge_command.plan(arguments, partial(_refuse, gguf=arguments.gguf is not None))
    write = _write_for_vllm if arguments.gguf is None else _write_gguf
    if check is None:
        yield from write(plan, arguments)
        return
    target: Path = arguments.to
    read_back = target.with_name(f".{target.name}.read-{getpid()}")
    with adapter_folder(plan, arguments) as folder:
        source = unmerged_source(check, folder, plan.base, arguments.template)
        yield from write(plan, arguments)
        if arguments.gguf is None:
            base = target / BASE if (target / BASE).is_dir() else plan.base
            exported = partial(unmerged_source, check, target / ADAPTER, base, arguments.template)
            yield from checked(check, source, "exported", exported, target, about(plan, arguments))
            return
        from dora_vl.evaluation.open_model import folder_of_gguf

        weights = {**about(plan, arguments), "weights": f"GGUF {arguments.gguf}"}
        try:
            yield from checked(
                check,
                source,
                "gguf",
                lambda: as_model(source, folder_of_gguf(target, plan.base, read_back)),
                target,
                weights,
            )
        finally:
            shutil.rmtree(read_back, ignore_errors=True)


def _refuse(target: Path, base: Path, *, gguf: bool) -> None:
    """Refuses a target that may not be replaced, and a base that cannot be exported."""
    if gguf:
        refuse_gguf_target(target)
        refuse_gguf_base(base)
    else:
        refuse_to_replace(target, ())
        refuse_unserved_base(config_in(base), base)


def _write_for_vllm(plan: Plan, arguments: argparse.Namespace) -> Iterator[str]:
    from dora_vl.backbones.places import resolved_layers

    model = skeleton(config_in(plan.base))
    if model is None:
        raise UserError(
            f"{plan.base} is of no class of transformers, and vLLM has none for it; dora-vl merge writes a plain folder"
        )
    head = model.get_output_embeddings()
    exported = export_for_vllm(
        plan.adapter,
        plan.base,
        arguments.to,
        resolved_layers(model, "language"),
        head=next((name for name, module in model.named_modules() if module is head), None),
        dtype=RESULT_DTYPES[arguments.dtype] if arguments.dtype else None,
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
    from dora_vl.backbones.loading import load_tokenizer

    tokenizer = load_tokenizer(str(plan.base))
    exported = export_gguf(
        plan.adapter, plan.base, arguments.to, tokenizer, kind=arguments.gguf, open_base=plan.open_base
    )
    for name, size in exported.files.items():
        yield f"{arguments.to / name}: {exported.architecture if name == 'model.gguf' else 'clip'}, {size:,} bytes"
    for line in exported.warnings:
        yield f"{arguments.to}: {line}"
