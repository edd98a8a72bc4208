"""`dora-vl prepare`: a publisher's files to records, with progress, a manifest, and a way to go on after a stop."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout
from tqdm import tqdm

from dora_vl.data.benchmarks.fields import Progress, Raw, Split
from dora_vl.data.benchmarks.table import (
    FORMAT,
    MEBIBYTE,
    SOURCES,
    ConvertedRow,
    Line,
    add_to_manifest,
    content,
    converted_rows,
    file_sha256,
    fingerprints,
    read_manifest,
)
from dora_vl.data.example import JSON, json_line, whole_file
from dora_vl.errors import UserError, shown, shown_text

# One split from rows to `<split>.jsonl` and its manifest entry: skipped when it is there, resumed when it was cut.


ROWS_TO_JUDGE = 1000
"""When none of so many rows can be used, the file is another one than the source expects."""
MOST_DROPPED = 100_000
"""All dropped rows are named in the manifest, which should stay a file that one can open."""
SECONDS_BETWEEN_NOTES = 5.0


@dataclass(kw_only=True)
class Counts:
    """How many rows were read and records written, and which rows were not used.

    Attributes:
        renamed: records whose id came before and got a number.
        without_answer: records that hold none, of a test set or because the source allows it.
        repeated: records that are an earlier one under another id, where ids say the place.
    """

    rows: int = 0
    written: int = 0
    renamed: int = 0
    without_answer: int = 0
    repeated: int = 0
    dropped: list[dict[str, JSON]] = field(default_factory=list)

    def drop(self, row: ConvertedRow, where: Path) -> None:
        """Counts a row that cannot be used.

        Raises:
            UserError: no row can be used, or too many cannot.
        """
        self.dropped.append({"row": row.number, "id": row.id, "reason": row.problem})
        if len(self.dropped) >= MOST_DROPPED:
            raise UserError(f"{where}: {len(self.dropped):,} rows cannot be used; {self.first_reason()}")
        if not self.written and len(self.dropped) >= ROWS_TO_JUDGE:
            raise UserError(f"{where}: none of the first {len(self.dropped):,} rows can be used; {self.first_reason()}")

    def first_reason(self) -> str:
        """The first dropped row, for a message."""
        first = self.dropped[0]
        return f"the first is row {first['row']}, id {first['id']}: {first['reason']}"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What became of a split; `entry` is what the manifest holds about it."""

    path: Path
    entry: Mapping[str, JSON]
    already_there: bool
    resumed_after: int = 0


def prepare_split(
    split: Split, folder: Path, *, source: str, workers: int, limit: int | None, progress: Progress
) -> Prepared:
    """Makes `folder/<split>.jsonl`, unless it is there and was made of the same files with the same settings.

    A run that ended early goes on where it was. The file gets its name only when it is whole.

    Raises:
        UserError: an input is malformed, an id is repeated, nothing in it can be used, or the disk is full.
    """
    path = folder / f"{split.name}.jsonl"
    known = read_manifest(folder)["splits"].get(split.name, {})
    with reading(_names(split)):
        inputs = fingerprints(split.inputs, known.get("inputs", []), progress)
    settings = {**split.settings, "limit": limit, "source": source, "format": FORMAT}
    if known.get("settings") == settings and content(known["inputs"]) == content(inputs) and _is_whole(path, known):
        return Prepared(path=path, entry=known, already_there=True)
    started = time.monotonic()
    with Partial(path, key=[content(inputs), settings], find_repeated=split.ids_by_place) as partial:
        resumed_after = partial.counts.rows
        _write_rows(split, partial, workers=workers, limit=limit, progress=progress)
        counts, sha256, size = partial.finish()
    seconds = round(time.monotonic() - started, 3)
    entry = _entry(split, path, counts) | {"sha256": sha256, "bytes": size, "inputs": inputs, "settings": settings}
    add_to_manifest(folder, source, split.name, {**entry, "seconds": seconds})
    return Prepared(path=path, entry=entry, already_there=False, resumed_after=resumed_after)


def _is_whole(path: Path, entry: Mapping[str, JSON]) -> bool:
    return path.is_file() and path.stat().st_size == entry["bytes"] and file_sha256(path) == entry["sha256"]


def _entry(split: Split, path: Path, counts: Counts) -> dict[str, JSON]:
    reasons = Counter(str(dropped["reason"]) for dropped in counts.dropped)
    return {
        "file": path.name,
        "rows": counts.rows,
        "published_rows": split.published_rows,
        "written": counts.written,
        "renamed_ids": counts.renamed,
        "without_answer": counts.without_answer,
        "repeated_records": counts.repeated,
        "dropped": len(counts.dropped),
        "reasons": dict(reasons.most_common()),
        "dropped_rows": counts.dropped,
        "notes": dict(split.notes),
    }


def _write_rows(split: Split, partial: Partial, *, workers: int, limit: int | None, progress: Progress) -> None:
    done = partial.counts.rows
    rows = islice(_readable(split.rows(progress), split), done, limit)
    for chunk in converted_rows(rows, split.convert, first_number=done + 1, workers=workers):
        for row in chunk:
            partial.add(row, number_repeated=split.repeated_ids == "number")
        partial.write()
    counts = partial.counts
    if not counts.rows:
        raise UserError(f"{_names(split)}: holds no rows")
    if not counts.written:
        raise UserError(f"{_names(split)}: none of its {counts.rows:,} rows can be used; {counts.first_reason()}")
    if counts.repeated * 2 == counts.written:
        raise UserError(
            f"{_names(split)}: is doubled, {counts.repeated:,} of its {counts.written:,} records repeat an earlier "
            "one; fetch the file again"
        )


def _readable(rows: Iterator[Raw], split: Split) -> Iterator[Raw]:
    with reading(_names(split)):
        yield from rows


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
    """A file that cannot be read is an error in one line.

    Raises:
        UserError: begins with the file's name, or with `where` if the system gives none.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or where}: cannot be read ({error.strerror or error})") from error


def _names(split: Split) -> str:
    return ", ".join(shown_text(str(path), 120) for path in split.inputs[:2]) or f"{split.task}/{split.name}"


class Partial:
    """The file while it grows, `.<name>.partial`, with a note beside it of how far it is whole.

    Args:
        path: the name that it gets when it is finished.
        key: what it is made of; a partial file of anything else is started anew.
        find_repeated: counts records that are an earlier one under another id.
    """

    def __init__(self, path: Path, key: JSON, *, find_repeated: bool = False) -> None:
        self._path = path
        self._key = json.loads(json.dumps(key))
        self._partial = path.with_name(f".{path.name}.partial")
        self._note = path.with_name(f".{path.name}.progress")
        self._lines: dict[str, int] = {}  # of each id
        self._contents: set[bytes] | None = set() if find_repeated else None
        self._waiting: list[bytes] = []
        self._digest = hashlib.sha256()
        self._bytes = 0
        self._noted_at = time.monotonic()
        self._cannot_write = False
        self.counts = Counts()

    def __enter__(self) -> Partial:
        with self._writing():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._taken_up() or self._partial.open("wb", buffering=MEBIBYTE)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """What was noted as whole stays for the next time, unless the input is at fault, or this program.

        A full disk or a stop by hand is neither; but what no note says to be whole would never be taken up.
        """
        with contextlib.suppress(OSError):
            self._file.close()
        at_fault = isinstance(error, Exception) and not self._cannot_write
        if at_fault or not self._note.is_file():
            for left in (self._partial, self._note):
                with contextlib.suppress(OSError):
                    left.unlink(missing_ok=True)

    def add(self, row: ConvertedRow, *, number_repeated: bool) -> None:
        """Takes what a row became; `write` puts it into the file."""
        self.counts.rows += 1
        if row.problem is not None:
            self.counts.drop(row, self._path)
        for line in row.lines:
            unique = self._unique(line, number_repeated)
            self.counts.written += 1
            self.counts.without_answer += not line.answered
            self.counts.repeated += self._stood_before(unique.encoded)
            self._lines[unique.id] = self.counts.written
            self._waiting.append(unique.encoded)

    def write(self) -> None:
        """Writes what `add` took, and notes now and then how far the file is whole."""
        data = b"".join(self._waiting)
        self._waiting.clear()
        with self._writing():
            self._file.write(data)
            self._digest.update(data)
            self._bytes += len(data)
            if time.monotonic() - self._noted_at >= SECONDS_BETWEEN_NOTES:
                self._save_note()

    def finish(self) -> tuple[Counts, str, int]:
        """Gives the file its name; returns its counts, sha256 and size."""
        with self._writing():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._partial.replace(self._path)
            self._note.unlink(missing_ok=True)
        return self.counts, self._digest.hexdigest(), self._bytes

    def _stood_before(self, encoded: bytes) -> bool:
        """Whether an earlier record says the same under another id, which stands first in a line."""
        if self._contents is None:
            return False
        _, end = json.JSONDecoder().raw_decode(start := encoded.decode(), len('{"id":'))
        digest = hashlib.blake2b(start[end:].encode(), digest_size=12).digest()
        before = digest in self._contents
        self._contents.add(digest)
        return before

    def _unique(self, line: Line, number_repeated: bool) -> Line:
        if line.id not in self._lines:
            return line
        if not number_repeated:
            lines = f"lines {self._lines[line.id]} and {self.counts.written + 1}"
            raise UserError(
                f"{self._path}: id {shown(line.id)} would be in {lines}; the publisher's ids must be unique"
            )
        number = 2
        while (numbered := f"{line.id}#{number}") in self._lines:
            number += 1
        self.counts.renamed += 1
        return Line(numbered, json_line({**json.loads(line.encoded), "id": numbered}, numbered).encode())

    def _save_note(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        with whole_file(self._note) as file:
            json.dump({"key": self._key, "bytes": self._bytes, "counts": vars(self.counts)}, file)
        self._noted_at = time.monotonic()

    def _taken_up(self) -> BinaryIO | None:
        """The partial file of an earlier run, cut to where it was whole; None where there is none of the same key."""
        try:
            note = json.loads(self._note.read_text(encoding="utf-8"))
            same = note["key"] == self._key and self._partial.stat().st_size >= note["bytes"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if not same:
            return None
        file = self._partial.open("r+b", buffering=MEBIBYTE)
        file.truncate(note["bytes"])
        for number, line in enumerate(file, start=1):
            self._digest.update(line)
            self._lines[json.loads(line)["id"]] = number
            self._stood_before(line)
        self._bytes = note["bytes"]
        self.counts = Counts(**note["counts"])
        return file

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, UserError) as error:
            self._cannot_write = True
            reason = (error.strerror or error) if isinstance(error, OSError) else error
            raise UserError(
                f"{self._path}: cannot be written ({reason}); with space again, the same command goes on where it was"
            ) from error


SMALL_BYTES = 32 << 20
"""Below this, starting processes takes longer than converting."""

DESCRIPTION = """\
Turns a publisher's files into records/<task>/<split>.jsonl, with records/<task>/manifest.json beside them: counts,
every dropped row with its reason, hashes, versions. Finished splits are skipped, a split that was cut short goes on.

  dora-vl prepare pope --from downloads/pope --to records
  dora-vl prepare nlvr --from downloads/nlvr --to records --set shares=train:0.8,validation:0.1,test:0.1

Sources (python -c "help('dora_vl.data.benchmarks.<room>')" says where each one's files are published):

""" + "\n".join(
    f"  {name:16} {source.summary}"
    + "".join(f"\n{'':19}--set {option}=...: {text}" for option, text in source.options.items())
    for name, source in SOURCES.items()
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `dora-vl prepare`."""
    parser.add_argument("source", metavar="SOURCE", help="one of the list above")
    parser.add_argument("--from", dest="folder", type=Path, required=True, metavar="FOLDER", help="the published files")
    parser.add_argument("--to", type=Path, default=Path("records"), metavar="FOLDER", help="default: records")
    parser.add_argument("--splits", metavar="A,B", help="only these, such as train,validation; default: all found")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows of each split")
    parser.add_argument("--workers", type=int, metavar="N", help="processes besides this one; default: as files need")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="an option of the source")


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Prepares each split; yields the lines to print."""
    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit is {arguments.limit}; at least 1 row is needed")
    if arguments.workers is not None and arguments.workers < 0:
        raise UserError(f"--workers is {arguments.workers}; 0 converts in this process, N in N others")
    with reading(str(arguments.folder)):
        chosen = chosen_splits(arguments)
    for split in chosen:
        folder = arguments.to / split.task
        workers = arguments.workers if arguments.workers is not None else default_workers(split)
        with _alone_in(folder), _progress_bar(split) as progress:
            prepared = prepare_split(
                split, folder, source=arguments.source, workers=workers, limit=arguments.limit, progress=progress
            )
        yield from summary(prepared)


def chosen_splits(arguments: argparse.Namespace) -> list[Split]:
    """The splits that the source finds and the user wants.

    Raises:
        UserError: no such source, option, folder or split.
    """
    if arguments.source not in SOURCES:
        nearest = get_close_matches(arguments.source, SOURCES, n=1, cutoff=0.0)[0]
        raise UserError(
            f"no source {shown(arguments.source)}; did you mean {nearest!r}? dora-vl prepare --help lists all"
        )
    if not arguments.folder.exists():
        raise UserError(f"{arguments.folder}: no such folder; --from takes the folder with the published files")
    source = SOURCES[arguments.source]
    options = _options(arguments.set, list(source.options), arguments.source)
    find: Callable[[Path, dict[str, str], Path], Iterator[Split]] = getattr(import_module(source.module), source.splits)
    splits = list(find(arguments.folder, options, arguments.to))
    if arguments.splits is None:
        return splits
    wanted = arguments.splits.split(",")
    unknown = [name for name in wanted if name not in {split.name for split in splits}]
    if unknown:
        found = ", ".join(sorted({split.name for split in splits}))
        raise UserError(f"--splits {shown_text(unknown[0], 60)}: {arguments.folder} has files for {found}")
    return [split for split in splits if split.name in wanted]


def default_workers(split: Split) -> int:
    """As many processes as cores, where there is enough to convert."""
    size = sum(path.stat().st_size for path in split.inputs)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if size < SMALL_BYTES or cores == 1 else cores


def summary(prepared: Prepared) -> Iterator[str]:
    """What to say of a split: its counts, and the reasons of what is missing."""
    entry = prepared.entry
    state = "already there" if prepared.already_there else "written"
    if prepared.resumed_after:
        state += f" (resumed after row {prepared.resumed_after:,})"
    yield f"{prepared.path}: {entry['written']:,} records of {entry['rows']:,} rows, {state}"
    if entry["renamed_ids"]:
        yield f"  {entry['renamed_ids']:,} repeated ids were numbered"
    if entry["repeated_records"]:
        yield f"  {entry['repeated_records']:,} records repeat an earlier one under another id; is the file doubled?"
    if 0 < entry["without_answer"] < entry["written"]:
        yield f"  {entry['without_answer']:,} records hold no answer"
    for reason, count in list(entry["reasons"].items())[:5]:
        yield f"  {count:,} dropped: {reason}"
    if len(entry["reasons"]) > 5:
        yield f"  {len(entry['reasons']) - 5} more reasons in manifest.json"
    published = entry["published_rows"]
    if published not in {None, entry["rows"]} and entry["settings"]["limit"] is None:
        yield f"  the publisher's file has {published:,} rows; this one may be another version"


def _options(settings: list[str], known: list[str], source: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or name not in known:
            has = f"has the options {', '.join(known)}" if known else "has no options"
            raise UserError(f"--set {shown_text(setting, 100)}: must be NAME=VALUE; {source} {has}")
        options[name] = value
    return options


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / ".prepare.lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"{folder}: another `dora-vl prepare` writes there; wait for it") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); choose another --to") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _progress_bar(split: Split) -> Iterator[Progress]:
    """Bytes of the inputs, once for their hash and once for their rows, with the time left; none without a terminal."""
    total = 2 * sum(path.stat().st_size for path in split.inputs)
    label = f"{split.task}/{split.name}"
    with tqdm(total=total or None, unit="B", unit_scale=True, desc=label, disable=None, leave=False) as bar:
        yield bar.update
