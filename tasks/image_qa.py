"""Asks a model about pictures of your own.

python tasks/image_qa.py --adapter runs/demo/adapter --image cat.png --question "what color is the shape?"
python tasks/image_qa.py --adapter runs/demo/adapter --image my/*.jpg --question "what color is the shape?"

Every question is put to every picture, each on its own; `--together` puts all pictures into one prompt, and
`--conversation` lets later questions see the earlier ones with their answers. Without --question it asks for
questions until an empty line. The adapter is any run's, or PEFT's; --model asks a model without one. What a VL-BART
reads of a picture is computed on the way.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dora_vl.errors import UserError, exit_on_user_error
from dora_vl.evaluation.asking import (
    add_options,
    answer_typed,
    files_of,
    open_model,
    open_picture,
    print_answers,
    write_piece,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from dora_vl.data.turns import Turn
    from dora_vl.evaluation.asker import Asker, Opened

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
    add_options(made)
    made.add_argument(
        "--image",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="picture files, or patterns such as 'my/*.jpg'",
    )
    made.add_argument("--together", action="store_true", help="all pictures in one prompt")
    made.add_argument("--conversation", action="store_true", help="later questions see the earlier ones and answers")
    return made


def read_topics(paths: Sequence[Path], *, together: bool) -> list[Topic]:
    """The pictures as topics; without any picture one topic of words alone."""
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


def ask(opened: Opened, topic: Topic, question: str, *, max_new_tokens: int, conversation: bool) -> None:
    """Puts one question to one topic."""
    from dora_vl.data.turns import Turn

    def answer(speaker: str, asker: Asker) -> str:
        turns = prompt(topic, speaker, question)
        return asker.answer(turns, topic.pictures, max_new_tokens=max_new_tokens, write=write_piece)

    for speaker, said in print_answers(opened, answer).items():
        if conversation and said:
            topic.said[speaker] = [*prompt(topic, speaker, question), Turn("assistant", said)]


def talk(opened: Opened, topics: list[Topic], options: argparse.Namespace) -> None:
    """Answers typed questions, and opens the pictures that are typed between them."""

    def answer(line: str) -> None:
        if line.startswith(PICTURE_COMMAND):
            topics[:] = read_topics(files_of([line.removeprefix(PICTURE_COMMAND).strip()], "picture"), together=False)
        else:
            ask_all(opened, topics, line, options)

    hint = f"Type a question, `{PICTURE_COMMAND}FILE` for another picture, or an empty line to leave."
    answer_typed(answer, hint=hint)


def ask_all(opened: Opened, topics: Sequence[Topic], question: str, options: argparse.Namespace) -> None:
    """Puts one question to every topic."""
    for topic in topics:
        if len(topics) > 1 or options.question:
            print(f"{', '.join(topic.names)}  {question}".strip())
        ask(
            opened,
            topic,
            question,
            max_new_tokens=options.max_new_tokens,
            conversation=options.conversation,
        )


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    """Opens the pictures and the model, then answers."""
    options = parser().parse_args(arguments)
    topics = read_topics(
        files_of(options.image, "picture"), together=options.together
    )  # a wrong path shows before the model loads
    opened = open_model(options)
    if not options.question:
        talk(opened, topics, options)
    for question in options.question:
        ask_all(opened, topics, question, options)


if __name__ == "__main__":
    main()
