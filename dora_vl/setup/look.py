"""What a person's questions and pictures are: read once, each row checked as `dora-vl check-data` does, and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from statistics import median

from PIL import ExifTags
from tqdm import tqdm

from dora_vl.data.media import MediaFolder, path_inside
from dora_vl.data.picture_decoding import NOT_DECODED, opened_picture
from dora_vl.data.readers.columns import USUAL, Columns, column_lines
from dora_vl.data.readers.containers import find_files
from dora_vl.data.regular_file import content_key
from dora_vl.data.sample_rows import read_row, turns_of
from dora_vl.data.turns import IMAGE_PLACEHOLDER, SPEAKERS, VIDEO_PLACEHOLDER, Clip, Conversation, as_conversation
from dora_vl.errors import BadSample, UserError, shown_text
from dora_vl.setup.questions_file import MOST_NAMES, picture_files, root_of_pictures
from dora_vl.sources.check_command import table
from dora_vl.sources.check_media import MediaCheck
from dora_vl.sources.check_rows import FileCheck, Limits, Sample
from dora_vl.sources.media_files import save_picture


@dataclass(frozen=True, kw_only=True)
class Row:
    """One usable sample."""

    conversation: Conversation
    kind: str | None = None

    @property
    def media(self) -> tuple[str, ...]:
        """Names of its pictures and videos."""
        return (*self.conversation.images, *(clip.path for clip in self.conversation.videos))

    def texts(self, role: str) -> list[str]:
        """What the user, or the assistant, says, without placeholders."""
        found = [turn.text for turn in self.conversation.turns if turn.role == role]
        return [text.replace(IMAGE_PLACEHOLDER, "").replace(VIDEO_PLACEHOLDER, "").strip() for text in found]

    def record(self, name: str) -> dict[str, object]:
        """Itself as LLaVA's JSON, under this id."""
        talk, images = self.conversation, list(self.conversation.images)
        kept: dict[str, object] = {"id": name}
        if images:
            kept["image"] = images[0] if len(images) == 1 else images
        if talk.videos:
            kept["videos"] = [_clip(clip) for clip in talk.videos]
        if self.kind is not None:
            kept["kind"] = self.kind
        return {**kept, "conversations": [{"from": SPEAKERS[turn.role], "value": turn.text} for turn in talk.turns]}


@dataclass(kw_only=True)
class Pictures:
    """What the pictures are that usable rows name; each is looked at once."""

    root: Path
    keys: dict[str, str] = field(default_factory=dict)
    """By name what tells its content: equal for a copy under another name."""
    formats: Counter[str] = field(default_factory=Counter)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    turned: int = 0
    transparent: int = 0

    def add(self, name: str) -> None:
        """Looks at one, if it has not been."""
        if name in self.keys:
            return
        path = self.root / name
        self.keys[name] = content_key(path)
        try:
            with opened_picture(path) as image:
                self.formats[image.format or "unknown"] += 1
                self.sizes.append(image.size)
                self.turned += image.getexif().get(ExifTags.Base.Orientation, 1) != 1
                self.transparent += image.has_transparency_data
        except NOT_DECODED:  # a video, or notes beside the pixels that are damaged
            self.formats[path.suffix.lstrip(".").upper() or "other"] += 1


@dataclass(frozen=True, kw_only=True)
class Look:
    """Everything that was seen.

    Attributes:
        root: of the paths in `rows`.
        holds: whether the questions file holds the pictures itself; they are in `root` then.
        trouble: what `check-data` says of rows that are left out, line by line.
    """

    questions: Path
    root: Path
    holds: bool
    format: str
    columns: Sequence[str]
    read: int
    rows: Sequence[Row]
    pictures: Pictures
    unnamed: int
    trouble: Sequence[str]

    @property
    def media(self) -> str:
        """What the rows are about, in a word: pictures, videos, or both."""
        talks = [row.conversation for row in self.rows]
        kinds = ("pictures", any(talk.images for talk in talks)), ("videos", any(talk.videos for talk in talks))
        return " and ".join(name for name, are_there in kinds if are_there) or "pictures"

    @property
    def links_out(self) -> bool:
        """Whether a file that the rows name is a link out of their folder."""
        try:
            for name in chain.from_iterable(row.media for row in self.rows):
                path_inside(self.root, name)
        except BadSample:
            return True
        return False

    def lines(self) -> Iterator[str]:
        """What is told of it."""
        yield f"{self.questions}: {self.format}, {self.read:,} rows, {len(self.rows):,} usable"
        yield from self.columns
        yield from self._picture_lines()
        asked, said = (
            list(chain.from_iterable(row.texts(role) for row in self.rows)) for role in ("user", "assistant")
        )
        rounds = [len(row.texts("assistant")) for row in self.rows]
        yield f"questions: {_spread(rounds)} a row, {_lengths(asked)}"
        most, times = Counter(said).most_common(1)[0]
        yield (
            f"answers: {_lengths(said)}, {len(set(said)):,} different, most often "
            f"{shown_text(most, 30)} ({times / len(said):.0%})"
        )
        if self.trouble:
            yield from ("left out, as check-data tells:", *self.trouble)

    def _picture_lines(self) -> Iterator[str]:
        seen = self.pictures
        if not seen.keys:
            yield "pictures: none, the rows are words alone"
            return
        formats = ", ".join(f"{name} {count:,}" for name, count in seen.formats.most_common())
        more = f"; {self.unnamed:,} more that no row names" if self.unnamed else ""
        where = "the file itself" if self.holds else self.root
        yield f"{self.media}: {len(seen.keys):,} in {where}, {formats}{more}"
        if seen.sizes:
            by_area = sorted(seen.sizes, key=lambda size: size[0] * size[1])
            least, middle, most = (f"{w}x{h}" for w, h in (by_area[0], by_area[len(by_area) // 2], by_area[-1]))
            turned = f"; turned upright by their EXIF notes {seen.turned:,}" if seen.turned else ""
            white = f"; shown on white for their transparency {seen.transparent:,}" if seen.transparent else ""
            yield f"sizes: {least} to {most} pixels, in the middle {middle}{turned}{white}"


def look_at(folder: Path, questions: Path, *, media_to: Path, columns: Columns = USUAL) -> Look:
    """Reads the questions and looks at every picture that they name.

    Args:
        folder: holds the pictures.
        media_to: gets the pictures that the questions file holds itself.
        columns: what the file's columns are.

    Raises:
        UserError: the file cannot be read to its end, no picture is found, or no row can be used.
    """
    records = find_files(questions)
    limits = Limits(most=10**9, unit="words", length=_words, answers_needed=True)
    held, names = _begin(records.rows(), FileCheck(questions, limits, None, columns=columns))
    root = media_to if held else root_of_pictures(folder, questions, names)
    check = FileCheck(questions, limits, MediaCheck(MediaFolder(root, follow_links=True), decode=True), columns=columns)
    forms: dict[str, None] = {}
    rows: list[Row] = []
    with tqdm(total=_bytes(records.files), unit="B", unit_scale=True, desc="reading", disable=None, leave=False) as bar:
        for number, record in enumerate(records.rows(bar.update), start=1):
            check.rows = number
            sample = check.read(record, number)
            row = _usable(check, record, sample, media_to if held else None, columns)
            if row is not None:
                rows.append(row)
                forms[str(sample.format)] = None
    trouble = list(table([(questions, finding) for name, finding in check.findings.items() if name != "duplicate id"]))
    if not rows:
        raise UserError(f"{questions}: not one of its {check.rows:,} rows can be used; {_first_problem(check)}")
    pictures = Pictures(root=root)
    for name in tqdm(
        list(dict.fromkeys(chain.from_iterable(row.media for row in rows))), "pictures", disable=None, leave=False
    ):
        pictures.add(name)
    there = 0 if held else sum(1 for _ in picture_files(root))
    return Look(
        questions=questions,
        root=root,
        holds=held,
        format=" and ".join(forms),
        columns=column_lines(check.uses),
        read=check.rows,
        rows=rows,
        pictures=pictures,
        unnamed=max(0, there - len(pictures.keys)),
        trouble=trouble if len(trouble) > 1 else (),  # the first line is the heading
    )


def _begin(records: Iterator[Mapping[str, object]], check: FileCheck) -> tuple[bool, list[str]]:
    """Whether the first rows hold their pictures, and the names of media in them."""
    held, names = False, list[str]()
    for number, record in enumerate(islice(records, MOST_NAMES), start=1):
        sample = check.read(record, number)
        held = held or bool(sample.held)
        names += [name for name in sample.media if name not in sample.held]
    return held, names


def _usable(
    check: FileCheck, record: Mapping[str, object], sample: Sample, media_to: Path | None, columns: Columns
) -> Row | None:
    """The row, or nothing where it cannot be used, which `check` then has noted."""
    if not check.check(sample):
        return None
    try:
        example = read_row({**record, "id": sample.id}, columns=columns)
        talk = as_conversation(example.id, example.images, turns_of(example), example.clips)
        if media_to is not None:
            names = {name: save_picture(data, media_to, example.id) for name, data in example.image_bytes.items()}
            images = tuple(names.get(name, name) for name in talk.images)
            talk = Conversation(talk.id, images, talk.turns, talk.videos)
    except BadSample as error:
        check.check(Sample(id=sample.id, problem=error.reason, kind=error.kind))
        return None
    kind = record.get("kind")
    return Row(conversation=talk, kind=kind if isinstance(kind, str) and kind else None)


def _first_problem(check: FileCheck) -> str:
    found = max(check.findings.values(), key=lambda finding: finding.count)
    return f"{found.count:,} times {found.problem}, for example {found.ids[0]}: {shown_text(found.example, 120)}"


def _clip(clip: Clip) -> object:
    times = {"start_seconds": clip.start_seconds, "end_seconds": clip.end_seconds}
    set_times = {name: value for name, value in times.items() if value is not None}
    return {"path": clip.path, **set_times} if set_times else clip.path


def _bytes(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _words(text: str) -> int:
    return len(text.split())


def _lengths(texts: Sequence[str]) -> str:
    """How many words they have."""
    words = _spread(map(_words, texts))
    return f"{words} word" if words == "1" else f"{words} words"


def _spread(numbers: Iterator[int] | Sequence[int]) -> str:
    """Such as `3 to 12, in the middle 5`."""
    found = sorted(numbers)
    if found[0] == found[-1]:
        return f"{found[0]:,}"
    return f"{found[0]:,} to {found[-1]:,} (in the middle {median(found):g})"
