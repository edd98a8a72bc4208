"""`dora-vl ask`, and the scripts in tasks/ that ask: a model's answers about one's own pictures or videos."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
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

    from dora_vl.data.example import Clip
    from dora_vl.data.turns import Turn
    from dora_vl.data.video import Frames, Sampling, VideoReader
    from dora_vl.evaluation.asker import Asker, Opened

DESCRIPTION = """\
Asks a model about pictures or videos of your own.

  dora-vl ask --adapter runs/my/adapter --image cat.png --question "what color is the cat?"
  dora-vl ask --adapter runs/my/adapter --image my/*.jpg                     asks for questions, until an empty line
  dora-vl ask --adapter runs/my/adapter --video clip.mp4 --question "which comes first?" --choice red --choice blue

The adapter is any run's, or PEFT's; --model asks a model without one, --compare-base both. Every question is put to
every picture, each on its own, unless --together puts all into one prompt. Of a video the model sees --frames frames.
"""
PICTURE_COMMAND = ":image "
OF_PICTURES = {"together": False, "conversation": False}
OF_VIDEOS = {"start": None, "end": None, "frames": 8, "choice": [], "subtitle": []}
"""Options that are about one of the two kinds alone, with their defaults."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `dora-vl ask`."""
    add_options(parser)
    add_picture_options(parser)
    add_video_options(parser)


def add_picture_options(parser: argparse.ArgumentParser) -> None:
    """The options that are about pictures."""
    parser.add_argument(
        "--image",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="picture files, or patterns such as 'my/*.jpg'",
    )
    parser.add_argument("--together", action="store_true", help="all pictures in one prompt")
    parser.add_argument("--conversation", action="store_true", help="later questions see the earlier ones and answers")


def add_video_options(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """The options that are about videos."""
    parser.add_argument(
        "--video",
        nargs="+",
        action="extend",
        default=[],
        required=required,
        metavar="FILE",
        help="video files, or patterns",
    )
    parser.add_argument("--start", type=float, help="seconds into the video where to begin")
    parser.add_argument("--end", type=float, help="seconds into the video where to stop")
    parser.add_argument(
        "--frames", type=int, default=OF_VIDEOS["frames"], help="frames that a model of pictures sees of a video"
    )
    parser.add_argument("--choice", action="append", default=[], help="a possible answer; may be given several times")
    parser.add_argument("--subtitle", action="append", default=[], help="what is said; may be given several times")


def run(options: argparse.Namespace) -> Iterator[str]:
    """Answers, each as it comes.

    Raises:
        UserError: pictures and videos at once, or an option of the other kind.
    """
    kind, others = ("video", OF_PICTURES) if options.video else ("image", OF_VIDEOS)
    mixed = [name for name, default in others.items() if getattr(options, name) != default]
    if options.video and options.image:
        mixed.append("image")
    if mixed:
        raise UserError(f"--{mixed[0]} does not go with --{kind}; ask about pictures or about videos")
    (ask_about_videos if options.video else ask_about_pictures)(options)
    yield from ()


@exit_on_user_error
def ask_script(
    description: str | None,
    add_own: Callable[[argparse.ArgumentParser], None],
    answer: Callable[[argparse.Namespace], None],
    arguments: Sequence[str] | None,
) -> None:
    """What a script in tasks/ does that asks about one kind."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    add_own(parser)
    answer(parser.parse_args(arguments))


def ask_about_pictures(options: argparse.Namespace) -> None:
    """Opens the pictures and the model, then answers; without a question it asks for some."""
    topics = read_topics(files_of(options.image, "picture"), together=options.together)  # before the model loads
    opened = open_model(options)
    if not options.question:
        talk(opened, topics, options)
    for question in options.question:
        ask_topics(opened, topics, question, options)


def ask_about_videos(options: argparse.Namespace) -> None:
    """Opens the videos and the model, then answers; without a question it asks for some."""
    paths = files_of(options.video, "video")
    for path in paths:
        if not path.is_file():  # shows before the model loads
            raise UserError(f"video {path} is missing")
    from dora_vl.data.video import VideoReader

    opened = open_model(options)
    with VideoReader() as reader:
        clips = ClipReader(reader)

        def ask(question: str) -> None:
            for path in paths:
                ask_clip(opened, clips, path, question, options)

        for question in options.question:
            ask(question)
        if not options.question:
            answer_typed(ask, hint="Type a question, or an empty line to leave.")


@dataclass(frozen=True, kw_only=True)
class Topic:
    """Pictures that are asked about in one prompt, and what has been said about them, by each model."""

    names: tuple[str, ...]
    pictures: tuple[Image, ...]
    said: dict[str, list[Turn]] = field(default_factory=dict)


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


def ask_topic(opened: Opened, topic: Topic, question: str, *, max_new_tokens: int, conversation: bool) -> None:
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
            ask_topics(opened, topics, line, options)

    hint = f"Type a question, `{PICTURE_COMMAND}FILE` for another picture, or an empty line to leave."
    answer_typed(answer, hint=hint)


def ask_topics(opened: Opened, topics: Sequence[Topic], question: str, options: argparse.Namespace) -> None:
    """Puts one question to every topic."""
    for topic in topics:
        if len(topics) > 1 or options.question:
            print(f"{', '.join(topic.names)}  {question}".strip())
        ask_topic(
            opened,
            topic,
            question,
            max_new_tokens=options.max_new_tokens,
            conversation=options.conversation,
        )


@dataclass
class ClipReader:
    """The frames of videos, each read once for every part and way of picking that is asked for."""

    reader: VideoReader
    _read: dict[tuple[Path, Clip, Sampling], Frames[Image]] = field(default_factory=dict)

    def frames(self, path: Path, clip: Clip, sampling: Sampling) -> Frames[Image]:
        """The frames of a part of a file.

        Raises:
            UserError: it cannot be read.
        """
        wanted = path, clip, sampling
        if wanted not in self._read:
            self._read[wanted] = self.reader.read(path.parent, clip, sampling)
        return self._read[wanted]


def ask_clip(opened: Opened, clips: ClipReader, path: Path, question: str, options: argparse.Namespace) -> None:
    """Puts one question to one video."""
    from dora_vl.data.example import Clip, Example, Subtitle
    from dora_vl.evaluation.asker import Shown

    example = Example(
        id="question",
        question=question,
        choices=tuple(options.choice),
        subtitles=tuple(Subtitle(text) for text in options.subtitle),
        videos=(Clip(path=path.name, start_seconds=options.start, end_seconds=options.end),),
    )
    view = opened.adapted.view(example, frames=options.frames)
    frames = clips.frames(path, view.clip, view.sampling)
    what = "frames as separate pictures, since it takes no videos" if view.as_pictures else "frames"
    times = f"{len(frames.seconds)} {what}, {frames.seconds[0]:.1f} to {frames.seconds[-1]:.1f} s"
    print(f"{path} ({times}, {frames.backend})  {question}")

    def answer(_: str, asker: Asker) -> str:
        seen = Shown(videos=(frames,))
        return asker.answer_example(view.example, seen, max_new_tokens=options.max_new_tokens, write=write_piece)

    print_answers(opened, answer)
