"""The eight commonsense sets of LLM-Adapters, by their own extraction of the answer from generated text.

Two official scripts take different parts of the whole text (prompt and answer) before they look for an answer:

- `llm_adapters`: what stands between the first and the second "### Response:";
- `nvlabs` (NVlabs/DoRA, so the paper's numbers): what stands after the last one.

They differ where a model goes on with another "### Response:" of its own. Then the first match of the task's
pattern counts, case-sensitive, anywhere: "untrue" is true, "answer10" is answer1, "True" is nothing. No match is wrong.

Reads `answers[0]` ("answer4", "true") and `extra["task"]`. The headline is the unweighted mean over the tasks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

from dora_vl.data.example import Example
from dora_vl.errors import UserError, shown
from dora_vl.evaluation.scores.benchmark import Benchmark, right_answer
from dora_vl.evaluation.scores.scored import Formula, Mean, Ratio, Scored, Tally

Rule = Literal["nvlabs", "llm_adapters"]
RESPONSE = "### Response:"
_FIVE = re.compile("|".join(f"answer{number}" for number in range(1, 6)))
PATTERNS: Mapping[str, re.Pattern[str]] = {
    "boolq": re.compile("true|false"),
    "piqa": re.compile("solution1|solution2"),
    "social_i_qa": _FIVE,
    "hellaswag": re.compile("ending1|ending2|ending3|ending4"),
    "winogrande": re.compile("option1|option2"),
    "ARC-Easy": _FIVE,
    "ARC-Challenge": _FIVE,
    "openbookqa": _FIVE,
}
"""Task -> what an answer looks like; the paper's order of columns."""


def response(text: str, rule: Rule, *, with_prompt: bool = False) -> str:
    """The part that is searched.

    Args:
        text: what the model generated; the script's own view puts the prompt, which ends in the marker, before it.
        with_prompt: `text` holds the prompt as well.

    Raises:
        UserError: the prompt is said to be there but the marker is not.
    """
    if with_prompt:
        if RESPONSE not in text:
            raise UserError(f"a text with its prompt must hold {RESPONSE!r}: {shown(text)}")
        text = text.split(RESPONSE, maxsplit=1)[1]
    return text.split(RESPONSE)[0 if rule == "llm_adapters" else -1].strip()


def extracted(text: str, task: str, rule: Rule) -> str:
    """The answer in a generated text, "" where there is none.

    Raises:
        UserError: no such task.
    """
    if task not in PATTERNS:
        raise UserError(f"no commonsense task {shown(task)}; there are {', '.join(PATTERNS)}")
    found = PATTERNS[task].search(response(text, rule))
    return found.group() if found else ""


def score(examples: Sequence[Example], answers: Mapping[str, str], *, rule: Rule = "nvlabs") -> Scored:
    """The mean over the tasks, then each task's accuracy, in percent.

    Args:
        answers: generated text without the prompt.

    Raises:
        UserError: no such task, or an example has no right answer.
    """
    tally, found = Tally(), set()
    for example in examples:
        task, answer = str(example.extra.get("task", "")), answers.get(example.id)
        found.add(task)
        right = float(extracted(answer or "", task, rule) == right_answer(example))
        columns = {f"right {task}": right, f"asked {task}": 1.0}
        tally.add(example.id, right, columns, failed=answer is None)
    tasks: dict[str, Formula] = {one: Ratio(f"right {one}", f"asked {one}") for one in PATTERNS if one in found}
    return tally.scored({"average": Mean(tuple(tasks.values())), **tasks}, settings={"extraction": rule})


BENCHMARK = Benchmark(
    modes={"nvlabs": partial(score, rule="nvlabs"), "llm_adapters": partial(score, rule="llm_adapters")}
)
