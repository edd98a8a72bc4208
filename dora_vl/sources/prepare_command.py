"""`dora-vl prepare`: a publisher's files to records, with progress, a manifest, and a way to go on after a stop."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from dora_vl.errors import UserError, shown, shown_text
from dora_vl.sources.prepare_split import Prepared, prepare_split, reading
from dora_vl.sources.published import Progress, Split
from dora_vl.sources.table import SOURCES

SMALL_BYTES = 32 << 20
"""Below this, starting processes takes longer than converting."""

DESCRIPTION = """\
Turns a publisher's files into records/<task>/<split>.jsonl, with records/<task>/manifest.json beside them: counts,
every dropped row with its reason, hashes, versions. Finished splits are skipped, a split that was cut short goes on.

  dora-vl prepare pope --from downloads/pope --to records
  dora-vl prepare nlvr --from downloads/nlvr --to records --set shares=train:0.8,validation:0.1,test:0.1

Sources (python -c "help('dora_vl.sources.<module>')" says where each one's files are published):

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
    find: Callable[[Path, dict[str, str], Path], Iterator[Split]] = import_module(source.module).splits
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
