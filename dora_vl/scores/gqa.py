"""GQA as its eval.py gives it, on answers converted the way LLaVA does.

Quirks kept: the conversion takes the periods off the end *before* lower-casing and strips no white space, so " yes" and
"yes. " are wrong. A question whose structural type is "query" counts as open, every other as binary. Without the
publisher's choices file validity and plausibility are 0 and are not listed here. Consistency is the mean over
*rightly answered* questions that entail others (`extra["entailed"]`) of how many of those are right; an entailed
question without an answer counts as wrong (the script stops). Distribution is chi-square between the histograms
of true and given answers in each global group, weighted by the group's size, / 100: lower is better, and no percent.

`vl_t5` (so the paper's VL-BART numbers) compares the generated text as it is, and gives an answer's weight where a
question has several.

Reads `answers`, and of `extra`: types {structural, semantic}, entailed, global_group, is_balanced (only
balanced questions are scored; absent means balanced).
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

from dora_vl.data.examples import Example
from dora_vl.errors import UserError, shown
from dora_vl.scores.benchmark import Benchmark
from dora_vl.scores.known_truth import right_answer
from dora_vl.scores.prompts import short
from dora_vl.scores.scored import ACCURACY, Formula, Ratio, Scored, Tally, by_kind, kind_columns, unit_of

Conversion = Literal["llava", "vl_t5"]


def converted(answer: str) -> str:
    """A model's answer as LLaVA's submission holds it."""
    return answer.rstrip(".").lower()


def score(examples: Sequence[Example], answers: Mapping[str, str], *, conversion: Conversion = "llava") -> Scored:
    """Accuracy over all, by open/binary, structural and semantic type; consistency and distribution where possible.

    Raises:
        UserError: a question's types, entailed questions or group are of another kind, or it has no right answer.
    """
    said = {name: converted(answer) if conversion == "llava" else answer for name, answer in answers.items()}
    right = {example.id: points(example, said) for example in examples}
    tally, structural, semantic, entails = Tally(), [], [], False
    balanced = [example for example in examples if example.extra.get("is_balanced", True)]
    for example in balanced:
        shape, meaning = _types(example)
        structural += [shape] if shape else []
        semantic += [meaning] if meaning else []
        kinds = [kind for kind in (shape, meaning) if kind]
        if shape:
            kinds.append("open" if shape == "query" else "binary")
        hit = right[example.id]
        columns = kind_columns(hit, *kinds)
        entailed = [one for one in _entailed(example) if one != example.id]
        if entailed:
            entails = True
            share = sum(right.get(one, 0.0) for one in entailed) / len(entailed)
            columns |= {"consistent": hit * share, "entailing": hit}
        tally.add(example.id, hit, columns, unit=unit_of(example), failed=example.id not in answers)
    formulas: dict[str, Formula] = {"accuracy": ACCURACY}
    if structural:
        formulas |= by_kind("accuracy", ["open", "binary"])
    formulas |= by_kind("structural", structural) | by_kind("semantic", semantic)
    if entails:
        formulas["consistency"] = Ratio("consistent", "entailing")
    return tally.scored(formulas, settings={"conversion": conversion}, fixed=_distribution(balanced, said))


def _types(example: Example) -> tuple[str, str]:
    """The structural and the semantic type, "" where the record has none."""
    types = example.extra.get("types")
    if not isinstance(types, Mapping | None):
        raise UserError(f"question {shown(example.id)}: extra.types must be an object, it is {shown(types)}")
    shape, meaning = (_text(example, f"types.{name}", (types or {}).get(name)) for name in ("structural", "semantic"))
    return shape, meaning


def _entailed(example: Example) -> list[str]:
    entailed = example.extra.get("entailed", [])
    if not isinstance(entailed, list | tuple) or not all(isinstance(one, str) for one in entailed):
        raise UserError(f"question {shown(example.id)}: extra.entailed must be a list of ids, it is {shown(entailed)}")
    return list(entailed)


def _text(example: Example, name: str, value: object) -> str:
    if not isinstance(value, str | None):
        raise UserError(f"question {shown(example.id)}: extra.{name} must be text, it is {shown(value)}")
    return value or ""


def points(example: Example, said: Mapping[str, str]) -> float:
    """The weight of the true answer that was said, letter by letter; 1 where a question has one true answer."""
    return {answer.text: answer.weight for answer in example.answers}.get(said.get(example.id, ""), 0.0)


def _distribution(examples: Sequence[Example], said: Mapping[str, str]) -> dict[str, float]:
    true: defaultdict[str, Counter[str]] = defaultdict(Counter)
    given: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for example in examples:
        group = example.extra.get("global_group")
        if group is not None:
            group = _text(example, "global_group", group)
            true[group][right_answer(example)] += 1
            given[group][said.get(example.id, "")] += 1
    if not true:
        return {}
    weighted, everything = 0.0, 0
    for group, expected in true.items():
        distance = sum((given[group][answer] - count) ** 2 / count for answer, count in expected.items())
        weighted += distance * expected.total()
        everything += expected.total()
    return {"distribution": weighted / everything / 100}


def submission(
    examples: Sequence[Example], answers: Mapping[str, str], *, conversion: Conversion = "llava"
) -> tuple[str, str]:
    """The file of GQA's eval.py and server, which compare letter by letter: answers as the mode converts them."""
    as_held = converted if conversion == "llava" else str
    rows = [{"questionId": example.id, "prediction": as_held(answers.get(example.id, ""))} for example in examples]
    return "gqa.json", json.dumps(rows, ensure_ascii=False)


BENCHMARK = Benchmark(
    modes={"llava": partial(score, conversion="llava"), "vl_t5": partial(score, conversion="vl_t5")},
    prompt=short,
    splits=("testdev", "test", "validation"),
    submission=submission,
    submissions={"vl_t5": partial(submission, conversion="vl_t5")},
)
