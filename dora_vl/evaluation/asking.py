"""What the scripts that ask a trained adapter share: their options, opening it, and printing answers as they come."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dora_vl.errors import UserError

if TYPE_CHECKING:
    from dora_vl.evaluation.assistant import Assistant, Assistants
    from dora_vl.evaluation.image_text_assistant import ImageTextAssistant
    from dora_vl.evaluation.vlbart_assistant import VlBartAssistant

    AnyAssistant = Assistant | ImageTextAssistant | VlBartAssistant
    AnyAssistants = Assistants[Assistant] | Assistants[ImageTextAssistant] | Assistants[VlBartAssistant]


def add_options(to: argparse.ArgumentParser) -> None:
    """The options that every asking script has."""
    to.add_argument("--adapter", type=Path, required=True, help="adapter folder of a run")
    to.add_argument(
        "--question", action="append", default=[], help='may be given several times; "" asks a VL-BART for a caption'
    )
    to.add_argument("--compare-base", action="store_true", help="also shows the answer without the adapter")
    to.add_argument("--base", help="where the base model is, if it moved since training")
    to.add_argument("--any-base", action="store_true", help="accepts another base or vision tower than in training")
    to.add_argument("--max-new-tokens", type=int, default=64, help="longest answer")


def open_model(options: argparse.Namespace) -> AnyAssistants:
    """The adapter that the options name, and its base where they ask for it."""
    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {options.max_new_tokens}; an answer needs at least 1")
    from transformers.utils import logging as transformers_logging

    from dora_vl.backbones.image_text import IMAGE_TEXT
    from dora_vl.backbones.vlbart_config import VlBartConfig
    from dora_vl.evaluation.ask_vlbart import subtasks_of
    from dora_vl.evaluation.assistant import open_assistants, read_recipe
    from dora_vl.evaluation.image_text_assistant import open_image_text_assistants
    from dora_vl.evaluation.vlbart_assistant import open_vlbart_assistants

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    adapter, where = options.adapter, {"base": options.base, "any_base": options.any_base}
    backbone = read_recipe(adapter).get("backbone")
    if backbone == VlBartConfig.model_type:
        return open_vlbart_assistants(adapter, subtasks_of, with_base=options.compare_base, **where)
    if backbone == IMAGE_TEXT:
        return open_image_text_assistants(adapter, with_base=options.compare_base, **where)
    return open_assistants(adapter, with_base=options.compare_base, **where)


def print_answers(assistants: AnyAssistants, answer: Callable[[str, AnyAssistant], str]) -> dict[str, str]:
    """Prints the answer while it is made, and the one without the adapter under it; returns both, by speaker.

    Args:
        answer: gives the answer of a speaker's model, and writes it with `write_piece` as it comes.
    """
    speakers: list[tuple[str, AnyAssistant]] = [("with adapter", assistants.adapted)]
    if assistants.base is not None:
        speakers.append(("without adapter", assistants.base))
    said: dict[str, str] = {}
    for speaker, assistant in speakers:
        print(f"  {speaker + ':':17s}" if len(speakers) > 1 else "  ", end="", flush=True)
        said[speaker] = answer(speaker, assistant)
        print("" if said[speaker] else "(the model ended its answer at once)", flush=True)
    return said


def write_piece(text: str) -> None:
    """Shows the next piece of an answer at once."""
    print(text, end="", flush=True)


def answer_typed(answer: Callable[[str], object], *, hint: str) -> None:
    """Answers typed questions until an empty line; a mistake in one is said and the talk goes on."""
    print(hint)
    for line in typed_lines():
        try:
            answer(line)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


def typed_lines() -> Iterator[str]:
    """Lines from the keyboard until an empty one or the end of input."""
    while True:
        try:
            line = input("question> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not line:
            return
        yield line
