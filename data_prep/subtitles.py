"""Subtitles of the video sets, in the forms in which they are still to be had, by video name.

- VALUE's JSON lines: {vid_name, sub: [{text, start, end}]} with seconds (`tv_subtitles.jsonl`,
  `how2_subtitles.jsonl`, `yc2_subtitles.jsonl`; also TVR's and TVC's `tvqa_preprocessed_subtitles.jsonl`);
- a folder of `<vid_name>.srt`, as in TVQA's `tvqa_subtitles.tar.gz`. Lines of one cue are joined by spaces; a cue
  whose times cannot be read keeps its text without times.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from data_prep.fields import UNKNOWN_ID, given, identifier, key, number, optional, rows, seconds, text
from data_prep.joins import column_by_id
from data_prep.published import WANTED, Progress, Raw, json_rows
from dora_vl.data.examples import JSON, Subtitle
from dora_vl.data.text_file import NotUtf8, opened, whole_text

NO_SPAN = frozenset({"", "nan", "nan-nan"})

_TIMES = re.compile(r"\s*{0}\s*-->\s*{0}".format(r"([0-9]{1,3}):([0-9]{1,2}):([0-9]{1,2})[,.]([0-9]{1,9})"))


class Subtitles:
    """The subtitles in a folder: all of a JSON lines file at once, or one `.srt` file when it is asked for.

    Args:
        folder: where the annotations are.
        names: files and folders to look for; the first that is there counts.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.path = next((folder / name for name in names if (folder / name).exists()), None)
        self._known: dict[str, JSON] | None = None

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The file that the records depend on; a folder's files are not hashed one by one."""
        return (self.path,) if self.path is not None and self.path.is_file() else ()

    def joined(self, annotations: Iterable[Raw], progress: Progress) -> Iterator[Raw]:
        """Each row with its video's subtitles under `sub`; without subtitles the rows as they are."""
        for row in annotations:
            yield row if self.path is None else {**row, "sub": self._of(key(row, "vid_name"), progress)}

    def _of(self, video: str | None, progress: Progress) -> JSON:
        assert self.path is not None
        if video is None:
            return []
        if self.path.is_dir():
            file = self.path / f"{video}.srt"
            return read_srt(file) if file.is_file() else []
        if self._known is None:
            self._known = column_by_id(self.path, json_rows(self.path, progress), "vid_name", "sub")
        return self._known.get(video, [])


def subtitles_of(raw: Raw, sample_id: str) -> tuple[Subtitle, ...]:
    """The subtitles that `Subtitles.joined` added, in order, those of empty text too: VL-BART's prompt joins them all.

    Entries without a text are left out.
    """
    found = optional(raw, "sub", rows, sample_id) or ()
    return tuple(_subtitle(entry, sample_id) for entry in found if optional(entry, "text", text, sample_id) is not None)


def _subtitle(entry: Raw, sample_id: str) -> Subtitle:
    start, end = (
        None if given(entry, name) is None else number(given(entry, name), name, sample_id) for name in ("start", "end")
    )
    return Subtitle(text(entry, "text", sample_id).strip(), start, end)


def read_srt(path: Path) -> list[dict[str, object]]:
    """The cues of an .srt file, as VALUE's JSON has them.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        content = whole_text(path, WANTED)
    except NotUtf8:
        with opened(path, WANTED) as file:
            content = file.read().decode("latin-1")  # some of TVQA's are
    return list(parse_srt(content))


def parse_srt(content: str) -> Iterator[dict[str, object]]:
    """Yields {text, start, end} of each cue; blocks are parted by empty lines."""
    for block in re.split(r"\r?\n\s*\r?\n", content):
        lines = [line.strip() for line in block.splitlines()]
        times = next(((place, match) for place, line in enumerate(lines) if (match := _TIMES.match(line))), None)
        if times is None:
            spoken = [line for line in lines if line and not line.isdigit()]
            start = end = None
        else:
            spoken = [line for line in lines[times[0] + 1 :] if line]
            start, end = _seconds(times[1].groups()[:4]), _seconds(times[1].groups()[4:])
        if spoken:
            yield {"text": " ".join(spoken), "start": start, "end": end}


def _seconds(parts: Sequence[str]) -> float:
    hours, minutes, seconds, fraction = parts
    return round(int(hours) * 3600 + int(minutes) * 60 + int(seconds) + float(f"0.{fraction}"), 3)


def span(value: JSON, sample_id: str = UNKNOWN_ID) -> tuple[float, float] | tuple[None, None]:
    """Start and end of "20.16-25.12" or of [20.16, 25.12]; None where there is none, or it is "nan-nan".

    Raises:
        BadSample: anything else; without a span the question would be about the whole video.
    """
    if value is None or (isinstance(value, str) and value.strip().lower() in NO_SPAN):
        return None, None
    return seconds(value.split("-") if isinstance(value, str) else value, "ts", sample_id)


def video_name(raw: Raw, sample_id: str) -> str:
    """The video's name, which is text even where it is a number."""
    return identifier(raw, "vid_name", sample_id)


def kept_span(raw: Raw, sample_id: str) -> Mapping[str, object]:
    """`ts` as published, which is part of VL-BART's prompt; `span` has read it."""
    return {} if given(raw, "ts", sample_id) is None else {"ts": given(raw, "ts", sample_id)}
