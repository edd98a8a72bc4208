"""`metrics.json` of `dora-vl evaluate`: all numbers of one model's answers; a later command adds to it or replaces it.

An entry of a benchmark that the command does not name stays only while it is still true: the answers are of the same
content (adapter and base, or predictions file, and what they are compared with), as many were asked, and the
benchmark's file has not changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dora_vl.data.examples import JSON, whole_file
from dora_vl.errors import UserError
from dora_vl.evaluation.predictions_file import file_sha256

METRICS = "metrics.json"
ENTRIES, ASKED_WITH = "benchmarks", "asked_with"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What all numbers of a file are of; hashes tell an adapter from its successor at the same place.

    Attributes:
        answers_sha256: by what was hashed: adapter and base, or predictions.
    """

    answers_of: str
    answers_sha256: Mapping[str, str]
    against: str | None = None
    against_sha256: Mapping[str, str] | None = None
    limit: int | None = None


def refuse_anothers(path: Path) -> None:
    """Keeps a training run's own metrics file from being replaced.

    Raises:
        UserError: the file is there and was not written here.
    """
    if path.is_file() and (there := _read(path)) and not isinstance(there.get(ENTRIES), Mapping):
        raise UserError(f"{path} is not of `dora-vl evaluate`, a training run's perhaps; name another folder with --to")


def write_metrics(
    path: Path,
    origin: Origin,
    entries: Mapping[str, JSON],
    *,
    asked: Sequence[str],
    asked_with: Mapping[str, JSON],
) -> list[str]:
    """Writes the entries, with those of before that are still true; without any there is no file.

    Args:
        entries: of the benchmarks that have a score.
        asked: every benchmark of the command; of these no entry of before stays.
        asked_with: the options of the answers, by benchmark; empty for a predictions file.

    Returns:
        What to say: where the numbers are, and which of before stayed and which went.
    """
    there = _read(path)
    before = _object(there, ENTRIES)
    header = json.loads(json.dumps(vars(origin)))
    same = all(there.get(name) == value for name, value in header.items())
    kept = {name: one for name, one in before.items() if same and name not in asked and _holds(one)}
    gone = [name for name in before if name not in kept and name not in entries]
    asked_before = {name: one for name, one in _object(there, ASKED_WITH).items() if name in kept}
    asked_now = {name: one for name, one in asked_with.items() if name in entries}
    benchmarks = kept | dict(entries)
    if benchmarks:
        with whole_file(path) as stream:
            content = {**header, ASKED_WITH: asked_before | asked_now, ENTRIES: benchmarks}
            stream.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    else:
        path.unlink(missing_ok=True)
    return _said(path, entries=list(entries), kept=list(kept), gone=gone)


def _said(path: Path, *, entries: Sequence[str], kept: Sequence[str], gone: Sequence[str]) -> list[str]:
    lines = []
    if gone:
        lines.append(f"{path}: no longer holds {', '.join(gone)}: of other answers, questions, --limit or --against")
    if entries:
        stayed = f", those of {', '.join(kept)} from before" if kept else ""
        lines.append(f"{path}: all numbers{stayed}")
    return lines


def _holds(entry: Mapping[str, JSON]) -> bool:
    """Whether the benchmark's file is what it was when it was scored."""
    file = Path(str(entry.get("file")) if isinstance(entry, Mapping) else "")
    return file.is_file() and file_sha256(file) == entry.get("file_sha256")


def _object(content: Mapping[str, JSON], name: str) -> Mapping[str, JSON]:
    value = content.get(name, {})
    return value if isinstance(value, Mapping) else {}


def _read(path: Path) -> Mapping[str, JSON]:
    """What is there; nothing where there is no file, or none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, Mapping) else {}
