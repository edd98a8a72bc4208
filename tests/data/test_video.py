"""Videos: the same frames from every backend, the right ones, and no file that hangs or ends the run."""

import time
from bisect import bisect_right
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from dora_vl import limited_process
from dora_vl.data.example import Clip
from dora_vl.data.video import EverySeconds, Uniform, VideoReader, clip_span, moments, no_video_reason
from dora_vl.data.video_backends import BACKENDS as LIBRARIES
from dora_vl.data.video_backends import BackendMissing, NoVideo, OpenVideo, Unreadable, import_backend
from dora_vl.errors import BadSample, UserError
from tests.data.video_files import CODECS, OPEN_GOPS, STEADY, read_frames, turned, write_clip, write_video

av = pytest.importorskip("av", reason="pip install '.[video]'")
pytest.importorskip("decord", reason="pip install '.[video]'")
pytestmark = pytest.mark.timeout(240)

BACKENDS = ("decord", "pyav")


def pixels(frames) -> np.ndarray:
    return np.stack([np.asarray(picture, dtype=np.int64) for picture in frames.pictures])


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each library that can be imported here."""
    try:
        import_backend(request.param)
    except BackendMissing as error:
        pytest.skip(str(error))
    return request.param


@pytest.mark.parametrize(
    ("seconds", "sampling", "expected"),
    [
        (STEADY, Uniform(4), (6, 18, 31, 43)),
        (STEADY[:1], Uniform(8), (0,)),
        ([2 + begin for begin in STEADY], Uniform(2), (12, 37)),
    ],
)
def test_the_frames_shown_at_those_moments(tmp_path: Path, backend: str, seconds, sampling, expected) -> None:
    write_video(tmp_path / "a.mp4", seconds)
    frames = read_frames(tmp_path, Clip(path="a.mp4"), sampling, backends=(backend,))
    assert frames.backend == backend
    assert frames.indices == expected
    assert frames.seconds == pytest.approx([seconds[index] - seconds[0] for index in expected], abs=1e-3)
    reds = [int(picture[24:, :, 0].mean()) for picture in pixels(frames)]
    assert reds == pytest.approx([4 * index for index in expected], abs=6)


def opened(backend: str, path: Path) -> closing[OpenVideo]:
    return closing(LIBRARIES[backend](str(path)))


def test_frames_that_begin_unevenly_are_found_by_their_times(tmp_path: Path, backend: str) -> None:
    uneven = [0.0, 0.04, 0.5, 0.52, 1.5, 3.0, 3.04, 5.0]
    with opened(backend, write_video(tmp_path / "a.mp4", uneven)) as video:
        assert video.locate([0.3, 0.51, 0.515, 2.9, 3.1, 5.0]) == [1, 2, 4, 6, 7]
        assert [seconds for seconds, _ in video.frames([1, 4])] == pytest.approx([0.04, 1.5], abs=1e-3)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_open_gops_give_the_frames_that_decoding_from_the_start_gives(tmp_path, backend, suffix) -> None:
    path = write_video(tmp_path / f"a{suffix}", x264=OPEN_GOPS)
    with av.open(str(path)) as container:
        whole = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
    assert len(whole) == len(STEADY)
    groups = [[index] for index in range(len(STEADY))] + [[6, 18, 31, 43], [7, 8, 9, 30], list(range(len(STEADY)))]
    if (backend, suffix) == ("decord", ".ts"):  # it loses the first frames of a stream: refused, not wrong
        with pytest.raises(Unreadable):
            opened(backend, path)
        return
    for indices in groups:
        with opened(backend, path) as video:
            for index, (seconds, frame) in zip(indices, video.frames(indices), strict=True):
                assert seconds == pytest.approx(STEADY[index], abs=1e-3)
                assert np.abs(frame.astype(int) - whole[index]).mean() < 1, f"{index} of {indices}"


def test_no_library_that_cannot_seek_is_asked_first(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", x264=OPEN_GOPS)
    clip = Clip(path="a.mp4", start_seconds=STEADY[5], end_seconds=STEADY[10])
    assert read_frames(tmp_path, clip, Uniform(5)).backend == "pyav"
    chosen = read_frames(tmp_path, clip, Uniform(5), backends=("decord", "pyav"))
    assert (chosen.backend, chosen.indices) == ("decord", (5, 6, 7, 8, 9))


def test_only_the_named_part(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4")
    for backend in BACKENDS:
        clip = Clip(path="a.mp4", start_seconds=0.8, end_seconds=1.2)
        assert read_frames(tmp_path, clip, Uniform(2), backends=(backend,)).indices == (22, 27)
        with pytest.raises(BadSample):
            read_frames(tmp_path, Clip(path="a.mp4", start_seconds=3.0), Uniform(2), backends=(backend,))


UPRIGHT = {
    (0, 1, -1, 0): lambda flat: np.rot90(flat, -1),
    (-1, 0, 0, -1): lambda flat: flat[::-1, ::-1],
    (-1, 0, 0, 1): lambda flat: flat[:, ::-1],
    (0, 1, 1, 0): lambda flat: flat.transpose(1, 0, 2),
}
"""a, b, c, d of the header's matrix, which show a pixel at (x, y) where (a x + c y, b x + d y) is -> what is shown."""


@pytest.mark.parametrize("matrix", UPRIGHT)
def test_a_turned_or_mirrored_video_is_shown_upright(tmp_path: Path, matrix: tuple[int, int, int, int]) -> None:
    turned(write_video(tmp_path / "flat.mp4"), tmp_path / "turned.mp4", matrix)
    flat = read_frames(tmp_path, Clip(path="flat.mp4"), Uniform(1), backends=("pyav",))
    upright = pixels(read_frames(tmp_path, Clip(path="turned.mp4"), Uniform(1)))[0]
    expected = UPRIGHT[matrix](pixels(flat)[0])
    assert upright.shape == expected.shape
    assert np.abs(upright - expected).mean() < 1


BROKEN = ("missing", "noise", "no_frame", "damaged", "cut", "cut_index_first")
BROKEN_FILES = (*(f"{name}.mp4" for name in BROKEN), "wide.mkv")


def write_broken(folder: Path) -> None:
    (folder / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(20_000))
    header = write_video(folder / "whole.mp4", STEADY, options={"movflags": "faststart"}).read_bytes()
    frames = header.find(b"mdat")  # how many bytes each frame takes is the encoder's to choose
    (folder / "cut_index_first.mp4").write_bytes(header[: frames + (len(header) - frames) * 3 // 10])
    plain = write_video(folder / "plain.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(plain[: len(plain) * 6 // 10])
    (folder / "no_frame.mp4").write_bytes(plain[: plain.find(b"mdat") - 4])
    (folder / "damaged.mp4").write_bytes(plain.replace(b"stbl", b"stbX"))
    write_clip(folder / "wide.mkv", "ffv1", width=12_000, height=4_000, frames=1)


def test_broken_files_are_named_and_the_next_one_is_read(tmp_path: Path) -> None:
    write_broken(tmp_path)
    with VideoReader(backends=BACKENDS) as reader:
        for name in BROKEN_FILES:
            with pytest.raises(BadSample) as raised:
                reader.read(tmp_path, Clip(path=name), Uniform(2))
            assert (raised.value.sample_id, name in raised.value.reason) == (name, True)
        frames = reader.read(tmp_path, Clip(path="whole.mp4"), Uniform(2))
    assert (frames.backend, frames.indices) == ("decord", (12, 37))


def test_a_missing_backend_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # found before what is installed
    (tmp_path / "av.py").write_text("raise ImportError('not built for this machine')")
    with VideoReader() as reader:
        assert [reader.read(tmp_path, Clip(path="a.mp4"), Uniform(2)).backend for _ in range(2)] == ["decord"] * 2
    (tmp_path / "decord.py").write_text("raise RuntimeError('no FFmpeg')")
    with VideoReader() as reader, pytest.raises(UserError) as raised:
        reader.read(tmp_path, Clip(path="a.mp4"), Uniform(2))
    assert not isinstance(raised.value, BadSample)  # the machine's fault, not the file's: it must end the run


STAND_IN = """
import os, signal, time
class DECORDError(Exception): pass
class VideoReader:
    def __init__(self, path, num_threads):
        if path.endswith("hang.mp4"): time.sleep(1000)
        if path.endswith("crash.mp4"): os.kill(os.getpid(), signal.SIGSEGV)
        raise DECORDError("[10:11:12] /src/reader.cc:7: not this one")
"""


def test_a_decoder_that_hangs_or_crashes_costs_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited_process, "START_SECONDS", 2.0)
    for name in ("good", "hang", "crash"):
        write_video(tmp_path / f"{name}.mp4")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "decord.py").write_text(STAND_IN)
    with VideoReader(backends=BACKENDS, limit_seconds=0.5) as reader:
        assert reader.read(tmp_path, Clip(path="good.mp4"), Uniform(2)).backend == "pyav"
        started = time.monotonic()
        for name in ("hang.mp4", "crash.mp4"):
            with pytest.raises(BadSample) as raised:
                reader.read(tmp_path, Clip(path=name), Uniform(2))
            assert raised.value.sample_id == name
        assert time.monotonic() - started < 30
        assert reader.read(tmp_path, Clip(path="good.mp4"), Uniform(2)).backend == "pyav"


def test_questions_about_one_video_decode_it_once_until_its_file_changes(tmp_path: Path) -> None:
    clip = Clip(path="a.mp4")
    write_video(tmp_path / "a.mp4")
    with VideoReader(backends=BACKENDS) as reader:
        first = reader.read(tmp_path, clip, Uniform(3))
        assert reader.read(tmp_path, clip, Uniform(3)) is first
        assert reader.read(tmp_path, clip, Uniform(2)).indices != first.indices
        assert reader.read(tmp_path, clip, Uniform(3)).indices == first.indices
        write_video(tmp_path / "a.mp4", STEADY[:20])
        assert max(reader.read(tmp_path, clip, Uniform(3)).indices) < 20 < max(first.indices)


def test_the_process_ends_with_its_parent(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4")
    reader = VideoReader(backends=BACKENDS)
    reader.read(tmp_path, Clip(path="a.mp4"), Uniform(1))
    process, connection = reader._process._process, reader._process._connection
    assert process is not None
    assert connection is not None
    connection.close()  # as the system does when the parent dies
    assert process.wait(timeout=60) == 0


CUT = (".mp4", ".mkv", ".webm", ".avi", ".gif")
"""Containers that state how long they are, or end with a mark; streams of MPEG tell no cut"""


@pytest.mark.parametrize("suffix", CODECS)
def test_whole_files_are_read_and_no_cut_one_is(tmp_path: Path, suffix: str) -> None:
    whole = write_clip(tmp_path / f"whole{suffix}", frames=60)
    assert len(read_frames(tmp_path, Clip(path=whole.name), Uniform(4)).pictures) == 4
    assert no_video_reason(whole) is None
    content, cut = whole.read_bytes(), tmp_path / f"cut{suffix}"
    for length in (len(content) // 3, len(content) * 2 // 3) if suffix in CUT else ():
        cut.write_bytes(content[:length])
        assert no_video_reason(cut) is not None
        with pytest.raises(BadSample):
            read_frames(tmp_path, Clip(path=cut.name), Uniform(4))


@pytest.mark.parametrize(
    ("sampling", "span", "expected"),
    [
        (Uniform(4), (2.0, 10.0), [3.0, 5.0, 7.0, 9.0]),
        (Uniform(1), (0.0, 7.0), [3.5]),
        (EverySeconds(1.5), (1.0, 6.3), [1.75, 3.25, 4.75, 6.25]),
        (EverySeconds(1.5), (0.0, 1.0), [0.25, 0.75]),
        (EverySeconds(1.5, max_frames=3), (0.0, 60.0), [10.0, 30.0, 50.0]),
    ],
)
def test_the_moments_that_are_looked_at(sampling, span, expected) -> None:
    assert moments(sampling, start=span[0], end=span[1]) == pytest.approx(expected)


def test_a_clip_is_cut_at_the_video_s_end_and_must_be_in_it() -> None:
    assert clip_span(2.0, 99.0, duration=8.0) == (2.0, 8.0)
    assert clip_span(None, None, duration=0.0) == (0.0, 0.0)  # a single frame of unknown length
    for start, end in ((9.0, None), (3.0, 3.0), (5.0, 4.0)):
        with pytest.raises(NoVideo):
            clip_span(start, end, duration=8.0)


@pytest.mark.parametrize(
    ("frames", "rate", "taken"),
    [(200, 25, [18, 56, 93, 131, 168]), (90, 30, [22, 67]), (61, 10, [7, 22, 37, 52]), (47, 24, [17])],
)
def test_equal_to_the_fps_filter_of_ffmpeg_within_a_frame(frames: int, rate: int, taken: list[int]) -> None:
    """`taken` is what libavfilter's `fps=1/1.5` gave, each frame with its number as its pixels."""
    begins = [number / rate for number in range(frames)]
    shown = moments(EverySeconds(1.5, min_frames=1), start=0.0, end=frames / rate)
    assert [bisect_right(begins, moment) - 1 for moment in shown] == pytest.approx(taken, abs=1)
