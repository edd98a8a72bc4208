"""Damaged and hostile pictures and videos are read or refused, in one line, in time and memory, and start no program.

FUZZ_CASES=20000 OMP_NUM_THREADS=1 python -m pytest -m slow tests/fuzz/test_media.py
"""

from __future__ import annotations

import hashlib
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

pytest.importorskip("av", reason="pip install '.[video]'")

from dora_vl.data.example import Clip
from dora_vl.data.pictures import open_image
from dora_vl.data.video import Uniform, VideoReader
from dora_vl.errors import BadSample
from tests.fuzz.damage import BYTE_CHANGES, LONGEST_LINE, failures, flip, memory_mb
from tests.fuzz.hostile import hostile_inputs
from tests.fuzz.media import CLIPS, pictures, videos

PICTURE_SECONDS, VIDEO_SECONDS, SPARE_SECONDS = 10.0, 20.0, 15.0
"""Above which a picture (of the processor's time) or a video (and ending its decoder) counts as hung."""
MOST_MEMORY_MB = 1_500.0
CHANGES = sorted(BYTE_CHANGES.keys() - {"utf-16", "latin-1", "lines mixed", "nested deeply"})
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn")


@dataclass(frozen=True)
class Result:
    """A hash of the pixels, empty where a file is refused; and what must not have happened."""

    pixels: str = ""
    failure: str = ""


class Media:
    """Reads files as training does, and watches what this process and the decoder's start."""

    def __init__(self) -> None:
        self.reader = VideoReader(limit_seconds=VIDEO_SECONDS)
        self.started: list[str] = []
        sys.addaudithook(self._watch)

    def _watch(self, event: str, arguments: tuple[object, ...]) -> None:
        if event in STARTS and "dora_vl.limited_process" not in str(arguments):
            self.started.append(f"{event} {str(arguments)[:80]}")

    def read(self, folder: Path, name: str, *, video: bool) -> Result:
        """A picture, or four frames of a video."""
        clock = time.perf_counter if video else time.process_time  # beside other programs a second may be several
        self.started.clear()
        memory, begin, pixels, refused, error = memory_mb(begin=True), clock(), "", "", ""
        try:
            images = (
                self.reader.read(folder, Clip(path=name), Uniform(4)).pictures if video else (open_image(folder, name),)
            )
            content = b"".join(repr(image.size).encode() + image.tobytes() for image in images)
            pixels = hashlib.sha256(content).hexdigest()
        except BadSample as problem:
            refused = str(problem)
        except Exception as problem:  # noqa: BLE001 - whatever passes through is what is looked for
            error = "".join(traceback.format_exception(problem)[-3:])
        seconds, memory = clock() - begin, memory_mb() - memory
        failed = {
            f"exception: {error}": error,
            f"another program is started: {self.started}": self.started or (video and self._children()),
            f"{seconds:.1f} s": seconds > (VIDEO_SECONDS + SPARE_SECONDS if video else PICTURE_SECONDS),
            f"{memory:.0f} MB of memory": memory > MOST_MEMORY_MB,
            f"no printable line: {refused[:100]!r}": len(refused) > LONGEST_LINE or not refused.isprintable(),
        }
        return Result(pixels, next((failure for failure, happened in failed.items() if happened), ""))

    def _children(self) -> str:
        process = self.reader._process._process
        path = Path(f"/proc/{process.pid}/task/{process.pid}/children") if process is not None else None
        return path.read_text() if path is not None and path.is_file() else ""


@pytest.fixture(scope="module")
def media() -> Iterator[Media]:
    reading = Media()
    yield reading
    reading.reader.close()


@pytest.mark.parametrize("count", [100, pytest.param(3_000, marks=[pytest.mark.slow, pytest.mark.timeout(3_600)])])
def test_no_damage_passes_through(media: Media, count: int, tmp_path: Path) -> None:
    """A third are cut and nothing else: pictures must be refused then, or give the pixels of the whole file."""
    files = {**pictures(), **videos()}

    def read(name: str, content: bytes) -> Result:
        (tmp_path / name).write_bytes(content)
        return media.read(tmp_path, name, video=name in CLIPS)

    whole = {name: read(name, content).pixels for name, content in files.items()}
    assert all(whole.values()), whole

    def run(number: int) -> str:
        draw = Random(number)
        name = draw.choice(sorted(files))
        content, changes = damaged(files[name], draw)
        result = read(name, content)
        failure = result.failure
        if not failure and changes == ["cut"] and name not in CLIPS and result.pixels not in ("", whole[name]):
            failure = "a truncated file is accepted"
        return failure and f"{name}, {'; '.join(changes)}: {failure}"

    assert failures(run, count) == []


def damaged(content: bytes, draw: Random) -> tuple[bytes, list[str]]:
    """The file after one to three changes, and their names."""
    if draw.random() < 1 / 3:
        return content[: draw.randrange(len(content))], ["cut"]
    changes = []
    for _ in range(draw.choice((1, 1, 2, 3))):
        name = draw.choice((*CHANGES, "number", "number", "beginning"))
        changes.append(f"{name} changed")
        if name == "number":  # lengths and sizes are such
            offset, width = draw.randrange(max(1, min(len(content), 400))), draw.choice((1, 2, 4, 8))
            value = draw.choice((b"\xff" * 8, b"\x7f" + b"\xff" * 7, bytes(8), b"\x80" + bytes(7), b"\0\0\0\x01" * 2))
            content = content[:offset] + value[:width] + content[offset + width :]
        elif name == "beginning":
            content = flip(content[:64], draw) + content[64:]
        else:
            content = BYTE_CHANGES[name](content, draw)
    return content, changes


@pytest.mark.parametrize("step", [6, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(1_800)])])
def test_hostile_inputs_do_no_harm(media: Media, step: int, tmp_path: Path) -> None:
    cases = list(hostile_inputs(tmp_path))
    assert len(cases) == len({case.title for case in cases}) > 200
    findings = []
    for number, case in enumerate([case for case in cases if step == 1 or case.must_fail][::step]):
        folder = tmp_path / f"hostile_{number}"
        folder.mkdir()
        case.put(folder / case.name)
        result = media.read(folder, case.name, video=case.video)
        if result.failure or (case.must_fail and result.pixels):
            findings.append(f"{case.title}: {result.failure or 'what is of no listed format is accepted'}")
    assert findings == []
