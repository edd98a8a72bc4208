"""Opens a sample's pictures, which a row names below a folder or holds itself."""

from __future__ import annotations

import base64
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias
from unicodedata import normalize

from PIL import Image

from dora_vl.data.picture_files import NOT_DECODED, decoding_trouble, load_picture, picture_facts, why_not_decoded
from dora_vl.data.turns import Unusable
from dora_vl.errors import ON_THE_WEB, BadSample, UserError, log_once, short_repr
from dora_vl.limited_process import JobFailed

if TYPE_CHECKING:
    import datasets

log = logging.getLogger(__name__)

PICTURE_ENDINGS = (
    "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "jpe", "jfif", "apng", "mpo",
    "jp2", "j2k", "jpc", "jpf", "jpx", "j2c", "avif", "avifs", "heic", "heif", "hif",
)  # fmt: skip
VIDEO_ENDINGS = (
    "mp4", "mkv", "webm", "avi", "mov", "m4v", "ts", "m2ts", "flv", "mpg", "mpeg", "vob", "wmv", "asf", "mxf",
)  # fmt: skip
ENDINGS = {"JPEG": "jpg", "TIFF": "tif"}
"""Maps Pillow's names of formats to file endings, where they differ."""


def save_picture(data: bytes, folder: Path, sample_id: str) -> str:
    """Writes a picture that a table holds into `folder`/media, named by its content; returns its path from `folder`.

    It is decoded first: in a table that was cut or damaged, one may begin and end well.
    """
    try:
        kind = str(picture_facts(BytesIO(data), decode=False)["format"])
    except JobFailed as error:
        raise BadSample(sample_id, f"its picture {error}") from None
    relative = f"media/{hashlib.sha256(data).hexdigest()[:32]}.{ENDINGS.get(kind, kind.lower())}"
    target = folder / relative
    if target.is_file() and target.stat().st_size == len(data):
        return relative
    if trouble := decoding_trouble(BytesIO(data)):
        raise BadSample(sample_id, f"its picture is {trouble.kind.removesuffix(' media')}: {trouble.detail}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)  # one that a kill cuts short has another size, and is written again
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error}); free some space") from error
    return relative


STORED = "bytes:"
"""The name of a picture that the data file holds begins so."""
HeldPictures: TypeAlias = Mapping[str, bytes]
"""Maps names to the bytes of pictures that a data file holds."""


@dataclass(frozen=True)
class MediaFolder:
    """Says where the paths of pictures or videos start, and how the files there are read.

    Attributes:
        follow_links: a file may be a link that leads out of it, as DVC and git-annex lay them (`data.follow_links`).
        as_published: pictures become pixels as in LLaVA's own code (`data.as_published`), see `open_image`.
    """

    root: Path
    follow_links: bool = False
    as_published: bool = False

    def __str__(self) -> str:
        return str(self.root)


def open_image(root: Path | MediaFolder, relative: str, stored: HeldPictures | None = None) -> Image.Image:
    """Returns the picture at `relative` under `root`, or among those that the data file holds, as a viewer shows it.

    It is RGB, decoded whole, turned as its EXIF orientation says, what is transparent laid on white, 16-bit grey scaled
    to 8 bits. LLaVA's own code does none of these (`convert("RGB")` in c121f04, `llava/train/train.py`): it reads a
    phone's photograph sideways, shows whatever colour is stored below transparency, and clips 16 bits to white; so does
    this `as_published`. Every other picture has the same pixels there and here, but for those with a side of more than
    `PICTURE_SIDE` pixels, which are shrunk to it.
    """
    folder = root if isinstance(root, MediaFolder) else MediaFolder(root)
    if stored is not None and relative in stored:
        source, where = BytesIO(stored[relative]), "the data file"
    else:
        source, where = path_inside(folder, relative), folder
    try:
        return load_picture(source, as_published=folder.as_published)
    except FileNotFoundError:
        raise BadSample(relative, f"picture {relative} is missing in {where}") from None
    except NOT_DECODED as error:
        raise BadSample(relative, f"picture {relative} in {where} {why_not_decoded(error)}") from None


def path_inside(root: Path | MediaFolder, relative: str, *, kind: str = "picture") -> Path:
    """Returns where the file at `relative` is, if that is inside `root`; `kind` is what the messages call it.

    Where nothing has exactly that name, it is the one file whose name differs only in upper and lower case, or in how
    Unicode writes an accent.
    """
    folder = root if isinstance(root, MediaFolder) else MediaFolder(root)
    parts = Path(relative)
    # An absolute one may lie below it by its name; where links lead is seen afterwards.
    is_outside = parts.is_absolute() and not any(
        parts.is_relative_to(start) for start in (folder.root.absolute(), folder.root.resolve())
    )
    if not relative or "\0" in relative or is_outside:
        raise BadSample(relative, f"{kind} path {relative!r} must be relative to {folder}, or lie in it")
    if ".." in parts.parts:
        raise BadSample(relative, f"{kind} path {relative!r} must not leave {folder}")
    path = as_spelled(folder.root, relative)
    if folder.follow_links:
        return path
    try:
        real, real_root = path.resolve(), folder.root.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a name too long, or of no encoding
        raise BadSample(relative, f"{kind} path {relative!r} cannot be followed: {error}") from None
    if not real.is_relative_to(real_root):
        remedy = "data.follow_links: true (--follow-links) reads such links"
        raise BadSample(relative, f"{kind} {relative} is a link that leads out of {folder}, to {real}; {remedy}")
    return path


def as_spelled(root: Path, relative: str) -> Path:
    """Returns the path below `root`, its file as the folder has it: `up.jpg` is `UP.JPG` where only that is there."""
    path = root / relative
    names = () if os.path.lexists(path) else _names_in(path.parent).get(_plain(path.name), ())
    if len(names) != 1:
        return path
    reason = "files whose names differ from the data's only in letter case or Unicode form are used"
    log_once(log, logging.WARNING, f"{root}: {reason}")
    return path.with_name(names[0])


@lru_cache(maxsize=64)
def _names_in(folder: Path) -> Mapping[str, Sequence[str]]:
    """Returns a folder's names, by what `_plain` makes of them, as they were when it was first asked for."""
    names: dict[str, list[str]] = {}
    with suppress(OSError, ValueError):
        for path in folder.iterdir():
            names.setdefault(_plain(path.name), []).append(path.name)
    return names


def _plain(name: str) -> str:
    """Returns a name in one case, its accents as parts of their letters: macOS writes them as characters."""
    return normalize("NFC", name).casefold()


def any_is_there(names: Iterable[str], root: Path) -> bool:
    """Tells whether any of these paths leads to something from `root`; a root that is another one has none."""
    for name in names:
        try:
            if as_spelled(root, name).exists():
                return True
        except (OSError, ValueError):  # a name that no file system takes
            continue
    return False


class StoredPictures(HeldPictures):
    """Bytes by the name that a row gives them, which is made of their content; worker processes may have it."""

    def __init__(self, tables: Sequence[datasets.Dataset]) -> None:
        self._tables = [table.select_columns(["held_pictures"]) for table in tables]
        self._places: dict[str, tuple[int, int, int]] = {}
        for number, table in enumerate(self._tables):
            for chunk_number, chunk in enumerate(table.data.column("held_pictures").chunks):
                names = chunk.flatten().field("name").to_pylist()
                self._places |= {name: (number, chunk_number, index) for index, name in enumerate(names)}

    @classmethod
    def joined(cls, parts: Sequence[StoredPictures]) -> StoredPictures:
        """Returns the pictures of several files."""
        return cls([table for part in parts for table in part._tables])

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> bytes:
        table, chunk, index = self._places[name]
        pictures = self._tables[table].data.column("held_pictures").chunk(chunk).flatten()
        return pictures.field("content")[index].as_py()


WEB, IN_PLACE, AS_URL = ("http://", "https://"), "data:", "file://"
"""A picture's text that begins so is not a path."""
BARE_BASE64 = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")
"""PNG, JPEG, GIF and WebP begin so in base64."""


def picture_name(value: object, key: str, image_bytes: dict[str, bytes]) -> str:
    """Returns a picture's path, or a name made of its content, which goes into `image_bytes`.

    Args:
        value: a path, bytes, an object with `bytes`, `path` or `url`, or a data URL; no address on the web.
        key: what messages call it.
    """
    if isinstance(value, Mapping):
        value = next((part for name in ("bytes", "path", "url") if (part := value.get(name)) is not None), None)
    if isinstance(value, str) and value.startswith(IN_PLACE):
        header, _, text = value.partition(",")
        content = _from_base64(text) if header.endswith(";base64") else None
        if content is None:
            raise Unusable(f"its data URL {short_repr(value)} cannot be read: it is not base64")
        value = content
    elif isinstance(value, str) and value.startswith(BARE_BASE64):
        value = _from_base64(value) or value  # a path may begin alike
    if isinstance(value, bytes | bytearray) and value:
        name = STORED + hashlib.sha256(value).hexdigest()[:32]
        image_bytes[name] = bytes(value)
        return name
    if not isinstance(value, str) or not value:
        raise Unusable(f"{key!r} must be a path or a list of paths, got {short_repr(value)}")
    if value.startswith(WEB):
        raise Unusable(f"{key!r} is on the web, {short_repr(value)}; fetch it and name the file", ON_THE_WEB)
    return value.removeprefix(AS_URL).replace("\\", "/")


def _from_base64(text: str) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        return None
