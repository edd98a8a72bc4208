"""Whether pictures and videos are there and whole; each file is looked at once, however many samples name it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from dora_vl.data.media import MediaFolder, path_inside
from dora_vl.data.media_limits import VIDEO_ENDINGS
from dora_vl.data.regular_file import NoRegularFile, refuse_no_file
from dora_vl.errors import BadSample

ENDS = {b"\xff\xd8\xff": b"\xff\xd9", b"\x89PNG\r\n\x1a\n": b"IEND", b"GIF8": b"\x3b"}
"""How whole files of a kind end, within their last bytes: a quick look that needs no decoding."""
TRUNCATED, BROKEN = "truncated media", "broken media"


@dataclass(frozen=True)
class Trouble:
    """Why a file cannot be used; `kind` is the same for all files with that trouble."""

    kind: str
    detail: str


class MediaCheck:
    """Looks files up under a root.

    Args:
        root: what the paths of samples are relative to; with `follow_links` they may be links out of it.
        decode: pictures are decoded whole too, which finds damage inside; their size, beginning and end are looked
            at in any case.
    """

    def __init__(self, root: Path | MediaFolder, *, decode: bool) -> None:
        self._folder = MediaFolder.of(root)
        self._decode = decode
        self._known: dict[str, Trouble | None] = {}

    @property
    def looked_at(self) -> int:
        """How many files."""
        return len(self._known)

    def trouble(self, name: str, content: bytes | None = None, video: bool = False) -> Trouble | None:
        """What is wrong with a file, or with a picture whose `content` the data file holds; None where nothing is.

        A `video` is looked at as one, whatever its name ends in.
        """
        if name not in self._known:
            self._known[name] = self._look(name, video) if content is None else self._look_into(content)
        return self._known[name]

    def _look_into(self, content: bytes) -> Trouble | None:
        quick = ends_trouble(content[:16], content[-4096:], len(content))
        return self._judged(quick, BytesIO(content))

    def _look(self, name: str, video: bool) -> Trouble | None:
        try:
            path = path_inside(self._folder, name, kind="video" if video else "picture")
        except BadSample as error:
            return Trouble("path leaves the folder", error.reason)
        try:
            found = path.stat()
            refuse_no_file(found.st_mode)
        except FileNotFoundError:
            return Trouble("missing media", f"not in {self._folder}")
        except NoRegularFile as error:
            return Trouble("no file", str(error))
        except OSError as error:
            return Trouble("missing media", str(error.strerror))
        size = found.st_size
        if size == 0:
            return Trouble("zero-byte media", "0 bytes")
        if video or path.suffix.lower().removeprefix(".") in VIDEO_ENDINGS:
            return video_trouble(path)
        return self._judged(quick_trouble(path, size), path)

    def _judged(self, quick: Trouble | None, source: Path | BytesIO) -> Trouble | None:
        """What looks odd is for training's own decoder to judge."""
        found = decoding_trouble(source) if self._decode or quick else None
        return quick if found and quick and quick.kind == TRUNCATED else found


def quick_trouble(path: Path, size: int) -> Trouble | None:
    """Looks at a picture's first and last bytes."""
    with path.open("rb") as file:
        beginning = file.read(16)
        file.seek(max(0, size - 4096))
        last = file.read()
    return ends_trouble(beginning, last, size)


def ends_trouble(beginning: bytes, last: bytes, size: int) -> Trouble | None:
    """What a picture's first 16 and last 4,096 bytes say; `size` is all of it."""
    for start, end in ENDS.items():
        if beginning.startswith(start):
            whole = last.rstrip(b"\0").endswith(end) or end in last[-64:]
            return None if whole else Trouble(TRUNCATED, f"{size:,} bytes, its end is missing")
    if beginning[:4] == b"RIFF" and beginning[8:12] == b"WEBP":
        stated = int.from_bytes(beginning[4:8], "little") + 8
        return None if size >= stated else Trouble(TRUNCATED, f"{size:,} of {stated:,} bytes")
    if beginning.startswith((b"BM", b"II*\0", b"MM\0*")):
        return None
    return Trouble(BROKEN, f"begins with {beginning[:8]!r}, which is no known picture format")


def decoding_trouble(path: Path | BytesIO) -> Trouble | None:
    """Decodes a picture whole, from a file or from memory, within the limits of training."""
    from dora_vl.data.picture_decoding import NOT_DECODED, NoPicture, load_picture

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_picture(path)
    except NoPicture as error:
        return Trouble(BROKEN, str(error))
    except NOT_DECODED as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        kind = TRUNCATED if "truncated" in reason or "cut off" in reason else BROKEN
        return Trouble(kind, reason)
    return None


def video_trouble(path: Path) -> Trouble | None:
    """Compares the lengths that a video's container states with the file's."""
    from dora_vl.vision.video_containers import NotWhole, NoVideoFormat, check_whole_video

    try:
        check_whole_video(path)
    except NotWhole as error:
        return Trouble(TRUNCATED, str(error))
    except NoVideoFormat as error:
        return Trouble(BROKEN, str(error))
    return None
