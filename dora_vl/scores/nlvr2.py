"""NLVR2 and NLVR as their metrics.py gives them: accuracy (called precision there) and consistency.

A sentence is consistent when all of its examples are right. For NLVR2 they share their identifier without its third
field ("dev-850-0-0" and "dev-850-1-0"), for NLVR the part before the "-" ("1572-0").

Quirks kept: the script strips a line of its CSV, parts it at commas and takes the second field; letter case aside that
must be the label exactly. So " True", "true." and "True ,x" are wrong, "True " and "True,x" right. The script ends when
an id is missing; here a missing answer is wrong.

Reads `id` and `answers[0]`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from dora_vl.data.examples import Example
from dora_vl.errors import UserError
from dora_vl.scores.benchmark import Benchmark, only
from dora_vl.scores.joins import ByKey
from dora_vl.scores.known_truth import right_answer
from dora_vl.scores.prompts import true_or_false
from dora_vl.scores.scored import ACCURACY, Ratio, Scored, Tally


def sentence_of_nlvr2(identifier: str) -> str:
    """What all examples of one sentence share.

    Raises:
        UserError: the identifier has not four fields.
    """
    fields = identifier.split("-")
    if len(fields) != 4:
        raise UserError(f"NLVR2 identifier {identifier!r} has {len(fields)} fields, not four as in 'dev-850-0-0'")
    return "-".join([*fields[:2], "", fields[3]])


def sentence_of_nlvr(identifier: str) -> str:
    """What all examples of one sentence share; a picture order after the pair number does not count."""
    return identifier.split("-")[0]


def as_read(answer: str) -> str:
    """What the script reads of a line that holds an identifier and this answer."""
    return f"identifier,{answer}".strip().split(",")[1]


def score(
    examples: Sequence[Example],
    answers: Mapping[str, str],
    *,
    sentence_of: Callable[[str], str] = sentence_of_nlvr2,
) -> Scored:
    """Accuracy and consistency in percent; an interval draws sentences.

    Raises:
        UserError: an example has no label.
    """
    if without := [one.id for one in examples if not one.answers]:
        raise UserError(f"{len(without)} examples have no label, first {without[0]}; they cannot be scored")
    right = {one.id: as_read(answers.get(one.id, "")).lower() == right_answer(one).lower() for one in examples}
    of_sentence = Counter(sentence_of(one.id) for one in examples)
    wrong = {sentence_of(one.id) for one in examples if not right[one.id]}
    tally = Tally()
    for example in examples:
        sentence, hit = sentence_of(example.id), float(right[example.id])
        share = 1 / of_sentence[sentence]  # the sentence's examples add up to one sentence
        columns = {"right": hit, "asked": 1.0, "sentences": share, "consistent": share * (sentence not in wrong)}
        tally.add(example.id, hit, columns, unit=sentence, failed=example.id not in answers)
    return tally.scored({"accuracy": ACCURACY, "consistency": Ratio("consistent", "sentences")})


def score_nlvr(examples: Sequence[Example], answers: Mapping[str, str]) -> Scored:
    """NLVR's own grouping of sentences."""
    return score(examples, answers, sentence_of=sentence_of_nlvr)


def submission(examples: Sequence[Example], answers: Mapping[str, str]) -> tuple[str, str]:
    """The script's CSV of identifier and answer; a missing one stays empty, which is wrong there as it is here."""
    rows = [f"{example.id},{' '.join(answers.get(example.id, '').splitlines())}" for example in examples]
    return "nlvr2.csv", "\n".join(rows) + "\n"


NLVR = Benchmark(modes=only(score_nlvr), prompt=true_or_false, together=lambda example: sentence_of_nlvr(example.id))
NLVR2 = Benchmark(
    modes=only(score),
    prompt=true_or_false,
    submission=submission,
    together=lambda example: sentence_of_nlvr2(example.id),
    joins=(ByKey("identifier without .png", lambda row: row.id.removesuffix(".png"), lambda one: one.id),),
)
