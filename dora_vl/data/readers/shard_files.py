"""Which files of a folder hold its rows: of those that `datasets` saved, and of which split each is by its name.

Names are read as `datasets` reads a folder without a card: words such as `train` or `val`, in the file's name or in
its folder's, and whatever stands before `-00000-of-00002`. But different words are never one split here: `dev` and
`validation` of MMMU are not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath

from dora_vl.data.text_file import json_of
from dora_vl.errors import UserError, shown, shown_names

SAVED_STATE, SAVED_SPLITS = "state.json", "dataset_dict.json"
BESIDE_ARROW = ("dataset_info.json", SAVED_STATE, SAVED_SPLITS)
"""What `datasets` writes beside the Arrow files of a folder."""
LEFTOVERS = ("cache-", "tmp")
"""How names of Arrow files begin that `datasets` keeps beside a set's own: what `map` and `filter` made of its rows."""

WORDS: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "evaluation", "eval"),
}
"""The words that a name says its split with, by what they mean."""
_WORD = "|".join(word for words in WORDS.values() for word in words)
_ANY_WORD = re.compile(rf"(?:^|[-._ 0-9])({_WORD})(?=[-._ 0-9]|$)")
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-[0-9]{5}-of-[0-9]{5}")


def of_the_set(found: Iterable[Path]) -> list[Path]:
    """The files without the Arrow files that are no shards of the set beside them.

    Beside a `state.json` of `datasets` the shards are those that it lists, in its order.

    Raises:
        UserError: that file cannot be read, or lists one that is not beside it.
    """
    by_folder: dict[Path, list[Path]] = {}
    for path in found:
        by_folder.setdefault(path.parent, []).append(path)
    return [path for folder, paths in by_folder.items() for path in _of_one_set(folder, paths)]


def _of_one_set(folder: Path, paths: list[Path]) -> list[Path]:
    arrow = [path for path in paths if path.suffix.lower() == ".arrow"]
    if not arrow:
        return paths
    listed = _saved_names(folder / SAVED_STATE)
    if listed is None:
        return [path for path in paths if path not in arrow or not path.name.startswith(LEFTOVERS)]
    there = {path.name: path for path in arrow}
    gone = [name for name in listed if name not in there]
    if gone:
        raise UserError(
            f"{folder / SAVED_STATE}: lists {shown(gone[0])}, which is no Arrow file beside it; copy the folder again"
        )
    return [path for path in paths if path not in arrow] + [there[name] for name in listed]


def _saved_names(state: Path) -> list[str] | None:
    """The files that a saved set consists of; None where nothing, or another program's file, says so."""
    if not state.is_file():
        return None
    try:
        content = json_of(state.read_text(encoding="utf-8"), str(state))
    except (OSError, UnicodeError) as error:
        raise UserError(f"{state}: cannot be read ({error}); copy the folder again") from None
    entries = content.get("_data_files") if isinstance(content, Mapping) else None
    if not isinstance(entries, list):
        return None
    said = [entry.get("filename") if isinstance(entry, Mapping) else entry for entry in entries]
    names = [name for name in said if isinstance(name, str)]
    if len(names) < len(said):
        raise UserError(f"{state}: its _data_files must name files, got {shown(entries)}; copy the folder again")
    return names


def by_split(folder: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """The files of each split, where names say so; all under "" where none does, or some do and name but one.

    Args:
        folder: what is looked through; only names below it count.

    Raises:
        UserError: there are several, and a file does not say which it belongs to.
    """
    said = {file: _named_split(folder, file.relative_to(folder)) for file in files}
    if any(said.values()):
        said = {file: name or _weakly_named_split(folder, file.relative_to(folder)) for file, name in said.items()}
    splits: dict[str, list[Path]] = {}
    for file, name in said.items():
        splits.setdefault(name, []).append(file)
    named = [name for name in splits if name]
    if len(splits) > 1 and len(named) == 1:
        return {"": list(files)}
    if "" in splits and named:
        raise UserError(
            f"{folder}: names say splits ({shown_names(named)}), but not that of {splits[''][0].relative_to(folder)}; "
            "give one file, or a folder for each split"
        )
    return splits


def meaning(name: str) -> str | None:
    """`train`, `validation` or `test` for a split's name that means it: `val`, `test_seen`."""
    word = _word(name.lower())
    return next((split for split, words in WORDS.items() if word in words), None)


def counted(splits: Mapping[str, Sequence[Path]]) -> str:
    """The splits for a message, each with its number of files."""
    return shown_names(f"{name} ({len(files)})" for name, files in splits.items())


def _named_split(folder: Path, path: PurePath) -> str:
    """What a file's name says, else a folder's; "" where none says anything."""
    if len(path.parts) > 1 and (folder / SAVED_SPLITS).is_file():
        return path.parts[0]
    name = path.name.lower()
    shard = _SHARD.match(name)
    if shard and _ANY_WORD.match(name):
        return shard[1]  # `test_seen` and `test_unseen` are two
    return _word(name) or next(filter(None, (_word(part.lower()) for part in reversed(path.parts[:-1]))), "")


def _weakly_named_split(folder: Path, path: PurePath) -> str:
    """What counts beside files that say splits in words: `testdev-00000-of-00001`, or the folder of a saved set."""
    if len(path.parts) > 1 and (folder / path).with_name(SAVED_STATE).is_file():
        return path.parts[-2]
    shard = _SHARD.match(path.name)
    return shard[1] if shard else ""


def _word(name: str) -> str:
    """The word that a name begins with, else the last one in it."""
    found = _ANY_WORD.match(name)
    return found[1] if found else next(iter(reversed(_ANY_WORD.findall(name))), "")
