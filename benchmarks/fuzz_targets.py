"""What `fuzz_files` damages of the publishers: small valid files of every source.

`fuzz_predictions` has the answers.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dora_vl.data.benchmarks.table import SOURCES
from dora_vl.errors import UserError

PUBLISHERS, PREDICTIONS = "publishers", "predictions"
FIXTURES = Path(__file__).parents[1] / "tests" / "sources" / "fixtures"
OTHER_NAMES = {"vqav2-vlt5": "vqav2-karpathy", "gqa-vlt5": "gqa", "nlvr2-vlt5": "nlvr2"}
OTHER_NAMES |= {"how2qa-csv": "how2qa", "yc2c-youcook2": "yc2c"}
"""Fixtures of a source's second form."""
SHARDS, SHARD_WEIGHT = "hugging-face", 0.1
"""Opening a shard takes `datasets` ten times as long as reading any other file."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A command and the files that it reads.

    Attributes:
        files: content by path below the case's folder.
        words: the command; `{files}` and `{out}` are the case's folders.
        weight: how often it is drawn, beside the others.
        java: whether the command may find Java, which takes it seconds.
    """

    kind: str
    name: str
    files: Mapping[str, bytes]
    words: tuple[str, ...]
    weight: float = 1.0
    java: bool = True


def publisher_targets(scratch: Path) -> list[Target]:
    """One for each fixture, and one for each option that reads otherwise."""
    made: list[Target] = []
    for folder in sorted(FIXTURES.iterdir()):
        source = OTHER_NAMES.get(folder.name, folder.name)
        words = ("prepare", source, "--from", "{files}", "--to", "{out}", "--workers", "0")
        made.append(Target(kind=PUBLISHERS, name=folder.name, files=_files(folder), words=words))
        if source == "nlvr":
            shares = (*words, "--set", "shares=train:0.5,test:0.5")
            made.append(Target(kind=PUBLISHERS, name="nlvr in shares", files=_files(folder), words=shares))
        if source == "llava-pretrain":
            own = ("prepare", "llava-json", *words[2:])
            made.append(Target(kind=PUBLISHERS, name="llava-json", files=_files(folder), words=own))
    made.append(_shard_target())
    missing = set(SOURCES) - {target.words[1] for target in made}
    if missing:
        raise UserError(f"{FIXTURES}: no files of the sources {', '.join(sorted(missing))}")
    return made


def _files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def _shard_target() -> Target:
    """A parquet file of questions with pictures."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    picture = next((FIXTURES / "mme").rglob("*.png")).read_bytes()
    rows = [
        {"id": f"q{number}", "question": "What is it?", "answers": ["cat", "dog"], "image": {"bytes": picture}}
        for number in range(6)
    ]
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), stream)
    words = ("prepare", SHARDS, "--from", "{files}", "--to", "{out}", "--workers", "0", "--set", "task=own")
    return Target(
        kind=PUBLISHERS, name=SHARDS, files={"a.parquet": stream.getvalue()}, words=words, weight=SHARD_WEIGHT
    )
