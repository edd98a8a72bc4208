"""What pages are made of: templates with every text escaped, small pictures as text, one file and no host asked."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from dora_vl import __version__
from dora_vl.data.example import Clip
from dora_vl.data.pictures import open_image
from dora_vl.data.video import Uniform, VideoReader
from dora_vl.errors import BadSample
from dora_vl.files import whole_file
from dora_vl.run.watched import EXACT_PX, JPEG_QUALITY, SIDE, small_picture, tiled


@cache
def _environment() -> Environment:
    loader = FileSystemLoader(Path(__file__).parent / "templates", encoding="utf-8")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def rendered(template: str, values: Mapping[str, Any]) -> str:
    """A template with its values; halves of surrogate pairs, which no file takes, become the sign for the unknown."""
    text = _environment().get_template(template).render(version=__version__, **values)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def write_page(path: Path, text: str) -> int:
    """Writes a page whole or not at all; its size in bytes. Raises UserError where it cannot be written."""
    with whole_file(path) as file:
        file.write(text)
    return path.stat().st_size


MOST_BYTES = 3_400_000
TOO_MANY = "left out, so that the page stays small"


class InlinePictures:
    """Small pictures as data URLs, each once and up to a budget of bytes; to be closed."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._left = most_bytes
        self._seen: set[str] = set()
        self._reader = VideoReader()

    def close(self) -> None:
        """Closes the videos."""
        self._reader.close()

    def file(self, path: Path) -> tuple[str, str]:
        """Returns a picture file as a data URL, and why there is none."""
        return self._add(lambda: open_image(path.parent, path.name))

    def shown(self, root: Path | None, pictures: Sequence[str], clip: Clip | None) -> tuple[str, str]:
        """Returns what a question shows as one small picture, and why there is none."""
        if not pictures and clip is None:
            return "", ""
        if root is None:
            return "", "the settings name no folder of its pictures"
        if clip is not None:
            return self._add(lambda: tiled(self._reader.read(root, clip, Uniform(SIDE**2)).pictures))
        return self._add(lambda: tiled([open_image(root, path) for path in pictures]))

    def _add(self, opened: Callable[[], Image.Image]) -> tuple[str, str]:
        if self._left <= 0:
            return "", TOO_MANY
        try:
            url = data_url(opened())
        except BadSample as error:
            return "", error.reason
        name = hashlib.sha256(url.encode()).hexdigest()
        if name not in self._seen:
            if len(url) > self._left:
                return "", TOO_MANY
            self._left -= len(url)
            self._seen.add(name)
        return url, ""


def data_url(picture: Image.Image) -> str:
    """Returns the picture, made small, as text inside a page: PNG to the pixel where it is tiny, else JPEG."""
    small = small_picture(picture.convert("RGB"))
    kind = "png" if max(small.size) <= EXACT_PX else "jpeg"
    file = io.BytesIO()
    small.save(file, format=kind, quality=JPEG_QUALITY, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
