"""LLaVA-Bench (in the wild): what an external judge is asked, and the score from its reviews.

LLaVA had GPT-4-0314 at temperature 0.2 compare each answer with a reference answer (GPT-4's own, from a description of
the picture in words): the first line of a review holds two numbers, the reference's score and the model's. The
benchmark's number is 100 times the mean of the model's over the mean of the reference's, for each category and over
all. No judge is called here.

Reads `question`, `answers[0]` (the reference answer), `extra["category"]` (conv, detail, complex) and
`extra["context"]` (the picture's description).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dora_vl.data.examples import Example
from dora_vl.errors import UserError
from dora_vl.scores.benchmark import LONG_ANSWER_TOKENS, Benchmark, json_lines
from dora_vl.scores.scored import Formula, Ratio, Scored, Tally, unit_of

REFERENCE, MODEL = "Assistant 1", "Assistant 2"


def judge_requests(
    examples: Sequence[Example], answers: Mapping[str, str], rules: Mapping[str, str] | None = None
) -> list[dict[str, str]]:
    """One request for each question: its id, category and the text to put to the judge.

    Args:
        rules: category -> the instruction that ends the text (`prompt` of `llava_bench_<category>` in LLaVA's
            rule.json); without them that part is left to the judge's system prompt.
    """
    requests = []
    for example in examples:
        category = str(example.extra.get("category", ""))
        parts = [
            ("Context", str(example.extra.get("context", ""))),
            ("Question", example.question),
            (REFERENCE, example.answers[0].text if example.answers else ""),
            (MODEL, answers.get(example.id, "")),
        ]
        text = "\n\n".join(f"[{title}]\n{body}" + _end(title) for title, body in parts)
        if rules and category in rules:
            text += f"\n\n[System]\n{rules[category]}\n\n"
        requests.append({"id": example.id, "category": category, "text": text})
    return requests


def _end(title: str) -> str:
    return f"\n\n[End of {title}]" if title in {REFERENCE, MODEL} else ""


def scores_of(review: str) -> tuple[float, float]:
    """The reference's and the model's score in a review's first line, separated by a space or a comma.

    Raises:
        UserError: there are not two numbers.
    """
    first, *_ = review.strip().split("\n", maxsplit=1)
    words = first.replace(",", " ").split()
    try:
        reference, model = map(float, words)
    except ValueError:
        raise UserError(f"a review must begin with two numbers, found {first[:60]!r}") from None
    return reference, model


def score_reviews(examples: Sequence[Example], reviews: Mapping[str, str]) -> Scored:
    """100 times model over reference, over all and by category; both scores' means come with it (from 1 to 10).

    Raises:
        UserError: a question has no review, or one without two numbers.
    """
    tally, categories = Tally(), []
    for example in examples:
        if example.id not in reviews:
            raise UserError(f"LLaVA-Bench question {example.id} has no review; ask the judge again")
        reference, model = scores_of(reviews[example.id])
        category = str(example.extra.get("category", "all"))
        categories.append(category)
        columns = {"reference": reference, "model": model, "asked": 1.0}
        columns |= {f"reference {category}": reference, f"model {category}": model}
        tally.add(example.id, model / reference if reference else 0.0, columns, unit=unit_of(example))
    formulas: dict[str, Formula] = {"relative score": Ratio("model", "reference")}
    formulas |= {f"category/{one}": Ratio(f"model {one}", f"reference {one}") for one in sorted(set(categories))}
    formulas |= {f"mean/{one}": Ratio(one, "asked", scale=1.0) for one in ("model", "reference")}
    return tally.scored(formulas, settings={"judge": "external"})


def submission(examples: Sequence[Example], answers: Mapping[str, str]) -> tuple[str, str]:
    """One request to the judge a line."""
    return "llava_bench_judge.jsonl", json_lines(judge_requests(examples, answers))


BENCHMARK = Benchmark(modes={}, max_new_tokens=LONG_ANSWER_TOKENS, submission=submission)
