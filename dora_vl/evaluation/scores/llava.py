"""The benchmarks of LLaVA's own scripts (commit c121f04): their questions, scores and files, quirks included.

An external judge scores two of them, LLaVA-Bench and MM-Vet: only the file for it is written here.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import PurePosixPath
from string import ascii_uppercase
from typing import Literal

from dora_vl.data.benchmarks.llava import MME_COGNITION, MME_PERCEPTION, POPE_CATEGORIES, POPE_VERSIONS
from dora_vl.data.example import Example, right_choice
from dora_vl.errors import UserError, parse_digits, short_repr
from dora_vl.evaluation.predictions import Prediction
from dora_vl.evaluation.scores.benchmark import (
    LETTER,
    LETTER_CN,
    LONG_ANSWER_TOKENS,
    REPEATED,
    SHORT,
    YES_OR_NO,
    Benchmark,
    ByKey,
    ByOrder,
    Key,
    json_lines,
    letter,
    lettered,
    letters,
    plain,
    question_in,
    refuse_strangers,
    right_answer,
    short,
)
from dora_vl.evaluation.scores.exact import lone_letter
from dora_vl.evaluation.scores.scored import (
    ACCURACY,
    AnswersById,
    Formula,
    Mean,
    Ratio,
    Scored,
    Tally,
    Total,
    score_points,
    share_of,
    unit_of,
)

# LLaVA-Bench (in the wild). LLaVA had GPT-4-0314 at temperature 0.2 compare each answer with a reference answer
# (GPT-4's own, from a description of the picture in words).


def judge_requests(examples: Sequence[Example], answers: AnswersById) -> list[dict[str, str]]:
    """Returns a request for each question: its id, category and the text to put to the judge.

    The instruction that ends the text in LLaVA (`prompt` in its rule.json) is left to the judge's system prompt.
    """
    requests: list[dict[str, str]] = []
    for example in examples:
        category = str(example.extra.get("category", ""))
        reference = example.answers[0].text if example.answers else ""
        text = f"[Context]\n{example.extra.get('context', '')}\n\n[Question]\n{example.question}"
        for title, answer in (("Assistant 1", reference), ("Assistant 2", answers.get(example.id, ""))):
            text += f"\n\n[{title}]\n{answer}\n\n[End of {title}]"
        requests.append({"id": example.id, "category": category, "text": text})
    return requests


LLAVA_BENCH = Benchmark(
    modes={},
    max_new_tokens=LONG_ANSWER_TOKENS,
    submission=lambda examples, answers: ("llava_bench_judge.jsonl", json_lines(judge_requests(examples, answers))),
)


# MM-Vet. Judged by GPT-4 with a few-shot prompt, each answer from 0 to 1 in steps of 0.1.


def mmvet_submission(examples: Sequence[Example], answers: AnswersById) -> tuple[str, str]:
    """Writes answers by the publisher's ids ("v1_7" for LLaVA's 7), as the online grader takes them."""
    names = [example.id for example in examples]
    content = {f"v1_{name}" if parse_digits(name) is not None else name: answers.get(name, "") for name in names}
    return "mmvet.json", json.dumps(content, ensure_ascii=False, indent=1)


MMVET = Benchmark(
    modes={},
    max_new_tokens=LONG_ANSWER_TOKENS,
    submission=mmvet_submission,
    joins=(ByKey("number, v1_N", lambda prediction: f"v1_{prediction.id}", lambda example: example.id),),
)


# MMBench and MMBench-CN: circular evaluation, all rotations of a question must be answered rightly.
#
# An answer's letter is read out by the rules of an evaluation tool, of which there were several; two are here:
#
# - `opencompass_2023` (an older script in OpenCompass, of LLaVA-1.5's days; VLMEvalKit's of that time read other
#   letters, so its numbers are not these): letters A to E whatever the choices; first a letter standing alone as a word
#   (not where "A" is among more than three words: it may be an article), then with one of eleven decorations such as
#   "A." or "(A)"; exactly one letter must fit.
# - `2025` (VLMEvalKit today): marks .()[],:;!*#{} become spaces; the one letter of the question's choices among the
#   words counts if it is one of the last four; four phrases of refusal, and a word "Z", are Z, which is never right.
#   Answers longer than twice all choices together are not searched for a choice's text.
#
# In both, an answer without such a letter counts for the one choice whose text is in it, letter case aside. Where
# neither gives a letter the tool asks GPT, or with `exact_matching` gives Z; here it is wrong, as with
# `exact_matching`. The server's numbers, made with GPT, can only be higher.

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


def chosen(answer: str, choices: Mapping[str, str], matcher: Matcher) -> str | None:
    """Returns the letter an answer gives, or None."""
    if "Failed to obtain answer via API" not in answer:
        letter = _letter_2023(answer) if matcher == "opencompass_2023" else _letter_2025(answer, choices)
        if letter is not None:
            return letter
    if matcher == "2025" and len(answer) > 2 * sum(map(len, choices.values())):
        return None
    return _only([letter for letter, text in choices.items() if text.lower() in answer.lower()])


def _letter_2023(answer: str) -> str | None:
    words = answer.split()
    alone = _only([letter for letter in _LETTERS_2023 if letter in words])
    if alone and not ("A" in words and len(words) > 3):
        return alone
    for decoration in _DECORATIONS_2023:
        if letter := _only([letter for letter in _LETTERS_2023 if decoration.format(letter) in words]):
            return letter
    return None


def _letter_2025(answer: str, letters: Collection[str]) -> str | None:
    if any(refusal in answer for refusal in _REFUSALS_2025):
        return NO_CHOICE
    words = answer.translate(_MARKS_2025).split()
    standing = [letter for letter in letters if letter in words]
    if len(standing) == 1:
        return standing[0] if words.index(standing[0]) >= len(words) - _LAST_WORDS_2025 else None
    return NO_CHOICE if not standing and NO_CHOICE in words else None


def _only(matches: Sequence[str]) -> str | None:
    return matches[0] if len(matches) == 1 else None


def mmbench_score(examples: Sequence[Example], answers: AnswersById, *, matcher: Matcher = "2025") -> Scored:
    """Scores circular accuracy, by `l2_category` and `category` too, and `vanilla`, over single rotations."""
    groups: defaultdict[int, list[Example]] = defaultdict(list)
    for example in examples:
        groups[question_of(example)].append(example)

    def is_right(example: Example) -> bool:
        choices, answer = dict(zip(ascii_uppercase, example.choices, strict=False)), answers.get(example.id)
        return answer is not None and chosen(answer, choices, matcher) == ascii_uppercase[right_choice(example)]

    tally, kinds = Tally(), set[str]()
    for question, rotations in groups.items():
        hits = list(map(is_right, rotations))
        first = min(rotations, key=lambda example: example.extra["index"])
        named = {"l2": first.extra.get("l2_category"), "category": first.extra.get("category")}
        of_question = {f"{prefix}/{kind}" for prefix, kind in named.items() if kind}
        kinds |= of_question
        of_whole = {"right": float(all(hits)), "asked": 1.0}
        for kind in of_question:
            of_whole |= {f"right {kind}": float(all(hits)), f"asked {kind}": 1.0}
        for example, hit in zip(rotations, hits, strict=True):
            columns = (of_whole if example is first else {}) | {"rotation right": float(hit), "rotations": 1.0}
            tally.add(example.id, float(hit), columns, unit=str(question), failed=example.id not in answers)
    formulas: dict[str, Formula] = {"accuracy": ACCURACY, "vanilla": Ratio("rotation right", "rotations")}
    formulas |= {kind: share_of(kind) for kind in sorted(kinds, key=lambda kind: (kind[0] != "l", kind))}
    return tally.scored(formulas, settings={"matcher": matcher, "without a letter": "wrong (exact_matching)"})


def question_of(example: Example) -> int:
    """Returns what all rotations of one question share: their index modulo 1,000,000."""
    index = example.extra.get("index")
    if not isinstance(index, int):
        raise UserError(
            f"MMBench example {short_repr(example.id)} has extra.index {short_repr(index)}; it needs the row's index"
        )
    return index % ROTATION


def letter_cn(example: Example) -> str:
    """Asks as MMBench-CN asks."""
    return f"{lettered(example)}\n{LETTER_CN}"


def mmbench_submission(examples: Sequence[Example], answers: AnswersById) -> tuple[str, str]:
    """Writes tab-separated text; a spreadsheet program saves it as the .xlsx that the server takes."""
    widest = max(len(example.choices) for example in examples)
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
    writer.writerow(["index", "question", *ascii_uppercase[:widest], "hint", "category", "prediction"])
    for example in examples:
        choices = [*example.choices, *[""] * (widest - len(example.choices))]
        extra = [str(example.extra.get(name) or "") for name in ("hint", "category")]
        index = example.extra.get("index", example.id)
        writer.writerow([index, example.question, *choices, *extra, answers.get(example.id, "")])
    return "mmbench.tsv", stream.getvalue()


MMBENCH, CHINESE = (
    Benchmark(
        modes={"2025": mmbench_score, "opencompass_2023": partial(mmbench_score, matcher="opencompass_2023")},
        prompt=prompt,
        max_new_tokens=LONG_ANSWER_TOKENS,
        splits=("validation", "test"),
        submission=mmbench_submission,
        chooses=True,
        together=question_of,
    )
    for prompt in (letter, letter_cn)
)


# MME as its calculation.py gives it.


def yes_or_no(answer: str) -> Literal["yes", "no", "other"]:
    """Reads an answer as the script does: "yes", then "no", in its first four characters in lower case.

    So "know" is no, "unknown" is neither, "eyes" is yes.
    """
    beginning = answer.lower()[:4]
    if "yes" in beginning:
        return "yes"
    return "no" if "no" in beginning else "other"


def mme_score(examples: Sequence[Example], answers: AnswersById) -> Scored:
    """Scores perception, cognition and every subtask, from 0 to 200; none is in percent.

    A subtask's is accuracy + accuracy+ (both questions of a picture right). The script pairs questions by their
    position; here by picture, and a picture that has not exactly two questions is refused. A missing answer is wrong.
    Perception (ten subtasks) is the headline, cognition (four) the second. `extra["category"]` is the subtask.
    """
    right = {
        example.id: yes_or_no(answers.get(example.id, "")) == right_answer(example).lower() for example in examples
    }
    pictures = Counter(picture_of(example) for example in examples)
    both = Counter(picture_of(example) for example in examples if right[example.id])
    odd = [name for name, count in pictures.items() if count != 2]
    if odd:
        raise UserError(f"MME picture {odd[0][1]} of {odd[0][0]} has {pictures[odd[0]]} questions, not two")
    tally = Tally()
    for example in examples:
        task, picture = picture_of(example)
        hit = float(right[example.id])
        columns = {f"right {task}": hit, f"asked {task}": 1.0}
        columns |= {f"both {task}": (both[task, picture] == 2) / 2, f"pictures {task}": 0.5}
        tally.add(example.id, hit, columns, unit=f"{task}\n{picture}", failed=example.id not in answers)
    published, seen = (*MME_PERCEPTION, *MME_COGNITION), {task for task, _ in pictures}
    tasks: dict[str, Formula] = {
        task: Total((share_of(task), Ratio(f"both {task}", f"pictures {task}")))
        for task in [*(task for task in published if task in seen), *sorted(seen.difference(published))]
    }
    sums: dict[str, Formula] = {}
    for name, members in (("perception", MME_PERCEPTION), ("cognition", MME_COGNITION)):
        if present := tuple(tasks[task] for task in members if task in tasks):
            sums[name] = Total(present)
    return tally.scored({**sums, **tasks})


def picture_of(example: Example) -> tuple[str, str]:
    """Returns an example's subtask and picture, which two questions share."""
    if len(example.images) != 1:
        raise UserError(f"MME example {example.id} names {len(example.images)} pictures; it needs one")
    return str(example.extra.get("category", "")), example.images[0]


def mme_prompt(example: Example) -> str:
    """Asks in LLaVA's wording: its suffix replaces MME's own "Please answer yes or no."."""
    return f"{example.question.replace(YES_OR_NO, '').strip()}\n{SHORT}"


def _mme_key(prediction: Prediction) -> Key:
    path, question = REPEATED.sub("", prediction.id), question_in(prediction.question)
    return (path.partition("/")[0], PurePosixPath(path).stem, question) if question else None


def _mme_example(example: Example) -> Key:
    if not example.images:
        return None
    return str(example.extra.get("category")), PurePosixPath(example.images[0]).stem, plain(example.question)


MME = Benchmark(
    modes={"": mme_score},
    prompt=mme_prompt,
    together=picture_of,
    joins=(ByKey("subtask, picture and question", _mme_key, _mme_example),),
)


# POPE as LLaVA's eval_pope.py gives it.
#
# The script matches answers and labels by their position and cuts the longer list in silence. Here the id matches, and
# an answer to a question that is not there is refused. Which version of the label files it was (`POPE_VERSIONS`), by
# its counts, is written into the settings.


def says_no(answer: str) -> bool:
    """Reads no where "No", "not" or "no" stands between *spaces* of the first sentence, as the script does.

    Commas go before. So "NO", "Not", "nope", "", "isn't", "No\\n" and "no!" all count as yes.
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return any(word in words for word in ("No", "not", "no"))


def pope_score(examples: Sequence[Example], answers: AnswersById) -> Scored:
    """Scores the categories' mean F1, LLaVA's number, its parts, and each category's, in percent.

    A missing answer counts as the wrong one of the two. Division by zero gives 0.
    """
    why = "the label files come in two versions, so prepare the one that the questions were asked from"
    refuse_strangers("POPE", examples, answers, why)
    tally, categories = Tally(), Counter[str]()
    for example in examples:
        category, label = str(example.extra.get("category", "all")), right_answer(example)
        categories[category] += 1
        if label not in ("yes", "no"):
            raise UserError(f"POPE example {example.id} has the label {short_repr(label)}; it must be yes or no")
        truth, answer = label == "yes", answers.get(example.id)
        yes = (not truth) if answer is None else not says_no(answer)
        cell = {(True, True): "tp", (True, False): "fp", (False, False): "tn", (False, True): "fn"}[yes, truth]
        columns = {f"{cell} {category}": 1.0, f"asked {category}": 1.0}
        columns |= {f"right {category}": float(yes == truth), f"yes {category}": float(yes)}
        tally.add(example.id, float(yes == truth), columns, unit=unit_of(example), failed=answer is None)
    by_category: dict[str, dict[str, Formula]] = {}
    for category in sorted(categories):
        tp, fp, fn = (f"{cell} {category}" for cell in ("tp", "fp", "fn"))
        by_category[category] = {
            "f1": Ratio(tp, (tp, tp, fp, fn), scale=200.0),  # 2 tp / (2 tp + fp + fn) is 2 P R / (P + R)
            "accuracy": share_of(category),
            "precision": Ratio(tp, (tp, fp)),
            "recall": Ratio(tp, (tp, fn)),
            "yes share": Ratio(f"yes {category}", f"asked {category}"),
        }
    formulas: dict[str, Formula] = {
        name: Mean(tuple(metrics[name] for metrics in by_category.values()))
        for name in ("f1", "accuracy", "precision", "recall", "yes share")
    }
    formulas |= {
        f"{kind}/{name}": formula for kind, metrics in by_category.items() for name, formula in metrics.items()
    }
    counts = tuple(categories[category] for category in POPE_CATEGORIES)
    described = ", ".join(f"{count} {category}" for category, count in sorted(categories.items()))
    return tally.scored(formulas, settings={"labels": POPE_VERSIONS.get(counts, described)})


POPE = Benchmark(modes={"": pope_score}, prompt=short, joins=(ByOrder("order, each prompt being the question's"),))


# ScienceQA as LLaVA's eval_science_qa.py gives it, and SEED-Bench as LLaVA's convert and SEED's own script do.

OPTIONS = "ABCDE"
SENTENCE = re.compile("The answer is ([A-Z]).")


def parse_letter(answer: str) -> str | None:
    """Parses the letter of an answer as ScienceQA's script does; None where that fails. In this order:

    1. the whole answer is one of A to E;
    2. it begins with a letter of A to E, a period and a space;
    3. "The answer is X" followed by *any* character, found exactly once: "The answer is C" with nothing after it fails,
       and "The answer is Because" parses as B.
    """
    if len(answer) == 1 and answer in OPTIONS:
        return answer
    if len(answer) >= 3 and answer[0] in OPTIONS and answer[1:3] == ". ":
        return answer[0]
    return _only(SENTENCE.findall(answer))


def scienceqa_score(examples: Sequence[Example], answers: AnswersById) -> Scored:
    """Scores image accuracy, LLaVA's number, where any question has a picture, then accuracy, in percent."""
    image = {"image accuracy": share_of("image accuracy")} if any(example.images for example in examples) else {}
    return score_points(
        examples,
        answers,
        lambda example, answer: float(parse_letter(answer) == letters(example)[right_choice(example)]),
        metrics={**image, "accuracy": ACCURACY},
        kinds=lambda example: ["image accuracy"] if example.images else [],
    )


def scienceqa_prompt(example: Example) -> str:
    """Asks in LLaVA's wording: the hint comes after "Context: "."""
    return f"{lettered(example, before_hint='Context: ')}\n{LETTER}"


def seed_score(examples: Sequence[Example], answers: AnswersById) -> Scored:
    """Scores the exact letter in percent: all, by `extra["data_type"]` and by `extra["question_type"]`.

    The published script stops when an answer is missing or a type has no right answer; here the former is wrong and the
    latter 0. Nothing is parsed out of longer answers: "A." is wrong. (lmms-eval takes the first character instead.)
    """

    def kinds(example: Example) -> list[str]:
        kind = example.extra.get("question_type")
        return [f"accuracy/{example.extra.get('data_type', 'image')}", *([f"type/{kind}"] if kind else [])]

    return score_points(
        examples, answers, lambda example, answer: float(answer == letters(example)[right_choice(example)]), kinds=kinds
    )


SCIENCEQA = Benchmark(
    modes={"": scienceqa_score}, prompt=scienceqa_prompt, max_new_tokens=LONG_ANSWER_TOKENS, chooses=True
)
SEED = Benchmark(modes={"": seed_score}, prompt=letter, chooses=True)


def with_choices(example: Example, suffix: str) -> Example:
    """Returns a question of LLaVA's conversations with the choices that its words end with, and the right one.

    The choices are the last lines "A. ...", "B. ..." or the line "Options: (A) ... (B) ..."; the right one is what the
    answer's letter names, or whose text it is.
    """
    turn, text = example.turns[-1], example.turns[-1].text
    choices = _choices(text)
    if not choices:
        return example
    extra = dict(example.extra)
    truth = example.answers[0].text.strip() if example.answers else ""
    lettered = list(zip(ascii_uppercase, choices, strict=False))
    same = [letter for letter, choice in lettered if truth in (choice, f"{letter}. {choice}")]
    letter = lone_letter(truth) or "none"
    if letter not in dict(lettered):  # ScienceQA's own parser knows A to E; a small letter may be a choice's text
        letter = parse_letter(truth) or parse_letter(truth + ".") or (same[0] if len(same) == 1 else letter.upper())
    if letter in dict(lettered):
        extra["correct"] = ascii_uppercase.index(letter)
    if suffix not in text:
        turn = replace(turn, text=f"{text.rstrip()}\n{suffix}")
    return replace(example, choices=choices, extra=extra, turns=(*example.turns[:-1], turn))


def _choices(text: str) -> tuple[str, ...]:
    if in_line := re.findall(r"^Options: (\(A\) .*)$", text, re.MULTILINE):
        return tuple(choice.strip() for choice in re.split(r"\([A-Z]\) ", in_line[-1])[1:])
    choices: list[str] = []
    for sign, choice in re.findall(r"^([A-Z])\. ?(.*)$", text, re.MULTILINE):
        choices = [] if sign == "A" else choices
        if sign == ascii_uppercase[len(choices) : len(choices) + 1]:
            choices.append(choice)
    return tuple(choices) if len(choices) > 1 else ()
