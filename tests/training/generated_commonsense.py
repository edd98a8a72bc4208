"""Questions of everyday knowledge in LLM-Adapters' form: which of four things is the largest?"""

import json
import random
from pathlib import Path

THINGS = ("an ant", "a mouse", "a cat", "a sheep", "a horse", "an elephant", "a blue whale")
"""In ascending order."""


def question(drawn: random.Random) -> dict[str, str]:
    things = drawn.sample(THINGS, 4)
    right = f"answer{1 + max(range(4), key=lambda index: THINGS.index(things[index]))}"
    choices = " ".join(f"Answer{number}: {thing}" for number, thing in enumerate(things, start=1))
    asked = f"Please choose the correct answer to the question: Which of these is the largest?\n\n{choices}\n\n"
    instruction = f"{asked}Answer format: answer1/answer2/answer3/answer4"
    return {"instruction": instruction, "input": "", "output": f"the correct answer is {right}", "answer": right}


def write_commonsense(folder: Path) -> Path:
    """Writes `train.json` and `test.json` of 40 questions each."""
    folder.mkdir(parents=True)
    for seed, name in enumerate(("train.json", "test.json")):
        drawn = random.Random(seed)
        (folder / name).write_text(json.dumps([question(drawn) for _ in range(40)]))
    return folder
