"""`dora-vl translate`: another tool's settings as a run's YAML, and a run's settings for another tool."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dora_vl.errors import UserError

if TYPE_CHECKING:
    from dora_vl.translation.translate import Translation

DESCRIPTION = """\
Reads the settings of LLaMA-Factory, TRL, ms-swift, LLaVA's scripts or PEFT and prints them as a run's YAML. Above it
stands a table of every setting: what it is called here, that it is always so here, or why it has no counterpart.

  dora-vl translate qwen2vl_lora_sft.yaml
  dora-vl translate scripts/v1_5/finetune_lora.sh --write my.yaml

With --to a run of ours, a file or a recipe's name, is written for another tool:

  dora-vl translate my.yaml --to llama-factory --write sft.yaml
  dora-vl translate llava/llava15 --variant 7b_dora --to peft --write adapter_config.json
"""
FROM = ("llama-factory", "trl", "ms-swift", "llava", "peft")
TO = ("peft", "llama-factory", "trl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `dora-vl translate`."""
    parser.add_argument("file", metavar="FILE", help="settings as YAML or JSON, or a script; with --to a run of ours")
    parser.add_argument("--from", dest="tool", choices=FROM, help="whose they are; default: seen by the names")
    parser.add_argument("--to", dest="other", choices=TO, help="write a run of ours for this tool")
    parser.add_argument("--variant", metavar="NAME", help="with --to: a variant of the run's file")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the settings there; must not exist")


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Translates; yields the lines to print.

    Raises:
        UserError: a file that cannot be read, or is of no known tool; nothing is written then.
    """
    target: Path | None = arguments.write
    if target is not None and target.exists():
        raise UserError(f"--write {target} is there already; name a new file")
    if arguments.other is None and arguments.variant is not None:
        raise UserError("--variant belongs to --to: it names a variant of a run of ours")
    if arguments.other is not None and arguments.tool is not None:
        raise UserError("--from says whose the file is, --to writes a run of ours for others; give one of them")
    yield from _inward(arguments) if arguments.other is None else _outward(arguments)


def _inward(arguments: argparse.Namespace) -> Iterator[str]:
    from dora_vl.translation.translate import translate
    from dora_vl.translation.whose_file import read_settings_file
    from dora_vl.translation.written import as_yaml

    file = Path(arguments.file)
    settings = read_settings_file(file, arguments.tool)
    translation = translate(settings.tool, settings.said, file)
    text = as_yaml(translation.settings)
    _check(file, text)
    title = f"{settings.tool.name}'s settings of {file}"
    yield from _told(title, translation, text, arguments.write)
    if arguments.write is not None:
        yield ""
        file = arguments.write
        yield f"next:  dora-vl show batch {file}    # or: deepspeed tasks/llava_instruct.py --config {file}"


def _check(file: Path, text: str) -> None:
    """Reads the settings as a run would.

    Raises:
        UserError: values that no run can have.
    """
    from dora_vl.run.command_line import read_run_file

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            read_run_file(path)
        except UserError as error:
            raise UserError(f"{file}: what it says is no run here: {error}") from None


def _outward(arguments: argparse.Namespace) -> Iterator[str]:
    from dora_vl.translation.own_run import read_own
    from dora_vl.translation.translate import nested, translate
    from dora_vl.translation.written import as_yaml

    tool, said = read_own(arguments.file, arguments.variant, arguments.other)
    translation = translate(tool, said, Path(arguments.file))
    as_json = arguments.other == "peft"
    text = (
        json.dumps(nested(translation.settings), indent=2) + "\n"
        if as_json
        else as_yaml(translation.settings, flat=True)
    )
    title = f"{arguments.file}{f', variant {arguments.variant},' if arguments.variant else ''} for {tool.name}"
    yield from _told(title, translation, text, arguments.write, with_table=not as_json)


def _told(
    title: str, translation: Translation, text: str, target: Path | None, *, with_table: bool = True
) -> Iterator[str]:
    """The table, and the settings: printed below it, or written.

    Args:
        with_table: the file may hold comments, and gets the table too.
    """
    from dora_vl.translation.written import summary, table

    heading = [f"{title}: {summary(translation)}", *table(translation)]
    comments = [f"# {line}".rstrip() for line in heading]
    if target is None:
        yield from (*comments, "", *text.splitlines())
        return
    written = "\n".join([*comments, "", text]) if with_table else text
    _write(target, written)
    yield from heading
    yield f"{target} written"


def _write(target: Path, text: str) -> None:
    staging = target.with_name(f".{target.name}.writing")
    try:
        staging.write_text(text, encoding="utf-8")
        staging.replace(target)
    except OSError as error:
        staging.unlink(missing_ok=True)
        raise UserError(f"--write {target}: {error.strerror}") from None
