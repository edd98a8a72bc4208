"""`dora-vl ask`, and the scripts in tasks/ that ask: a model's answers about one's own pictures or videos."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_vl.data.pictures import MediaFolder, open_image
from dora_vl.errors import BadSample, UserError, exit_on_user_error, positive_int

if TYPE_CHECKING:
    from PIL.Image import Image

    from dora_vl.data.turns import Turn
    from dora_vl.evaluation.open_model import OpenedModel
    from dora_vl.evaluation.predictor import Predictor

DESCRIPTION = """\
Asks a model about pictures or videos of your own.

  dora-vl ask --adapter runs/my/adapter --image cat.png --question "what color is the cat?"
  dora-vl ask --adapter runs/my/adapter --image my/*.jpg                     asks for questions, until an empty line
  dora-vl ask --adapter runs/my/adapter --video clip.mp4 --question "which comes first?" --choice red --choice blue

The adapter is any run's, or PEFT's; --model asks a model without one, --compare-base both. Every question is put to
every picture, each on its own, unless --together puts all into one prompt. Of a video the model sees --frames frames.
"""
PICTURE_COMMAND = ":image "
FILES: dict[str, Any] = {"type": Path, "nargs": "+", "action": "extend", "default": [], "metavar": "FILE"}
OF_PICTURES = {"together": False, "conversation": False}
OF_VIDEOS = {"start": None, "end": None, "frames": 8, "choice": [], "subtitle": []}
"""Maps the options that only pictures, or only videos, take to their defaults; they are refused with the other kind."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `dora-vl ask`."""
    parser.description = DESCRIPTION
    parser.set_defaults(work=run)
    add_options(parser)
    add_picture_options(parser)
    add_video_options(parser)


def add_options(to: argparse.ArgumentParser) -> None:
    """Adds the options that every asking script has."""
    add = to.add_argument
    add("--adapter", type=Path, help="adapter folder of a run, or of PEFT")
    add("--model", help="folder or hub id of a model that is asked without an adapter")
    add("--question", action="append", default=[], help='may be given several times; "" asks a VL-BART for a caption')
    add("--compare-base", action="store_true", help="also shows the answer without the adapter")
    add(
        "--strength",
        type=float,
        default=1.0,
        metavar="T",
        help="how much of the adapter is applied: 0 the base, 1 the adapter, beyond it more of the same",
    )
    add("--max-new-tokens", type=positive_int, default=64, help="longest answer")
    add_model_options(to)


def add_model_options(to: argparse.ArgumentParser) -> None:
    """Adds the options about the model, wherever one is asked."""
    to.add_argument("--base", help="where the base model is, if it moved since training")
    to.add_argument("--any-base", action="store_true", help="accepts another base or vision tower than in training")
    to.add_argument(
        "--template", help="prompt format of a LLaVA-1.5 or a language model without recipe.json (model.template)"
    )


def add_picture_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that are about pictures."""
    parser.add_argument("--image", help="picture files", **FILES)
    parser.add_argument("--together", action="store_true", help="all pictures in one prompt")
    parser.add_argument("--conversation", action="store_true", help="later questions see the earlier ones and answers")


def add_video_options(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Adds the options that are about videos."""
    add = parser.add_argument
    add("--video", required=required, help="video files", **FILES)
    add("--start", type=float, help="seconds into the video where to begin")
    add("--end", type=float, help="seconds into the video where to stop")
    add("--frames", type=int, default=OF_VIDEOS["frames"], help="frames that a model of pictures sees of a video")
    add("--choice", action="append", default=[], help="a possible answer; may be given several times")
    add("--subtitle", action="append", default=[], help="what is said; may be given several times")


def run(options: argparse.Namespace) -> Iterator[str]:
    """Prints each answer as it comes."""
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
    arguments: Sequence[str] | None = None,
) -> None:
    """Runs a script of tasks/ that asks about pictures or about videos."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    add_own(parser)
    answer(parser.parse_args(arguments))


def open_picture(path: Path) -> Image:
    """Opens a picture file as RGB; imports nothing of a model, so that a wrong path shows at once."""
    try:
        return open_image(MediaFolder(path.parent, follow_links=True), path.name)
    except BadSample as error:
        raise UserError(error.reason) from error


def opened_by(options: argparse.Namespace) -> OpenedModel:
    """Opens the model that the options name, and its base where they ask for it."""
    from dora_vl.core.strength import checked_strength
    from dora_vl.evaluation.open_model import ModelRequest, open_model

    return open_model(
        ModelRequest(
            adapter=options.adapter,
            model=options.model,
            base=options.base,
            any_base=options.any_base,
            with_base=options.compare_base,
            template=options.template,
            strength=checked_strength(options.strength),
        )
    )


_write = partial(print, end="", flush=True)
"""Prints the next piece of an answer, at once."""


def print_answers(opened: OpenedModel, answer: Callable[[str, Predictor], str]) -> dict[str, str]:
    """Prints the answer while `answer` makes it, and the one without the adapter under it; both, by speaker."""
    speakers: list[tuple[str, Predictor]] = [("with adapter", opened.adapted)]
    if opened.base is not None:
        speakers.append(("without adapter", opened.base))
    answers: dict[str, str] = {}
    for speaker, predictor in speakers:
        print(f"  {speaker + ':':17s}" if len(speakers) > 1 else "  ", end="", flush=True)
        answers[speaker] = answer(speaker, predictor)
        print("" if answers[speaker] else "(the model ended its answer at once)", flush=True)
    return answers


def answer_all(questions: Sequence[str], answer: Callable[[str], object], what: str) -> None:
    """Answers the questions, or those typed until an empty line, where a mistake ends nothing."""
    for question in questions:
        answer(question)
    if questions:
        return
    print(f"Type {what} or an empty line to leave.")
    while True:
        try:
            line = input("question> ").strip()
        except EOFError:
            print()
            return
        if not line:
            return
        try:
            answer(line)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


@dataclass(frozen=True, kw_only=True)
class PictureChat:
    """A conversation about some pictures, which come in its first turn; each speaker has `turns` of its own."""

    names: tuple[str, ...]
    pictures: tuple[Image, ...]
    turns: dict[str, list[Turn]] = field(default_factory=dict)


def read_chats(paths: Sequence[Path], *, together: bool) -> list[PictureChat]:
    """Begins a conversation about each picture, or about all of them; without pictures a text-only one."""
    groups = [paths] if together or not paths else [[path] for path in paths]
    return [PictureChat(names=tuple(map(str, group)), pictures=tuple(map(open_picture, group))) for group in groups]


def ask_about_pictures(options: argparse.Namespace) -> None:
    """Opens the pictures and the model, then answers; without a question it asks for some."""
    chats = read_chats(options.image, together=options.together)  # a wrong path shows before the model loads
    opened = opened_by(options)

    def answer(line: str) -> None:
        if line.startswith(PICTURE_COMMAND):
            chats[:] = read_chats([Path(line.removeprefix(PICTURE_COMMAND).strip())], together=False)
            return
        for chat in chats:
            if len(chats) > 1 or options.question:
                print(f"{', '.join(chat.names)}  {line}".strip())
            ask_chat(opened, chat, line, max_new_tokens=options.max_new_tokens, remember=options.conversation)

    answer_all(options.question, answer, f"a question, `{PICTURE_COMMAND}FILE` for another picture,")


def ask_chat(opened: OpenedModel, chat: PictureChat, question: str, *, max_new_tokens: int, remember: bool) -> None:
    """Prints the answers to a question; with `remember` each speaker's next question follows its answer to this one."""
    from dora_vl.data.example import Example
    from dora_vl.data.turns import IMAGE_PLACEHOLDER, Turn
    from dora_vl.evaluation.predictor import PromptMedia

    if IMAGE_PLACEHOLDER in question:
        raise UserError(f"the question holds {IMAGE_PLACEHOLDER}; the pictures' places are added by themselves")
    with_pictures = f"{IMAGE_PLACEHOLDER}\n" * len(chat.pictures) + question

    def turns_of(speaker: str) -> list[Turn]:
        earlier = chat.turns.get(speaker, [])
        return [*earlier, Turn("user", question if earlier else with_pictures)]

    def answer(speaker: str, predictor: Predictor) -> str:
        example = Example(id="question", question=question, turns=tuple(turns_of(speaker)))
        shown = PromptMedia(pictures=chat.pictures)
        return predictor.answer(example, shown, max_new_tokens=max_new_tokens, write=_write)

    for speaker, text in print_answers(opened, answer).items():
        if remember and text:
            chat.turns[speaker] = [*turns_of(speaker), Turn("assistant", text)]


def ask_about_videos(options: argparse.Namespace) -> None:
    """Opens the videos and the model, then answers; without a question it asks for some."""
    paths = options.video
    for path in paths:
        if not path.is_file():  # shows before the model loads
            raise UserError(f"video {path} is missing")
    from dora_vl.data.example import Clip, Example, Subtitle
    from dora_vl.data.video import VideoReader
    from dora_vl.evaluation.predictor import PromptMedia
    from dora_vl.evaluation.questions import as_asked
    from dora_vl.evaluation.scores.benchmark import about_video

    opened = opened_by(options)

    def ask_clip(path: Path, question: str) -> None:
        example = Example(
            id="question",
            question=question,
            choices=tuple(options.choice),
            subtitles=tuple(Subtitle(text) for text in options.subtitle),
            videos=(Clip(path=path.name, start_seconds=options.start, end_seconds=options.end),),
        )
        view = opened.adapted.view(example, frames=options.frames)
        frames = read(path.parent, view.clip, view.sampling)
        what = "frames as separate pictures, since it takes no videos" if view.as_pictures else "frames"
        times = f"{len(frames.seconds)} {what}, {frames.seconds[0]:.1f} to {frames.seconds[-1]:.1f} s"
        print(f"{path} ({times}, {frames.backend})  {question}")
        prompt, shown = as_asked(view.example, about_video), PromptMedia(videos=(frames,))
        most = options.max_new_tokens
        print_answers(opened, lambda _, predictor: predictor.answer(prompt, shown, max_new_tokens=most, write=_write))

    with VideoReader() as reader:
        read = cache(reader.read)  # each clip is read once for both models
        answer_all(options.question, lambda question: [ask_clip(path, question) for path in paths], "a question,")
