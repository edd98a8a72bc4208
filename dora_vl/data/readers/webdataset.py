"""WebDataset archives: the files of one sample have one name up to its first dot, and stand one after another."""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath

from dora_vl.data.media_limits import PICTURE_ENDINGS, VIDEO_ENDINGS
from dora_vl.data.readers.columns import ROLES, plain_name
from dora_vl.data.text_file import LONGEST_REASON, json_of, opened, text_of
from dora_vl.errors import UserError, one_line

LARGEST_MEMBER_BYTES = 1 << 30
READING_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, zlib.error, lzma.LZMAError)


def webdataset_rows(path: Path) -> Iterator[dict[str, object]]:
    """Yields a row for each sample: the fields of its `.json`, its pictures as bytes, its `.txt` as a caption.

    Its videos are bytes too, which is told where the row is read, unless the fields name a video's file. Other files of
    a sample are fields by their ending, as bytes; `__key__` is the sample's name.

    Raises:
        UserError: it cannot be read to its end, or a `.json` or `.txt` in it is none.
    """
    with opened(path, "samples") as file:
        try:
            with tarfile.open(fileobj=file, mode="r|*") as archive:
                for key, members in groupby(_members(archive, path), key=lambda member: member[0]):
                    yield _row(key, [member[1:] for member in members], path)
        except READING_ERRORS as error:
            reason = one_line(str(error), LONGEST_REASON) or type(error).__name__
            raise UserError(f"{path}: cannot be read as a tar archive ({reason}); fetch or write it again") from None


def _members(archive: tarfile.TarFile, path: Path) -> Iterator[tuple[str, str, bytes]]:
    for member in archive:
        if not member.isfile():
            continue
        if member.size > LARGEST_MEMBER_BYTES:
            raise UserError(f"{path}: {one_line(member.name, 60)} has {member.size:,} bytes; a sample's file has less")
        content = archive.extractfile(member)
        place = PurePosixPath(member.name)
        name, _, ending = place.name.partition(".")
        yield str(place.parent / name), ending.lower(), b"" if content is None else content.read()


def _row(key: str, files: list[tuple[str, bytes]], path: Path) -> dict[str, object]:
    row: dict[str, object] = {"__key__": key}
    pictures: list[bytes] = []
    videos: list[object] = []
    for ending, content in files:
        where = f"{path}, {one_line(key, 60)}.{one_line(ending, 20)}"
        if ending == "json":
            fields = json_of(text_of(content, where), where)
            row |= fields if isinstance(fields, dict) else {"json": fields}
        elif ending == "txt":
            row["txt"] = text_of(content, where)
        elif ending.rpartition(".")[2] in PICTURE_ENDINGS:
            pictures.append(content)
        elif ending.rpartition(".")[2] in VIDEO_ENDINGS:
            videos.append({"bytes": content})
        else:
            row[ending] = content
    if pictures:  # they stand for what the text calls them by
        row = {name: value for name, value in row.items() if plain_name(name) not in ROLES["images"]} | {
            "images": pictures
        }
    if videos and not any(row.get(name) for name in ROLES["videos"]):
        row["videos"] = videos
    return row
