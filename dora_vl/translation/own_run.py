"""A run of ours as settings by dotted names, for the tables that write it for other tools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dora_vl.run.command_line import read_run, setting_names, with_variant
from dora_vl.translation import to_llama_factory, to_peft, to_trl
from dora_vl.translation.rules import Tool

TOOLS: Mapping[str, Tool] = {
    "peft": to_peft.TO_PEFT,
    "llama-factory": to_llama_factory.TO_LLAMA_FACTORY,
    "trl": to_trl.TO_TRL,
}
"""What `--to` may say."""


def read_own(name: str, variant: str | None, other: str) -> tuple[Tool, Mapping[str, Any]]:
    """The tool's table and a run's settings.

    Args:
        name: a file, or a recipe's name.
        variant: one of the file's variants; None: the file's own choice.
        other: a key of `TOOLS`.

    Raises:
        UserError: no run of ours, or settings that no run can have.
    """
    chosen = [] if variant is None else [f"--variant={variant}"]
    read_run([f"--config={name}", *chosen])
    (content,) = with_variant([name], variant)
    leaves = {name.removesuffix(".help") for name in setting_names() if name != "training"}
    return TOOLS[other], dict(_leaves(content, leaves))


def _leaves(content: Mapping[str, Any], leaves: set[str], before: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in content.items():
        name = f"{before}{key}"
        if isinstance(value, Mapping) and name not in leaves:
            found += _leaves(value, leaves, f"{name}.")
        else:
            found.append((name, value))
    return found
