"""The moments looked at, against counts written out and against ffmpeg's own fps filter."""

from __future__ import annotations

from bisect import bisect_right
from fractions import Fraction

import pytest

from dora_vl.data.video import AtSeconds, EverySeconds, FrameSampling, OutsideClip, Uniform, clip_span, moments
from dora_vl.errors import UserError


@pytest.mark.parametrize(
    ("sampling", "span", "expected"),
    [
        (Uniform(4), (2.0, 10.0), [3.0, 5.0, 7.0, 9.0]),
        (Uniform(1), (0.0, 7.0), [3.5]),
        (EverySeconds(1.5), (0.0, 6.0), [0.75, 2.25, 3.75, 5.25]),
        (EverySeconds(1.5), (1.0, 6.3), [1.75, 3.25, 4.75, 6.25]),
        (EverySeconds(1.5), (0.0, 1.0), [0.25, 0.75]),
        (EverySeconds(1.5, most=3), (0.0, 60.0), [10.0, 30.0, 50.0]),
        (AtSeconds((3.0, 1.0)), (0.0, 4.0), [1.0, 3.0]),
    ],
)
def test_the_moments_that_are_looked_at(
    sampling: FrameSampling, span: tuple[float, float], expected: list[float]
) -> None:
    assert moments(sampling, start=span[0], end=span[1]) == pytest.approx(expected)


def test_a_named_moment_outside_the_clip_is_refused() -> None:
    with pytest.raises(OutsideClip):
        moments(AtSeconds((1.0, 5.0)), start=0.0, end=4.0)


@pytest.mark.parametrize(
    "wrong",
    [lambda: Uniform(0), lambda: EverySeconds(0.0), lambda: EverySeconds(1.0, least=3, most=2), lambda: AtSeconds(())],
)
def test_settings_that_take_no_frame_are_refused(wrong) -> None:
    with pytest.raises(UserError):
        wrong()


def test_a_clip_is_cut_at_the_video_s_end_and_must_be_in_it() -> None:
    assert clip_span(2.0, 99.0, duration=8.0) == (2.0, 8.0)
    assert clip_span(None, None, duration=0.0) == (0.0, 0.0)  # a single frame of unknown length
    for start, end in ((9.0, None), (3.0, 3.0), (5.0, 4.0)):
        with pytest.raises(OutsideClip):
            clip_span(start, end, duration=8.0)


@pytest.mark.parametrize(("frames", "rate"), [(200, 25), (90, 30), (61, 10), (47, 24)])
def test_equal_to_the_fps_filter_of_ffmpeg(frames: int, rate: int) -> None:
    av = pytest.importorskip("av", reason="pip install '.[video]'")
    graph = av.filter.Graph()
    source = graph.add_buffer(width=16, height=16, format=av.VideoFormat("gray"), time_base=Fraction(1, rate))
    kept = graph.add("fps", "fps=1/1.5")
    sink = graph.add("buffersink")
    source.link_to(kept)
    kept.link_to(sink)
    graph.configure()
    ours = [begin / rate for begin in range(frames)]
    sampling = EverySeconds(1.5, least=1)
    shown = [bisect_right(ours, moment) - 1 for moment in moments(sampling, start=0.0, end=frames / rate)]
    taken = []
    for number in range(frames):
        frame = av.VideoFrame(16, 16, "gray")
        # The number is written into the picture: the filter gives a frame a new time and keeps its content.
        frame.planes[0].update(bytes([number]) * frame.planes[0].buffer_size)
        frame.pts, frame.time_base = number, Fraction(1, rate)
        graph.push(frame)
    graph.push(None)
    while True:
        try:
            taken.append(int(graph.pull().to_ndarray()[0, 0]))
        except (av.error.BlockingIOError, av.error.EOFError):
            break
    middle = min(len(shown), len(taken))
    assert middle >= 1
    assert abs(len(shown) - len(taken)) <= 1
    assert max(abs(first - other) for first, other in zip(shown[:middle], taken[:middle], strict=True)) <= 1
