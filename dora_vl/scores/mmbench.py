"""MMBench and MMBench-CN: circular evaluation, all rotations of a question must be answered rightly.

Rotations of one question share their `extra["index"]` modulo 1,000,000. An answer's letter is read out by the rules of
an evaluation tool, of which there were several; two are here, and the one used is in the settings:

- `opencompass_2023` (an older script in OpenCompass, of LLaVA-1.5's days; VLMEvalKit's of that time read other letters,
  so its numbers are not these): letters A to E whatever the choices; first a letter standing alone as a word (not where
  "A" is among more than three words: it may be an article), then with one of eleven decorations such as "A." or "(A)";
  exactly one letter must fit.
- `2025` (VLMEvalKit today): marks .()[],:;!*#{} become spaces; the one letter of the question's choices among the words
  counts if it is one of the last four; four phrases of refusal, and a word "Z", are Z, which is never right. Answers
  longer than twice all choices together are not searched for a choice's text.

In both, an answer without such a letter counts for the one choice whose text is in it, letter case aside. Where
neither gives a letter the tool asks GPT, or with `exact_matching` gives Z; here it is wrong, as with
`exact_matching`. The server's numbers, made with GPT, can only be higher.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from string import ascii_uppercase
from typing import Literal

from dora_vl.data.examples import Example
from dora_vl.errors import UserError, shown
from dora_vl.scores.benchmark import LONG_ANSWER_TOKENS, Benchmark
from dora_vl.scores.choices import correct_index
from dora_vl.scores.prompts import LETTER_CN, Prompt, letter, lettered
from dora_vl.scores.scored import ACCURACY, Ratio, Scored, Tally, by_kind, kind_columns

Matcher = Literal["opencompass_2023", "2025"]
ROTATION = 1_000_000
NO_CHOICE = "Z"

_LETTERS_2023 = "ABCDE"
_DECORATIONS_2023 = ("{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")
_MARKS_2025 = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_REFUSALS_2025 = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_LAST_WORDS_2025 = 4
_NO_ANSWER = "Failed to obtain answer via API"


def chosen(answer: str, choices: Mapping[str, str], matcher: Matcher) -> str | None:
    """The letter an answer gives, or None.

    Args:
        choices: letter -> text.
    """
    letter = _letter_2023(answer) if matcher == "opencompass_2023" else _letter_2025(answer, choices)
    if letter is not None:
        return letter
    length = sum(map(len, choices.values()))
    if matcher == "2025" and len(answer) > 2 * length:
        return None
    said = answer.lower()
    return _only([letter for letter, text in choices.items() if text.lower() in said])


def score(examples: Sequence[Example], answers: Mapping[str, str], *, matcher: Matcher = "2025") -> Scored:
    """Circular accuracy over questions, by `l2_category` and `category`; and `vanilla`, over single rotations.

    Raises:
        UserError: an example has no whole number as `extra["index"]`.
    """
    groups: defaultdict[int, list[Example]] = defaultdict(list)
    for example in examples:
        groups[question_of(example)].append(example)
    tally, coarse, fine = Tally(), [], []
    for question, rotations in groups.items():
        hits = [_is_right(one, answers, matcher) for one in rotations]
        first = min(rotations, key=lambda one: one.extra["index"])
        wide, narrow = (str(first.extra.get(name, "")) for name in ("l2_category", "category"))
        coarse += [wide] if wide else []
        fine += [narrow] if narrow else []
        for one, hit in zip(rotations, hits, strict=True):
            whole = kind_columns(float(all(hits)), *(kind for kind in {wide, narrow} if kind)) if one is first else {}
            columns = {**whole, "rotation right": float(hit), "rotations": 1.0}
            tally.add(one.id, float(hit), columns, unit=str(question), failed=one.id not in answers)
    vanilla = Ratio("rotation right", "rotations")
    formulas = {"accuracy": ACCURACY, "vanilla": vanilla, **by_kind("l2", coarse), **by_kind("category", fine)}
    return tally.scored(formulas, settings={"matcher": matcher, "without a letter": "wrong (exact_matching)"})


def question_of(example: Example) -> int:
    """What all rotations of one question share.

    Raises:
        UserError: the example has no whole number as `extra["index"]`.
    """
    index = example.extra.get("index")
    if not isinstance(index, int):
        raise UserError(f"MMBench example {shown(example.id)} has extra.index {shown(index)}; it needs the row's index")
    return index % ROTATION


def _is_right(example: Example, answers: Mapping[str, str], matcher: Matcher) -> bool:
    if example.id not in answers:
        return False
    choices = dict(zip(ascii_uppercase, example.choices, strict=False))
    return chosen(answers[example.id], choices, matcher) == ascii_uppercase[correct_index(example)]


def _letter_2023(answer: str) -> str | None:
    if _NO_ANSWER in answer:
        return None
    words = answer.split()
    alone = _only([letter for letter in _LETTERS_2023 if letter in words])
    if alone and not ("A" in words and len(words) > 3):
        return alone
    for decoration in _DECORATIONS_2023:
        found = _only([letter for letter in _LETTERS_2023 if decoration.format(letter) in words])
        if found:
            return found
    return None


def _letter_2025(answer: str, letters: Collection[str]) -> str | None:
    if _NO_ANSWER in answer:
        return None
    if any(refusal in answer for refusal in _REFUSALS_2025):
        return NO_CHOICE
    words = answer.translate(_MARKS_2025).split()
    found = [letter for letter in letters if letter in words]
    if len(found) == 1:
        return found[0] if words.index(found[0]) >= len(words) - _LAST_WORDS_2025 else None
    return NO_CHOICE if not found and NO_CHOICE in words else None


def _only(found: Sequence[str]) -> str | None:
    return found[0] if len(found) == 1 else None


def letter_cn(example: Example) -> str:
    """MMBench-CN's question."""
    return f"{lettered(example)}\n{LETTER_CN}"


def submission(examples: Sequence[Example], answers: Mapping[str, str]) -> tuple[str, str]:
    """The columns as tab-separated text; a spreadsheet program saves it as the .xlsx that the server takes."""
    widest = max(len(example.choices) for example in examples)
    letters = ascii_uppercase[:widest]
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
    writer.writerow(["index", "question", *letters, "hint", "category", "prediction"])
    for example in examples:
        choices = [*example.choices, *[""] * (widest - len(example.choices))]
        extra = [str(example.extra.get(name) or "") for name in ("hint", "category")]
        index = example.extra.get("index", example.id)
        writer.writerow([index, example.question, *choices, *extra, answers.get(example.id, "")])
    return "mmbench.tsv", stream.getvalue()


def _benchmark(prompt: Prompt) -> Benchmark:
    return Benchmark(
        modes={"2025": score, "opencompass_2023": partial(score, matcher="opencompass_2023")},
        prompt=prompt,
        max_new_tokens=LONG_ANSWER_TOKENS,
        splits=("validation", "test"),
        submission=submission,
        chooses=True,
        together=question_of,
    )


BENCHMARK = _benchmark(letter)
CHINESE = _benchmark(letter_cn)
