"""The moments looked at, against counts written out and those that ffmpeg's own fps filter took."""

from __future__ import annotations

from bisect import bisect_right

import pytest

from dora_vl.data.video import EverySeconds, FrameSampling, Uniform, clip_span, moments
from dora_vl.data.video_backends import NoVideo


@pytest.mark.parametrize(
    ("sampling", "span", "expected"),
    [
        (Uniform(4), (2.0, 10.0), [3.0, 5.0, 7.0, 9.0]),
        (Uniform(1), (0.0, 7.0), [3.5]),
        (EverySeconds(1.5), (1.0, 6.3), [1.75, 3.25, 4.75, 6.25]),
        (EverySeconds(1.5), (0.0, 1.0), [0.25, 0.75]),
        (EverySeconds(1.5, most=3), (0.0, 60.0), [10.0, 30.0, 50.0]),
    ],
)
def test_the_moments_that_are_looked_at(
    sampling: FrameSampling, span: tuple[float, float], expected: list[float]
) -> None:
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
    shown = moments(EverySeconds(1.5, least=1), start=0.0, end=frames / rate)
    assert [bisect_right(begins, moment) - 1 for moment in shown] == pytest.approx(taken, abs=1)
