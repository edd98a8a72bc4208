"""Which file of a person's folder holds the questions, and which folder the pictures' paths start from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from PIL import Image

from dora_vl.data.media import MediaFolder, path_inside
from dora_vl.data.readers.columns import USUAL, Columns
from dora_vl.data.readers.containers import BESIDE_ARROW, JSON_ENDINGS, READERS, ending_of, find_files
from dora_vl.errors import BadSample, UserError, shown, shown_names

MANIFESTS = ("manifest.json", *BESIDE_ARROW)
SHARDED = (".parquet", ".arrow", ".tar")
"""Of these, several files in one folder are one set."""
MOST_FILES, MOST_NAMES = 2_000, 200
EXAMPLE = "image,question,answer"
RUN_FILE = "run.yaml"
"""What `dora-vl init` writes: a folder that holds one is a run's."""


def find_questions(folder: Path, columns: Columns = USUAL) -> Path:
    """The one file, or folder of shards, below a folder whose rows are questions or captions.

    Raises:
        UserError: there is none (it says what one looks like), or there are several.
    """
    tried: dict[Path, str] = {}
    found: list[Path] = []
    for path in islice(_data_files(folder), MOST_FILES):
        problem = why_no_questions(path, columns)
        if problem is None:
            found.append(path)
        else:
            tried[path] = problem
    if len(found) == 1:
        return found[0]
    if found:
        names = shown_names(path.relative_to(folder) for path in found)
        raise UserError(f"{folder}: {len(found)} files hold questions, {names}; name one with --questions FILE")
    if tried:
        first, problem = next(iter(tried.items()))
        raise UserError(
            f"{folder}: none of its {len(tried)} data files holds questions; {problem} (columns such as {EXAMPLE}, "
            f"or a format of docs/data.md){'' if len(tried) == 1 else f'; that is the first, {first.name}'}"
        )
    pictures = sum(1 for _ in islice(picture_files(folder), MOST_FILES))
    raise UserError(
        f"{folder}: {pictures:,} pictures and no file of questions ({', '.join([*JSON_ENDINGS, *READERS])}); write a "
        f"questions.csv with the first line {EXAMPLE} and a line for each question, or name a file with --questions"
    )


def why_no_questions(path: Path, columns: Columns = USUAL) -> str | None:
    """Why the first row of a file cannot be a sample; None where it can."""
    try:
        first = next(find_files(path).rows(), None)
    except UserError as error:
        return str(error)
    if first is None:
        return f"{path.name} is empty"
    return None if columns.shape_of(first) is not None else f"{path.name}: its columns are {shown_names(first)}"


def root_of_pictures(folder: Path, questions: Path, names: Sequence[str]) -> Path:
    """The folder from which most of the first names lead to files; of equals the nearest to `folder`.

    Args:
        names: of pictures and videos, as rows have them.

    Raises:
        UserError: from no folder does any of them.
    """
    some = list(dict.fromkeys(names))[:MOST_NAMES]
    if not some:
        return folder
    beside = questions if questions.is_dir() else questions.parent
    below = sorted(
        {path.parent for path in islice(picture_files(folder), 50 * MOST_FILES)}, key=lambda one: len(one.parts)
    )
    above = [parent for one in below for parent in one.parents if parent.is_relative_to(folder)]
    roots = list(dict.fromkeys([folder, beside, *below, *above]))[:MOST_FILES]
    hits = Counter({root: sum(_is_there(root, name) for name in some) for root in roots})
    best, count = max(hits.items(), key=lambda pair: (pair[1], -roots.index(pair[0])))
    if not count:
        raise UserError(
            f"{questions}: not one of its first {len(some)} pictures is below {folder}, such as {shown(some[0])}; "
            "give the folder that holds them, or correct the paths"
        )
    return best


def picture_files(folder: Path) -> Iterator[Path]:
    """Files below a folder whose names end as pictures' do."""
    Image.init()
    endings = frozenset(Image.EXTENSION)
    return (path for path in _files_below(folder) if path.suffix.lower() in endings)


def _data_files(folder: Path) -> Iterator[Path]:
    """Data files below a folder, a folder of shards as one."""
    seen: set[Path] = set()
    for path in _files_below(folder):
        ending = ending_of(path)
        if path.name in MANIFESTS or ending not in (*JSON_ENDINGS, *READERS):
            continue
        whole = _shards(path) if ending in SHARDED else path
        if whole not in seen:
            seen.add(whole)
            yield whole


def _shards(path: Path) -> Path:
    """The folder of a shard, where others of its kind are beside it; else the file."""
    siblings = sum(one.suffix.lower() == path.suffix.lower() for one in path.parent.iterdir())
    return path.parent if siblings > 1 or (path.parent / BESIDE_ARROW[0]).is_file() else path


def _files_below(folder: Path) -> Iterable[Path]:
    """Files in order, those of hidden folders and of runs left out."""
    found = sorted(folder.rglob("*"))
    runs = {path.parent for path in found if path.name == RUN_FILE}
    for path in found:
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and runs.isdisjoint(path.parents):
            yield path


def _is_there(root: Path, name: str) -> bool:
    try:
        return path_inside(MediaFolder(root, follow_links=True), name).is_file()
    except (BadSample, OSError, ValueError):
        return False
