"""`dora-vl convert`: other tools' adapters to the folder that PEFT and this package read."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dora_vl.errors import UserError

if TYPE_CHECKING:
    from dora_vl.adapters.foreign_formats import ReadOptions

DESCRIPTION = """\
Reads an adapter of another tool and writes an adapter folder (adapter_model.safetensors, adapter_config.json): what
PEFT, transformers and dora_vl load. The format is known by the file's keys; --from names it where they do not tell.

  dora-vl convert DoRA-llava/ --to adapter                      NVlabs' LLaVA, both of its .bin files
  dora-vl convert LAST.pth --to adapter                         NVlabs' VL-BART
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `dora-vl convert`."""
    parser.add_argument("source", type=Path, metavar="FROM", help="a folder or file that holds an adapter")
    parser.add_argument(
        "--to", type=Path, required=True, metavar="FOLDER", help="adapter folder to write, replaced if it is one"
    )
    parser.add_argument("--base", type=Path, metavar="FOLDER", help="the base, written down as the adapter's")
    add_reading_arguments(parser)


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that some formats need, shared by the commands that read adapters."""
    formats = "peft, nvlabs, nvlabs-llava or nvlabs-vlbart"
    parser.add_argument("--from", dest="format", metavar="FORMAT", help=f"{formats}; default: known by the keys")
    parser.add_argument("--alpha", type=float, help="numerator of the scale, where no file states it")
    parser.add_argument(
        "--rename",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="beginnings of layer names, of other tools' files; may come often",
    )


def reading_options(arguments: argparse.Namespace) -> ReadOptions:
    """Turns the options into those of `read_foreign_adapter`."""
    from dora_vl.adapters.foreign_formats import ReadOptions  # seconds, so not for --help

    pairs = [rename.partition("=") for rename in arguments.rename]
    if any(not old or not equals for old, equals, _ in pairs):
        raise UserError(f"--rename {arguments.rename}: write OLD=NEW, e.g. --rename model.=model.language_model.")
    return ReadOptions(
        format=arguments.format,
        base=arguments.base,
        alpha=arguments.alpha,
        renames=tuple((old, new) for old, _, new in pairs),
    )


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Converts an adapter and yields the lines to print."""
    from dora_vl.adapters.adapter import write_adapter
    from dora_vl.adapters.files import refuse_to_replace_adapter
    from dora_vl.adapters.foreign_formats import read_foreign_adapter

    source, target = arguments.source, arguments.to
    if target.resolve() in (source.resolve(), source.resolve().parent):
        raise UserError(f"--to {target} is where the adapter is read from; name another folder")
    refuse_to_replace_adapter(target)
    adapter = read_foreign_adapter(source, reading_options(arguments))
    write_adapter(adapter, target)
    yield f"{target}: {len(adapter.layers)} layers, {len(adapter.extras)} other tensors"
