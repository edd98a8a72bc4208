"""ScienceQA as LLaVA's eval_science_qa.py (commit c121f04) gives it: accuracy over all, and over those with a picture.

Quirks kept, in the order in which the rules are tried:

1. the whole answer is one of A to E;
2. it begins with a letter of A to E, a period and a space;
3. "The answer is X" followed by *any* character, found exactly once: "The answer is C" with nothing after it fails, and
   "The answer is Because" parses as B.

Anything else has failed and is wrong, and so is a letter beyond the question's choices. Image accuracy, the number in
LLaVA's tables, is over questions asked with a picture (the script looks for `<image>` in the stored prompt; here
the example has images).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from dora_vl.data.examples import Example
from dora_vl.scores.benchmark import LONG_ANSWER_TOKENS, Benchmark, only
from dora_vl.scores.choices import correct_index, letters
from dora_vl.scores.prompts import LETTER, lettered
from dora_vl.scores.scored import ACCURACY, Ratio, Scored, Tally, kind_columns, unit_of

OPTIONS = "ABCDE"
SENTENCE = re.compile("The answer is ([A-Z]).")


def parsed(answer: str) -> str | None:
    """The letter an answer gives, or None where the parsing fails."""
    if len(answer) == 1 and answer in OPTIONS:
        return answer
    if len(answer) >= 3 and answer[0] in OPTIONS and answer[1:3] == ". ":
        return answer[0]
    found = SENTENCE.findall(answer)
    return found[0] if len(found) == 1 else None


def score(examples: Sequence[Example], answers: Mapping[str, str]) -> Scored:
    """Image accuracy first where any question has a picture, then accuracy, in percent."""
    tally = Tally()
    for example in examples:
        answer = answers.get(example.id)
        right = answer is not None and parsed(answer) == letters(example)[correct_index(example)]
        kinds = ["with picture"] if example.images else []
        columns = kind_columns(float(right), *kinds)
        tally.add(example.id, float(right), columns, unit=unit_of(example), failed=answer is None)
    image = {"image accuracy": Ratio("right with picture", "asked with picture")}
    return tally.scored({**(image if any(example.images for example in examples) else {}), "accuracy": ACCURACY})


def prompt(example: Example) -> str:
    """LLaVA's wording: the hint stands behind "Context: "."""
    return f"{lettered(example, before_hint='Context: ')}\n{LETTER}"


BENCHMARK = Benchmark(modes=only(score), prompt=prompt, max_new_tokens=LONG_ANSWER_TOKENS, chooses=True)
