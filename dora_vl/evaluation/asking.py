"""What the scripts that ask a model share: their options, opening it, and printing answers as they come."""

from __future__ import annotations

import argparse
import glob
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from dora_vl.data.pictures import MediaFolder, open_image
from dora_vl.errors import BadSample, UserError

if TYPE_CHECKING:
    from dora_vl.evaluation.asker import Asker, Opened

_WEB = re.compile(r"(https?):/+(.*)")
"""An address; as a path it has one slash less."""


def add_options(to: argparse.ArgumentParser) -> None:
    """The options that every asking script has."""
    to.add_argument("--adapter", type=Path, help="adapter folder of a run, or of PEFT")
    to.add_argument("--model", help="folder or hub id of a model that is asked without an adapter")
    to.add_argument(
        "--question", action="append", default=[], help='may be given several times; "" asks a VL-BART for a caption'
    )
    to.add_argument("--compare-base", action="store_true", help="also shows the answer without the adapter")
    to.add_argument(
        "--strength",
        type=float,
        default=1.0,
        metavar="T",
        help="how much of the adapter is applied: 0 the base, 1 the adapter, beyond it more of the same",
    )
    to.add_argument("--max-new-tokens", type=int, default=64, help="longest answer")
    add_model_options(to)


def add_model_options(to: argparse.ArgumentParser) -> None:
    """The options that say more of the model, wherever one is asked."""
    to.add_argument("--base", help="where the base model is, if it moved since training")
    to.add_argument("--any-base", action="store_true", help="accepts another base or vision tower than in training")
    to.add_argument(
        "--template", help="prompt format of a LLaVA-1.5 or a language model without recipe.json (model.template)"
    )


def files_of(names: Sequence[str], kind: str) -> list[Path]:
    """The files that names and patterns (`*`, `?`, `[...]`) stand for; a shell that was kept from it did not ask.

    Args:
        kind: what they are, for the message.

    Raises:
        UserError: a pattern without a file.
    """
    found: list[Path] = []
    for name in names:
        if Path(name).exists() or "://" in name or not glob.has_magic(name):
            found.append(Path(name))
            continue
        matched = sorted(glob.glob(name))  # noqa: PTH207 - a Path globs no absolute pattern
        if not matched:
            raise UserError(f"no {kind} matches {name}")
        found += map(Path, matched)
    return found


def open_picture(path: Path) -> Image.Image:
    """One picture file as RGB; nothing of a model is imported, so a wrong path is told at once.

    Raises:
        UserError: it is missing or no picture, or an address on the web.
    """
    if found := _WEB.match(str(path)):
        raise UserError(f"{found[1]}://{found[2]} is on the web; save the picture and give its file")
    try:
        return open_image(MediaFolder(path.parent, follow_links=True), path.name)
    except BadSample as error:
        raise UserError(error.reason) from error


def open_model(options: argparse.Namespace) -> Opened:
    """The model that the options name, and its base where they ask for it."""
    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {options.max_new_tokens}; an answer needs at least 1")
    if options.adapter is None and options.strength != 1:
        raise UserError("--strength is about an adapter; name one with --adapter")
    from dora_vl.core.strength import checked_strength
    from dora_vl.evaluation.asker import Wanted
    from dora_vl.evaluation.open_model import open_asker

    return open_asker(
        Wanted(
            adapter=options.adapter,
            model=options.model,
            base=options.base,
            any_base=options.any_base,
            with_base=options.compare_base,
            template=options.template,
            strength=checked_strength(options.strength),
        )
    )


def print_answers(opened: Opened, answer: Callable[[str, Asker], str]) -> dict[str, str]:
    """Prints the answer while it is made, and the one without the adapter under it; returns both, by speaker.

    Args:
        answer: gives the answer of a speaker's model, and writes it with `write_piece` as it comes.
    """
    speakers: list[tuple[str, Asker]] = [("with adapter", opened.adapted)]
    if opened.base is not None:
        speakers.append(("without adapter", opened.base))
    said: dict[str, str] = {}
    for speaker, asker in speakers:
        print(f"  {speaker + ':':17s}" if len(speakers) > 1 else "  ", end="", flush=True)
        said[speaker] = answer(speaker, asker)
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
