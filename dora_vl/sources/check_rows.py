"""What is wrong with a data file's rows, found in one pass: ids, answers, placeholders, lengths, media, overlap."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dora_vl.data.examples import FIELDS, JSON, Example, from_record
from dora_vl.data.readers.columns import USUAL, Columns, ColumnsError
from dora_vl.data.readers.containers import find_files
from dora_vl.data.sample_rows import id_of, read_row, turns_of
from dora_vl.data.turns import IMAGE_PLACEHOLDER, as_conversation
from dora_vl.errors import EMPTY_ANSWER, NO_ANSWER, NO_SAMPLE, BadSample, shown_text
from dora_vl.sources.check_media import MediaCheck

SHOWN_IDS = 5
LEFT_OUT = "columns left out"
"""The problem of rows that a run would refuse for a column."""


@dataclass(kw_only=True)
class Finding:
    """One kind of problem of one file: how many samples have it, and the first of their ids."""

    problem: str
    count: int = 0
    ids: list[str] = field(default_factory=list)
    example: str = ""

    def add(self, sample_id: str, detail: str = "") -> None:
        """Counts one more sample."""
        self.count += 1
        if len(self.ids) < SHOWN_IDS:
            self.ids.append(shown_text(sample_id, 60))
        self.example = self.example or detail


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What of a row is checked, whichever form it is in."""

    id: str
    media: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    """Those of the media that are videos."""
    asked: str = ""
    answers: tuple[str, ...] = ()
    text: str = ""
    problem: str = ""
    kind: str = NO_SAMPLE
    """Of the problem, as the table names it."""
    held: Mapping[str, bytes] = field(default_factory=dict)
    """The media that the file itself holds, by name."""
    format: str | None = None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What counts as too long, and in what it is counted.

    Attributes:
        length: of a text, in `unit`.
        answers_needed: an example without any answer is a problem (a test set may keep them back).
    """

    most: int
    unit: str
    length: Callable[[str], int]
    answers_needed: bool


class FileCheck:
    """Checks one file's samples one after another; `findings` grow with them."""

    def __init__(
        self,
        path: Path,
        limits: Limits,
        media: MediaCheck | None,
        videos: MediaCheck | None = None,
        columns: Columns = USUAL,
    ) -> None:
        self.path = path
        self.rows = 0
        self.findings: dict[str, Finding] = {}
        self.samples: dict[int, str] = {}  # hash of what is asked, with its media -> id
        self.uses: list[Mapping[str, str]] = []
        self._columns = columns
        self._limits = limits
        self._media = media
        self._videos = videos or media
        self._ids: set[str] = set()

    def run(self, progress: Callable[[int], object]) -> FileCheck:
        """Reads the whole file."""
        formats: dict[str, str] = {}
        for number, record in enumerate(find_files(self.path).rows(progress), start=1):
            self.rows += 1
            sample = self.read(record, number)
            if sample.format is not None:
                first = formats.setdefault(sample.format, f"row {number}")
                if sample.format != next(iter(formats)) and first == f"row {number}":
                    firsts = "; ".join(f"{name}: {place}" for name, place in formats.items())
                    self._add("mixed formats", sample.id, f"the first of each: {firsts}")
            self.check(sample)
        return self

    def read(self, record: Mapping[str, JSON], number: int) -> Sample:
        """One row, from 1: a talk, an instruction, or a record; what cannot be read is a sample with its problem."""
        own = self._columns.id_of(record)
        sample_id = f"row {number}" if own is None else id_of(record, number, self._columns)
        form = None
        try:
            resolved = self._columns.resolve(record)
            form = None if resolved.format is None else resolved.format.name
            if resolved.uses not in self.uses:
                self.uses.append(resolved.uses)
            if form in (None, "records") and record.keys() <= FIELDS:
                example = from_record({**record, "id": sample_id})
                return _example(example, answers_needed=self._limits.answers_needed)
            return _talk(read_row({**record, "id": sample_id}, columns=self._columns), form)
        except ColumnsError as error:
            return Sample(id=sample_id, problem=str(error), kind=LEFT_OUT, format=form)
        except BadSample as error:
            return Sample(id=sample_id, problem=error.reason, kind=error.kind, format=form)

    def check(self, sample: Sample) -> bool:
        """Checks one sample; returns whether it can be used, however long it is and whatever else has its id."""
        if sample.id in self._ids:
            self._add("duplicate id", sample.id)
        self._ids.add(sample.id)
        usable = True
        if sample.problem:
            usable = False
            self._add(sample.kind, sample.id, sample.problem)
        elif any(not answer.replace(IMAGE_PLACEHOLDER, "").strip() for answer in sample.answers):
            usable = False
            self._add(EMPTY_ANSWER, sample.id)
        length = self._limits.length(sample.text)
        if length > self._limits.most:
            self._add(
                f"longer than {self._limits.most:,} {self._limits.unit}", sample.id, f"{length:,} {self._limits.unit}"
            )
        for name in sample.media:
            check = self._videos if name in sample.videos else self._media
            trouble = None if check is None else check.trouble(name, sample.held.get(name), name in sample.videos)
            if trouble is not None:
                usable = False
                self._add(trouble.kind, sample.id, f"{name}: {trouble.detail}")
        if sample.asked or sample.media:
            self.samples.setdefault(hash((sample.asked, sample.media)), sample.id)
        return usable

    def _add(self, problem: str, sample_id: str, detail: str = "") -> None:
        self.findings.setdefault(problem, Finding(problem=problem)).add(sample_id, detail)


def _talk(example: Example, form: str | None) -> Sample:
    conversation = as_conversation(example.id, example.images, turns_of(example), example.clips)
    asked = [turn.text for turn in conversation.turns if turn.role == "user"]
    videos = tuple(clip.path for clip in example.clips)
    return Sample(
        id=example.id,
        media=conversation.images + videos,
        videos=videos,
        asked="\n".join([*asked, *_spans(example)]),
        answers=tuple(turn.text for turn in conversation.turns if turn.role == "assistant"),
        text="\n".join(turn.text for turn in conversation.turns),
        held=example.image_bytes,
        format=form,
    )


def _example(example: Example, *, answers_needed: bool) -> Sample:
    said = tuple(turn.text for turn in example.turns if turn.role == "assistant")
    answers = tuple(answer.text for answer in example.answers) + said
    asked = "\n".join(
        [example.question, *(turn.text for turn in example.turns if turn.role == "user"), *example.choices]
    )
    subtitles = " ".join(subtitle.text for subtitle in example.subtitles)
    if answers_needed and not answers:
        raise BadSample(example.id, "it has no answer", NO_ANSWER)
    videos = tuple(clip.path for clip in example.clips)
    order = str(example.extra.get("order", ""))
    return Sample(
        id=example.id,
        media=example.images + videos,
        videos=videos,
        asked="\n".join(part for part in (asked, *_spans(example), order) if part.strip()),
        answers=answers,
        text="\n".join(part for part in (subtitles, asked, max(answers, key=len, default="")) if part),
        format="records",
    )


def _spans(example: Example) -> list[str]:
    """Which part of each video is meant: the same question about another part is another one."""
    return [f"{clip.start_seconds}-{clip.end_seconds}" for clip in example.clips]


def overlap(first: FileCheck, second: FileCheck) -> Finding | None:
    """Samples that ask the same of the same media in both files."""
    common = first.samples.keys() & second.samples.keys()
    if not common:
        return None
    finding = Finding(problem=f"also in {second.path.name}")
    for key in sorted(common, key=lambda key: first.samples[key]):
        same = f"{first.samples[key]} is {second.samples[key]} there"
        finding.add(first.samples[key], same)
    return finding


def pairs(checks: Sequence[FileCheck]) -> Iterator[tuple[FileCheck, FileCheck]]:
    """Each two of the files once."""
    for number, first in enumerate(checks):
        for second in checks[number + 1 :]:
            yield first, second


def total(findings: Iterable[Finding]) -> int:
    """How many problems there are in all."""
    return sum(finding.count for finding in findings)
