"""`dora-vl check-data`: what would make samples unusable, before a run finds it: one table with counts and ids."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from dora_vl.data.media import MediaFolder
from dora_vl.data.readers.columns import Columns, roles_of_columns
from dora_vl.data.readers.containers import BESIDE_ARROW, JSON_ENDINGS, READERS, ending_of
from dora_vl.errors import UserError, shown_names, shown_text
from dora_vl.sources.check_media import MediaCheck
from dora_vl.sources.check_rows import LEFT_OUT, FileCheck, Finding, Limits, overlap, pairs, total

DESCRIPTION = """\
Checks data files of every format that training reads, and records of `dora-vl prepare`. Finds duplicate ids, empty
and missing answers, placeholders that differ from the pictures, samples that are too long, missing, empty, truncated
and broken media, rows of mixed formats, and samples that stand in two of the files. Prints one table; exit status 1
when something was found.

  dora-vl check-data records/nlvr/train.jsonl records/nlvr/test.jsonl --media downloads/nlvr
  dora-vl check-data train.json --media pictures --decode --tokenizer vicuna-7b-v1.5 --longest 2048
"""

ENDINGS = (*JSON_ENDINGS, *READERS)
NO_DATA = ("manifest.json", *BESIDE_ARROW)
WORDS, TOKENS = 1_500, 2_048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `dora-vl check-data`."""
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="data files, or folders of them")
    parser.add_argument(
        "--media", type=Path, metavar="FOLDER", help="the root of pictures and videos; else not looked at"
    )
    parser.add_argument("--videos", type=Path, metavar="FOLDER", help="the root of videos, where it is another")
    parser.add_argument("--follow-links", action="store_true", help="files may be links out of those folders")
    parser.add_argument(
        "--decode", action="store_true", help="decode each picture whole too: slower, finds damage inside"
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="a folder with tokenizer.json; else words count"
    )
    add_columns(parser)
    parser.add_argument("--longest", type=int, metavar="N", help=f"default {TOKENS} tokens, or {WORDS} words")


def add_columns(parser: argparse.ArgumentParser) -> None:
    """The options that say what columns are, as `data.columns` and `data.ignore_columns` do."""
    parser.add_argument("--columns", metavar="COLUMN=ROLE,...", default="", help="such as photo_file=image")
    parser.add_argument("--ignore-columns", metavar="COLUMN,...", default="", help="columns to be left out")


def columns_of(arguments: argparse.Namespace) -> Columns:
    """What the options say of the columns.

    Raises:
        UserError: `--columns` is of another form, or names what no column can be.
    """
    pairs = [part.rpartition("=") for part in filter(None, arguments.columns.split(","))]
    if any(not column for column, _, _ in pairs):
        raise UserError(f"--columns {shown_text(arguments.columns, 100)}: must be COLUMN=ROLE,...")
    roles = {column: role for column, _, role in pairs}
    return Columns(roles, tuple(filter(None, arguments.ignore_columns.split(","))))


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Checks the files; yields the lines to print.

    Raises:
        SystemExit: with status 1, after the table, when something was found.
    """
    files = data_files(arguments.paths)
    looked_in = {"--media": arguments.media, "--videos": arguments.videos}
    for option, folder in looked_in.items():
        if folder is not None and not folder.is_dir():
            raise UserError(f"{folder}: no such folder; {option} takes the root of the samples' paths")
    media, videos = (
        None if folder is None else MediaCheck(MediaFolder(folder, arguments.follow_links), decode=arguments.decode)
        for folder in looked_in.values()
    )
    columns = columns_of(arguments)
    checks = [_check(file, limits_of(arguments, file), media, videos, columns) for file in files]
    for check in checks:
        if left := [name for name, roles in roles_of_columns(check.uses).items() if not roles]:
            yield f"{shown_text(check.path.name, 120)}: left out {shown_names(left)}"
    found = [(check.path, finding) for check in checks for finding in check.findings.values()]
    for first, second in pairs(checks):
        shared = overlap(first, second)
        if shared is not None:
            found.append((first.path, shared))
    rows = sum(check.rows for check in checks)
    roots = [one for one in (media, videos) if one is not None]
    looked = f", {sum(one.looked_at for one in roots):,} media files" if roots else ""
    if not found:
        yield f"{len(files)} files, {rows:,} samples{looked}: nothing found"
        return
    yield from table(found)
    if any(finding.problem == LEFT_OUT for _, finding in found):
        yield f"{LEFT_OUT}: --columns COLUMN=ROLE,... says what they are, --ignore-columns COLUMN,... leaves them out"
    yield f"{len(files)} files, {rows:,} samples{looked}: {total(finding for _, finding in found):,} problems"
    raise SystemExit(1)


def data_files(paths: Sequence[Path]) -> list[Path]:
    """The files themselves, and those of the folders (manifests left out).

    Raises:
        UserError: a path is neither, or nothing is in it.
    """
    files: list[Path] = []
    for path in paths:
        inside = [path] if path.is_file() else []
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if ending_of(file) in ENDINGS)
            inside = [file for file in found if file.name not in NO_DATA and not file.name.startswith(".")]
        if not inside:
            raise UserError(f"{path}: neither a data file nor a folder with {', '.join(ENDINGS)} in it")
        files += inside
    return list(dict.fromkeys(files))


def limits_of(arguments: argparse.Namespace, file: Path) -> Limits:
    """What is too long, and whether the file's answers may be kept back, as in test sets."""
    if arguments.longest is not None and arguments.longest < 1:
        raise UserError(f"--longest is {arguments.longest}; at least 1 is needed")
    length = _words if arguments.tokenizer is None else _tokens(arguments.tokenizer)
    usual = WORDS if arguments.tokenizer is None else TOKENS
    return Limits(
        most=arguments.longest or usual,
        unit="words" if arguments.tokenizer is None else "tokens",
        length=length,
        answers_needed=not file.stem.startswith("test"),
    )


def table(found: Sequence[tuple[Path, Finding]]) -> Iterator[str]:
    """One line for each kind of problem in each file, the most frequent first."""
    rows = [("file", "problem", "samples", "ids", "for example")]
    for path, finding in sorted(found, key=lambda pair: (str(pair[0]), -pair[1].count)):
        more = ", ..." if finding.count > len(finding.ids) else ""
        ids = ", ".join(shown_text(one) for one in finding.ids) + more
        shown = shown_text(str(Path(path.parent.name, path.name)), 120)  # its name alone in the current folder
        rows.append(
            (shown, shown_text(finding.problem, 120), f"{finding.count:,}", ids, shown_text(finding.example, 100))
        )
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        cells = [text.ljust(width) for text, width in zip(row, widths, strict=False)]
        yield "  ".join([*cells, row[4]]).rstrip()


def _check(
    file: Path, limits: Limits, media: MediaCheck | None, videos: MediaCheck | None, columns: Columns
) -> FileCheck:
    with tqdm(total=file.stat().st_size, unit="B", unit_scale=True, desc=file.name, disable=None, leave=False) as bar:
        return FileCheck(file, limits, media, videos, columns).run(bar.update)


def _words(text: str) -> int:
    return len(text.split())


def _tokens(folder: Path) -> Callable[[str], int]:
    """The tokenizer of a model's folder, through `tokenizers` alone."""
    path = folder / "tokenizer.json" if folder.is_dir() else folder
    if not path.is_file():
        raise UserError(f"{path}: no such file; --tokenizer takes a folder with tokenizer.json")
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"{path}: not a tokenizer: {' '.join(str(error).split())[:200]}") from error
    return lambda text: len(tokenizer.encode(text).ids)
