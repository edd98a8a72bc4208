"""`dora-vl check-data`: finds what would make samples unusable before a run does; prints counts and ids in a table."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from io import BytesIO
from itertools import chain, combinations
from pathlib import Path
from posixpath import normpath
from typing import BinaryIO

from tqdm import tqdm

from dora_vl.data.box_sheet import MOST, write_sheet
from dora_vl.data.column_names import ROLES, Row, plain_name
from dora_vl.data.columns import USUAL, Columns, ColumnsError, roles_of_columns
from dora_vl.data.containers import ENDINGS
from dora_vl.data.conversation import WRONG_BOX
from dora_vl.data.data_files import counted_splits, find_files, is_data_file, picture_folder, split_of, split_used
from dora_vl.data.example import FIELDS, Example
from dora_vl.data.formats.choices import CountedFromOne
from dora_vl.data.formats.records import read_record
from dora_vl.data.objects import PLACE, Box, boxes_in
from dora_vl.data.pictures import (
    TRUNCATED,
    VIDEO_ENDINGS,
    MediaFolder,
    Trouble,
    decoding_trouble,
    path_inside,
    picture_facts,
)
from dora_vl.data.readers import read_fields
from dora_vl.data.turns import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Role
from dora_vl.data.video import no_video_reason
from dora_vl.errors import (
    EMPTY_ANSWER,
    NO_ANSWER,
    BadSample,
    UserError,
    align_columns,
    positive_int,
    short_names,
    short_text,
)
from dora_vl.files import NoRegularFile, open_regular
from dora_vl.limited_process import JobFailed

ENDS = {b"\xff\xd8\xff": b"\xff\xd9", b"\x89PNG\r\n\x1a\n": b"IEND", b"GIF8": b"\x3b"}
"""A file that begins with the key is whole if its last bytes hold the value; this needs no decoding."""


class MediaCheck:
    """Checks that pictures and videos exist and are whole; each file once, however many samples name it.

    Size, beginning and end of pictures are looked at in any case; `decode` finds damage inside too.
    """

    def __init__(self, root: Path | MediaFolder, *, decode: bool) -> None:
        self._folder = root if isinstance(root, MediaFolder) else MediaFolder(root)
        self._decode = decode
        self.known: dict[str, Trouble | None] = {}
        self._sizes: dict[str, tuple[int, int] | None] = {}

    def trouble(self, name: str, content: bytes | None = None, video: bool = False) -> Trouble | None:
        """Returns what is wrong with a file, or a picture whose `content` the data file holds; None: nothing.

        A `video` is looked at as one, whatever its name ends in.
        """
        if name not in self.known:
            memory = BytesIO(content or b"")
            self.known[name] = self._look(name, video) if content is None else self._picture(memory, memory)
        return self.known[name]

    def size(self, name: str, content: bytes | None = None) -> tuple[int, int] | None:
        """Returns the sides of a picture as it is shown; None where it cannot be read."""
        if name not in self._sizes:
            try:
                source = path_inside(self._folder, name) if content is None else BytesIO(content)
                width, height = picture_facts(source, decode=False)["shown"]
                self._sizes[name] = (int(width), int(height))
            except (BadSample, JobFailed):
                self._sizes[name] = None
        return self._sizes[name]

    def path(self, name: str) -> Path:
        """Returns where a picture is."""
        return path_inside(self._folder, name)

    def _look(self, name: str, video: bool) -> Trouble | None:
        try:
            path = path_inside(self._folder, name, kind="video" if video else "picture")
        except BadSample as error:
            return Trouble("path leaves the folder", error.reason)
        try:
            with open_regular(path) as file:
                if not file.seek(0, 2):
                    return Trouble("zero-byte media", "0 bytes")
                if not video and path.suffix.lower().removeprefix(".") not in VIDEO_ENDINGS:
                    return self._picture(file, path)
        except FileNotFoundError:
            return Trouble("missing media", f"not in {self._folder}")
        except NoRegularFile as error:
            return Trouble("no file", str(error))
        except OSError as error:
            return Trouble("missing media", str(error.strerror))
        return no_video_reason(path)

    def _picture(self, file: BinaryIO | BytesIO, source: Path | BytesIO) -> Trouble | None:
        """Judges a picture by its end; decodes a suspicious one as training does."""
        is_whole = looks_whole(file)
        trouble = None if is_whole and not self._decode else decoding_trouble(source)
        return replace(trouble, kind=TRUNCATED) if trouble and is_whole is False else trouble


def looks_whole(file: BinaryIO | BytesIO) -> bool | None:
    """Tells whether a picture ends as whole ones of its kind do; None where its kind has no known end."""
    size = file.seek(0, 2)
    file.seek(max(0, size - 4096))
    last = file.read()
    file.seek(0)
    beginning = file.read(16)
    for start, end in ENDS.items():
        if beginning.startswith(start):
            return last.rstrip(b"\0").endswith(end) or end in last[-64:]
    if beginning[:4] == b"RIFF" and beginning[8:12] == b"WEBP":
        return size >= int.from_bytes(beginning[4:8], "little") + 8
    return None


SHOWN_IDS = 5
LEFT_OUT = "columns left out"  # a run would refuse these rows for a column
NO_PICTURE, EMPTY_QUESTION, CONTRADICTION = "no picture", "empty question", "another answer to the same question"
EMPTY_AS_TEXT = 'an answer "nan" or "null"'
GREETING = "an opening turn of the assistant, which is not trained"
SMALL_BOX, PIXELS_IN_TEXT = "a box under two pixels", "numbers in a text that look like a box's pixels"
DOUBTS = (NO_PICTURE, EMPTY_QUESTION, EMPTY_AS_TEXT, GREETING, CONTRADICTION, SMALL_BOX, PIXELS_IN_TEXT)
"""A run trains on samples with these problems, and warns."""
SEVERAL_ANSWERS = "several right answers: in {:,} rows; the most frequent is trained on, the test counts each"


@dataclass(kw_only=True)
class Finding:
    """One kind of problem in one file: how many samples have it, and the first of their ids, grouped by detail."""

    problem: str
    count: int = 0
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, sample_id: str, detail: str = "") -> None:
        """Counts one more sample."""
        self.count += 1
        if self.count <= SHOWN_IDS:
            self.examples.setdefault(detail, []).append(short_text(sample_id, 60))

    def __str__(self) -> str:
        ids = ", ".join(chain.from_iterable(self.examples.values()))
        return f"{self.problem}: {self.count:,} samples ({ids}{', ...' if self.count > SHOWN_IDS else ''})"


_FOUR = re.compile(r"(?<![\[\w])\[" + r"\s*,\s*".join([r"\s*(\d+(?:\.\d+)?)"] * 4) + r"\s*\](?!\])")
"""Families write their own numbers in marks or in two brackets."""


def _has_pixels(text: str) -> bool:
    boxes = (tuple(map(float, numbers)) for numbers in _FOUR.findall(PLACE.sub("", text)))
    return any(x0 < x1 and y0 < y1 and max(x1, y1) > 1 for x0, y0, x1, y1 in boxes)


def find_doubts(row: Row, example: Example, form: str | None, columns: Columns) -> list[str]:
    """Returns what is probably a mistake in a usable row: an empty cell for its picture, question or answer.

    An empty cell is one of `DOUBTS` only where other rows of the file have pictures.
    """
    doubts: list[str] = []
    names = {*ROLES["images"], *ROLES["videos"]}
    if not (example.images or example.videos) and any(
        columns.roles.get(name, plain_name(name)) in names for name in row
    ):
        doubts.append(NO_PICTURE)
    if next((turn.role for turn in example.turns if turn.role != "system"), "user") == "assistant":
        doubts.append(GREETING)
    questions = [turn.text for turn in example.turns if turn.role == "user"]
    words = (text.replace(IMAGE_PLACEHOLDER, "").replace(VIDEO_PLACEHOLDER, "").strip() for text in questions)
    if form != "captions" and not all(words):
        doubts.append(EMPTY_QUESTION)
    if any(text.strip().lower() in ("nan", "null") for text in _texts_of(example, "assistant")):
        doubts.append(EMPTY_AS_TEXT)  # as other programs write an empty cell, though it may be the answer
    if example.images and any(map(_has_pixels, _texts_of(example, "assistant"))):
        doubts.append(PIXELS_IN_TEXT)
    return doubts


def question_and_answer(example: Example) -> tuple[str, str, str]:
    """Returns an example's question, media and answer as texts to compare; a caption has no question."""
    questions = _texts_of(example, "system", "user", "tool") or [example.question, *example.choices]
    words = "\n".join(questions).replace(IMAGE_PLACEHOLDER, "").strip()
    if example.rejected or example.is_good is not None:
        words = ""  # several answers to one question are what such rows are for
    replies = _texts_of(example, "assistant") or [answer.text for answer in example.answers]
    # The same about another part of a video, or another order of pictures, is another question.
    clips = [replace(clip, path=normpath(clip.path)) for clip in example.videos]
    media = [*map(normpath, example.images), *map(str, clips), str(example.extra.get("order", ""))]
    return words, "\0".join(filter(None, media)), "\0".join(replies)


def _texts_of(example: Example, *roles: Role) -> list[str]:
    return [turn.text + turn.more for turn in example.turns if turn.role in roles and turn.is_trained]


@dataclass
class FileCheck:
    """Checks one file's rows one after another; `findings` grow with them.

    Args:
        longest: the most words, or tokens where `tokens` counts those, of an example.
        answers_needed: an example without any answer is a problem (a test set may keep them back).
        videos: of files that are videos; None: as `media`.
    """

    path: Path
    _: KW_ONLY
    columns: Columns = USUAL
    longest: int | None = None
    tokens: Callable[[str], int] | None = None
    answers_needed: bool = True
    media: MediaCheck | None = None
    videos: MediaCheck | None = None
    rows: int = field(default=0, init=False)
    with_several_answers: int = field(default=0, init=False)
    splits: Counter[str | None] = field(default_factory=Counter, init=False)
    samples: dict[int, str] = field(default_factory=dict, init=False)  # hash of what is asked, with its media -> id
    uses: list[Mapping[str, str]] = field(default_factory=list, init=False)
    formats: dict[str, str] = field(default_factory=dict, init=False)
    """Maps each format to its first row."""
    drawn: list[tuple[Path, list[Box]]] = field(default_factory=list, init=False)
    """The first pictures with boxes, in fractions."""
    remedy: str = field(default="", init=False)
    """Says which options settle the first row that a column made unusable."""
    _ids: set[str] = field(default_factory=set, init=False)
    _findings: dict[str, Finding] = field(default_factory=dict, init=False)
    _answers: dict[int, tuple[int, str]] = field(default_factory=dict, init=False)
    """Maps the hash of what is asked to that of its first answer, and to its id."""
    _has_media: bool = field(default=False, init=False)

    @property
    def findings(self) -> dict[str, Finding]:
        """Maps each kind of problem to what was found of it."""
        return {name: finding for name, finding in self._findings.items() if name != NO_PICTURE or self._has_media}

    def run(self) -> FileCheck:
        """Reads the whole file."""
        for row in tqdm(find_files(self.path).rows(), self.path.name, unit=" rows", disable=None, leave=False):
            self.check(self.read(row))
        return self

    def read(self, row: Row) -> Example | BadSample:
        """Returns the next row: a conversation, or a record; or why it cannot be one."""
        self.rows += 1
        self.splits[split_of(row)] += 1
        location = f"row {self.rows}"
        sample_id = self.columns.id_of(row, location)
        try:
            has_fields_of_records = row.keys() <= FIELDS
            resolved = self.columns.resolve(row, strict=not has_fields_of_records)
            form = None if resolved.format is None else resolved.format.name
            is_record = form in (None, "records") and has_fields_of_records
            if has_fields_of_records and not is_record:
                resolved = self.columns.resolve(row)
            if resolved.uses not in self.uses:
                self.uses.append(resolved.uses)
            self._note_format("records" if is_record else form, sample_id, location)
            example = read_record({**row, "id": sample_id}) if is_record else read_fields(resolved, sample_id)
        except CountedFromOne as error:
            where = location if sample_id == location else f"{location} ({sample_id})"
            raise UserError(f"{self.path}, {where}: {error}") from None
        except ColumnsError as error:
            self.remedy = self.remedy or error.options
            return BadSample(sample_id, error.problem.rstrip(";"), LEFT_OUT)
        except BadSample as error:
            return error
        except RecursionError:
            return BadSample(sample_id, "its values are nested too deeply")
        if self.answers_needed and not example.answers and all(turn.role != "assistant" for turn in example.turns):
            return BadSample(sample_id, "it has no answer", NO_ANSWER)
        self._has_media |= bool(example.images or example.videos)
        if not is_record:
            for doubt in find_doubts(row, example, form, self.columns):
                self._add(doubt, sample_id)
        return example

    def _note_format(self, form: str | None, sample_id: str, location: str) -> None:
        if form is None or form in self.formats:
            return
        self.formats[form] = location
        if len(self.formats) > 1:
            firsts = "; ".join(f"{name}: {first}" for name, first in self.formats.items())
            self._add("mixed formats", sample_id, f"the first of each: {firsts}")

    def check(self, example: Example | BadSample) -> bool:
        """Checks what was read of one row; returns whether it can be used, apart from its length and duplicate ids."""
        sample_id = example.sample_id if isinstance(example, BadSample) else example.id
        if sample_id in self._ids:
            self._add("duplicate id", sample_id)
        self._ids.add(sample_id)
        if isinstance(example, BadSample):
            self._add(example.kind, sample_id, example.reason)
            return False
        self.with_several_answers += len(example.answers) > 1
        replies = _texts_of(example, "assistant")
        answers = [answer.text for answer in example.answers]
        usable = all(answer.replace(IMAGE_PLACEHOLDER, "").strip() for answer in (*answers, *replies))
        if not usable:
            self._add(EMPTY_ANSWER, sample_id)
        texts = [*(subtitle.text for subtitle in example.subtitles), example.question, *example.choices]
        texts += [*_texts_of(example, "system", "user", "tool"), *replies, max(answers, key=len, default="")]
        self._check_length(sample_id, texts)
        media = [(name, False) for name in (*example.images, *example.rejected_images)]
        media += [(clip.path, True) for clip in example.videos]
        for name, is_video in media:
            check = (self.videos or self.media) if is_video else self.media
            trouble = None if check is None else check.trouble(name, example.image_bytes.get(name), is_video)
            if trouble is not None:
                usable = False
                self._add(trouble.kind, sample_id, f"{name}: {trouble.detail}")
        usable &= self._check_boxes(example)
        words, shown_media, answer_text = question_and_answer(example)
        key = hash((words, shown_media))
        if words or shown_media:
            self.samples.setdefault(key, sample_id)
        if words and usable:
            first, name = self._answers.setdefault(key, (hash(answer_text), sample_id))
            if hash(answer_text) != first:
                self._add(CONTRADICTION, sample_id, f"{name} has another answer")
        return usable

    def _check_boxes(self, example: Example) -> bool:
        """Checks that boxes are inside their pictures, where these are there; returns whether all are."""
        boxes = [box for turn in example.turns for place in boxes_in(turn.text) for box in place]
        if not boxes or self.media is None:
            return True
        inside: dict[str, list[Box]] = {}
        for box in boxes:
            name = example.images[box.image]
            if (size := self.media.size(name, example.image_bytes.get(name))) is None:
                continue
            try:
                box = box.in_fractions(size)
            except ValueError as error:
                self._add(WRONG_BOX, example.id, str(error))
                return False
            sides = box.pixels(size)
            if len(sides) == 4 and min(sides[2] - sides[0], sides[3] - sides[1]) < 2:
                self._add(SMALL_BOX, example.id, f"{box.named()} of {size[0]} x {size[1]} pixels")
            if name not in example.image_bytes:
                inside.setdefault(name, []).append(box)
        if len(self.drawn) < MOST:
            self.drawn += [(self.media.path(name), each) for name, each in inside.items()]
        return True

    def _check_length(self, sample_id: str, texts: Sequence[str]) -> None:
        if self.longest is None:
            return
        text, unit = "\n".join(filter(None, texts)), "tokens" if self.tokens else "words"
        length = self.tokens(text) if self.tokens else len(text.split())
        if length > self.longest:
            self._add(f"longer than {self.longest:,} {unit}", sample_id, f"{length:,} {unit}")

    def _add(self, problem: str, sample_id: str, detail: str = "") -> None:
        self._findings.setdefault(problem, Finding(problem=problem)).add(sample_id, detail)


DESCRIPTION = """\
Checks data files of every format that training reads, and records of `dora-vl prepare`. Finds duplicate ids, empty
and missing answers, empty questions, rows without a picture among others, different answers to the same question,
placeholders that differ from the pictures, samples that are too long, missing, empty, truncated and broken media, rows
of mixed formats, and samples that occur in two of the files. Prints one table with up to five ids per problem; exits
with status 1 if anything was found.

  dora-vl check-data records/nlvr/train.jsonl records/nlvr/test.jsonl --media downloads/nlvr
  dora-vl check-data train.json --media pictures --decode --tokenizer vicuna-7b-v1.5 --longest 2048
"""

WORDS, TOKENS = 1_500, 2_048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `dora-vl check-data`."""
    parser.description = DESCRIPTION
    parser.set_defaults(work=run)
    add = parser.add_argument
    add("paths", type=Path, nargs="+", metavar="PATH", help="data files, or folders of them")
    add("--media", type=Path, metavar="FOLDER", help="the root of pictures and videos; not checked if left out")
    add("--videos", type=Path, metavar="FOLDER", help="the root of videos, where it is another")
    add("--follow-links", action="store_true", help="files may be links out of those folders")
    add("--sheet", type=Path, metavar="PNG", help="draws the boxes of the first pictures; with --media")
    add("--decode", action="store_true", help="decode each picture whole too: slower, finds damage inside")
    add("--tokenizer", type=Path, metavar="FOLDER", help="a folder with tokenizer.json; without it words are counted")
    add_columns(parser)
    add("--longest", type=positive_int, metavar="N", help=f"default {TOKENS} tokens, or {WORDS} words")


def add_columns(parser: argparse.ArgumentParser) -> None:
    """Adds the options for column roles, the counterparts of `data.columns`, `data.ignore` and `data.ask`."""
    parser.add_argument("--columns", metavar="COLUMN=ROLE,...", default="", help="such as photo_file=image")
    parser.add_argument("--ignore", metavar="COLUMN,...", default="", help="columns to be left out")
    parser.add_argument("--ask", metavar="QUESTION", default="", help="the question of every row that has none")


def columns_of(arguments: argparse.Namespace) -> Columns:
    """Returns the column settings that the options give."""
    pairs = [part.rpartition("=") for part in filter(None, arguments.columns.split(","))]
    if any(not column for column, _, _ in pairs):
        raise UserError(f"--columns {short_text(arguments.columns, 100)}: must be COLUMN=ROLE,...")
    roles = {column: role for column, _, role in pairs}
    return Columns(roles, tuple(filter(None, arguments.ignore.split(","))), arguments.ask)


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Checks the files; yields the lines to print, and ends with status 1 if anything was found."""
    files = data_files(arguments.paths)
    media, videos = (_media_check(arguments, option) for option in ("media", "videos"))
    columns = columns_of(arguments)
    tokens = None if arguments.tokenizer is None else _tokens(arguments.tokenizer)
    checks: list[FileCheck] = []
    for file in files:
        check = FileCheck(
            file,
            columns=columns,
            longest=arguments.longest or (TOKENS if tokens else WORDS),
            tokens=tokens,
            answers_needed=not file.stem.startswith("test"),  # a test set may keep its answers back
            media=media,
            videos=videos,
        )
        checks.append(check.run())
        if left := [name for name, roles in roles_of_columns(check.uses).items() if not roles]:
            yield f"{short_text(file.name, 120)}: left out {short_names(left)}"
        if split_used(check.splits, "train", "test"):
            yield f"{short_text(file.name, 120)}: its rows name splits: {counted_splits(check.splits)}"
        if check.with_several_answers:
            yield f"{short_text(file.name, 120)}: {SEVERAL_ANSWERS.format(check.with_several_answers)}"
    if unmet := columns.missing_column(chain.from_iterable(check.uses for check in checks)):
        raise UserError(unmet)
    if arguments.sheet:
        yield _draw(checks, arguments.sheet)
    findings = [(check.path, finding) for check in checks for finding in check.findings.values()]
    for first, second in combinations(checks, 2):  # samples that ask the same of the same media in both files
        shared = Finding(problem=f"also in {second.path.name}")
        for name, key in sorted((first.samples[key], key) for key in first.samples.keys() & second.samples.keys()):
            shared.add(name, f"{name} is {second.samples[key]} there")
        findings += [(first.path, shared)] if shared.count else []
    media_checks = [check for check in (media, videos) if check is not None]
    looked = f", {sum(len(check.known) for check in media_checks):,} media files" if media_checks else ""
    summary = f"{len(files)} files, {sum(check.rows for check in checks):,} samples{looked}"
    if not findings:
        yield f"{summary}: nothing found"
        return
    yield from table(findings)
    yield from (f"{check.path.name}: {check.remedy}" for check in checks if check.remedy)
    yield f"{summary}: {sum(finding.count for _, finding in findings):,} problems"
    raise SystemExit(1)


def _draw(checks: Sequence[FileCheck], to: Path) -> str:
    """Draws the boxes of the first pictures; returns the line that says so."""
    drawn = [each for check in checks for each in check.drawn]
    if not drawn:
        raise UserError(f"--sheet {to}: no sample has boxes in a picture that is there; --media FOLDER says where")
    write_sheet(drawn, to)
    return f"{to}: the boxes of {min(MOST, len(drawn))} pictures"


def _media_check(arguments: argparse.Namespace, option: str) -> MediaCheck | None:
    folder: Path | None = getattr(arguments, option)
    if folder is None:
        return None
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --{option} takes the root of the samples' paths")
    return MediaCheck(MediaFolder(folder, arguments.follow_links), decode=arguments.decode)


def data_files(paths: Sequence[Path]) -> list[Path]:
    """Returns the files themselves, and those of the folders (manifests left out)."""
    files: list[Path] = []
    for path in paths:
        inside = [path] if path.is_file() else []
        if path.is_dir():
            below = sorted(filter(is_data_file, path.rglob("*")))
            inside = [file for file in below if not file.name.startswith(".")] or [path] * (
                picture_folder(path) is not None
            )
        if not inside:
            raise UserError(f"{path}: neither a data file nor a folder with {', '.join(ENDINGS)} in it")
        files += inside
    return list(dict.fromkeys(files))


def table(findings: Sequence[tuple[Path, Finding]]) -> list[str]:
    """Returns lines for each kind of problem in each file, the most frequent first, with the first ids."""
    rows: list[tuple[str, ...]] = [("file", "problem", "samples", "ids", "for example")]
    for path, finding in sorted(findings, key=lambda pair: (str(pair[0]), -pair[1].count)):
        file = short_text(str(Path(path.parent.name, path.name)), 120)  # only its name in the current folder
        cells = (file, short_text(finding.problem, 120), f"{finding.count:,}")
        for detail, ids in finding.examples.items():
            rows.append((*cells, ", ".join(ids), short_text(detail, 100)))
            cells = ("", "", "")
        if finding.count > SHOWN_IDS:
            rows.append((*cells, "...", ""))
    return align_columns(rows, left=len(rows[0]))


def _tokens(folder: Path) -> Callable[[str], int]:
    """Returns a function that counts tokens by the tokenizer of a model's folder; needs only `tokenizers`."""
    path = folder / "tokenizer.json" if folder.is_dir() else folder
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{path}: not a tokenizer: {' '.join(str(error).split())[:200]}") from error
    return lambda text: len(tokenizer.encode(text).ids)
