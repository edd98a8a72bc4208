"""Pictures of an encoder-decoder's test: its loss curve, and a sheet of questions, marked as the task scores them."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dora_vl.data.example import Clip, Example
from dora_vl.data.pictures import open_image
from dora_vl.data.video import Uniform, VideoReader
from dora_vl.evaluation.predictions import Prediction
from dora_vl.evaluation.scores.scored import Scored
from dora_vl.training.run_folder import LOSS_LOG, read_log
from dora_vl.training.watching import SIDE, tiled


def clip_picture(reader: VideoReader, root: Path, clip: Clip) -> Image.Image:
    """Four frames, evenly over the clip, two by two; fewer where it has fewer.

    Raises:
        BadSample: the clip cannot be read.
    """
    return tiled(reader.read(root, clip, Uniform(SIDE**2)).pictures)


log = logging.getLogger(__name__)

ACCURACY = "accuracy"
TITLE_CHARACTERS = 100


@dataclass(frozen=True)
class Shown:
    """A task on the sheet: its examples, the answers by id, and its score, None where the publisher keeps answers."""

    task: str
    examples: Sequence[Example]
    answers: Mapping[str, str]
    scored: Scored | None

    @property
    def title(self) -> str:
        """The score as `metrics.json` has it; what could not be asked counts as wrong there."""
        if self.scored is None:
            return f"{self.task}: {len(self.answers):,} answers, not scored"
        name, value = next(iter(self.scored.metrics.items()))
        if name == ACCURACY:
            return f"{self.task}: {value / 100:.1%} of {self.scored.n:,} right"
        return f"{self.task}: {name} {value:.1f} of {self.scored.n:,}"

    def predictions(self) -> list[Prediction]:
        """What was answered about a picture or a video; ids begin with the task, since two tasks may share them."""
        return [
            _prediction(f"{self.task}/{example.id}", example, self.answers[example.id])
            for example in self.examples
            if example.id in self.answers and media_of(example)
        ]

    def shares(self) -> dict[str, float]:
        """How right each answer is, by the prediction's id; nothing where the score is no share of right answers."""
        if self.scored is None or ACCURACY not in self.scored.metrics:
            return {}
        return {f"{self.task}/{name}": share for name, share in self.scored.per_item.items()}


def draw(tasks: Sequence[Shown], *, run_folder: Path, image_folder: str | None) -> None:
    """The loss curve and, where the pictures are known, the contact sheet."""
    try:
        from dora_vl.evaluation.pictures import write_contact_sheet, write_loss_curve

        entries = read_log(run_folder / LOSS_LOG)
        if any("loss" in entry for entry in entries):
            write_loss_curve(entries, run_folder / "loss_curve.png")
    except ImportError:
        log.warning("no loss curve: matplotlib is not installed (pip install 'dora-vl[demo]')")
        return
    predictions = [prediction for task in tasks for prediction in task.predictions()]
    if image_folder is None:
        return
    if not predictions:
        log.warning("no contact sheet: no question about a picture or a video was answered")
        return
    root = Path(image_folder)
    examples = [(f"{task.task}/{example.id}", example) for task in tasks for example in task.examples]
    clips = {example.video.path: example.video for _, example in examples if example.video is not None}
    heard = {name: " ".join(line.text for line in example.subtitles) for name, example in examples}
    with VideoReader() as reader:

        def open_medium(path: str) -> Image.Image:
            return clip_picture(reader, root, clips[path]) if path in clips else open_image(root, path)

        write_contact_sheet(
            predictions,
            open_medium,
            run_folder / "contact_sheet.png",
            title="\n".join(textwrap.wrap(", ".join(one.title for one in tasks), TITLE_CHARACTERS, max_lines=2)),
            subtitles=heard,
            shares={name: share for task in tasks for name, share in task.shares().items()},
        )


def media_of(example: Example) -> list[str]:
    """Paths of an example's pictures, or of its video."""
    return list(example.images) or ([] if example.video is None else [example.video.path])


def expected(example: Example) -> str:
    """The right answer as a model says it: a choice's label, or the first answer."""
    if example.choices and "correct" in example.extra:
        return f"a{example.extra['correct']}"
    return example.answers[0].text if example.answers else ""


def in_words(example: Example, said: str) -> str:
    """An answer as people read it: a choice's label as its words."""
    labels = [f"a{index}" for index in range(len(example.choices))]
    return dict(zip(labels, example.choices, strict=True)).get(said, said)


def _prediction(name: str, example: Example, said: str) -> Prediction:
    """What the contact sheet shows; a choice in its words."""
    kind = example.extra.get("kind")
    return Prediction(
        id=name,
        images=media_of(example),
        question=example.question,
        truth=in_words(example, expected(example)),
        prediction=in_words(example, said),
        kind=None if kind is None else str(kind),
    )
