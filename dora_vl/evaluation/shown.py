"""What a question shows the model, pictures and a video's frames, and how it is read from disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch import Tensor

from dora_vl.data.examples import Clip
from dora_vl.data.media import any_is_there
from dora_vl.data.stored_pictures import open_picture
from dora_vl.data.turns import IMAGE_PLACEHOLDER, Turn
from dora_vl.errors import BadSample, UserError, shown
from dora_vl.evaluation.questions import Question
from dora_vl.vision.frame_sampling import Sampling
from dora_vl.vision.video import VideoReader
from dora_vl.vision.video_decoding import Frames


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What one prompt shows.

    Attributes:
        pictures: RGB, in the order of the prompt's placeholders.
        features: `[tokens, width]` of each picture instead, as a frozen vision tower's output was stored.
        video: frames with their times; they come before everything else, and no placeholder stands for them.
    """

    pictures: tuple[Image.Image, ...] = ()
    features: tuple[Tensor, ...] = ()
    video: Frames[Image.Image] | None = None

    @property
    def frames(self) -> tuple[Image.Image, ...]:
        """The video's frames; none without one."""
        return () if self.video is None else self.video.pictures


NOTHING = Shown()


@dataclass(frozen=True, kw_only=True)
class MediaReader:
    """Reads what questions show; it may be sent to data workers.

    Attributes:
        folder: root of pictures and videos.
        sampling: which frames of a video.
        features: a picture's stored features by its path; None opens the picture.
    """

    folder: Path
    sampling: Sampling
    videos: VideoReader = field(default_factory=VideoReader)
    features: Callable[[str], Tensor] | None = None

    def read(self, question: Question) -> Shown:
        """Everything that a question shows.

        Raises:
            BadSample: a picture or the video is missing or broken.
        """
        video = None if question.video is None else self.video(question.video)
        if self.features is not None:
            return Shown(features=tuple(self.features(path) for path in question.images), video=video)
        return Shown(pictures=tuple(open_picture(self.folder, path) for path in question.images), video=video)

    def video(self, clip: Clip) -> Frames[Image.Image]:
        """The frames of a clip.

        Raises:
            BadSample: it cannot be read.
        """
        return self.videos.read(self.folder, clip, self.sampling)

    def close(self) -> None:
        """Ends the decoder's process."""
        self.videos.close()


def frames_first(turns: Sequence[Turn], seen: Shown) -> tuple[Sequence[Turn], tuple[Image.Image, ...]]:
    """The turns and pictures of a prompt in which a video's frames are so many pictures before everything else."""
    asked = next((place for place, turn in enumerate(turns) if turn.role == "user"), None)
    if not seen.frames or asked is None:
        return turns, seen.pictures
    first = Turn("user", f"{IMAGE_PLACEHOLDER}\n" * len(seen.frames) + turns[asked].text)
    return [*turns[:asked], first, *turns[asked + 1 :]], (*seen.frames, *seen.pictures)


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
    if seen.pictures or seen.features or seen.video is not None:
        raise BadSample("question", reason)
