"""Writes `docs/settings.md` from the dataclasses of a run: `python -m tests.run.settings_page`."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from docstring_parser import parse_from_object

from dora_vl.backbones.specs import ComposeSpec, LanguageSource, SmallLanguageModel, VlBartSpec
from dora_vl.core.config import AdaptedPart
from dora_vl.run.arguments import TRAINER_DEFAULTS
from dora_vl.run.settings import DEFAULTS, FIELDS, RunConfig, Task
from dora_vl.run.settings_parser import SECTION_CLASSES

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
HEAD = """\
# Every setting

<!-- Written by `python -m tests.run.settings_page` from dora_vl/run/settings.py; change it there. -->

A run is [one YAML](training.md); these are the settings it may hold, with their defaults. Any of them also stands on
the command line, `--section.key value`, and wins over the file. `dora-vl train my.yaml --help` prints these sentences
for your task, `dora-vl train my.yaml --print_config` the values of your run. What only some tasks take begins with
their names.
"""
TRAINING = """
## training

Any field of [`transformers.TrainingArguments`](https://huggingface.co/docs/transformers/main_classes/trainer) under its
own name. `training.output_dir` must be set. Defaults are transformers', except {ours}, and on CUDA `tf32: true`.
`warmup_steps` below 1 is a share of all steps. `training.deepspeed` takes `zero0`, `zero2`, `zero3`, `zero3_offload` or
a JSON file ([which when](starting.md#what-the-ranks-share)).
"""
SPECS: Mapping[str, tuple[type[Any], str]] = {
    "model.compose of a LLaVA": (ComposeSpec, "Parts that a LLaVA is made of."),
    "model.compose of a VL-BART": (VlBartSpec, "Parts that a VL-BART is made of."),
    "model.compose.small": (SmallLanguageModel, "A small model with random weights, in place of a published one."),
    "model.source": (LanguageSource, "A language model that is written once as a plain folder."),
    "adapter.parts": (AdaptedPart, "Each name holds these."),
}


def sentence(text: str) -> str:
    """A docstring as a cell of a table: one line, its signs no markup outside code."""
    pieces = re.split(r"(`[^`]*`)", " ".join(text.split()))
    plain = (re.sub(r"([*|])", r"\\\1", piece).replace("<", "&lt;") for piece in pieces[::2])
    code = (piece.replace("|", r"\|") for piece in pieces[1::2])
    return "".join(part for pair in zip(plain, [*code, ""], strict=True) for part in pair)


def takers(name: str) -> str:
    """The tasks that take a setting; "" where all do."""
    tasks = [task for task in get_args(Task) if name in FIELDS[task]]
    return f"*{', '.join(tasks)}.* " if 0 < len(tasks) < len(FIELDS) else ""


def default(item: Field[Any], name: str) -> str:
    """A field's default as YAML has it, and those of tasks that have others."""
    if item.default is MISSING and item.default_factory is MISSING:
        return "required"
    value = item.default if item.default is not MISSING else item.default_factory()  # type: ignore[misc]
    if not isinstance(value, str | int | float | bool | tuple | Mapping | None):  # a section of its own
        return ""
    others = [f"{task}: `{of_task[name]}`" for task, of_task in DEFAULTS.items() if name in of_task]
    return "; ".join([f"`{value if isinstance(value, str) and value else json.dumps(value)}`", *others])


def choices(kind: Any, text: str) -> str:
    """The words that a setting may be, where its sentence does not name them all."""
    literals = [option for option in (kind, *get_args(kind)) if get_origin(option) is Literal]
    words = [word for literal in literals for word in get_args(literal)]
    named = all(re.search(rf"\b{re.escape(word)}\b", text) for word in words)
    return "" if named else f" One of {', '.join(f'`{word}`' for word in words)}."


def table(kind: type[Any], prefix: str = "", *, left_out: frozenset[str] = frozenset()) -> Iterator[str]:
    """A row for each field of a dataclass."""
    described = {
        param.arg_name: param.description or ""
        for base in reversed(kind.__mro__[:-1])
        for param in parse_from_object(base).params
    }
    types = get_type_hints(kind)
    yield from ("", "| setting | default | what it does |", "| --- | --- | --- |")
    for item in fields(kind):
        if item.name not in left_out:
            name = f"{prefix}{item.name}"
            text = described.get(item.name, "")
            what = f"{takers(name)}{sentence(text)}{choices(types[item.name], text)}"
            yield f"| `{item.name}` | {default(item, name)} | {what} |"


def page() -> str:
    """The whole page."""
    ours = ", ".join(
        f"`{name}: {json.dumps(value) if not isinstance(value, str) else value}`"
        for name, value in TRAINER_DEFAULTS.items()
    )
    lines = [HEAD.rstrip(), "", "## At the top level"]
    lines += table(RunConfig, left_out=frozenset({*SECTION_CLASSES, "training"}))
    for section, kind in SECTION_CLASSES.items():
        lines += ["", f"## {section}", "", (kind.__doc__ or "").split("\n\n")[0].strip(), *table(kind, f"{section}.")]
    lines += [TRAINING.format(ours=ours).rstrip()]
    for title, (kind, about) in SPECS.items():
        lines += ["", f"## {title}", "", about, *table(kind)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
