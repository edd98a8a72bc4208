"""`dora-vl translate`: another tool's settings as a run's YAML."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dora_vl.errors import UserError

DESCRIPTION = """\
Reads the settings of LLaMA-Factory, TRL, ms-swift, LLaVA's scripts or PEFT and prints them as a run's YAML. Above it
stands a table of every setting: what it is called here, that it is always so here, or why it has no counterpart.

  dora-vl translate qwen2vl_lora_sft.yaml
  dora-vl translate scripts/v1_5/finetune_lora.sh --write my.yaml
"""
FROM = ("llama-factory", "trl", "ms-swift", "llava", "peft")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `dora-vl translate`."""
    parser.add_argument("file", metavar="FILE", type=Path, help="settings as YAML or JSON, or a script")
    parser.add_argument("--from", dest="tool", choices=FROM, help="whose they are; default: seen by the names")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the settings there; must not exist")


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Translates; yields the lines to print."""
    file, target = arguments.file, arguments.write
    if target is not None and target.exists():
        raise UserError(f"--write {target} is there already; name a new file")
    from dora_vl.run.reading import read_run_file
    from dora_vl.start.rules import as_yaml, summary, table, translate
    from dora_vl.start.settings_file import read_settings
    from dora_vl.start.tools import TOOLS

    name, settings = read_settings(file, arguments.tool)
    translation = translate(TOOLS[name], settings, file)
    text = as_yaml(translation.settings)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            read_run_file(path)
        except UserError as error:
            raise UserError(f"{file}: what it says is no run here: {error}") from None
    heading = [f"{TOOLS[name].name}'s settings of {file}: {summary(translation)}", *table(translation)]
    whole = "\n".join([*(f"# {line}".rstrip() for line in heading), "", text])
    if target is None:
        yield whole.removesuffix("\n")
        return
    try:
        target.write_text(whole, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--write {target}: {error.strerror}") from None
    yield from heading
    yield f"{target} written\n\nnext:  dora-vl show batch {target}"
