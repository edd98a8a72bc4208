"""Asks a trained adapter about pictures of your own.

python tasks/image_qa.py --adapter runs/demo/adapter --image cat.png --question "what color is the shape?"

Every question is put to every picture, each on its own; `--together` puts all pictures into one prompt, and
`--conversation` lets later questions see the earlier ones with their answers. Without --question it asks for
questions until an empty line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dora_vl.errors import UserError, exit_on_user_error

if TYPE_CHECKING:
    from PIL.Image import Image

    from dora_vl.data.turns import Turn
    from dora_vl.evaluation.assistant import Assistant, Assistants

PICTURE_COMMAND = ":image "


@dataclass(frozen=True, kw_only=True)
class Topic:
    """Pictures that are asked about in one prompt, and what has been said about them, by each model."""

    names: tuple[str, ...]
    pictures: tuple[Image, ...]
    said: dict[str, list[Turn]] = field(default_factory=dict)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--adapter", type=Path, required=True, help="adapter folder of a run")
    made.add_argument(
        "--image", type=Path, action="append", default=[], help="picture file; may be given several times"
    )
    made.add_argument("--question", action="append", default=[], help="may be given several times")
    made.add_argument("--together", action="store_true", help="all pictures in one prompt")
    made.add_argument("--conversation", action="store_true", help="later questions see the earlier ones and answers")
    made.add_argument("--compare-base", action="store_true", help="also shows the answer without the adapter")
    made.add_argument("--base", help="where the base model is, if it moved since training")
    made.add_argument("--any-base", action="store_true", help="accepts a base with other content than in training")
    made.add_argument("--max-new-tokens", type=int, default=64, help="longest answer")
    return made


def read_topics(paths: Sequence[Path], *, together: bool) -> list[Topic]:
    """The pictures as topics; without any picture one topic of words alone."""
    from dora_vl.evaluation.assistant import open_picture

    named = [(str(path), open_picture(path)) for path in paths]
    if together or not named:
        return [Topic(names=tuple(name for name, _ in named), pictures=tuple(picture for _, picture in named))]
    return [Topic(names=(name,), pictures=(picture,)) for name, picture in named]


def prompt(topic: Topic, speaker: str, question: str) -> list[Turn]:
    """What this model has been told about the topic, then the question; the pictures stand in the first turn."""
    from dora_vl.data.turns import IMAGE_PLACEHOLDER, Turn

    if IMAGE_PLACEHOLDER in question:
        raise UserError(f"the question holds {IMAGE_PLACEHOLDER}; the pictures' places are added by themselves")
    earlier = topic.said.get(speaker, [])
    text = question if earlier else f"{IMAGE_PLACEHOLDER}\n" * len(topic.pictures) + question
    return [*earlier, Turn("user", text)]


def ask(assistants: Assistants, topic: Topic, question: str, *, max_new_tokens: int, conversation: bool) -> None:
    """Prints the answer while it is made, and the one without the adapter under it."""
    from dora_vl.data.turns import Turn

    speakers: list[tuple[str, Assistant]] = [("with adapter", assistants.adapted)]
    if assistants.base is not None:
        speakers.append(("without adapter", assistants.base))
    for speaker, assistant in speakers:
        print(f"  {speaker + ':':17s}" if len(speakers) > 1 else "  ", end="", flush=True)
        turns = prompt(topic, speaker, question)
        answer = assistant.answer(turns, topic.pictures, max_new_tokens=max_new_tokens, write=write_piece)
        print("" if answer else "(the model ended its answer at once)", flush=True)
        if conversation and answer:
            topic.said[speaker] = [*turns, Turn("assistant", answer)]


def write_piece(text: str) -> None:
    """Shows the next piece of an answer at once."""
    print(text, end="", flush=True)


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


def talk(assistants: Assistants, topics: list[Topic], options: argparse.Namespace) -> None:
    """Answers typed questions; a mistake in one is said and the talk goes on."""
    print(f"Type a question, `{PICTURE_COMMAND}FILE` for another picture, or an empty line to leave.")
    for line in typed_lines():
        try:
            if line.startswith(PICTURE_COMMAND):
                topics = read_topics([Path(line.removeprefix(PICTURE_COMMAND).strip())], together=False)
            else:
                ask_all(assistants, topics, line, options)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


def ask_all(assistants: Assistants, topics: Sequence[Topic], question: str, options: argparse.Namespace) -> None:
    """Puts one question to every topic."""
    for topic in topics:
        if len(topics) > 1 or options.question:
            print(f"{', '.join(topic.names)}  {question}".strip())
        ask(
            assistants,
            topic,
            question,
            max_new_tokens=options.max_new_tokens,
            conversation=options.conversation,
        )


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    """Opens the pictures and the model, then answers."""
    options = parser().parse_args(arguments)
    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {options.max_new_tokens}; an answer needs at least 1")
    topics = read_topics(options.image, together=options.together)  # a wrong path shows before the model loads

    from transformers.utils import logging as transformers_logging

    from dora_vl.evaluation.assistant import open_assistants

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    assistants = open_assistants(
        options.adapter, base=options.base, with_base=options.compare_base, any_base=options.any_base
    )
    if not options.question:
        talk(assistants, topics, options)
    for question in options.question:
        ask_all(assistants, topics, question, options)


if __name__ == "__main__":
    main()
