"""`dora-vl export`: a trained model in the form that a server of another kind takes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from dora_vl.evaluation.merge_command import CHECK_HELP, RESULT_DTYPES, add_shared_arguments

DESCRIPTION = f"""\
Writes a trained model as another server takes it.

  dora-vl export --for vllm --adapter runs/llava/adapter --to served

vLLM serves adapters of the language model's linear layers, and nothing else that was trained: the projector, and what
was adapted in the vision tower, are folded into served/base; served/adapter holds the rest and stays an adapter.

{CHECK_HELP}
"""
OPENS_BASES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `dora-vl export`."""
    parser.add_argument("--for", dest="server", choices=("vllm",), required=True, help="the server")
    add_shared_arguments(parser)
    parser.add_argument("--dtype", choices=RESULT_DTYPES, help="of the base; default: each tensor's own")
    parser.set_defaults(base_values="trained")


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Exports, and checks if asked; yields the lines to print."""
    from dora_vl.evaluation.merging import write_and_check  # with torch, which takes seconds

    yield from write_and_check(arguments, for_vllm=True)
