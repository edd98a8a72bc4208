"""Fixed questions put to an encoder-decoder that trains, each in its task's way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from dora_vl.backbones.pieces import Seq2SeqEncoder
from dora_vl.backbones.vlbart import VlBartBackbone
from dora_vl.data.example import Example
from dora_vl.data.pictures import open_image
from dora_vl.data.video import VideoReader
from dora_vl.errors import BadSample
from dora_vl.evaluation.seq2seq_pictures import clip_picture, expected, in_words, media_of
from dora_vl.evaluation.seq2seq_run import Tested, answer_rows
from dora_vl.training.watching import Watch, WatchedQuestion, evenly, tiled


def watch_subtasks(
    backbone: VlBartBackbone,
    encoder: Seq2SeqEncoder,
    tested: Sequence[Tested],
    *,
    count: int,
    image_folder: str | None,
    source: str,
) -> Watch | None:
    """So many examples, of each task in turn, evenly over its file; None where no file holds one that can be read.

    Args:
        image_folder: root of the pictures; None shows none.
    """
    chosen = _chosen(tested, count)
    named = {name: example for name, (_, example) in chosen.items()}
    if not named:
        return None

    def ask() -> Mapping[str, str]:
        answers: dict[str, str] = {}
        for one in tested:
            rows = {name: example for name, (task, example) in chosen.items() if task is one}
            done = _answered(backbone, encoder, one, list(rows.values()))
            answers |= {name: in_words(row, done[row.id]) for name, row in rows.items() if row.id in done}
        return answers

    pictures: dict[str, Callable[[], Image.Image]] = {}
    for name, example in named.items() if image_folder is not None else ():
        if (opens := picture_of(example, Path(str(image_folder)))) is not None:
            pictures[name] = opens
    return Watch(
        questions=tuple(_question(name, example, image_folder) for name, example in named.items()),
        pictures=pictures,
        ask=ask,
        source=source,
    )


def _chosen(tested: Sequence[Tested], count: int) -> dict[str, tuple[Tested, Example]]:
    """Examples by a name that says the task too."""
    found: dict[str, tuple[Tested, Example]] = {}
    for number, one in enumerate(tested):
        subtask, file, _ = one
        for place in evenly(range(len(file)), len(range(number, count, len(tested)))):
            try:
                example = file[place]
            except BadSample:  # validation, or the test, counts and names it
                continue
            found[f"{subtask.name}/{example.id}"] = one, example
    return found


def _answered(
    backbone: VlBartBackbone, encoder: Seq2SeqEncoder, tested: Tested, rows: Sequence[Example]
) -> Mapping[str, str]:
    if not rows:
        return {}
    subtask, _, reader = tested
    with torch.no_grad():  # not inference mode, whose tensors training could not use
        return answer_rows(backbone, encoder, subtask, reader, rows).answers


def _question(name: str, example: Example, image_folder: str | None) -> WatchedQuestion:
    shows = media_of(example)
    return WatchedQuestion(
        id=name,
        question=example.question or "(describe it)",
        truth=in_words(example, expected(example)),
        why_no_picture="evaluation.image_folder names no folder of pictures" if shows and image_folder is None else "",
    )


def picture_of(example: Example, root: Path) -> Callable[[], Image.Image] | None:
    """What opens an example's pictures, or frames of its video, as one; None: it shows nothing."""
    return partial(_picture, example, root) if media_of(example) else None


def _picture(example: Example, root: Path) -> Image.Image:
    if example.video is None:
        return tiled([open_image(root, path) for path in example.images])
    with VideoReader() as reader:
        return clip_picture(reader, root, example.video)
