"""What every way of asking needs of a model, and what a question shows it: pictures, a video's frames."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from PIL import Image
from torch import Tensor

from dora_vl.backbones.video_inputs import Video
from dora_vl.data.pictures import HeldPictures, MediaFolder, any_is_there, open_picture
from dora_vl.data.turns import VIDEO_PLACEHOLDER, Turn
from dora_vl.data.video import Uniform
from dora_vl.errors import BadSample, UserError, shown
from dora_vl.evaluation.questions import Question
from dora_vl.training.run_media import VideoReading
from dora_vl.training.watching import SIDE, tiled

if TYPE_CHECKING:
    from dora_vl.data.example import Clip, Example
    from dora_vl.data.video import Sampling
    from dora_vl.evaluation.ask import Asking
    from dora_vl.evaluation.questions import EvaluationSet


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
        stored: pictures that a data file holds itself.
    """

    folder: Path | MediaFolder
    videos: VideoReading
    features: Callable[[str], Tensor] | None = None
    stored: HeldPictures | None = None

    def read(self, question: Question) -> Shown:
        """Everything that a question shows.

        Raises:
            BadSample: a picture or a video is missing or broken.
        """
        videos = tuple(self.videos.read(question.videos))
        if self.features is not None:
            return Shown(features=tuple(self.features(path) for path in question.images), videos=videos)
        pictures = tuple(open_picture(self.folder, path, self.stored) for path in question.images)
        return Shown(pictures=pictures, videos=videos)

    def picture(self, question: Question) -> Image.Image:
        """One picture of all that a question shows, up to four of its pictures or frames, for people to look at.

        Raises:
            BadSample: as `read`; or it shows nothing.
        """
        pictures = [open_picture(self.folder, path, self.stored) for path in question.images[: SIDE**2]]
        frames = [frame for clip in question.videos[:1] for frame in self._frames(clip)]
        if not pictures and not frames:
            raise BadSample(question.id, "it shows nothing")
        return tiled(pictures or frames)

    def _frames(self, clip: Clip) -> Sequence[Image.Image]:
        return self.videos.reader.read(self.videos.folder, clip, Uniform(SIDE**2)).pictures

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


Write = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What came of many questions.

    Attributes:
        answers: by id, in the questions' order.
        failed: the reason for each question that could not be asked, by id.
        answered_before: how many an earlier run had answered.
        cut: the tokens that each text which was cut lost, by id.
        seconds: how long it took.
        without_numbers: ids of those for which the model's scores were no numbers.
    """

    answers: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    answered_before: int = 0
    cut: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    without_numbers: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class View:
    """A question about a video as a model is asked it, and what it looks at.

    Attributes:
        as_pictures: the model takes no videos; the frames are so many pictures to it.
    """

    example: Example
    clip: Clip
    sampling: Sampling
    as_pictures: bool = False


@runtime_checkable
class Asker(Protocol):
    """A model, ready to be asked."""

    def answer(
        self,
        turns: Sequence[Turn],
        pictures: Sequence[Image.Image],
        *,
        max_new_tokens: int = 64,
        write: Write | None = None,
    ) -> str:
        """The answer to turns that end with a question; one `<image>` in them for each picture.

        Args:
            turns: the conversation so far, its last turn the question.
            pictures: RGB pictures in the order of their placeholders.
            max_new_tokens: longest answer.
            write: receives the answer piece by piece while it is made.

        Raises:
            UserError: the turns cannot be put to this model.
        """
        ...

    def view(self, example: Example, *, frames: int) -> View:
        """What this model looks at of an example's video; `frames` of it where nothing else was trained.

        Raises:
            UserError: no such question can be put to it.
        """
        ...

    def answer_example(
        self, example: Example, seen: Shown, *, max_new_tokens: int = 64, write: Write | None = None
    ) -> str:
        """The answer to an example's question about these pictures or this video; see `answer`."""
        ...

    def ask(self, one: EvaluationSet, asking: Asking) -> Asked:
        """Puts a benchmark's questions to the model; what fails is named and counted."""
        ...


@dataclass(frozen=True, kw_only=True)
class Opened:
    """The model with its adapter, if it has one, and without where that was asked for.

    Attributes:
        adapted: what is asked.
        base: the model without the adapter.
    """

    adapted: Asker
    base: Asker | None = None


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which model is to be opened: an adapter on its base, or a model by itself.

    Attributes:
        adapter: the folder that training or PEFT wrote.
        model: a model's folder or hub id, to be asked without an adapter.
        base: where the adapter's base is now; None looks where the adapter says.
        any_base: accepts a base with other content than the one trained on.
        with_base: also opens the model without the adapter; it shares all weights that the adapter leaves alone.
        template: the prompt format of a LLaVA-1.5 or a language model of which nothing says it.
        strength: how much of the adapter is applied: 0 nothing, 1 all, beyond it more of the same.
    """

    adapter: Path | None = None
    model: str | None = None
    base: str | None = None
    any_base: bool = False
    with_base: bool = False
    template: str | None = None
    strength: float = 1.0
