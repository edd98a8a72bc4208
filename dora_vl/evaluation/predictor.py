"""What asks and reads for a test: media, how questions are put, and the protocol of a model that answers them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

from PIL import Image
from torch import Tensor

from dora_vl.backbones.generation import NOT_FINITE_SCORES
from dora_vl.backbones.video_inputs import Video
from dora_vl.data.example import Clip, Example
from dora_vl.data.pictures import HeldPictures, MediaFolder, any_is_there, open_image
from dora_vl.data.video import FrameSampling, Uniform
from dora_vl.errors import BadSample, UserError, short_repr
from dora_vl.evaluation.predictions import Prediction
from dora_vl.evaluation.questions import kind_of, text_asked
from dora_vl.run.base import VideoReading
from dora_vl.run.folder import SIDE, tiled
from dora_vl.shapes import Float

Write = Callable[[str], object]
Answered = Iterator[list[Prediction]]
AnswerMethod = Literal["generation", "letters", "outputs", "cloze"]


@dataclass(frozen=True, kw_only=True)
class PromptMedia:
    """Holds the pictures and videos of one prompt, RGB, in the order of its `<image>` and `<video>`."""

    pictures: tuple[Image.Image, ...] = ()
    videos: tuple[Video, ...] = ()

    @property
    def frames(self) -> tuple[Image.Image, ...]:
        """Returns the frames of every video."""
        return tuple(frame for video in self.videos for frame in video.pictures)


@dataclass(frozen=True, kw_only=True)
class MediaReader:
    """Reads the pictures and videos of examples, `stored` ones from a data file; data workers may have it."""

    folder: Path | MediaFolder
    videos: VideoReading
    stored: HeldPictures | None = None

    def read(self, example: Example) -> PromptMedia:
        """Reads all pictures and videos of an example."""
        videos = tuple(self.videos.read(example.videos))
        pictures = tuple(open_image(self.folder, path, self.stored) for path in example.images)
        return PromptMedia(pictures=pictures, videos=videos)

    def frames(self, clip: Clip, sampling: FrameSampling) -> Video:
        """Reads the frames of a clip by another sampling than that of `videos`."""
        return self.videos.reader.read(self.videos.folder, clip, sampling)

    def picture(self, example: Example) -> Image.Image:
        """Makes one picture of up to four of an example's pictures or frames, for people to look at."""
        pictures = [open_image(self.folder, path, self.stored) for path in example.images[: SIDE**2]]
        frames = [frame for clip in example.videos[:1] for frame in self.frames(clip, Uniform(SIDE**2)).pictures]
        if not pictures and not frames:
            raise BadSample(example.id, "it shows nothing")
        return tiled(pictures or frames)

    def close(self) -> None:
        """Ends the process that decodes videos."""
        self.videos.reader.close()


def media_reader(folder: Path | MediaFolder, *, frames: int, one_length: bool = False) -> MediaReader:
    """Makes a reader of pictures, and of `frames` frames of each video, below one folder."""
    videos = VideoReading(folder=folder, sampling=Uniform(frames), frames=frames if one_length else None)
    return MediaReader(folder=folder, videos=videos)


def check_pictures(images: Iterable[str], folder: Path, *, of: str = "", setting: str) -> None:
    """Refuses a folder that is missing or holds none of the pictures, before any model is loaded."""
    if not folder.is_dir():
        raise UserError(f"picture folder {folder} does not exist; set {setting}")
    names = list(dict.fromkeys(images))
    if names and not any_is_there(names, folder):
        raise UserError(
            f"{f'{of}: ' if of else ''}not one of {len(names)} pictures is in {folder}, first "
            f"{short_repr(names[0])}; set {setting} to the folder that their paths start from"
        )


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Says how questions are answered.

    Attributes:
        workers: processes that read pictures ahead; 0 reads them in this one.
        answer_method: what the model says; of the question's choices the likeliest letter; of the outputs that its last
            line admits the likeliest one; cloze: the log-likelihood of every ending, as numbers.
        task: names a trained task of a VL-BART; "" tells it by the question's form.
        letters: a VL-BART's choice is given as its letter, not as its label.
    """

    batch_size: int = 32
    max_new_tokens: int = 64
    workers: int = 0
    answer_method: AnswerMethod = "generation"
    task: str = ""
    letters: bool = False


@dataclass(frozen=True, kw_only=True)
class View:
    """A question about a video and the frames that a model is shown, as pictures where it takes no videos."""

    example: Example
    clip: Clip
    sampling: FrameSampling
    as_pictures: bool = False


class Predictor(Protocol):
    """A model that answers examples."""

    def answer(
        self, example: Example, media: PromptMedia, *, max_new_tokens: int = 64, write: Write | None = None
    ) -> str:
        """Answers one question about these pictures or videos; `write` receives the text piece by piece."""
        ...

    def predict(self, examples: Sequence[Example], media: MediaReader, decoding: Decoding) -> Answered:
        """Yields every example's prediction, batch by batch, in an order of its own; none is left out."""
        ...

    def logits(
        self, example: Example, answer: str, media: MediaReader, decoding: Decoding
    ) -> Float[Tensor, "tokens vocab"]:
        """Returns the logits that predict an answer's tokens; none where the answer cannot come there."""
        ...

    def view(self, example: Example, *, frames: int) -> View:
        """Picks the frames of an example's video; `frames` of them where training fixed no number."""
        ...


def prediction(
    example: Example, answer: str | None, error: str = "", *, boxes: str = "", cut_tokens: int = 0
) -> Prediction:
    """Makes the record of an example's answer, or of the error that left it without one."""
    return Prediction(
        id=example.id,
        images=list(example.images),
        videos=[asdict(clip) for clip in example.videos],
        question=text_asked(example),
        truth=example.answers[0].text if example.answers else "",
        prediction="" if answer is None else answer.strip(),
        boxes=boxes,
        kind=kind_of(example),
        error=error or (NOT_FINITE_SCORES if answer is None else ""),
        cut_tokens=cut_tokens,
    )
