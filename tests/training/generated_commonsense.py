"""Questions of everyday knowledge in LLM-Adapters' form: four things are compared by size, weight, speed or heat."""

from __future__ import annotations

import json
import random
from pathlib import Path

RANKED = {
    "largest": ("an ant", "a mouse", "a cat", "a sheep", "a horse", "an elephant", "a blue whale"),
    "heaviest": ("a feather", "a letter", "an apple", "a brick", "a bicycle", "a car", "a ship"),
    "fastest": ("a snail", "a walking child", "a runner", "a galloping horse", "a car", "an airplane", "light"),
    "hottest": ("ice", "spring water", "bath water", "boiling water", "an oven", "a candle's flame", "the sun"),
    "longest": ("a second", "a minute", "an hour", "a day", "a week", "a month", "a year"),
}
"""Quality -> things in ascending order."""


def generate(rows: int, *, seed: int) -> list[dict[str, str]]:
    """Rows of four choices each; the same for the same seed."""
    drawn = random.Random(seed)
    records = []
    for _ in range(rows):
        quality = drawn.choice(sorted(RANKED))
        things = drawn.sample(RANKED[quality], 4)
        right = max(range(4), key=lambda index: RANKED[quality].index(things[index])) + 1
        choices = " ".join(f"Answer{number}: {thing}" for number, thing in enumerate(things, start=1))
        records.append(
            {
                "instruction": f"Please choose the correct answer to the question: Which of these is the {quality}?\n\n"
                f"{choices}\n\nAnswer format: answer1/answer2/answer3/answer4",
                "input": "",
                "output": f"the correct answer is answer{right}",
                "answer": f"answer{right}",
            }
        )
    return records


def write_commonsense(folder: Path) -> Path:
    """Writes `train.json` and `test.json` of 40 questions each."""
    folder.mkdir(parents=True)
    for seed, name in enumerate(("train.json", "test.json")):
        (folder / name).write_text(json.dumps(generate(40, seed=seed)))
    return folder
