"""`dora-vl prepare`: converts a publisher's files to records, with a manifest."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import platform
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import IO, cast

from tqdm import tqdm

from dora_vl import __version__
from dora_vl.data.benchmarks.fields import UNKNOWN_ID, Raw, Split
from dora_vl.data.benchmarks.table import SOURCES
from dora_vl.data.example import JSON, Example, json_line, to_record
from dora_vl.errors import BadSample, UserError, positive_int, short_repr, short_text
from dora_vl.files import file_sha256, locked, whole_file, write_json

FORMAT = 2  # raise it when records change their meaning: older files are then made again
ROWS_TO_JUDGE = 1000
"""If none of this many first rows can be used, the file is not the one that the source expects."""

DESCRIPTION = """\
Turns a publisher's files into records/<task>/<split>.jsonl, with records/<task>/manifest.json beside them: counts,
every dropped row with its reason, hashes, versions. Finished splits are skipped.

  dora-vl prepare pope --from downloads/pope --to records
  dora-vl prepare nlvr --from downloads/nlvr --to records --set shares=train:0.8,validation:0.1,test:0.1

Sources (python -c "help('dora_vl.data.benchmarks.images')", llava, videos... says where the files are published):

""" + "\n".join(
    f"  {name:16} {source.summary}"
    + "".join(f"\n{'':19}--set {option}=...: {text}" for option, text in source.options.items())
    for name, source in SOURCES.items()
)


@dataclass(kw_only=True)
class ConversionCounts:
    """Counts the rows that were read and the records written, and says which rows were not used.

    Attributes:
        renamed_ids: records whose id came before and got a number.
        without_answer: records that hold none, of a test set or because the source allows it.
        repeated_records: records that are an earlier one under another id, where ids say the place.
    """

    rows: int = 0
    written: int = 0
    renamed_ids: int = 0
    without_answer: int = 0
    repeated_records: int = 0
    dropped_rows: list[dict[str, JSON]] = field(default_factory=list)

    def first_reason(self) -> str:
        """Returns the first dropped row, for a message."""
        first = self.dropped_rows[0]
        return f"the first is row {first['row']}, id {first['id']}: {first['reason']}"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The outcome of preparing a split; `entry` is its entry in the manifest."""

    path: Path
    entry: Mapping[str, JSON]
    already_there: bool


def prepare_split(split: Split, folder: Path, *, source: str, limit: int | None) -> Prepared:
    """Makes `folder/<split>.jsonl`, unless it exists and was made from the same files with the same settings."""
    path, manifest = folder / f"{split.name}.jsonl", folder / "manifest.json"
    try:
        splits = json.loads(manifest.read_text(encoding="utf-8"))["splits"] if manifest.is_file() else {}
        others = dict(splits.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{manifest}: not a manifest of `dora-vl prepare`; move it away and run again") from None
    before = others.pop(split.name, {})
    with reading(_names(split)):
        inputs = [
            {"file": file.name, "bytes": file.stat().st_size, "sha256": file_sha256(file)} for file in split.inputs
        ]
    settings = {**split.settings, "limit": limit, "source": source, "format": FORMAT}
    is_same = before.get("settings") == settings and before.get("inputs") == inputs and path.is_file()
    if is_same and path.stat().st_size == before["bytes"] and file_sha256(path) == before["sha256"]:
        return Prepared(path=path, entry=before, already_there=True)
    started = time.monotonic()
    with whole_file(path, binary=True) as file:
        records = Records(split, path, file)
        _write_rows(split, records, limit)
    counts = records.counts
    entry: dict[str, JSON] = {
        "file": path.name,
        "published_rows": split.published_rows,
        **vars(counts),
        "dropped": len(counts.dropped_rows),
        "reasons": dict(Counter(str(dropped["reason"]) for dropped in counts.dropped_rows).most_common()),
        "notes": dict(split.notes),
        "sha256": records.digest.hexdigest(),
        "bytes": path.stat().st_size,
        "inputs": inputs,
        "settings": settings,
        "seconds": round(time.monotonic() - started, 3),
    }
    versions = {"python": platform.python_version(), "format": str(FORMAT), "dora-vl": __version__}
    write_json(manifest, {"versions": versions, "splits": {**others, split.name: {"source": source, **entry}}})
    return Prepared(path=path, entry=entry, already_there=False)


def _write_rows(split: Split, records: Records, limit: int | None) -> None:
    counts, names = records.counts, _names(split)
    for row in _read_rows(split, limit):
        records.add(row)
    if not counts.rows:
        raise UserError(f"{names}: holds no rows")
    if not counts.written:
        raise UserError(f"{names}: none of its {counts.rows:,} rows can be used; {counts.first_reason()}")
    if counts.repeated_records * 2 == counts.written:
        doubled = f"{counts.repeated_records:,} of its {counts.written:,} records repeat an earlier one"
        raise UserError(f"{names}: is doubled, {doubled}; fetch the file again")


def _read_rows(split: Split, limit: int | None) -> Iterator[Raw]:
    name, total = f"{split.task}/{split.name}", split.published_rows if limit is None else limit
    with reading(_names(split)):
        yield from tqdm(islice(split.rows(), limit), name, total, unit=" rows", disable=None, leave=False)


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
    """Turns an error of reading a file into one line, which names the file, or `where` if the system does not."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or where}: cannot be read ({error.strerror or error})") from error


def _names(split: Split) -> str:
    return ", ".join(short_text(str(path), 120) for path in split.inputs[:2]) or f"{split.task}/{split.name}"


class Records:
    """The records of a split: converts rows, writes the records as lines, and counts."""

    def __init__(self, split: Split, path: Path, file: IO[bytes]) -> None:
        self._split = split
        self._path = path
        self._file = file
        self._lines: dict[str, int] = {}  # the line that each id is in
        self._contents = set[bytes]()
        self.counts = ConversionCounts()
        self.digest = hashlib.sha256()

    def add(self, row: Raw) -> None:
        """Writes what a row becomes; one that cannot be used keeps its reason in the counts."""
        self.counts.rows += 1
        try:
            lines = self._converted(row)
        except BadSample as error:
            self._drop(short_text(error.sample_id, 80), short_text(error.reason, 200))
        except RecursionError:
            self._drop(UNKNOWN_ID, "its values are nested too deeply")
        else:
            for name, line, is_answered in lines:
                self._write(name, line, is_answered=is_answered)

    def _converted(self, row: Raw) -> list[tuple[str, str, bool]]:
        """Returns the records of a row: the id, the line of JSON, and whether it is answered, of each."""
        lines: list[tuple[str, str, bool]] = []
        result = self._split.convert(row)
        for item in [cast(Example, result)] if isinstance(result, Example | Mapping) else result:
            record = to_record(item) if isinstance(item, Example) else item
            name, is_answered = str(record["id"]), not isinstance(item, Example) or bool(item.answers or item.turns)
            try:
                lines.append((name, json_line(record, name), is_answered))
            except UserError as error:
                raise BadSample(name, str(error).removeprefix(f"{name}: ")) from None
        return lines

    def _drop(self, name: str, reason: str) -> None:
        counts = self.counts
        counts.dropped_rows.append({"row": counts.rows, "id": name, "reason": reason})
        if not counts.written and len(counts.dropped_rows) >= ROWS_TO_JUDGE:
            none = f"none of the first {ROWS_TO_JUDGE:,} rows can be used"
            raise UserError(f"{self._path}: {none}; {counts.first_reason()}")

    def _write(self, name: str, line: str, *, is_answered: bool) -> None:
        counts = self.counts
        if name in self._lines:
            if self._split.repeated_ids == "refuse":
                lines = f"lines {self._lines[name]} and {counts.written + 1}"
                raise UserError(f"{self._path}: id {short_repr(name)} in {lines}; the publisher's ids must be unique")
            name = next(new for number in count(2) if (new := f"{name}#{number}") not in self._lines)
            counts.renamed_ids += 1
            line = json_line({**json.loads(line), "id": name}, name)
        counts.written += 1
        counts.without_answer += not is_answered
        counts.repeated_records += self._split.ids_by_place and self._stood_before(line)
        self._lines[name] = counts.written
        self._file.write(line.encode())
        self.digest.update(line.encode())

    def _stood_before(self, line: str) -> bool:
        """Tells whether an earlier record says the same under another id, which comes first in a line."""
        _, end = json.JSONDecoder().raw_decode(line, len('{"id":'))
        digest = hashlib.blake2b(line[end:].encode(), digest_size=12).digest()
        before = digest in self._contents
        self._contents.add(digest)
        return before


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `dora-vl prepare`."""
    parser.description = DESCRIPTION
    parser.set_defaults(work=run)
    parser.add_argument("source", choices=SOURCES, metavar="SOURCE", help="one of the list above")
    parser.add_argument("--from", dest="folder", type=Path, required=True, metavar="FOLDER", help="the published files")
    parser.add_argument("--to", type=Path, default=Path("records"), metavar="FOLDER", help="default: records")
    parser.add_argument("--splits", metavar="A,B", help="only these, such as train,validation; default: all found")
    parser.add_argument("--limit", type=positive_int, metavar="N", help="only the first N rows of each split")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="an option of the source")


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Prepares each split; yields the lines to print."""
    with reading(str(arguments.folder)):
        chosen = _chosen_splits(arguments)
    for split in chosen:
        folder = arguments.to / split.task
        with _alone_in(folder):
            prepared = prepare_split(split, folder, source=arguments.source, limit=arguments.limit)
        yield from summary(prepared)


def _chosen_splits(arguments: argparse.Namespace) -> list[Split]:
    source = SOURCES[arguments.source]
    options: dict[str, str] = {}
    for setting in arguments.set:
        name, equals, value = setting.partition("=")
        if not equals or name not in source.options:
            has = f"has the options {', '.join(source.options)}" if source.options else "has no options"
            raise UserError(f"--set {short_text(setting, 100)}: must be NAME=VALUE; {arguments.source} {has}")
        options[name] = value
    splits = list(source.splits(arguments.folder, options, arguments.to))
    names = [split.name for split in splits] if arguments.splits is None else arguments.splits.split(",")
    if unknown := set(names) - {split.name for split in splits}:
        known_names = ", ".join(sorted({split.name for split in splits}))
        raise UserError(f"--splits {short_text(min(unknown), 60)}: {arguments.folder} has files for {known_names}")
    return [split for split in splits if split.name in names]


def summary(prepared: Prepared) -> Iterator[str]:
    """Yields a split's summary lines: its counts, and why rows are missing."""
    entry = prepared.entry
    state = "already there" if prepared.already_there else "written"
    yield f"{prepared.path}: {entry['written']:,} records of {entry['rows']:,} rows, {state}"
    if entry["renamed_ids"]:
        yield f"  {entry['renamed_ids']:,} repeated ids were numbered"
    if entry["repeated_records"]:
        yield f"  {entry['repeated_records']:,} records repeat an earlier one under another id; is the file doubled?"
    if 0 < entry["without_answer"] < entry["written"]:
        yield f"  {entry['without_answer']:,} records hold no answer"
    for reason, times in list(entry["reasons"].items())[:5]:
        yield f"  {times:,} dropped: {reason}"
    if len(entry["reasons"]) > 5:
        yield f"  {len(entry['reasons']) - 5} more reasons in manifest.json"
    published = entry["published_rows"]
    if published not in {None, entry["rows"]} and entry["settings"]["limit"] is None:
        yield f"  the publisher's file has {published:,} rows; this one may be another version"


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder / ".prepare.lock", wait=False))
        except BlockingIOError:
            raise UserError(f"{folder}: another `dora-vl prepare` writes there; wait for it") from None
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror or error}); choose another --to") from error
        yield
