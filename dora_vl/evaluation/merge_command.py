"""`dora-vl merge`: an adapter folded into its base; a check compares the two, by logits and by answers."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from dora_vl.adapters.convert_command import add_reading_arguments
from dora_vl.errors import number_between, positive_int

RESULT_DTYPES = ("bfloat16", "float16", "float32")
QUESTIONS = 20
CHECK_HELP = """\
With --check the unmerged model and what was written answer the same questions, those of the run's test or of a file;
answers and logits are compared, in check.json beside the weights. Exit status 1 where more answers differ than
--most-different allows."""

DESCRIPTION = f"""\
Writes base + adapter as a plain model folder: sharded safetensors, configuration, tokenizer and processor. Computed in
float32, one tensor in memory at a time, so a 7B model needs no second copy. An earlier merge in --to is replaced.

  dora-vl merge --adapter runs/llava/adapter --to llava-merged
  dora-vl merge --adapter adapter --base llava-1.5-7b/ --dtype float16 --to merged

{CHECK_HELP}
Without --check the logits for a few drawn texts are compared, and exit status 1 says that they differ by more than
rounding; --no-check compares nothing.

  dora-vl merge --adapter runs/llava/adapter --to llava-merged --check 50
  dora-vl merge --adapter adapter --to merged --check --questions test.jsonl --images pictures --most-different 0.02
"""
OPENS_BASES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `dora-vl merge`."""
    add_shared_arguments(parser)
    parser.add_argument("--dtype", choices=RESULT_DTYPES, help="of the result; default: as stored, or as trained")
    parser.add_argument(
        "--base-values",
        choices=("trained", "stored"),
        default="trained",
        help="of a base that was quantised for training: trained (default) merges into the values after quantisation, "
        "so that the result is the trained model; stored into the folder's own, which the adapter never saw",
    )


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of every command that combines an adapter with its base, and can check the result."""
    parser.add_argument("--adapter", type=Path, required=True, metavar="DIR", help="folder of a run")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument("--base", type=Path, metavar="FOLDER", help="default: what the adapter says it was trained on")
    parser.add_argument("--any-base", action="store_true", help="accept a base whose content hash differs")
    add_reading_arguments(parser)
    add = parser.add_argument_group("checking the result").add_argument
    add("--no-check", dest="check", action="store_const", const=0, help="merge: compares nothing")
    help_text = f"asks N questions (default {QUESTIONS})"
    add("--check", type=positive_int, nargs="?", const=QUESTIONS, metavar="N", help=help_text)
    add("--questions", type=Path, metavar="FILE", help="in any format that training reads (default: the run's test)")
    add("--images", type=Path, metavar="DIR", help="root of their pictures (default: the run's, or here)")
    add("--template", help="prompt format of a LLaVA-1.5 or a language model without recipe.json")
    add(
        "--check-dtype",
        choices=RESULT_DTYPES,
        help="that the models compute in (default: float32; the run's own where its base was quantised)",
    )
    add("--check-tokens", type=positive_int, default=32, metavar="N", help="longest answer")
    add(
        "--most-different",
        type=number_between(float, 0, 1),
        default=0.0,
        metavar="SHARE",
        help="of the questions whose answers may differ, 0 to 1 (default: 0)",
    )


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Merges, and checks if asked; yields the lines to print."""
    from dora_vl.evaluation.merging import write_and_check  # with torch, which takes seconds

    yield from write_and_check(arguments)
