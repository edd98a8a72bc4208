"""`manifest.json` of a task: for each split what it was made from, what came out, and every row that did not."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dora_vl.data.examples import JSON, whole_file
from dora_vl.errors import UserError

FILE = "manifest.json"
FORMAT = 2
"""Raised when records change their meaning, so that files of an earlier form are made again."""

MEBIBYTE = 1 << 20


def read_manifest(folder: Path) -> dict[str, JSON]:
    """The task's manifest, or an empty one.

    Raises:
        UserError: the file is there but is no manifest.
    """
    path = folder / FILE
    if not path.is_file():
        return {"splits": {}}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest["splits"], dict):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: not a manifest of `dora-vl prepare`; move it away and run again") from None
    return manifest


def add_to_manifest(folder: Path, source: str, split: str, entry: Mapping[str, JSON]) -> None:
    """Writes the split's entry, keeping the other splits'."""
    splits = {**read_manifest(folder)["splits"], split: {"source": source, **entry}}
    with whole_file(folder / FILE) as file:
        json.dump({"versions": versions(), "splits": splits}, file, ensure_ascii=False, indent=1)
        file.write("\n")


def versions() -> dict[str, str]:
    """What the records were made with."""
    found = {"python": platform.python_version(), "format": str(FORMAT)}
    for package in ("dora-vl", "datasets", "pyarrow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def fingerprints(
    inputs: Sequence[Path], known: Sequence[Mapping[str, JSON]], progress: Callable[[int], object]
) -> list[dict[str, JSON]]:
    """Name, size, modification time and sha256 of each file.

    A file whose size and time are those of `known` is taken for unchanged and not read again.
    """
    before = {(entry["file"], entry["bytes"], entry["modified_ns"]): entry["sha256"] for entry in known}
    result: list[dict[str, JSON]] = []
    for path in inputs:
        stat = path.stat()
        key = (path.name, stat.st_size, stat.st_mtime_ns)
        digest = before.get(key) or file_sha256(path, progress)
        result.append({"file": path.name, "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns, "sha256": digest})
    return result


def content(entries: Sequence[Mapping[str, JSON]]) -> list[tuple[str, str]]:
    """What of fingerprints decides whether files are the same: names and hashes, not times."""
    return [(str(entry["file"]), str(entry["sha256"])) for entry in entries]


def file_sha256(path: Path, progress: Callable[[int], object] = lambda _: None) -> str:
    """The file's sha256 in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(MEBIBYTE):
            digest.update(piece)
            progress(len(piece))
    return digest.hexdigest()
