"""`dora-vl merge`: adapters folded into their base, and with `--check` the certificate that answers are the same."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from os import getpid
from pathlib import Path

from dora_vl.adapters import merge_command
from dora_vl.adapters.adapter import Adapter, write_adapter
from dora_vl.adapters.folder import CONFIG_FILE, WEIGHTS_FILE
from dora_vl.adapters.merge_command import Plan
from dora_vl.evaluation.check_options import (
    CHECK_HELP,
    add_check_options,
    as_model,
    checked,
    planned_check,
    unmerged_source,
)

DESCRIPTION = f"""{merge_command.DESCRIPTION}
{CHECK_HELP}

  dora-vl merge --adapter runs/llava/adapter --to llava-merged --check 50
  dora-vl merge --adapter adapter --to merged --check --questions test.jsonl --images pictures --most-different 0.02
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `dora-vl merge`."""
    merge_command.add_arguments(parser)
    add_check_options(parser)


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Merges, and checks where that is asked for; yields the lines to print."""
    check = planned_check(arguments, arguments.adapter[0])
    plan = merge_command.plan(arguments)
    if check is None:
        yield from merge_command.merge(plan, arguments)
        return
    with adapter_folder(plan, arguments) as folder:
        source = unmerged_source(check, folder, plan.base, arguments.template)
        yield from merge_command.merge(plan, arguments)
        merged = as_model(source, arguments.to)
        yield from checked(check, source, {"merged": lambda: merged}, arguments.to, about(plan, arguments))


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
        write_adapter(_with_prompt(plan), folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _with_prompt(plan: Plan) -> Adapter:
    """The adapter with what the first one's recipe says of how its model is asked."""
    asked = {name: value for name, value in plan.adapters[0].recipe.items() if name != "adapter"}
    return replace(plan.adapter, recipe={**asked, **plan.adapter.recipe})
