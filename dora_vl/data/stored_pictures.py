"""Pictures that a data file itself holds, by name: of its memory-mapped Arrow table, or of a row that was streamed."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from PIL import Image

from dora_vl.data.media import decode_image, open_image

if TYPE_CHECKING:
    import datasets


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
        tables: whole tables of `records.load_llava`; each picture stands in the first row that has it.
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


def open_picture(root: Path, name: str, stored: HeldPictures | None = None) -> Image.Image:
    """A picture of the data file itself, or the file at `name` under `root`; see `media.open_image`.

    Raises:
        BadSample: as `open_image`.
    """
    if stored is not None and name in stored:
        return decode_image(io.BytesIO(stored.read(name)), name, "the data file")
    return open_image(root, name)
