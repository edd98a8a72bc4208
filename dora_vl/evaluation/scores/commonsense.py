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
from dora_vl.evaluation.scores.scored import Answers, Mean, Scored, Tally, share_of

Rule = Literal["nvlabs", "llm_adapters"]
RESPONSE = "### Response:"
_FIVE = re.compile("answer[1-5]")
PATTERNS: Mapping[str, re.Pattern[str]] = {
    "boolq": re.compile("true|false"),
    "piqa": re.compile("solution[12]"),
    "social_i_qa": _FIVE,
    "hellaswag": re.compile("ending[1-4]"),
    "winogrande": re.compile("option[12]"),
    "ARC-Easy": _FIVE,
    "ARC-Challenge": _FIVE,
    "openbookqa": _FIVE,
}
"""Task -> what an answer looks like; the paper's order of columns."""


def extracted(text: str, task: str, rule: Rule) -> str:
    """The answer in a generated text, "" where there is none."""
    if task not in PATTERNS:
        raise UserError(f"no commonsense task {shown(task)}; there are {', '.join(PATTERNS)}")
    # The scripts see the prompt, which ends in the marker, before.
    match = PATTERNS[task].search(text.split(RESPONSE)[0 if rule == "llm_adapters" else -1])
    return match.group() if match else ""


def score(examples: Sequence[Example], answers: Answers, *, rule: Rule = "nvlabs") -> Scored:
    """The mean over the tasks, then each task's accuracy, in percent; answers are generated text without the prompt."""
    tally, found = Tally(), set[str]()
    for example in examples:
        task, answer = str(example.extra.get("task", "")), answers.get(example.id)
        found.add(task)
        right = float(extracted(answer or "", task, rule) == right_answer(example))
        tally.add(example.id, right, {f"right {task}": right, f"asked {task}": 1.0}, failed=answer is None)
    tasks = {task: share_of(task) for task in PATTERNS if task in found}
    return tally.scored({"average": Mean(tuple(tasks.values())), **tasks}, settings={"extraction": rule})


BENCHMARK = Benchmark(
    modes={"nvlabs": partial(score, rule="nvlabs"), "llm_adapters": partial(score, rule="llm_adapters")}
)
