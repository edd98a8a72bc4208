"""What `fuzz_files` damages: small valid files of every source, and right answers to every benchmark's records."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dora_vl.cli import main
from dora_vl.data.examples import Example, iterate_examples
from dora_vl.errors import UserError
from dora_vl.evaluation.benchmarks import BENCHMARKS
from dora_vl.evaluation.commonsense import PATTERNS
from dora_vl.sources.table import SOURCES

PUBLISHERS, PREDICTIONS = "publishers", "predictions"
FIXTURES = Path(__file__).parents[1] / "tests" / "sources" / "fixtures"
OTHER_NAMES = {"vqav2-vlt5": "vqav2-karpathy", "gqa-vlt5": "gqa", "nlvr2-vlt5": "nlvr2"}
OTHER_NAMES |= {"how2qa-csv": "how2qa", "yc2c-youcook2": "yc2c"}
"""Fixtures of a source's second form."""
SHARDS, SHARD_WEIGHT = "hugging-face", 0.1
"""Opening a shard takes `datasets` ten times as long as reading any other file."""
CAPTIONS, CAPTION_WEIGHT = frozenset({"coco_caption", "tvc", "yc2c"}), 0.02
"""Captions are scored by Java programs, seconds for ten of them."""
ANSWERS, RECORDS = "predictions.jsonl", "records.jsonl"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A command and the files that it reads.

    Attributes:
        files: content by path below the case's folder.
        words: the command; `{files}` and `{out}` are the case's folders.
        weight: how often it is drawn, beside the others.
    """

    kind: str
    name: str
    files: Mapping[str, bytes]
    words: tuple[str, ...]
    weight: float = 1.0


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


def prediction_targets(scratch: Path) -> list[Target]:
    """Records of every benchmark with their right answers; where no fixture is of it, records of one like it."""
    records = _records(scratch / "records")
    made: list[Target] = []
    for name in BENCHMARKS:
        path = next((path for path in records if path.parent.name == LIKE.get(name, name)), None)
        if path is None:
            raise UserError(f"{FIXTURES}: no records for the benchmark {name}")
        answers = [{"id": example.id, "answer": _right(example)} for example in iterate_examples(path)]
        written = "".join(json.dumps(answer) + "\n" for answer in answers)
        words = ("evaluate", "--benchmarks", f"{name}={{files}}/{RECORDS}", "--predictions", f"{{files}}/{ANSWERS}")
        files = {ANSWERS: written.encode(), RECORDS: path.read_bytes()}
        weight = CAPTION_WEIGHT if name in CAPTIONS else 1.0
        made.append(Target(kind=PREDICTIONS, name=name, files=files, words=(*words, "--to", "{out}"), weight=weight))
    return made


LIKE = {"exact_match": "textvqa", **dict.fromkeys(sorted(PATTERNS.keys() - {"boolq", "openbookqa"}), "openbookqa")}
"""Benchmarks without a fixture, and whose records they are asked with."""


def _records(to: Path) -> list[Path]:
    """The records of all fixtures; of a benchmark's splits one with answers comes first."""
    for folder in sorted(FIXTURES.iterdir()):
        source = OTHER_NAMES.get(folder.name, folder.name)
        with contextlib.redirect_stdout(io.StringIO()):
            main(["prepare", source, "--from", str(folder), "--to", str(to / folder.name), "--workers", "0"])
    found = [path for path in sorted(to.glob("*/*/*.jsonl")) if not path.parent.name.startswith("llava_m")]
    found = [path for path in found if path.parent.name != "llava_pretrain"]
    return sorted(found, key=lambda path: not next(iterate_examples(path)).answers)


def _right(example: Example) -> str:
    return example.answers[0].text if example.answers else "a"
