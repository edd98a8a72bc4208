"""Damaged and hostile pictures and videos are read or refused, in one line, in time and memory, and start no program.

FUZZ_CASES=20000 OMP_NUM_THREADS=1 python -m pytest -m slow tests/fuzz/test_media.py
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

pytest.importorskip("av", reason="pip install 'dora-vl[video]'")

from dora_vl.data.example import Clip
from dora_vl.data.pictures import open_image
from dora_vl.data.video import Uniform, VideoReader
from dora_vl.errors import BadSample
from tests.fuzz.damage import BYTE_CHANGES, LONGEST_LINE, failures, flip, memory_mb
from tests.fuzz.hostile import Hostile, hostile_inputs
from tests.fuzz.media import CLIPS, STREAMS, pictures, videos

PICTURE_SECONDS, VIDEO_SECONDS, SPARE_SECONDS = 10.0, 20.0, 15.0
"""Above which a picture (of the processor's time) or a video (and ending its decoder) counts as hung."""
MOST_MEMORY_MB = 1_500.0
CHANGES = sorted(BYTE_CHANGES.keys() - {"utf-16", "latin-1", "lines mixed", "nested deeply"})
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn")


@dataclass(frozen=True)
class Read:
    """A hash of the pixels, or why there are none, and what must not have happened."""

    pixels: str = ""
    refused: str = ""
    failure: str = ""


class Media:
    """Reads files as training does, and watches what this process and the decoder's start."""

    def __init__(self) -> None:
        self.reader = VideoReader(limit_seconds=VIDEO_SECONDS)
        self.started: list[str] = []
        sys.addaudithook(self._watch)

    def _watch(self, event: str, arguments: tuple[object, ...]) -> None:
        if event in STARTS and "dora_vl.data.video" not in str(arguments):
            self.started.append(f"{event} {str(arguments)[:80]}")

    def read(self, folder: Path, name: str, *, video: bool) -> Read:
        """A picture, or four frames of a video."""
        clock = time.perf_counter if video else time.process_time  # beside other programs a second may be several
        self.started.clear()
        memory, begin, pixels, refused, error = memory_mb(begin=True), clock(), "", "", ""
        try:
            if video:
                frames = self.reader.read(folder, Clip(path=name), Uniform(4))
                content = b"".join(frame.tobytes() for frame in frames.pictures)
            else:
                picture = open_image(folder, name)
                content = repr(picture.size).encode() + picture.tobytes()
            pixels = hashlib.sha256(content).hexdigest()
        except BadSample as problem:
            refused = str(problem)
        except Exception as problem:  # noqa: BLE001 - whatever passes through is what is looked for
            error = "".join(traceback.format_exception(problem)[-3:])
        seconds, limit = clock() - begin, VIDEO_SECONDS + SPARE_SECONDS if video else PICTURE_SECONDS
        memory = memory_mb() - memory
        checks = (
            (bool(error), f"exception: {error}"),
            (bool(self.started) or (video and bool(self._children())), f"another program is started: {self.started}"),
            (seconds > limit, f"{seconds:.1f} s"),
            (memory > MOST_MEMORY_MB, f"{memory:.0f} MB of memory"),
            (len(refused) > LONGEST_LINE or not refused.isprintable(), f"no printable line: {refused[:100]!r}"),
        )
        return Read(pixels, refused, next((failure for wrong, failure in checks if wrong), ""))

    def _children(self) -> str:
        process = self.reader._process
        path = Path(f"/proc/{process.pid}/task/{process.pid}/children") if process is not None else None
        return path.read_text() if path is not None and path.is_file() else ""


@pytest.fixture(scope="module")
def media() -> Iterator[Media]:
    reading = Media()
    yield reading
    reading.reader.close()


@pytest.mark.parametrize("count", [100, pytest.param(3_000, marks=[pytest.mark.slow, pytest.mark.timeout(3_600)])])
def test_no_damage_passes_through(media: Media, count: int, tmp_path: Path) -> None:
    """A third of the files are cut and nothing else: those must be refused, or give the pixels of the whole file."""
    files = {**pictures(), **videos()}
    whole: dict[str, str] = {}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        found = media.read(tmp_path, name, video=name in CLIPS)
        assert found.pixels, (name, found)
        whole[name] = found.pixels

    def run(number: int) -> str:
        draw = Random(number)
        name = draw.choice(sorted(files))
        content, described = damaged(files[name], draw)
        folder = tmp_path / f"case_{number}"
        folder.mkdir()
        (folder / name).write_bytes(content)
        found = media.read(folder, name, video=name in CLIPS)
        failure = found.failure
        if not failure and described == ["cut"] and name not in STREAMS and found.pixels not in ("", whole[name]):
            failure = "a truncated file is accepted"
        if not failure:
            shutil.rmtree(folder)
        return failure and f"{name}, {'; '.join(described)}: {failure}"

    assert failures(run, count) == []


def damaged(content: bytes, draw: Random) -> tuple[bytes, list[str]]:
    """The file after one to three changes, and their names."""
    if draw.random() < 1 / 3:
        return content[: draw.randrange(len(content))], ["cut"]
    described = []
    for _ in range(draw.choice((1, 1, 2, 3))):
        name = draw.choice((*CHANGES, "number", "number", "beginning"))
        described.append(f"{name} changed")
        if name == "number":  # lengths and sizes are such
            place, width = draw.randrange(max(1, min(len(content), 400))), draw.choice((1, 2, 4, 8))
            value = draw.choice((b"\xff" * 8, b"\x7f" + b"\xff" * 7, bytes(8), b"\x80" + bytes(7), b"\0\0\0\x01" * 2))
            content = content[:place] + value[:width] + content[place + width :]
        elif name == "beginning":
            content = flip(content[:64], draw) + content[64:]
        else:
            content = BYTE_CHANGES[name](content, draw)
    return content, described


def hostile(media: Media, case: Hostile, folder: Path) -> str:
    """What must not have happened, or ""."""
    folder.mkdir()
    found = media.read(folder, case.put(folder), video=case.video)
    accepted = "what is no picture or video of a listed format is accepted" if case.must_fail and found.pixels else ""
    return f"{case.name}: {found.failure or accepted}" if found.failure or accepted else ""


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(1_800)])])
def test_hostile_inputs_do_no_harm(media: Media, every: int, tmp_path: Path) -> None:
    cases = list(hostile_inputs(tmp_path))
    assert len(cases) == len({case.name for case in cases}) > 200
    chosen = [case for case in cases if every == 1 or case.must_fail][::every]  # those of small cost
    found = [hostile(media, case, tmp_path / f"hostile_{number}") for number, case in enumerate(chosen)]
    assert list(filter(None, found)) == []


def test_a_truncated_file_that_is_accepted_is_seen(
    media: Media, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search itself can fail: without its check a cut GIF is read, with other pixels."""
    monkeypatch.setattr("dora_vl.data.video.check_whole_video", lambda path: "gif")
    whole = videos()["clip.gif"]
    pixels = set()
    for number, end in enumerate((len(whole), len(whole) // 2, len(whole) // 3)):
        (tmp_path / f"{number}.gif").write_bytes(whole[:end])
        pixels.add(media.read(tmp_path, f"{number}.gif", video=True).pixels)
    assert len(pixels - {""}) > 1
