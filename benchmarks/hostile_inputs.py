"""What `fuzz_media` reads besides damaged files: 200 and more inputs that somebody thought out."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fuzz_case import Outcome, memory_mb
from benchmarks.hostile_pictures import OTHER_FORMATS, lying_and_bursting, saved
from benchmarks.hostile_videos import OTHER_VIDEOS, asf_mxf_and_mpeg, large_frames, lying_and_endless
from benchmarks.media_case import judged, read, with_read

HOSTILE = "hostile"
NAMES = (
    "../outside", "../../etc/passwd", "/etc/passwd", "a/../../b", "./../x", "~/x", "~root/x", "", ".", "..", "a\0b",
    "a" * 5_000, "a/" * 3_000, "a\nerror: forged", "\x1b[2J\x1b[31mred", "\u202egnp", "\ud83d", "|id", "$(id)", "`id`",
    "; id", "-rf", "--help", "http://127.0.0.1:9/a", "https://example.invalid/a", "file:///etc/passwd", "ftp://a/b",
    "concat:a|b", "pipe:0", "data:image/png;base64,AAAA", "tcp://127.0.0.1:9", "s3://a/b", "%s%s%n", "{0.__class__}",
    "CON", "a:b", "a\\..\\b", "\u2028", "a\rb",
)  # fmt: skip
"""Of files that are not there, or not to be had."""
SPECIAL: dict[str, Callable[[Path], object]] = {
    "a named pipe": os.mkfifo,
    "a socket": lambda path: _listen(path),
    "a folder": lambda path: path.mkdir(),
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to a folder above": lambda path: path.symlink_to(".."),
    "a link that leads nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to a pipe": lambda path: (os.mkfifo(path.with_name("p")), path.symlink_to("p")),
    "a hole of 1 TB": lambda path: _hole(path, b""),
    "a hole of 1 TB that begins as a PNG": lambda path: _hole(path, b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR"),
    "a hole of 1 TB that begins as a WebP": lambda path: _hole(path, b"RIFF\xff\xff\xff\xffWEBPVP8 "),
    "a hole of 1 TB that begins as an MP4": lambda path: _hole(path, b"\0\0\0\x10ftypisom"),
    "a hole of 1 TB that begins as Matroska": lambda path: _hole(path, bytes.fromhex("1a45dfa3")),
    "a hole of 1 TB that begins as a GIF": lambda path: _hole(path, b"GIF89a"),
    **{
        f"a link to {target}": lambda path, target=target: path.symlink_to(target)
        for target in (
            "/dev/zero",
            "/dev/urandom",
            "/dev/full",
            "/dev/tty",
            "/dev/stdin",
            "/etc/passwd",
            "/proc/self/mem",
        )
    },
}


@dataclass(frozen=True)
class Hostile:
    """One input: `put` makes it in a folder and gives the name to read."""

    said: str
    video: bool
    put: Callable[[Path], str]
    must_fail: bool = True


def hostile_inputs(scratch: Path) -> Iterator[Hostile]:
    """All of them."""
    for contents, video in ((OTHER_FORMATS, False), (OTHER_VIDEOS, True)):
        for said, content in contents.items():
            yield Hostile(said, video, _written(content))
    for said, content in lying_and_bursting():
        yield Hostile(said, video=False, put=_written(content), must_fail=False)
    for said, content in (*lying_and_endless(), *asf_mxf_and_mpeg(), *large_frames(scratch)):
        yield Hostile(said, video=True, put=_written(content), must_fail=False)
    for video in (False, True):
        for said, make in SPECIAL.items():
            yield Hostile(f"{said}, as a {'video' if video else 'picture'}", video, _made(make))
        for name in NAMES:
            yield Hostile(
                f"the name {name[:40]!r}, of a {'video' if video else 'picture'}", video, lambda _, name=name: name
            )
    for name in ("a\nb.png", "\x1b[31m.png", "-rf", "$(id).png", "\u202e.png", "%n.png", "a|id"):
        yield Hostile(f"a picture called {name!r}", video=False, put=_written(saved("PNG"), name), must_fail=False)


def run_hostile(case: Hostile, scratch: Path, number: int) -> Outcome:
    """Reads one, and judges it as a damaged file."""
    folder = scratch / f"hostile_{number}"
    folder.mkdir()
    name = case.put(folder)
    before = memory_mb(begin=True)
    found = read(folder, name, video=case.video)
    memory = max(0.0, memory_mb() - before)
    failure, detail = judged(found, memory, video=case.video)
    if not failure and case.must_fail and found.pixels:
        failure = "what is no picture or video of a listed format is accepted"
    target = "videos" if case.video else "pictures"
    told = {"number": -number, "kind": HOSTILE, "target": target, "damage": case.said}
    return with_read(Outcome(**told, status=0, failure=failure, detail=detail, memory_mb=memory, longest_line=0), found)


def _written(content: bytes, name: str = "hostile") -> Callable[[Path], str]:
    def put(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return name

    return put


def _made(make: Callable[[Path], object]) -> Callable[[Path], str]:
    def put(folder: Path) -> str:
        make(folder / "hostile")
        return "hostile"

    return put


def _listen(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path may have a hundred characters
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(path.name)
    finally:
        os.chdir(here)


def _hole(path: Path, beginning: bytes) -> None:
    path.write_bytes(beginning)
    os.truncate(path, 2**40)
