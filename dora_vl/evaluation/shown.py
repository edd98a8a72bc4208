"""What a question shows the model, pictures and a video's frames, and how it is read from disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from dora_vl.backbones.video_inputs import Video, as_pictures
from dora_vl.data.media import any_is_there
from dora_vl.data.stored_pictures import open_picture
from dora_vl.data.turns import VIDEO_PLACEHOLDER, Turn
from dora_vl.errors import BadSample, UserError, shown
from dora_vl.evaluation.questions import Question
from dora_vl.run.video_reading import VideoReading


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What one prompt shows.

    Attributes:
        pictures: RGB, in the order of the prompt's `<image>`.
        features: `[tokens, width]` of each picture instead, as a frozen vision tower's output was stored.
        videos: frames with their times, in the order of the prompt's `<video>`.
    """

    pictures: tuple[Image.Image, ...] = ()
    features: tuple[Tensor, ...] = ()
    videos: tuple[Video, ...] = ()

    @property
    def frames(self) -> tuple[Image.Image, ...]:
        """Every video's frames."""
        return tuple(frame for video in self.videos for frame in video.pictures)


@dataclass(frozen=True, kw_only=True)
class MediaReader:
    """Reads what questions show; it may be sent to data workers.

    Attributes:
        folder: root of the pictures.
        videos: which frames of a video, and from which root.
        features: a picture's stored features by its path; None opens the picture.
    """

    folder: Path
    videos: VideoReading
    features: Callable[[str], Tensor] | None = None

    def read(self, question: Question) -> Shown:
        """Everything that a question shows.

        Raises:
            BadSample: a picture or a video is missing or broken.
        """
        videos = tuple(self.videos.read(question.videos))
        if self.features is not None:
            return Shown(features=tuple(self.features(path) for path in question.images), videos=videos)
        return Shown(pictures=tuple(open_picture(self.folder, path) for path in question.images), videos=videos)

    def close(self) -> None:
        """Ends the decoder's process."""
        self.videos.reader.close()


def videos_placed(turns: Sequence[Turn], videos: int) -> Sequence[Turn]:
    """The turns with `<video>` for so many videos, which come before everything else where no turn has a place."""
    asked = next((place for place, turn in enumerate(turns) if turn.role == "user"), None)
    if not videos or asked is None or any(VIDEO_PLACEHOLDER in turn.text for turn in turns):
        return turns
    first = Turn("user", f"{VIDEO_PLACEHOLDER}\n" * videos + turns[asked].text)
    return [*turns[:asked], first, *turns[asked + 1 :]]


def frames_as_pictures(turns: Sequence[Turn], seen: Shown) -> tuple[Sequence[Turn], Sequence[Image.Image]]:
    """The turns and pictures of a prompt in which a video is so many pictures.

    Raises:
        BadSample: the turns' places are not as many as what is shown.
    """
    if not seen.videos:
        return turns, seen.pictures
    try:
        return as_pictures(turns, seen.pictures, seen.videos)
    except ValueError as error:
        raise BadSample("question", str(error)) from error


def check_pictures(questions: Iterable[Question], folder: Path, *, setting: str) -> None:
    """Refuses a picture folder that is none, or holds not one of the pictures; before any model is loaded.

    Args:
        setting: what names the folder, for the message.

    Raises:
        UserError: it says how many pictures were looked for, and the first.
    """
    if not folder.is_dir():
        raise UserError(f"picture folder {folder} does not exist; set {setting}")
    names = list(dict.fromkeys(path for question in questions for path in question.images))
    if names and not any_is_there(names, folder):
        raise UserError(
            f"not one of {len(names)} pictures is in {folder}, first {shown(names[0])}; set {setting} to the folder "
            "that their paths start from"
        )


def refuse_media(seen: Shown, reason: str) -> None:
    """Raises a `BadSample` where a model of words alone is shown anything."""
    if seen.pictures or seen.features or seen.videos:
        raise BadSample("question", reason)
