"""Writes the rows of docs/preferences.md's miniatures: easy-VQA's answers alone, and pairs of a right and a wrong one.

    dora-vl quickstart
    python -m benchmarks.miniature_rows --from runs/demo/data --to runs/miniatures

The wrong answer of a pair is another answer that questions of the same first word have, drawn by the row's id.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def without_reasons(rows: Sequence[Row], reason_end: str = ", so ") -> list[dict[str, Any]]:
    """Returns rows whose answers are the part behind `reason_end`: "no" of "blue circle, so no"."""
    return [
        {
            "id": row["id"],
            "image": row["image"],
            "question": row["conversations"][0]["value"].removeprefix("<image>\n"),
            "answer": row["conversations"][1]["value"].rpartition(reason_end)[2],
        }
        for row in rows
    ]


def pairs(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns rows with `chosen` and `rejected` in place of `answer`."""
    answers: defaultdict[str, set[str]] = defaultdict(set)
    for row in rows:
        answers[kind_of(row)].add(row["answer"])
    return [
        {
            **{name: row[name] for name in ("id", "image", "question")},
            "chosen": row["answer"],
            "rejected": random.Random(row["id"]).choice(sorted(answers[kind_of(row)] - {row["answer"]})),
        }
        for row in rows
    ]


def kind_of(row: Row) -> str:
    """Returns what a question asks for: a colour, a shape, or yes or no."""
    words = row["question"].split()
    if words[0] != "what":
        return "yes or no"
    return "colour" if "color" in words else "shape"


def write_lines(path: Path, rows: Sequence[Row]) -> None:
    """Writes a JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the rows into a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True)
    options = parser.parse_args(arguments)
    options.to.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation", "test"):
        rows = without_reasons(json.loads((options.source / f"{split}.json").read_text("utf-8")))
        write_lines(options.to / f"{split}.jsonl", rows)
        if split != "test":
            write_lines(options.to / f"{split}_pairs.jsonl", pairs(rows))


if __name__ == "__main__":
    main()
