"""Asks a trained adapter about videos of your own.

python tasks/video_qa.py --adapter runs/demo-video/adapter --video clip.mp4 --question "which color comes first?" \\
    --choice red --choice blue

A LLaVA sees `--frames` frames as so many pictures; a VL-BART sees the frames that it was trained to see, as features
that are computed on the way. `--start` and `--end` name a part of the video, `--subtitle` says what is said in it.
Without --question it asks for questions until an empty line.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dora_vl.errors import UserError, exit_on_user_error
from tasks.asking import add_options, answer_typed, open_model, print_answers, write_piece

if TYPE_CHECKING:
    from PIL.Image import Image

    from dora_vl.evaluation.assistant import Assistant
    from dora_vl.evaluation.vlbart_assistant import VlBartAssistant
    from dora_vl.vision.video_decoding import Frames
    from tasks.asking import AnyAssistants

DEFAULT_FRAMES = 8


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(made)
    made.add_argument(
        "--video", type=Path, action="append", required=True, help="video file; may be given several times"
    )
    made.add_argument("--start", type=float, help="seconds into the video where to begin")
    made.add_argument("--end", type=float, help="seconds into the video where to stop")
    made.add_argument("--frames", type=int, default=DEFAULT_FRAMES, help="frames that a LLaVA sees")
    made.add_argument("--choice", action="append", default=[], help="a possible answer; may be given several times")
    made.add_argument("--subtitle", action="append", default=[], help="what is said; may be given several times")
    return made


def read_clips(options: argparse.Namespace, assistants: AnyAssistants) -> list[tuple[Path, Frames[Image]]]:
    """The frames of each video that the model is to see.

    Raises:
        UserError: a video cannot be read.
    """
    from dora_vl.data.examples import Clip
    from dora_vl.evaluation.vlbart_assistant import VlBartAssistant
    from dora_vl.vision.frame_sampling import Uniform
    from dora_vl.vision.video import VideoReader

    model = assistants.adapted
    sampling = model.sampling if isinstance(model, VlBartAssistant) else Uniform(options.frames)
    with VideoReader() as reader:
        return [
            (
                path,
                reader.read(
                    path.parent, Clip(path=path.name, start_seconds=options.start, end_seconds=options.end), sampling
                ),
            )
            for path in options.video
        ]


def ask_all(
    assistants: AnyAssistants, clips: Sequence[tuple[Path, Frames[Image]]], question: str, options: argparse.Namespace
) -> None:
    """Puts one question to every video."""
    from dora_vl.data.examples import Example, Subtitle

    example = Example(
        id="question",
        question=question,
        choices=tuple(options.choice),
        subtitles=tuple(Subtitle(text) for text in options.subtitle),
    )
    for path, frames in clips:
        times = f"{len(frames.seconds)} frames, {frames.seconds[0]:.1f} to {frames.seconds[-1]:.1f} s"
        print(f"{path} ({times}, {frames.backend})  {question}")

        def answer(_: str, assistant: Assistant | VlBartAssistant, seen: Sequence[Image] = frames.pictures) -> str:
            return assistant.answer_example(example, seen, max_new_tokens=options.max_new_tokens, write=write_piece)

        print_answers(assistants, answer)


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    """Opens the model and the videos, then answers."""
    options = parser().parse_args(arguments)
    for path in options.video:
        if not path.is_file():  # shows before the model loads
            raise UserError(f"video {path} is missing")
    assistants = open_model(options)
    clips = read_clips(options, assistants)
    for question in options.question:
        ask_all(assistants, clips, question, options)
    if not options.question:
        answer_typed(
            lambda line: ask_all(assistants, clips, line, options), hint="Type a question, or an empty line to leave."
        )


if __name__ == "__main__":
    main()
