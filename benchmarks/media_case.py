"""One case of `fuzz_media`: a damaged or hostile file, read as training does, and what must not come of it."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random

from benchmarks.file_mutations import BYTE_CHANGES
from benchmarks.fuzz_case import LONGEST_LINE, Outcome, memory_mb
from benchmarks.media_files import PICTURES, STREAMS, MediaFile, whole_files
from dora_vl.data.example import Clip
from dora_vl.data.pictures import open_image
from dora_vl.data.video import Uniform, VideoReader
from dora_vl.errors import BadSample

PICTURE_SECONDS, VIDEO_SECONDS = 10.0, 20.0
"""Above which a picture (of the processor's time) or a video counts as hung; a video's reader keeps the time itself."""
SPARE_SECONDS = 15.0
"""For ending the decoder's process and starting another."""
MOST_MEMORY_MB = 1_500.0
FRAMES = Uniform(4)
WORKER = "dora_vl.data.video"
CUT = "cut"
CHANGES = tuple(
    name for name in BYTE_CHANGES if name not in {"UTF-16", "UTF-32", "Latin-1", "lines mixed", "nested deeply"}
)
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn")


class Started:
    """Programs that this process starts, beside the decoder's."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[object, ...]) -> None:
        if event in STARTS and WORKER not in str(arguments):
            self.seen.append(f"{event} {str(arguments)[:80]}")


@dataclass(frozen=True)
class Read:
    """What came of a file: a hash of its pixels, or why there are none; `error` is an exception that passed."""

    pixels: str = ""
    refused: str = ""
    error: str = ""
    seconds: float = 0.0
    started: tuple[str, ...] = ()


@cache
def started() -> Started:
    """This process's."""
    return Started()


@cache
def reader() -> VideoReader:
    """This process's."""
    return VideoReader(limit_seconds=VIDEO_SECONDS)


def read(root: Path, name: str, *, video: bool) -> Read:
    """Reads a picture, or four frames of a video."""
    programs = started()
    clock = time.perf_counter if video else time.process_time  # beside other programs a second may be several
    before, begin = len(programs.seen), clock()
    pixels = refused = error = ""
    try:
        pixels = _pixels(root, name, video=video)
    except BadSample as problem:
        refused = str(problem)
    except Exception as problem:  # noqa: BLE001 whatever passes through is what is looked for
        place = traceback.extract_tb(problem.__traceback__)[-1]
        error = f"{type(problem).__name__} in {Path(place.filename).name}:{place.lineno}"
    new = (*programs.seen[before:], *(_children_of_the_decoder() if video else ()))
    return Read(pixels, refused, error, clock() - begin, new)


def _pixels(root: Path, name: str, *, video: bool) -> str:
    if not video:
        picture = open_image(root, name)
        return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()
    frames = reader().read(root, Clip(path=name), FRAMES)
    return hashlib.sha256(b"".join(frame.tobytes() for frame in frames.pictures)).hexdigest()


def _children_of_the_decoder() -> list[str]:
    """Programs below the decoder's process."""
    process = reader()._process
    if process is None:
        return []
    try:
        found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii").split()
    except OSError:
        return []
    return [f"the decoder started process {number}" for number in found]


@cache
def _files() -> tuple[MediaFile, ...]:
    return tuple(whole_files())


@cache
def _whole_pixels(number: int, scratch: Path) -> str:
    """Of the undamaged file, read once in each process."""
    file = _files()[number]
    folder = scratch / f"whole_{os.getpid()}"
    folder.mkdir(exist_ok=True)
    (folder / file.name).write_bytes(file.content)
    found = read(folder, file.name, video=file.kind != PICTURES)
    if not found.pixels:
        raise RuntimeError(f"{file.name} cannot be read whole: {found.refused or found.error}")
    return found.pixels


def damaged(file: MediaFile, draw: Random) -> tuple[bytes, list[str]]:
    """The file after one to three changes, and their names; a third of all are cut and nothing else."""
    content = file.content
    if draw.random() < 1 / 3:
        return content[: draw.randrange(len(content))], [CUT]
    said = []
    for _ in range(draw.choice((1, 1, 2, 3))):
        name = draw.choice((*CHANGES, "number", "number", "beginning flipped"))
        said.append(name)
        if name == "number":  # lengths and sizes are such
            place, width = draw.randrange(max(1, min(len(content), 400))), draw.choice((1, 2, 4, 8))
            value = draw.choice((b"\xff" * 8, b"\x7f" + b"\xff" * 7, bytes(8), b"\x80" + bytes(7), b"\0\0\0\x01" * 2))
            content = content[:place] + value[:width] + content[place + width :]
        elif name == "beginning flipped":
            content = BYTE_CHANGES["bytes flipped"](content[:64], draw) + content[64:]
        else:
            content = BYTE_CHANGES[name](content, draw)
    return content, said


def run_case(scratch: Path, seed: int, number: int, keep: Path | None = None) -> Outcome:
    """Damages one file as its number says, and reads it."""
    draw = Random(f"{seed}/{number}")
    which = draw.randrange(len(_files()))
    file = _files()[which]
    whole = _whole_pixels(which, scratch)
    content, said = damaged(file, draw)
    folder = keep or scratch / f"case_{number}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file.name).write_bytes(content)
        before = memory_mb(begin=True)
        found = read(folder, file.name, video=file.kind != PICTURES)
        memory = max(0.0, memory_mb() - before)
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    failure, detail = judged(found, memory, video=file.kind != PICTURES)
    if not failure and said == [CUT] and len(content) < len(file.content) and file.kind != STREAMS:
        failure = "a truncated file is accepted" if found.pixels and found.pixels != whole else ""
    case = Outcome(
        number=number,
        kind=file.kind,
        target=file.name,
        damage="; ".join(said),
        status=0,
        failure=failure,
        detail=detail,
        memory_mb=memory,
        longest_line=0,
    )
    return with_read(case, found)


def with_read(case: Outcome, found: Read) -> Outcome:
    """As the publishers' files have it: status 0 for what is read, 2 for what is refused."""
    status = None if found.error else 2 if found.refused else 0
    detail = case.detail or found.refused[-200:]
    return replace(case, status=status, detail=detail, longest_line=len(found.refused))


def judged(found: Read, memory: float, *, video: bool) -> tuple[str, str]:
    """What must not have happened, and what is special to this case."""
    limit = VIDEO_SECONDS + SPARE_SECONDS if video else PICTURE_SECONDS
    checks: Sequence[tuple[bool, str, str]] = (
        (bool(found.error), f"exception: {found.error}", ""),
        (bool(found.started), "another program is started", "; ".join(found.started)),
        (found.seconds > limit, f"it takes more than {limit:.0f} s", f"{found.seconds:.1f} s"),
        (memory > MOST_MEMORY_MB, f"more than {MOST_MEMORY_MB:.0f} MB of memory", f"{memory:.0f} MB"),
        (len(found.refused) > LONGEST_LINE, f"a line of more than {LONGEST_LINE} characters", found.refused[:100]),
        (not found.refused.isprintable(), "a message that is no printable line", repr(found.refused[:100])),
    )
    return next(((failure, detail) for wrong, failure, detail in checks if wrong), ("", ""))
