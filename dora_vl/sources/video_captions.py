"""What TVC and YC2C share: VALUE's JSON lines of a clip and its descriptions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from dora_vl.data.examples import Answer, Clip, Example
from dora_vl.errors import BadSample
from dora_vl.sources.fields import given, integer, kept, optional, rows, text
from dora_vl.sources.published import Progress, Raw, Split, json_rows
from dora_vl.sources.subtitles import Subtitles, kept_span, span, subtitles_of, video_name


def caption_split(task: str, name: str, file: Path, subtitles: Subtitles, size: int | None) -> Split:
    """A file of clips as one split; the descriptions of test sets are kept back."""
    return Split(
        task=task,
        name=name,
        inputs=(file, *subtitles.inputs),
        rows=partial(_rows, file, subtitles),
        convert=partial(convert_clip, answered=not name.startswith("test")),
        published_rows=size,
        notes={"subtitles": subtitles.path.name if subtitles.path else "none found"},
    )


def _rows(file: Path, subtitles: Subtitles, progress: Progress) -> Iterator[Raw]:
    return subtitles.joined(json_rows(file, progress), progress)


def convert_clip(raw: Raw, *, answered: bool) -> Example:
    """One clip with all of its descriptions.

    Args:
        answered: it must have one.
    """
    clip_id = integer(raw, "clip_id")
    sample_id = str(clip_id)
    found = optional(raw, "descs", rows, sample_id) or ()
    descriptions = [told for entry in found if (told := text(entry, "desc", sample_id)).strip()]
    if answered and not any(descriptions):
        raise BadSample(sample_id, "it has no description")
    name = video_name(raw, sample_id)
    start, end = span(given(raw, "ts"), sample_id)
    return Example(
        id=sample_id,
        video=Clip(path=f"{name}.mp4", start_seconds=start, end_seconds=end),
        answers=tuple(Answer(text=description) for description in descriptions if description),
        subtitles=subtitles_of(raw, sample_id),
        extra={
            "clip_id": clip_id,
            "vid_name": name,
            **kept_span(raw, sample_id),
            **kept(raw, "duration", sample_id=sample_id),
            **_kinds(found, sample_id),
        },
    )


def _kinds(found: Iterable[Raw], sample_id: str) -> Mapping[str, object]:
    """Whether each description was written from video, text or both, where the set says it."""
    kinds = [kind for entry in found if (kind := optional(entry, "type", text, sample_id))]
    return {"description_types": kinds} if kinds else {}
