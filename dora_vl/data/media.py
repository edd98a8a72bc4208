"""Pictures of a sample: as a row names or holds them, below their folder or in the data file; decoded as a whole."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from dora_vl.data.picture_decoding import decode_image, in_one_line
from dora_vl.errors import ON_THE_WEB, BadSample, shown

if TYPE_CHECKING:
    import datasets
    from PIL import Image


ALLOW_LINKS = "data.follow_links: true (--follow-links) reads such links"


@dataclass(frozen=True)
class MediaFolder:
    """Where the paths of pictures or videos start, and how the files there are read.

    Attributes:
        root: the folder.
        follow_links: a file may be a link that leads out of it, as DVC and git-annex lay them (`data.follow_links`).
        as_published: pictures become pixels as in LLaVA's own code (`data.as_published`), see `open_image`.
    """

    root: Path
    follow_links: bool = False
    as_published: bool = False

    def __str__(self) -> str:
        return str(self.root)

    @classmethod
    def of(cls, root: Path | MediaFolder) -> MediaFolder:
        """A path alone is read as usual."""
        return root if isinstance(root, MediaFolder) else cls(root)


def open_image(root: Path | MediaFolder, relative: str) -> Image.Image:
    """The picture at `relative` under `root`, as RGB, decoded whole, as a viewer shows it.

    Turned as its EXIF orientation says, what is transparent laid on white, 16-bit grey scaled to 8 bits. LLaVA's own
    code does none of these (`convert("RGB")` in c121f04, `llava/train/train.py`): it reads a phone's photograph
    sideways, shows whatever colour is stored below transparency, and clips 16 bits to white; so does this
    `as_published`. Every other picture has the same pixels there and here, but for those with a side of more than
    `media_limits.PICTURE_SIDE` pixels, which are shrunk to it.

    Args:
        root: the folder that holds all pictures.
        relative: a path inside it, with `/`; an absolute path that lies in it counts as that.

    Raises:
        BadSample: the path leaves `root`, nothing is there, or it cannot be decoded; its `sample_id` is the
            path, because a picture does not know its sample.
    """
    folder = MediaFolder.of(root)
    return decode_image(path_inside(folder, relative), relative, str(folder), as_published=folder.as_published)


def path_inside(root: Path | MediaFolder, relative: str, *, kind: str = "picture") -> Path:
    """Where the file at `relative` is, if that is inside `root`; `kind` is what the messages call it.

    Raises:
        BadSample: the path leaves `root`, through dots or through a link that may not be followed.
    """
    folder = MediaFolder.of(root)
    parts = PurePosixPath(relative)
    absolute = parts.is_absolute() or Path(relative).is_absolute()
    if not relative or "\0" in relative or (absolute and not _is_below(folder.root, Path(relative))):
        raise BadSample(relative, f"{kind} path {relative!r} must be relative to {folder}, or lie in it")
    if ".." in parts.parts or ".." in Path(relative).parts:
        raise BadSample(relative, f"{kind} path {relative!r} must not leave {folder}")
    path = folder.root / relative
    if folder.follow_links:
        return path
    try:
        real, real_root = path.resolve(), folder.root.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a name too long, or of no encoding
        raise BadSample(relative, f"{kind} path {relative!r} cannot be followed: {in_one_line(error)}") from None
    if not real.is_relative_to(real_root):
        raise BadSample(relative, f"{kind} {relative} is a link that leads out of {folder}, to {real}; {ALLOW_LINKS}")
    return path


def any_is_there(names: Iterable[str], root: Path) -> bool:
    """Whether any of these paths leads to something from `root`; a root that is another one has none."""
    for name in names:
        try:
            if (root / name).exists():
                return True
        except (OSError, ValueError):  # a name that no file system takes
            continue
    return False


def _is_below(root: Path, path: Path) -> bool:
    """By their names alone; where links lead is seen afterwards."""
    return path.is_relative_to(root.absolute()) or path.is_relative_to(root.resolve())


@runtime_checkable
class HeldPictures(Protocol):
    """Bytes by the name that a row gives them."""

    def __contains__(self, name: str) -> bool: ...

    def read(self, name: str) -> bytes:
        """The bytes of a picture that is there."""
        ...


@dataclass(frozen=True)
class RowPictureBytes:
    """The pictures of one row."""

    held: Mapping[str, bytes]

    def __contains__(self, name: str) -> bool:
        return name in self.held

    def read(self, name: str) -> bytes:
        """The bytes of a picture that is there."""
        return self.held[name]


class StoredPictures:
    """Bytes by the name that a row gives them, which is made of their content; worker processes may have it.

    Args:
        tables: whole tables of `record_table.load_table`; each picture stands in the first row that has it.
    """

    def __init__(self, tables: Sequence[datasets.Dataset]) -> None:
        self._tables = [table.select_columns(["held_pictures"]) for table in tables]
        self._places: dict[str, tuple[int, int, int]] = {}
        for number, table in enumerate(self._tables):
            for chunk_number, chunk in enumerate(table.data.column("held_pictures").chunks):
                names = chunk.flatten().field("name").to_pylist()
                self._places |= {name: (number, chunk_number, place) for place, name in enumerate(names)}

    @classmethod
    def joined(cls, parts: Sequence[StoredPictures]) -> StoredPictures:
        """The pictures of several files."""
        return cls([table for part in parts for table in part._tables])

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def read(self, name: str) -> bytes:
        """The bytes of a picture that is there."""
        table, chunk, place = self._places[name]
        pictures = self._tables[table].data.column("held_pictures").chunk(chunk).flatten()
        return pictures.field("content")[place].as_py()


def open_picture(root: Path | MediaFolder, name: str, stored: HeldPictures | None = None) -> Image.Image:
    """A picture of the data file itself, or the file at `name` under `root`; see `media.open_image`.

    Raises:
        BadSample: as `open_image`.
    """
    if stored is not None and name in stored:
        as_published = MediaFolder.of(root).as_published
        return decode_image(io.BytesIO(stored.read(name)), name, "the data file", as_published=as_published)
    return open_image(root, name)


WEB, IN_PLACE, AS_URL = ("http://", "https://"), "data:", "file://"
"""What begins a picture's text where that is no path."""
BARE_BASE64 = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")
"""How the bytes of PNG, JPEG, GIF and WebP begin in base64."""
STORED = "bytes:"


@dataclass
class RowPictures:
    """Pictures in order: `names` are paths, or made of the content where `held` has the bytes."""

    sample_id: str
    names: list[str] = field(default_factory=list)
    held: dict[str, bytes] = field(default_factory=dict)

    def add(self, value: object, key: str) -> None:
        """Takes a path, bytes, an object with `bytes`, `path` or `url`, or a data URL.

        Raises:
            BadSample: anything else, or an address on the web.
        """
        if isinstance(value, Mapping):
            given = [value.get(name) for name in ("bytes", "path", "url")]
            value = next((one for one in given if one is not None), None)
        if isinstance(value, bytes | bytearray) and value:
            self._hold(bytes(value))
        elif isinstance(value, str) and value.startswith(IN_PLACE):
            self._hold(self._from_data_url(value))
        elif isinstance(value, str) and value.startswith(BARE_BASE64) and (data := _from_base64(value)) is not None:
            self._hold(data)
        elif isinstance(value, str) and value.startswith(WEB):
            told = f"{key!r} is on the web, {shown(value)}; fetch it and name the file"
            raise BadSample(self.sample_id, told, ON_THE_WEB)
        elif isinstance(value, str) and value:
            self.names.append(value.removeprefix(AS_URL).replace("\\", "/"))
        else:
            raise BadSample(self.sample_id, f"{key!r} must be a path or a list of paths, got {shown(value)}")

    def _hold(self, data: bytes) -> None:
        name = STORED + hashlib.sha256(data).hexdigest()[:32]
        self.names.append(name)
        self.held[name] = data

    def _from_data_url(self, url: str) -> bytes:
        header, comma, content = url.partition(",")
        try:
            if not comma or not header.endswith(";base64"):
                raise ValueError("it is not base64")
            return base64.b64decode(content, validate=True)
        except (ValueError, binascii.Error) as error:
            raise BadSample(self.sample_id, f"its data URL {shown(url)} cannot be read: {error}") from None


def _from_base64(text: str) -> bytes | None:
    """The bytes, or None where the text is no base64: a path may begin alike."""
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        return None


def row_pictures(fields: Mapping[str, object], sample_id: str) -> RowPictures:
    """The pictures among a row's fields; one that is no list counts as a list of one.

    Raises:
        BadSample: see `RowPictures.add`.
    """
    pictures = RowPictures(sample_id)
    value = fields.get("images")
    if value is None or value in ("", b"", []) or value != value:  # NaN: a table's empty cell
        return pictures
    for one in value if isinstance(value, list | tuple) else [value]:
        pictures.add(one, "images")
    return pictures
