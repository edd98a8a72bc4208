"""Rewards by a person's own functions, and truths that no answer earns."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest

from dora_vl.data.example import Answer, Example
from dora_vl.errors import UserError
from dora_vl.evaluation.rewards import check_truths, rewards_of

EXAMPLES = [Example(id=f"row {n}", question="How many?", answers=(Answer(text=str(n)),)) for n in range(4)]
ANSWERS = ["0", "no", "2", ""]
RIGHT = [1.0, 0.0, 1.0, 0.0]
IN_LISTS = (
    "def own(examples, answers):\n    return [float(e.answers[0].text == a) for e, a in zip(examples, answers)]\n"
)
EACH = "def own(example, answer):\n    return example.answers[0].text == answer\n"
AWAITED = "import asyncio\nasync def own(example, answer):\n    await asyncio.sleep(0.2)\n    return EACH\n".replace(
    "EACH", "float(example.answers[0].text == answer)"
)
WAITING = "import time\ndef own(example, answer):\n    time.sleep(0.2)\n    return example.answers[0].text == answer\n"


def rewarded(folder: Path, code: str, **settings: Any) -> list[float]:
    path = folder / "own.py"
    path.write_text(code)
    (reward,) = rewards_of([f"{path}:own"], answer_format=None, answer_after=None, **settings).values()
    return reward(EXAMPLES, ANSWERS)


@pytest.mark.parametrize(
    "code", [EACH, IN_LISTS, AWAITED, IN_LISTS.replace("def", "async def")], ids=["each", "lists", "async", "both"]
)
def test_a_function_takes_one_answer_or_all_of_a_step(code: str, tmp_path: Path) -> None:
    assert rewarded(tmp_path, code) == RIGHT


@pytest.mark.parametrize(("code", "threads"), [(AWAITED, 1), (WAITING, 4)], ids=["async", "threads"])
def test_answers_wait_together(code: str, threads: int, tmp_path: Path) -> None:
    began = time.monotonic()
    assert rewarded(tmp_path, code, threads=threads) == RIGHT
    assert time.monotonic() - began < 0.7  # 0.8 one after the other


@pytest.mark.parametrize(
    "code",
    [
        "def own(example, answer):\n    return None if answer == 'no' else 1\n",
        "def own(examples, answers):\n    return [None if answer == 'no' else 1 for answer in answers]\n",
    ],
)
def test_none_does_not_apply(code: str, tmp_path: Path) -> None:
    assert rewarded(tmp_path, code) == [1, pytest.approx(math.nan, nan_ok=True), 1, 1]


FAULTY = {
    "raises": "def own(example, answer):\n    return {'2': 1}[answer]\n",
    "exits": "import sys\ndef own(example, answer):\n    sys.exit(0)\n",
    "no number": "def own(example, answer):\n    return 'good'\n",
    "infinite": "def own(example, answer):\n    return float('inf')\n",
    "not a number": "def own(example, answer):\n    return float('nan')\n",
    "one too few": "def own(examples, answers):\n    return [1.0] * (len(answers) - 1)\n",
    "awaits": "async def own(example, answer):\n    raise KeyError(answer)\n",
}


@pytest.mark.parametrize("code", FAULTY.values(), ids=FAULTY)
def test_a_failing_function_is_named_with_its_sample(code: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        rewarded(tmp_path, code)
    assert "own.py" in str(error.value)
    assert "row 0" in str(error.value)
    skipped = rewarded(tmp_path, code, skips_errors=True)
    assert math.isnan(skipped[0])


def test_a_line_is_named_and_a_file_that_exits_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"own\.py:2: KeyError"):
        rewarded(tmp_path, FAULTY["raises"])
    with pytest.raises(UserError):
        rewarded(tmp_path, "import sys\nsys.exit(0)\n" + EACH)


@pytest.mark.parametrize(
    ("reward", "truth", "earned"),
    [
        ("box", "[1, 2, 3]", False),
        ("box", "the dog", False),
        ("box", "[5, 5, 1, 1]", False),
        ("box", "[1, 2, 30, 40]", True),
        ("relaxed", "inf", False),
        ("relaxed", "1e1", True),
        ("vqa", "A", False),
        ("vqa", "?", False),
        ("vqa", "a cat", True),
        ("exact", "A", True),
        ("anls", "?", True),
    ],
)
def test_a_truth_that_no_answer_earns_is_named(reward: str, truth: str, earned: bool) -> None:
    examples = [Example(id="odd", question="?", answers=(Answer(text=truth),))]
    if earned:
        check_truths([reward], examples, "data.json", answer_after=None)
        return
    with pytest.raises(UserError) as error:
        check_truths([reward], examples, "data.json", answer_after=None)
    assert "odd" in str(error.value)
    assert "data.json" in str(error.value)
