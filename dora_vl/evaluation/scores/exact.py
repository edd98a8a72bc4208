"""Answers compared with the right one: exact match, near misses, choices, the commonsense sets, TVQA and How2QA."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import isfinite, prod
from string import ascii_uppercase
from typing import Literal
from unicodedata import normalize

from dora_vl.data.example import Example, right_choice
from dora_vl.data.objects import PLACE, matched
from dora_vl.evaluation.scores import caption
from dora_vl.evaluation.scores.benchmark import (
    Benchmark,
    Scorer,
    about_video,
    letters,
    refuse_strangers,
    right_answer,
    right_answers,
)
from dora_vl.evaluation.scores.scored import ACCURACY, AnswersById, Formula, Mean, Ratio, Scored, score_points, share_of
from dora_vl.evaluation.scores.vqa import normalise

Comparison = Callable[[str, str], float | bool]


def normalised(answer: str) -> str:
    """Lowers an answer's case, leaves single spaces, and takes full stops off its end (GQA's rule in LLaVA).

    An accent is the same as a part of its letter and as a character of its own (Unicode's NFC and NFD).
    """
    return _plain(answer).rstrip(".").rstrip() or _plain(answer)


def _plain(text: str) -> str:
    return " ".join(normalize("NFC", text).lower().split())


def final_answer(text: str, after: str | None) -> str:
    """Returns what follows the last `after` in an answer that reasons first ("blue circle, so no")."""
    return text.rpartition(after)[2] if after else text


def score(examples: Sequence[Example], answers: AnswersById, *, answer_after: str | None = None) -> Scored:
    """Scores accuracy in percent, over all and by `extra["kind"]`: an answer is right that equals a right one."""

    def points(example: Example, answer: str) -> float:
        right = {normalised(final_answer(text, answer_after)) for text in right_answers(example)}
        return float(normalised(final_answer(answer, answer_after)) in right)

    settings = {"answer_after": answer_after} if answer_after else {}
    return score_points(examples, answers, points, kinds=by_kind, settings=settings)


def by_kind(example: Example) -> list[str]:
    """Returns the kind of question as a metric's name."""
    return [f"kind/{example.extra['kind']}"] if "kind" in example.extra else []


BENCHMARK = Benchmark(modes={"": score})


# A benchmark of one's own: the best over an example's right answers, in percent. Rewards compare by the same rules.


def best_points(points: Comparison, example: Example, answer: str, *, answer_after: str | None = None) -> float:
    """Returns the best of an answer's points against each right answer; one without a word must be the right one."""
    text = final_answer(answer, answer_after)
    rights = [final_answer(right.text, answer_after) for right in example.answers]
    return max(
        (float(points(text, right)) for right in rights if bool(text.strip()) == bool(right.strip())), default=0.0
    )


def best_of(points: Comparison, headline: str) -> Scorer:
    """Makes a scorer of `best_points`."""
    return partial(score_points, points=partial(best_points, points), metrics={headline: ACCURACY}, kinds=by_kind)


def right_choice_points(example: Example, answer: str) -> float:
    """Returns 1 where the answer gives the right choice's letter or text, and no other's."""
    choices = dict(zip(ascii_uppercase, example.choices, strict=False))
    return float(_chosen(answer, choices) == ascii_uppercase[right_choice(example)])


def _chosen(answer: str, choices: Mapping[str, str]) -> str | None:
    """Returns the letter an answer gives, or None.

    A letter as it was asked for goes before all texts, a small one after them. An answer that is neither counts for
    the only choice that it names: by its letter ("B. ...", "the answer is B") or by its text as whole words, unless a
    negation stands before these in their clause ("not red").
    """
    bare = lone_letter(answer)
    if bare in choices:
        return bare
    for same in (str.strip, normalised, _without_article):  # "Co" and "CO" may both be choices
        equal = [letter for letter, text in choices.items() if same(text) == same(answer)]
        if len(equal) == 1:
            return equal[0]
    if bare.upper() in choices:
        return bare.upper()
    named = _letters_named(answer) & {*choices} | _texts_named(normalised(answer), choices)
    return named.pop() if len(named) == 1 else None


_LEADING_LETTER = re.compile(r"\s*(?:\(([A-Z])\)|([A-Z])[.:)])(?=\s|$)")
_LETTER_ALONE = re.compile(r"(?<![\w'’])(?:[B-HJ-Z](?![\w'’])|[AI](?=[.:)]))")
_LETTER_GIVEN = re.compile(
    r"\b(?i:answer|option|choice|letter|choose|pick|select|is|['’]s)[\s:]+(?:option\s+)?\(?([A-Z])\)?(?=[\s.!]*$|[.:;,)])"
)
_NEGATION = re.compile(r"\b(?:not|no|never|neither|nor|none|without|cannot|isnt|hardly)\b|n['’]t\b|[不没沒非無无]")
_CLAUSE_END = re.compile(r"[.,;:!?\n。,；]")
_UNSPACED = r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]"  # Thai, Lao, Japanese and Chinese put no spaces between words


def _negated(before: str) -> bool:
    return _NEGATION.search(_CLAUSE_END.split(before)[-1].lower()) is not None


def _letters_named(answer: str) -> set[str]:
    """Finds the letters of "B. because ...", with all others that stand alone beside it, and of "The answer is B"."""
    named = {match[1] for match in _LETTER_GIVEN.finditer(answer) if not _negated(answer[: match.start()])}
    return named | ({*_LETTER_ALONE.findall(answer)} if _LEADING_LETTER.match(answer) else set())


def _texts_named(answer: str, choices: Mapping[str, str]) -> set[str]:
    """Finds the choices whose texts are words of the answer, the longest first: "red dog" is no "dog"."""
    letters: dict[str, set[str]] = {}
    for letter, text in choices.items():
        if len(text := _without_article(text)) > 1 or re.match(rf"\d|{_UNSPACED}", text):  # no "a" that is an article
            letters.setdefault(text, set()).add(letter)
    named = set[str]()
    for match in re.finditer("|".join(map(_as_words, sorted(letters, key=len, reverse=True))) or "(?!)", answer):
        named |= set() if _negated(answer[: match.start()]) else letters[match[0]]
    return named


def _as_words(text: str) -> str:
    """Returns the pattern of a text that is no part of another word or number ("1" in "1.5", "no" in "no idea")."""
    before = "" if re.match(_UNSPACED, text) else r"(?<![\w.\-−])(?<!\d[,:/])"
    after = "" if re.match(_UNSPACED, text[-1]) else r"(?!\w|['’\-]\w|[.,:/]\d|\s?%)"
    return before + re.escape(text) + after + (r"(?!\s+\w)" if text == "no" else "")


def _without_article(answer: str) -> str:
    return re.sub("^(?:an?|the) ", "", normalised(answer))


def lone_letter(answer: str) -> str:
    """Returns the letter that is all of an answer but for marks ("F", "(F)", "F.", "f:"); "" where there is more."""
    match = _LONE_LETTER.fullmatch(answer.strip())
    return match[1] if match else ""


_LONE_LETTER = re.compile(r"\(?([A-Za-z])\)?[.:]?")


def similarity(answer: str, true: str) -> float:
    """Returns one answer's ANLS against one right one, from 0 to 1 (Biten et al., 2019; DocVQA).

    One minus the edit distance over the longer one's length, letter case and spaces aside; nothing up to one half.
    """
    answer, true = _plain(answer), _plain(true)
    if answer == true:
        return 1.0
    longer = max(len(answer), len(true))
    if abs(len(answer) - len(true)) * 2 > longer:  # at least so many insertions
        return 0.0
    share = 1.0 - _edits(answer, true) / longer
    return share if share > 0.5 else 0.0


def _edits(first: str, second: str) -> int:
    """Computes Levenshtein's distance, a line of its table at a time."""
    line = list(range(len(second) + 1))
    for number, letter in enumerate(first, start=1):
        corner, line[0] = line[0], number
        for column, other in enumerate(second, start=1):
            changed = corner + (letter != other)
            corner = line[column]
            line[column] = min(changed, corner + 1, line[column - 1] + 1)
    return line[-1]


def is_close(answer: str, true: str) -> bool:
    """Tests ChartQA's relaxed equality (Masry et al., 2022): numbers, "%" as hundredths, may be off by 5 % of the true.

    Others must be equal but for letter case; so must a number whose true value is zero. An infinite one is not met.
    """
    number, true_number = _number(answer), _number(true)
    if not all(isfinite(value or 0.0) for value in (number, true_number)):
        return False
    if number is None or not true_number:
        return answer.strip().lower() == true.strip().lower()
    # 105 is within, whatever float division makes of it
    return abs(number - true_number) <= (0.05 + 1e-9) * abs(true_number)


def _number(text: str) -> float | None:
    text = text.strip().replace("_", "?")  # Python alone reads 1_0 as 10
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None


_NUMBER = re.compile(r"(?:(?<![\w.])[-+])?(?<![\w.])(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")


def box_of(text: str) -> tuple[float, ...]:
    """Returns left, top, right and bottom, the last four numbers of a text; nothing where they are no box."""
    box = tuple(map(float, _NUMBER.findall(text.replace("−", "-"))[-4:]))
    return box if len(box) == 4 and box[0] < box[2] and box[1] < box[3] and all(map(isfinite, box)) else ()


def overlap(answer: str, true: str) -> float:
    """Computes the intersection of two boxes over their union; of several, the mean over all that either has."""
    if PLACE.search(true):
        shares = matched(true, answer)
        return sum(shares) / len(shares)
    if not (box := box_of(answer)) or not (true_box := box_of(true)):
        return 0.0
    shared = prod(max(0.0, min(box[end], true_box[end]) - max(box[end - 2], true_box[end - 2])) for end in (2, 3))
    union = sum((right - left) * (bottom - top) for left, top, right, bottom in (box, true_box)) - shared
    return shared / union if isfinite(union) else 0.0


COMPARISONS: Mapping[str, Comparison] = {
    "exact": lambda answer, true: normalised(answer) == normalised(true),
    "anls": similarity,
    "relaxed": is_close,
    # a true answer of which the normaliser leaves nothing ("A", "the", "?") is not met
    "vqa": lambda answer, true: normalise(answer) == normalise(true) != "",
    "box": overlap,
}
"""Maps a name to what compares an answer with a right one; a right answer equal to itself earns its points, or none."""
HEADLINES = {"exact": "accuracy", "relaxed": "relaxed accuracy", "vqa": "accuracy", "box": "mean overlap"}
SCORINGS: Mapping[str, Scorer] = {
    **{name: best_of(points, HEADLINES.get(name, name)) for name, points in COMPARISONS.items()},
    "choice": partial(score_points, points=right_choice_points, kinds=by_kind),
    "caption": caption.score,
}
"""`scoring:` of a benchmark's YAML takes these names."""


# The eight commonsense sets of LLM-Adapters, by their own extraction of the answer from generated text.
#
# Two official scripts search different parts of the text: `llm_adapters` what stands between the first and the second
# "### Response:", `nvlabs` (NVlabs/DoRA, so the paper's numbers) what stands after the last one. They differ where a
# model goes on with another of its own. Then the first match of the task's pattern counts, case-sensitive, anywhere:
# "untrue" is true, "answer10" is answer1, "True" is nothing. Reads `answers[0]` ("answer4") and `extra["task"]`.

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
"""Maps a task to the pattern of its answers, in the order of the paper's columns."""


def extracted(text: str, task: str, rule: Rule) -> str:
    """Finds the answer in a generated text; "" where there is none."""
    # The scripts see the prompt, which ends in the marker, before.
    match = PATTERNS[task].search(text.split(RESPONSE)[0 if rule == "llm_adapters" else -1])
    return match.group() if match else ""


def _task_of(example: Example) -> str:
    return str(example.extra.get("task", ""))


def _tasks_of(examples: Sequence[Example]) -> dict[str, Formula]:
    """Returns the mean over the tasks that are there, then each task's accuracy."""
    present = set(map(_task_of, examples))
    tasks = {task: share_of(task) for task in PATTERNS if task in present}
    return {"average": Mean(tuple(tasks.values())), **tasks}


def commonsense_score(examples: Sequence[Example], answers: AnswersById, *, rule: Rule = "nvlabs") -> Scored:
    """Scores generated text without its prompt: the mean over the tasks, then each task's accuracy, in percent."""
    return score_points(
        examples,
        answers,
        lambda example, answer: float(extracted(answer, _task_of(example), rule) == right_answer(example)),
        metrics=_tasks_of(examples),
        kinds=lambda example: [_task_of(example)],
        settings={"extraction": rule},
    )


CLOZE = "cloze"
BY_LENGTH = frozenset({"piqa", "hellaswag", "ARC-Easy", "ARC-Challenge", "openbookqa"})
"""lm-eval's task files define `acc_norm` for these, and for no other of the eight."""


def cloze_score(examples: Sequence[Example], answers: AnswersById) -> Scored:
    """Scores the likeliest endings: the mean over the tasks, then each one's accuracy (lm-eval's `acc`), in percent.

    `normalised` divides each log-likelihood by its ending's characters (`acc_norm`), for the sets that have it. An
    answer is the log-likelihoods of the endings, as numbers with spaces between; of equals the first is chosen.
    """

    def chosen(example: Example, answer: str, lengths: Sequence[float]) -> bool:
        scores = [float(number) / length for number, length in zip(answer.split(), lengths, strict=True)]
        return scores.index(max(scores)) == example.extra["correct"]

    def normalised_points(example: Example) -> dict[str, float]:
        endings, answer, task = example.extra["endings"], answers.get(example.id), _task_of(example)
        if task not in BY_LENGTH:
            return {}
        right = answer is not None and chosen(example, answer, [float(len(ending)) for ending in endings])
        return {f"normalised {task}": float(right), f"asked normalised {task}": 1.0}

    tasks = _tasks_of(examples)
    by_length = {
        f"normalised {task}": Ratio(f"normalised {task}", f"asked normalised {task}")
        for task in tasks
        if task in BY_LENGTH
    }
    return score_points(
        examples,
        answers,
        lambda example, answer: float(chosen(example, answer, [1.0] * len(example.extra["endings"]))),
        metrics={**tasks, **by_length},
        kinds=lambda example: [_task_of(example)],
        more=normalised_points,
    )


COMMONSENSE = Benchmark(
    modes={
        **{rule: partial(commonsense_score, rule=rule) for rule in ("nvlabs", "llm_adapters")},
        CLOZE: cloze_score,  # of records of `dora-vl prepare cloze`
    }
)


# TVQA and How2QA: the generated label ("a2") by exact match, and what VALUE's server would make of it.
#
# The model is trained to say "a" and the index. VL-Adapter counts exact matches of that string (`accuracy`). The server
# compares whole numbers and rounds to two decimals (`value_accuracy`): an empty answer is a guess of the first choice,
# a missing one, -1 in the file, is wrong (the server stops). A LLaVA is asked for a letter, so "C" or "C." is read as
# "a2" where the question has such a choice. Source: github.com/VALUE-Leaderboard/EvaluationTools.


def label_of(example: Example, answer: str) -> str:
    """Returns the label that an answer gives: the answer itself, or that of the choice whose letter it is."""
    letter, choices = answer.strip().removesuffix("."), letters(example)
    return f"a{choices.index(letter)}" if len(letter) == 1 and letter in choices else answer


def submitted_index(answer: str) -> int:
    """Returns the choice that a submission holds for an answer: its second character, or 0 where that is no digit."""
    digit = answer[1:2]
    return int(digit) if digit.isascii() and digit.isdigit() else 0


def video_score(examples: Sequence[Example], answers: AnswersById) -> Scored:
    """Scores both accuracies in percent; ignores extra answers (TVQA)."""
    return score_points(
        examples,
        answers,
        lambda example, answer: float(label_of(example, answer) == f"a{right_choice(example)}"),
        metrics={"accuracy": ACCURACY, "value_accuracy": Ratio("parsed right", "asked", decimals=2)},
        more=lambda example: {"parsed right": float(_submitted(example, answers) == right_choice(example))},
    )


def how2qa_score(examples: Sequence[Example], answers: AnswersById) -> Scored:
    """Scores as `video_score` does, and refuses extra answers."""
    refuse_strangers("How2QA", examples, answers, "its server rejects them")
    return video_score(examples, answers)


def _submitted(example: Example, answers: AnswersById) -> int:
    """Returns the choice that the server's file holds; -1 for a missing answer, as the server stops at none."""
    answer = answers.get(example.id)
    return -1 if answer is None else submitted_index(label_of(example, answer))


def video_submission(examples: Sequence[Example], answers: AnswersById, *, file: str) -> tuple[str, str]:
    """Writes VALUE's file of choice indices by question id."""
    return file, json.dumps({example.id: _submitted(example, answers) for example in examples})


TVQA = Benchmark(
    modes={"": video_score},
    prompt=about_video,
    splits=("validation", "test"),
    submission=partial(video_submission, file="tvqa_test_predictions.json"),
    chooses=True,
    labels_choices=True,
)
HOW2QA = replace(
    TVQA, modes={"": how2qa_score}, submission=partial(video_submission, file="how2qa_test_public_predictions.json")
)
