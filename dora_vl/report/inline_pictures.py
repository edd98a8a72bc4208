"""Small pictures as text inside a page, each once and up to a budget, so that a page stays a few megabytes."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from PIL import Image

from dora_vl.data.examples import Clip
from dora_vl.data.media import open_image
from dora_vl.errors import BadSample
from dora_vl.evaluation.seq2seq_pictures import clip_picture
from dora_vl.run.watched import EXACT_PX, JPEG_QUALITY, small_picture, tiled
from dora_vl.vision.video import VideoReader

MOST_BYTES = 2_500_000
TOO_MANY = "left out, so that the page stays small"


class InlinePictures:
    """Pictures as data URLs; use it as a context manager.

    Args:
        most_bytes: of all of them together; later ones are left out.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._left = most_bytes
        self._urls: dict[str, str] = {}
        self._reader = VideoReader()

    def __enter__(self) -> InlinePictures:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.close()

    def file(self, path: Path) -> tuple[str, str]:
        """A picture file as a data URL, and why there is none."""
        return self._add(lambda: open_image(path.parent, path.name))

    def shown(self, root: Path | None, pictures: Sequence[str], clip: Clip | None) -> tuple[str, str]:
        """What a question shows as one small picture, and why there is none."""
        if not pictures and clip is None:
            return "", ""
        if root is None:
            return "", "the settings name no folder of its pictures"
        if clip is not None:
            return self._add(lambda: clip_picture(self._reader, root, clip))
        return self._add(lambda: tiled([open_image(root, path) for path in pictures]))

    def _add(self, opened: Callable[[], Image.Image]) -> tuple[str, str]:
        if self._left <= 0:
            return "", TOO_MANY
        try:
            data, kind = encoded(opened())
        except BadSample as error:
            return "", error.reason
        name = hashlib.sha256(data).hexdigest()
        if name not in self._urls:
            if len(data) > self._left:
                return "", TOO_MANY
            self._left -= len(data)
            self._urls[name] = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        return self._urls[name], ""


def data_url(picture: Image.Image) -> str:
    """The picture, made small, as text inside a page."""
    data, kind = encoded(picture)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def encoded(picture: Image.Image) -> tuple[bytes, str]:
    """The picture, made small, as a file's bytes, and its kind: PNG to the pixel where it is tiny, else JPEG."""
    small = small_picture(picture.convert("RGB"))
    kind = "png" if max(small.size) <= EXACT_PX else "jpeg"
    file = io.BytesIO()
    small.save(file, format=kind, quality=JPEG_QUALITY, optimize=True)
    return file.getvalue(), kind
