"""Writes easy-VQA's questions about colours and shapes with plain answers, and pairs of a right and a wrong one.

    dora-vl quickstart
    python -m benchmarks.reward_rows --from runs/demo/data --to runs/rewards

The wrong answer of a pair is another one to such questions, drawn by the row's id.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dora_vl.files import write_json_lines

REASON_END = ", so "
"""The demo's answers give their reason before this text: "blue circle, so blue"."""
SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


def named(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows whose answer is a colour or a shape, the answer without its reason."""
    columns = [
        {
            "id": row["id"],
            "image": row["image"],
            "question": row["conversations"][0]["value"].removeprefix("<image>\n"),
            "answer": row["conversations"][1]["value"].rpartition(REASON_END)[2],
        }
        for row in rows
    ]
    return [row for row in columns if row["answer"] in (*SHAPES, *COLOURS)]


def with_wrong_answer(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row with `chosen` and `rejected` in place of `answer`."""
    answers = SHAPES if row["answer"] in SHAPES else COLOURS
    wrong = random.Random(row["id"]).choice([answer for answer in answers if answer != row["answer"]])
    return {**{name: row[name] for name in ("id", "image", "question")}, "chosen": row["answer"], "rejected": wrong}


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes three splits, and the pairs of two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", type=Path, required=True, help="the demo's runs/demo/data")
    parser.add_argument("--to", type=Path, required=True, help="a folder, made where it is not there")
    options = parser.parse_args(arguments)
    options.to.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation", "test"):
        rows = named(json.loads((options.source / f"{split}.json").read_text("utf-8")))
        random.Random(0).shuffle(rows)  # `evaluation.limit` takes the first ones, of all kinds
        write_json_lines(options.to / f"{split}.jsonl", rows)
        if split != "test":
            write_json_lines(options.to / f"{split}_pairs.jsonl", [with_wrong_answer(row) for row in rows])


if __name__ == "__main__":
    main()
