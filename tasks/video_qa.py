"""Asks a model about videos of your own.

python tasks/video_qa.py --adapter runs/demo-video/adapter --video clip.mp4 --question "which color comes first?" \\
    --choice red --choice blue

The model sees `--frames` frames: as a video, or as so many pictures where it takes none, which is said. A VL-BART sees
the frames that it was trained to see, as features that are computed on the way. `--start` and `--end` name a part of
the video, `--subtitle` says what is said in it. A model of TVQA, How2QA or TVC needs a part: it sees the whole video
and reads in its text which part is meant.
Without --question it asks for questions until an empty line.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dora_vl.errors import UserError, exit_on_user_error
from dora_vl.evaluation.asking import add_options, answer_typed, files_of, open_model, print_answers, write_piece

if TYPE_CHECKING:
    from PIL.Image import Image

    from dora_vl.data.examples import Clip
    from dora_vl.evaluation.asker import Asker, Opened
    from dora_vl.vision.frame_sampling import Sampling
    from dora_vl.vision.video import VideoReader
    from dora_vl.vision.video_decoding import Frames

DEFAULT_FRAMES = 8


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(made)
    made.add_argument(
        "--video", nargs="+", action="extend", required=True, metavar="FILE", help="video files, or patterns"
    )
    made.add_argument("--start", type=float, help="seconds into the video where to begin")
    made.add_argument("--end", type=float, help="seconds into the video where to stop")
    made.add_argument("--frames", type=int, default=DEFAULT_FRAMES, help="frames that a model of pictures sees")
    made.add_argument("--choice", action="append", default=[], help="a possible answer; may be given several times")
    made.add_argument("--subtitle", action="append", default=[], help="what is said; may be given several times")
    return made


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


def ask_all(opened: Opened, clips: ClipReader, question: str, options: argparse.Namespace) -> None:
    """Puts one question to every video."""
    for path in options.video:
        ask(opened, clips, path, question, options)


def ask(opened: Opened, clips: ClipReader, path: Path, question: str, options: argparse.Namespace) -> None:
    """Puts one question to one video."""
    from dora_vl.data.examples import Clip, Example, Subtitle
    from dora_vl.evaluation.asker import Shown

    example = Example(
        id="question",
        question=question,
        choices=tuple(options.choice),
        subtitles=tuple(Subtitle(text) for text in options.subtitle),
        video=Clip(path=path.name, start_seconds=options.start, end_seconds=options.end),
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


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    """Opens the model and the videos, then answers."""
    options = parser().parse_args(arguments)
    options.video = files_of(options.video, "video")
    for path in options.video:
        if not path.is_file():  # shows before the model loads
            raise UserError(f"video {path} is missing")
    from dora_vl.vision.video import VideoReader

    opened = open_model(options)
    with VideoReader() as reader:
        clips = ClipReader(reader)
        for question in options.question:
            ask_all(opened, clips, question, options)
        if not options.question:
            answer_typed(
                lambda line: ask_all(opened, clips, line, options),
                hint="Type a question, or an empty line to leave.",
            )


if __name__ == "__main__":
    main()
