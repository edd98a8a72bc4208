"""What a benchmark is: its question, its official score, its server's file, and how its files name its questions.

Each benchmark's own is in the scorer's file, and one row of `evaluation.benchmarks` makes it known.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from dora_vl.data.examples import Example
from dora_vl.scores.joins import Join
from dora_vl.scores.known_truth import Group
from dora_vl.scores.prompts import Prompt, as_is
from dora_vl.scores.scored import Scored
from dora_vl.whole_numbers import number_of

Scorer = Callable[[Sequence[Example], Mapping[str, str]], Scored]
Submission = Callable[[Sequence[Example], Mapping[str, str]], tuple[str, str]]

SHORT_ANSWER_TOKENS, LONG_ANSWER_TOKENS = 128, 1024  # LLaVA-1.5's own
FRAMES = 4  # 2,304 of LLaVA-1.5's 4,096 positions


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark.

    Attributes:
        modes: version -> scorer, the usual one first; empty where an external judge scores.
        prompt: what a LLaVA is asked.
        max_new_tokens: longest answer.
        splits: names of the split to look for in `records/<task>/`, the first that is there.
        submission: the server's file, its name and text; a test split's answers are the publisher's, so it scores.
            Read back by the official rule it gives the score of `modes`.
        submissions: version -> its file, where it is another than `submission`.
        joins: how rows of the official files name their questions, beside the id.
        labels_choices: answers are "a" and the choice's index, and official files hold the index alone.
        chooses: every question has choices, and `extra["correct"]` is what is scored.
        together: examples with equal values are scored as one, so that one without its right answer leaves out all.
        shares_answers: one right answer serves all of them.
        frames: how many frames of a video a LLaVA is shown.
    """

    modes: Mapping[str, Scorer]
    prompt: Prompt = as_is
    max_new_tokens: int = SHORT_ANSWER_TOKENS
    splits: tuple[str, ...] = ("test", "validation")
    submission: Submission | None = None
    submissions: Mapping[str, Submission] = field(default_factory=dict)
    joins: tuple[Join, ...] = ()
    labels_choices: bool = False
    chooses: bool = False
    together: Group | None = None
    shares_answers: bool = False
    frames: int = FRAMES


def only(scorer: Scorer) -> Mapping[str, Scorer]:
    """`modes` of a benchmark with one official version."""
    return {"": scorer}


def json_lines(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as a submission's JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def published_id(name: str) -> int | str:
    """An id as servers take it: a number where it is one."""
    number = number_of(name)
    return name if number is None else number
