"""A cut video is refused with both lengths, wherever it was cut; a whole one of every container is read to its end."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from dora_vl.data import video_containers
from dora_vl.data.example import Clip
from dora_vl.data.video import Uniform, read_frames
from dora_vl.data.video_containers import ASF, KLV_KEY, PACK, NotWhole, NoVideoFormat, check_whole_video, container_of
from dora_vl.errors import BadSample
from tests.vision.video_files import CODECS, OPEN_GOPS, write_clip, write_video

pytest.importorskip("av", reason="pip install 'dora-vl[video]'")
FFMPEG = {".mp4": "mov", ".mkv": "matroska", ".webm": "matroska", ".ts": "mpegts", ".mpg": "mpeg", ".wmv": "asf"}
UNTOLD = {".ts": 188, ".mpg": 2048}
"""Bytes of a packet, after which a stream that says no length may end."""


def cuts(whole: bytes) -> list[int]:
    """Many places over all of the file, and every one of its last 40 bytes but those that are padding."""
    return [*range(1, len(whole), max(1, len(whole) // 60)), *range(len(whole) - 40, len(whole))]


@pytest.mark.parametrize("suffix", CODECS)
def test_whole_files_are_read_and_no_cut_one_is(tmp_path: Path, suffix: str) -> None:
    whole = write_clip(tmp_path / f"whole{suffix}")
    assert check_whole_video(whole) == container_of(whole) == FFMPEG.get(suffix, suffix[1:])
    assert len(read_frames(tmp_path, Clip(path=whole.name), Uniform(4), backends=("pyav",)).pictures) == 4
    content, cut = whole.read_bytes(), tmp_path / f"cut{suffix}"
    for length in cuts(content):
        if length % UNTOLD.get(suffix, length + 1) == 0:
            continue
        cut.write_bytes(content[:length])
        with pytest.raises((NotWhole, NoVideoFormat)):
            check_whole_video(cut)
    cut.write_bytes(content[: len(content) * 3 // 5])
    with pytest.raises(BadSample):
        read_frames(tmp_path, Clip(path=cut.name), Uniform(4))


@pytest.mark.parametrize("x264", ["keyint=20", OPEN_GOPS])
def test_a_transport_stream_that_was_cut_has_a_last_picture_that_is_not_whole(tmp_path: Path, x264: str) -> None:
    """Its container cannot tell: every cut here is between two packets."""
    content = write_video(tmp_path / "whole.ts", noise=True, x264=x264).read_bytes()
    frames = read_frames(tmp_path, Clip(path="whole.ts"), Uniform(4), backends=("pyav",))
    assert (frames.count, frames.indices) == (50, (6, 18, 31, 43))
    cuts, refused = range(len(content) // 188 // 2, len(content) // 188, 20), 0
    for packets in cuts:
        (tmp_path / "cut.ts").write_bytes(content[: packets * 188])
        try:
            read_frames(tmp_path, Clip(path="cut.ts"), Uniform(4), backends=("pyav",))
        except BadSample as error:
            refused += error.sample_id == "cut.ts"
    assert refused >= 0.7 * len(cuts), len(cuts)  # of those between two pictures no one can know


def test_a_stream_without_a_length_is_whole_up_to_the_duration_that_it_states(tmp_path: Path) -> None:
    content = write_clip(tmp_path / "a.webm", frames=200, options={"cluster_time_limit": "1000"}).read_bytes()
    start = content.index(bytes.fromhex("18538067"))
    unknown = content[: start + 4] + b"\x01" + b"\xff" * 7 + content[start + 12 :]
    path = tmp_path / "b.webm"
    path.write_bytes(unknown)
    check_whole_video(path)
    cluster = unknown.index(bytes.fromhex("1f43b675"), len(unknown) // 2)  # where one begins: no element is cut
    path.write_bytes(unknown[:cluster])
    with pytest.raises(NotWhole):
        check_whole_video(path)


def test_an_avi_that_was_never_finished_and_one_whose_index_is_beyond_its_end(tmp_path: Path) -> None:
    content = write_clip(tmp_path / "a.avi").read_bytes()
    path = tmp_path / "b.avi"
    path.write_bytes(content[:4] + bytes(4) + content[8:])
    with pytest.raises(NotWhole):
        check_whole_video(path)
    cut = content[:-100]
    path.write_bytes(cut[:4] + struct.pack("<I", len(cut) - 8) + cut[8:])  # RIFF's length was made to fit
    with pytest.raises(NotWhole):
        check_whole_video(path)


def test_a_file_of_endlessly_many_parts_ends_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_containers, "MOST_PARTS", 1000)
    path = tmp_path / "a"
    for content in (
        struct.pack(">I4s", 8, b"free") * 5000,
        b"GIF89a" + bytes(7) + b"!\xf9" + b"\x01x" * 5000,
        b"FLV\x01\x01" + struct.pack(">I", 9) + bytes(15 * 5000 + 4),
        bytes.fromhex("1a45dfa380" + "18538067" + "01ffffffffffffff") + b"\xec\x80" * 5000,
        (ASF + struct.pack("<Q", 24)) * 5000,
        (KLV_KEY + bytes(13)) * 5000,
        PACK + b"\x21" + bytes(7) + b"\0\0\1\xb9" * 5000,
        b"RIFF" + struct.pack("<I", 40_000) + b"AVI " + (b"JUNK" + bytes(4)) * 5000,
    ):
        path.write_bytes(content)
        with pytest.raises(NotWhole):
            check_whole_video(path)
