"""Names, special files and formats that could do harm are one bad sample with one printable line; nothing is opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dora_vl.data.example import Clip
from dora_vl.data.pictures import open_image
from dora_vl.data.video import Uniform, VideoReader
from dora_vl.errors import BadSample
from tests.data.hostile import NAMES, PICTURES, SPECIAL, VIDEOS


@pytest.fixture(scope="module")
def reader() -> Iterator[VideoReader]:
    with VideoReader() as reading:
        yield reading


def refused(reader: VideoReader, folder: Path, name: str) -> None:
    for read in (lambda: open_image(folder, name), lambda: reader.read(folder, Clip(path=name), Uniform(2))):
        with pytest.raises(BadSample) as error:
            read()
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 500


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_a_name_of_nothing_that_may_be_read(reader: VideoReader, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "outside").write_bytes(b"")
    refused(reader, tmp_path / "folder", name)


@pytest.mark.parametrize("put", SPECIAL.values(), ids=SPECIAL)
def test_what_is_no_regular_file_below_the_folder(
    reader: VideoReader, tmp_path: Path, put: Callable[[Path], object]
) -> None:
    put(tmp_path / "hostile")
    refused(reader, tmp_path, "hostile")


@pytest.mark.parametrize("content", [*PICTURES.values(), *VIDEOS.values()], ids=[*PICTURES, *VIDEOS])
def test_a_format_that_starts_programs_or_names_files(reader: VideoReader, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "hostile").write_bytes(content)
    refused(reader, tmp_path, "hostile")
