"""What TVQA and How2QA share: VALUE's JSON lines of a question about a span of a video, with its choices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from dora_vl.data.examples import Answer, Clip, Example
from dora_vl.sources.fields import filled, given, identifier, index_of, integer, kept, key
from dora_vl.sources.published import Progress, Raw, json_rows
from dora_vl.sources.subtitles import Subtitles, kept_span, span, subtitles_of, video_name


def question_rows(
    file: Path, subtitles: Subtitles, solution: Mapping[str, int] | None, progress: Progress
) -> Iterator[Raw]:
    """The rows with their subtitles, and the right choice from `solution` where the row keeps it back."""
    rows = json_rows(file, progress)
    if solution is not None:
        rows = (_solved(row, solution) for row in rows)
    return subtitles.joined(rows, progress)


def _solved(row: Raw, solution: Mapping[str, int]) -> Raw:
    known = given(row, "answer_idx")
    return {**row, "answer_idx": solution.get(key(row, "qid") or "")} if known is None else row


def convert_question(raw: Raw, *, choices: int, answered: bool) -> Example:
    """One question.

    Args:
        choices: how many it has.
        answered: its right choice must be there.
    """
    sample_id = identifier(raw, "qid")
    texts = tuple(filled(raw, f"a{number}", sample_id) for number in range(choices))
    correct: int | None = None
    if answered or given(raw, "answer_idx") is not None:
        correct = index_of(integer(raw, "answer_idx", sample_id), texts, "answer_idx", sample_id)
    name = video_name(raw, sample_id)
    start, end = span(given(raw, "ts"), sample_id)
    return Example(
        id=sample_id,
        video=Clip(path=f"{name}.mp4", start_seconds=start, end_seconds=end),
        question=filled(raw, "q", sample_id),
        answers=() if correct is None else (Answer(text=texts[correct]),),
        choices=texts,
        subtitles=subtitles_of(raw, sample_id),
        extra={"vid_name": name, **kept_span(raw, sample_id), **kept(raw, "show_name", sample_id=sample_id)}
        | ({} if correct is None else {"correct": correct}),
    )
