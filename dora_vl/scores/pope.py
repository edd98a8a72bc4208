"""POPE as LLaVA's eval_pope.py gives it: accuracy, precision, recall, F1 and the share of "yes", for each category.

Quirks kept in `says_no`: only the first sentence counts, commas go, and then one of the words "No", "not", "no" must
stand between *spaces*. So "NO", "Not", "nope", "", "isn't", "No\\n" and "no!" all count as yes.

The script matches answers and labels by their position and cuts the longer list in silence. Label files come in two
versions: LLaVA's question file belongs to POPE commit e3e3926 (2,910 random, 3,000 popular, 3,000 adversarial);
today's files have 3,000 each, `random` in another order. Here the id matches, and an answer to a question that is not
there is refused. Which version it was, by its counts, is written into the settings. Division by zero gives 0.

The headline is the mean F1 of the categories, as LLaVA's table has it. Reads `answers[0]` (yes or no) and
`extra["category"]`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from dora_vl.data.examples import Example
from dora_vl.errors import UserError, shown
from dora_vl.scores.benchmark import Benchmark, only
from dora_vl.scores.joins import ByOrder
from dora_vl.scores.known_truth import right_answer
from dora_vl.scores.prompts import short
from dora_vl.scores.scored import Formula, Mean, Ratio, Scored, Tally, unit_of

CATEGORIES = ("random", "popular", "adversarial")
VERSIONS: Mapping[tuple[int, ...], str] = {(2910, 3000, 3000): "e3e3926 (LLaVA-1.5's)", (3000, 3000, 3000): "current"}
"""Label files by their questions in each of `CATEGORIES`."""


def says_no(answer: str) -> bool:
    """How the script reads an answer; whatever is not no is yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return any(word in words for word in ("No", "not", "no"))


def score(examples: Sequence[Example], answers: Mapping[str, str]) -> Scored:
    """F1 and its parts in percent.

    A missing answer counts as the wrong one of the two.

    Raises:
        UserError: an answer belongs to no question, so that another label version is likely.
    """
    strangers = sorted(answers.keys() - {example.id for example in examples})
    if strangers:
        raise UserError(
            f"{len(strangers)} POPE answers belong to no question here, first {shown(strangers[0])}; the label files "
            "come in two versions, so prepare the one that the questions were asked from"
        )
    tally, categories = Tally(), [str(example.extra.get("category", "all")) for example in examples]
    for example, category in zip(examples, categories, strict=True):
        truth, answer = _is_yes(example), answers.get(example.id)
        said = (not truth) if answer is None else not says_no(answer)
        cell = {(True, True): "tp", (True, False): "fp", (False, False): "tn", (False, True): "fn"}[said, truth]
        columns = {f"{cell} {category}": 1.0, f"asked {category}": 1.0}
        columns |= {f"right {category}": float(said == truth), f"yes {category}": float(said)}
        tally.add(example.id, float(said == truth), columns, unit=unit_of(example), failed=answer is None)
    return tally.scored(_formulas(sorted(set(categories))), settings={"labels": _version(categories)})


def _is_yes(example: Example) -> bool:
    label = right_answer(example)
    if label not in {"yes", "no"}:
        raise UserError(f"POPE example {example.id} has the label {shown(label)}; it must be yes or no")
    return label == "yes"


def _formulas(categories: Sequence[str]) -> dict[str, Formula]:
    """Each number's mean over the categories, then each category's own."""
    own = {one: _of_category(one) for one in categories}
    names = _of_category("").keys()
    means: dict[str, Formula] = {name: Mean(tuple(of_one[name] for of_one in own.values())) for name in names}
    return means | {f"{one}/{name}": formula for one, of_one in own.items() for name, formula in of_one.items()}


def _of_category(one: str) -> dict[str, Formula]:
    tp, fp, fn = (f"{cell} {one}" for cell in ("tp", "fp", "fn"))
    return {
        "f1": Ratio(tp, (tp, tp, fp, fn), scale=200.0),  # 2 tp / (2 tp + fp + fn) is 2 P R / (P + R)
        "accuracy": Ratio(f"right {one}", f"asked {one}"),
        "precision": Ratio(tp, (tp, fp)),
        "recall": Ratio(tp, (tp, fn)),
        "yes share": Ratio(f"yes {one}", f"asked {one}"),
    }


def _version(categories: Sequence[str]) -> str:
    counts = Counter(categories)
    of_each = tuple(counts[one] for one in CATEGORIES)
    return VERSIONS.get(of_each, ", ".join(f"{counts[one]} {one}" for one in sorted(counts)))


BENCHMARK = Benchmark(modes=only(score), prompt=short, joins=(ByOrder("order, each prompt being the question's"),))
