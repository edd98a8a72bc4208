"""A person's rows in two halves, to train on and to test with: no picture in both, not even as a copy."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dora_vl.data.training_rows import held_out_places
from dora_vl.errors import UserError
from dora_vl.setup.look import Look, Row

TEST_SHARE, MOST_TESTED = 0.2, 1_000
"""A fifth is held out, of large sets as many as tell a score to 3 %."""


def usual_share(rows: int) -> float:
    """The share that is held out where nobody says one."""
    return min(TEST_SHARE, MOST_TESTED / max(1, rows))


def split(look: Look, *, share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """The rows to train on and those to test with, each in the file's order.

    Rows of one picture, by its content, stay together; see `training_rows.held_out_places`.

    Raises:
        UserError: the share is none, or leaves one side empty.
    """
    if not 0 < share < 1:
        raise UserError(f"--test-share is {share}; it must be above 0 and below 1")
    media = [[look.pictures.keys[name] for name in row.media] for row in look.rows]
    ids = [f"{number}" for number in range(len(look.rows))]
    try:
        held = set(held_out_places(ids, media, share=share, seed=seed).tolist())
    except UserError:
        groups = len({key for keys in media for key in keys}) or len(ids)
        raise UserError(
            f"{look.questions}: {len(ids)} usable rows about {groups} {look.media} cannot be parted by --test-share "
            f"{share:g}, since rows about the same stay together; give another share, or more {look.media}"
        ) from None
    train = [row for place, row in enumerate(look.rows) if place not in held]
    return train, [row for place, row in enumerate(look.rows) if place in held]


def write_rows(path: Path, rows: Sequence[Row], seen: Counter[str]) -> None:
    """Writes LLaVA JSON, a row a line.

    Args:
        seen: how often each id has been written; a repeated one gets a number behind it.
    """
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            name = row.conversation.id
            seen[name] += 1
            unique = name if seen[name] == 1 else f"{name}#{seen[name]}"
            file.write(json.dumps(row.record(unique), ensure_ascii=False) + "\n")
