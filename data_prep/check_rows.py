"""What is wrong with a data file's rows, found in one pass: ids, answers, placeholders, lengths, media, overlap."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.check_media import MediaCheck
from dora_vl.data.examples import JSON, from_record
from dora_vl.data.records import stream_records
from dora_vl.data.turns import IMAGE_PLACEHOLDER, read_llava
from dora_vl.errors import BadSample, shown_text

SHOWN_IDS = 5


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
    asked: str = ""
    answers: tuple[str, ...] = ()
    text: str = ""
    problem: str = ""


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

    def __init__(self, path: Path, limits: Limits, media: MediaCheck | None) -> None:
        self.path = path
        self.rows = 0
        self.findings: dict[str, Finding] = {}
        self.samples: dict[int, str] = {}  # hash of what is asked, with its media -> id
        self._limits = limits
        self._media = media
        self._ids: set[str] = set()

    def run(self, progress: Callable[[int], object]) -> FileCheck:
        """Reads the whole file."""
        for number, record in enumerate(stream_records(self.path, progress=progress), start=1):
            self.rows += 1
            self.check(read_sample(record, number, answers_needed=self._limits.answers_needed))
        return self

    def check(self, sample: Sample) -> None:
        """Checks one sample."""
        if sample.id in self._ids:
            self._add("duplicate id", sample.id)
        self._ids.add(sample.id)
        if sample.problem:
            self._add(_kind(sample.problem), sample.id, sample.problem)
        elif any(not answer.replace(IMAGE_PLACEHOLDER, "").strip() for answer in sample.answers):
            self._add("empty answer", sample.id)
        length = self._limits.length(sample.text)
        if length > self._limits.most:
            self._add(
                f"longer than {self._limits.most:,} {self._limits.unit}", sample.id, f"{length:,} {self._limits.unit}"
            )
        for name in sample.media if self._media is not None else ():
            trouble = self._media.trouble(name) if self._media is not None else None
            if trouble is not None:
                self._add(trouble.kind, sample.id, f"{name}: {trouble.detail}")
        if sample.asked or sample.media:
            self.samples.setdefault(hash((sample.asked, sample.media)), sample.id)

    def _add(self, problem: str, sample_id: str, detail: str = "") -> None:
        self.findings.setdefault(problem, Finding(problem=problem)).add(sample_id, detail)


def _kind(problem: str) -> str:
    """The column of the table for a reason why a sample cannot be read."""
    if IMAGE_PLACEHOLDER in problem:
        return "placeholders differ from pictures"
    return "empty answer" if "empty" in problem else "not a sample"


def read_sample(record: Mapping[str, JSON], number: int, *, answers_needed: bool) -> Sample:
    """A LLaVA record, an instruction, or an example; what cannot be read is a sample with its problem."""
    sample_id = str(record["id"]) if record.get("id") is not None else f"row {number}"
    try:
        if "conversations" in record:
            return _llava(record, sample_id)
        if "instruction" in record:
            return _instruction(record, sample_id)
        return _example(record, sample_id, answers_needed=answers_needed)
    except BadSample as error:
        return Sample(id=sample_id, problem=error.reason)


def _llava(record: Mapping[str, JSON], sample_id: str) -> Sample:
    conversation = read_llava(record)
    texts = [turn.text for turn in conversation.turns]
    return Sample(
        id=sample_id,
        media=conversation.images,
        asked="\n".join(turn.text for turn in conversation.turns if turn.role == "user"),
        answers=tuple(turn.text for turn in conversation.turns if turn.role == "assistant"),
        text="\n".join(texts),
    )


def _instruction(record: Mapping[str, JSON], sample_id: str) -> Sample:
    parts = [record.get(name) or "" for name in ("instruction", "input", "output")]
    if not all(isinstance(part, str) for part in parts):
        raise BadSample(sample_id, "'instruction', 'input' and 'output' must hold text")
    return Sample(id=sample_id, asked="\n".join(parts[:2]), answers=(parts[2],), text="\n".join(parts))


def _example(record: Mapping[str, JSON], sample_id: str, *, answers_needed: bool) -> Sample:
    example = from_record(record)
    said = tuple(turn.text for turn in example.turns if turn.role == "assistant")
    answers = tuple(answer.text for answer in example.answers) + said
    asked = "\n".join(
        [example.question, *(turn.text for turn in example.turns if turn.role == "user"), *example.choices]
    )
    subtitles = " ".join(subtitle.text for subtitle in example.subtitles)
    if answers_needed and not answers:
        raise BadSample(sample_id, "its answer is empty: it has none")
    media = example.images + (() if example.video is None else (example.video.path,))
    span = "" if example.video is None else f"{example.video.start_seconds}-{example.video.end_seconds}"
    order = str(example.extra.get("order", ""))
    return Sample(
        id=sample_id,
        media=media,
        asked="\n".join(part for part in (asked, span, order) if part.strip()),
        answers=answers,
        text="\n".join(part for part in (subtitles, asked, max(answers, key=len, default="")) if part),
    )


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
