"""Generates questions of everyday knowledge in LLM-Adapters' form, for trying a run where no published set is at hand.

None of the commonsense sets is in the Python package index. These questions compare things by size, weight, speed
or temperature; each has four choices and one right answer, as OpenBookQA's have. They test that a run works,
nothing else.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from dora_vl.errors import exit_on_user_error, positive
from dora_vl.files import whole_file

RANKED = {
    "largest": ("an ant", "a mouse", "a cat", "a sheep", "a horse", "an elephant", "a blue whale"),
    "heaviest": ("a feather", "a letter", "an apple", "a brick", "a bicycle", "a car", "a ship"),
    "fastest": ("a snail", "a walking child", "a runner", "a galloping horse", "a car", "an airplane", "light"),
    "hottest": ("ice", "spring water", "bath water", "boiling water", "an oven", "a candle's flame", "the sun"),
    "longest": ("a second", "a minute", "an hour", "a day", "a week", "a month", "a year"),
}
"""Quality -> things in ascending order."""
CHOICES = 4


def generate(rows: int, *, seed: int) -> list[dict[str, str]]:
    """Records in LLM-Adapters' form; the same for the same seed."""
    drawn = random.Random(seed)
    records = []
    for _ in range(rows):
        quality = drawn.choice(sorted(RANKED))
        things = drawn.sample(RANKED[quality], CHOICES)
        right = max(range(CHOICES), key=lambda index: RANKED[quality].index(things[index])) + 1
        choices = " ".join(f"Answer{number}: {thing}" for number, thing in enumerate(things, start=1))
        names = "/".join(f"answer{number}" for number in range(1, CHOICES + 1))
        records.append(
            {
                "instruction": f"Please choose the correct answer to the question: Which of these is the {quality}?\n\n"
                f"{choices}\n\nAnswer format: {names}",
                "input": "",
                "output": f"the correct answer is answer{right}",
                "answer": f"answer{right}",
            }
        )
    return records


@exit_on_user_error
def main(arguments: list[str] | None = None) -> None:
    """Writes the two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, help="folder for train.json and test.json")
    parser.add_argument("--rows", type=positive, default=40, help="questions in each file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for number, name in enumerate(("train.json", "test.json")):  # the test's questions are drawn apart
        with whole_file(options.to / name) as file:
            json.dump(generate(options.rows, seed=2 * options.seed + number), file, indent=1)


if __name__ == "__main__":
    main()
