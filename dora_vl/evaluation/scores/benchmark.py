"""What a benchmark is: its question, its official score, its server's file, and how its files name its questions.

Each benchmark's own is in a scorer's file, and one entry of `evaluation.benchmarks` makes it known.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from string import ascii_uppercase

from dora_vl.data.example import LETTER, Example, with_letters
from dora_vl.data.turns import IMAGE_PLACEHOLDER, Turn
from dora_vl.errors import UserError, parse_digits, short_repr
from dora_vl.evaluation.predictions import Prediction, Predictions
from dora_vl.evaluation.scores.scored import AnswersById, Scored

# The questions: LLaVA-1.5's own wording, to the letter, as far as benchmarks share it.
#
# An example that holds `turns` is asked with them as they are. LLaVA's question files hold the suffixes already;
# records hold the publisher's question, so they are added here. The wordings for captions and NLVR are this project's.

SHORT = "Answer the question using a single word or phrase."
LETTER_CN = "请直接回答选项字母。"
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
YES_OR_NO = "Please answer yes or no."

PromptFunction = Callable[[Example], str]


def as_is(example: Example) -> str:
    """Returns only the question."""
    return example.question


def short(example: Example) -> str:
    """Asks as VQAv2, GQA and POPE are asked."""
    return f"{example.question}\n{SHORT}"


def letter(example: Example) -> str:
    """Asks as SEED and MMBench are asked: hint, question, lettered choices."""
    return f"{lettered(example)}\n{LETTER}"


def caption_of_picture(_: Example) -> str:
    """Asks for a caption, as of COCO's pictures."""
    return "Provide a one-sentence caption for the provided image."


def true_or_false(example: Example) -> str:
    """Asks as NLVR and NLVR2 are asked."""
    return f"{example.question}\nIs this true or false? {SHORT}"


def about_video(example: Example) -> str:
    """Asks about a video (TVQA, How2QA, one's own): what is said in it, the question, lettered choices."""
    choices = with_letters(example.choices)
    return "\n".join([*_subtitles(example), example.question, *choices, *([LETTER] if choices else [])])


def caption_of_video(example: Example) -> str:
    """Asks for a caption of a clip, as of TVC and YC2C."""
    return "\n".join([*_subtitles(example), "Provide a one-sentence caption for the provided video."])


def _subtitles(example: Example) -> list[str]:
    """Returns the clip's subtitles as one line; none where nothing is said."""
    text = " ".join(subtitle.text for subtitle in example.subtitles if subtitle.text)
    return [f"Subtitles: {text}"] if text else []


def prompt_turns(example: Example, prompt: PromptFunction) -> tuple[Turn, ...]:
    """Returns the prompt as turns up to and with the question, one placeholder for each picture first."""
    if example.turns:
        return example.turns[:-1] if example.turns[-1].role == "assistant" else example.turns
    return (Turn("user", f"{IMAGE_PLACEHOLDER}\n" * len(example.images) + prompt(example)),)


def lettered(example: Example, before_hint: str = "") -> str:
    """Returns hint, question and choices, a line each."""
    hint = str(example.extra.get("hint") or "")
    return "\n".join([*([before_hint + hint] if hint else []), example.question, *with_letters(example.choices)])


# Which question a line of a predictions file answers, beside by the id.
#
# LLaVA's question files name TextVQA's, MME's, VizWiz' and POPE's questions differently from the publishers'
# annotations. A line's prompt tells questions about one picture apart. Source of the names: LLaVA c121f04,
# `llava/eval/eval_textvqa.py`, `eval_pope.py`, `scripts/convert_*.py`, and MME's `convert_answer_to_mme.py`.

Key = Hashable | None
REPEATED = re.compile(r"#\d+$")
"""`questions` ends ids with this where several questions have the same."""
_SUFFIXES = (SHORT, LETTER, LETTER_CN, UNANSWERABLE, YES_OR_NO)
_OCR = re.compile(r"^Reference OCR token:.*$", re.MULTILINE)


@dataclass(frozen=True)
class ByKey:
    """By a key that both have, None where one has none; questions of one key are told apart by their order."""

    by: str
    of_prediction: Callable[[Prediction], Key]
    of_example: Callable[[Example], Key]

    def pairs(self, predictions: Sequence[Prediction], examples: Sequence[Example]) -> list[str | None]:
        """Returns the id of each prediction's question; None where there is none."""
        named: defaultdict[Key, list[str]] = defaultdict(list)
        for example in examples:
            named[self.of_example(example)].append(example.id)
        named.pop(None, None)
        keys = [self.of_prediction(prediction) for prediction in predictions]
        counts = Counter(keys)
        unequal = [key for key, ids in named.items() if len(ids) > 1 and counts[key] not in (0, len(ids))]
        if unequal:
            key = unequal[0]
            raise UserError(
                f"{len(unequal)} keys ({self.by}) fit several questions, first {short_repr(key)}: {counts[key]} "
                f"answers for {len(named[key])} questions; give each answer its question's id"
            )
        turn: Counter[Key] = Counter()
        ids: list[str | None] = []
        for key in keys:
            several = named.get(key, ())
            ids.append(several[min(turn[key], len(several) - 1)] if several else None)
            turn[key] += 1
        return ids


@dataclass(frozen=True)
class ByOrder:
    """By place, where each prompt holds the words of the question at its place; categories in any order."""

    by: str

    def pairs(self, predictions: Sequence[Prediction], examples: Sequence[Example]) -> list[str | None]:
        """See `ByKey`."""
        questions = [question_in(prediction.question) for prediction in predictions]
        categories: defaultdict[str, list[Example]] = defaultdict(list)
        for example in examples:
            categories[str(example.extra.get("category"))].append(example)
        if len(predictions) != len(examples) or not all(questions) or len(categories) > 4:  # 24 orders are tried
            return [None] * len(predictions)
        orders = [[example for name in names for example in categories[name]] for names in permutations(categories)]
        fitting = [order for order in orders if [plain(example.question) for example in order] == questions]
        if len(fitting) > 1:
            raise UserError(f"the answers fit the questions in {len(fitting)} orders of their categories; give ids")
        return [example.id for example in fitting[0]] if fitting else [None] * len(predictions)


def question_in(prompt: str) -> str:
    """Returns only a prompt's question, in lower case with single spaces: suffixes, OCR tokens and placeholders go."""
    for suffix in _SUFFIXES:  # first, since they end the line of tokens
        prompt = prompt.replace(suffix, " ")
    return plain(_OCR.sub(" ", prompt.replace(IMAGE_PLACEHOLDER, " ")))


def plain(question: str) -> str:
    """Returns a question in lower case with single spaces, without suffixes; POPE's "imange" is an image."""
    for suffix in _SUFFIXES:
        question = question.replace(suffix, " ")
    return " ".join(question.lower().replace("imange", "image").split())


def match_predictions(
    benchmark: Benchmark, examples: Sequence[Example], predictions: Sequence[Prediction], *, path: Path, questions: Path
) -> Predictions:
    """Returns the predictions of another tool's file by their questions' ids, as the benchmark's files name these."""
    matches: dict[str, list[str | None]] = {}
    unclear: list[str] = []
    for way in (ByKey("id", lambda prediction: prediction.id, lambda example: example.id), *benchmark.joins):
        try:
            matches[way.by] = way.pairs(predictions, examples)
        except UserError as error:
            unclear.append(str(error))
    counts = {by: len(predictions) - names.count(None) for by, names in matches.items()}
    most = max(counts.values())
    if not most:
        raise UserError(
            f"{path}: {unclear[0]}"
            if unclear
            else f"{path} ({len(predictions)} answers) and {questions} ({len(examples)} questions) have no id in "
            f"common, looked for by {'; '.join(counts)}; first ids {short_repr(predictions[0].id, 40)} and "
            f"{short_repr(examples[0].id, 40)}; were they made from the same questions?"
        )
    by, *others = [way for way, count in counts.items() if count == most]
    if differing := [other for other in others if matches[other] != matches[by]]:
        raise UserError(
            f"{path}: {most} of {len(predictions)} answers fit a question of {questions} by {by}, and as many fit "
            f"another one by {differing[0]}; give each answer its question's id"
        )
    answers: dict[str, str] = {}
    strangers: dict[str, str] = {}
    for name, prediction in zip(matches[by], predictions, strict=True):
        if name is None:
            strangers[prediction.id] = prediction.prediction
        else:
            is_choice = prediction.is_number and benchmark.labels_choices
            answer = f"a{prediction.prediction}" if is_choice else prediction.prediction
            if not prediction.set and answers.setdefault(name, answer) != answer:  # of our own file the later counts
                twice = f"{short_repr(answers[name])} and {short_repr(answer)}"
                raise UserError(
                    f"{path}: two answers to {short_repr(prediction.id)}, {twice}; leave the one that is meant"
                )
            answers[name] = answer
    return Predictions(
        answered=[Prediction(id=name, prediction=answer) for name, answer in (strangers | answers).items()],
        joined_by=by,
        strangers=tuple(strangers),
    )


Scorer = Callable[[Sequence[Example], AnswersById], Scored]
Submission = Callable[[Sequence[Example], AnswersById], tuple[str, str]]
GroupKey = Callable[[Example], Hashable]

SHORT_ANSWER_TOKENS, LONG_ANSWER_TOKENS = 128, 1024  # LLaVA-1.5's own
FRAMES = 4  # 2,304 of LLaVA-1.5's 4,096 positions


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark.

    Attributes:
        modes: version -> scorer, the usual one first, "" if there is only one; empty where an external judge
            scores.
        splits: names of the split to look for in `records/<task>/`, the first that is there.
        submission: the server's file, its name and text; a test split's answers are the publisher's, so it scores.
            Read back by the official rule it gives the score of `modes`.
        submissions: version -> its file, where it is another than `submission`.
        joins: how predictions of the official files name their questions, beside the id.
        labels_choices: answers are "a" and the choice's index, and official files hold only the index.
        chooses: every question has choices, and `extra["correct"]` is what is scored.
        together: examples with equal values are scored as one (rotations of a question, items of a sentence), so that
            one without its right answer leaves out all.
        shares_answers: one right answer serves all of them (captions of a clip).
        frames: how many frames of a video a LLaVA is shown.
    """

    modes: Mapping[str, Scorer]
    prompt: PromptFunction = as_is
    max_new_tokens: int = SHORT_ANSWER_TOKENS
    splits: tuple[str, ...] = ("test", "validation")
    submission: Submission | None = None
    submissions: Mapping[str, Submission] = field(default_factory=dict)
    joins: tuple[ByKey | ByOrder, ...] = ()
    labels_choices: bool = False
    chooses: bool = False
    together: GroupKey | None = None
    shares_answers: bool = False
    frames: int = FRAMES


# Which examples can be scored: those whose right answer the file holds, and whole groups of them. A test split has
# none, and its publisher scores it. A file that has most of them is scored without the others, which are named.

NO_ANSWER = "its record holds no right answer"
GROUP_WITHOUT = "it is scored together with records of which one or more hold no right answer"


def has_answer(example: Example) -> bool:
    """Returns True where a right answer is there that is not blank."""
    people = example.extra.get("human_answers")
    texts = [answer.text for answer in example.answers]
    texts += [str(answer) for answer in people] if isinstance(people, list | tuple) else []
    return "correct" in example.extra or any(text.strip() for text in texts)


def not_scored(benchmark: Benchmark, examples: Sequence[Example], unreadable: Mapping[str, str]) -> dict[str, str]:
    """Says by id why examples are in no score; an unreadable record that has an answer counts as wrong instead."""
    bare = {
        example.id
        for example in examples
        if not (example.id in unreadable and example.answers)
        and not ("correct" in example.extra if benchmark.chooses else has_answer(example))
    }
    if benchmark.together is None or not bare or len(bare) == len(examples):
        return {example.id: NO_ANSWER for example in examples if example.id in bare}
    groups: defaultdict[Hashable, list[str]] = defaultdict(list)
    for example in examples:
        groups[benchmark.together(example)].append(example.id)
    reasons: dict[str, str] = {}
    for members in groups.values():
        without = [name for name in members if name in bare]
        if without and (not benchmark.shares_answers or len(without) == len(members)):
            reasons |= {name: NO_ANSWER if name in bare else GROUP_WITHOUT for name in members}
    return reasons


def right_answers(example: Example) -> list[str]:
    """Returns the right answers' texts."""
    if not example.answers:
        raise UserError(f"example {short_repr(example.id)} has no right answer; prepare the set again")
    return [answer.text for answer in example.answers]


def right_answer(example: Example) -> str:
    """Returns the first right answer's text."""
    return right_answers(example)[0]


def letters(example: Example) -> str:
    """Returns the letters of the example's choices: "ABCD" for four."""
    return ascii_uppercase[: len(example.choices)]


def check_choices(
    examples: Iterable[Example], file: Path, *, max_choices: int | None = len(ascii_uppercase), all_known: bool = True
) -> None:
    """Sees, before a model is asked, that every question of a file can be answered and scored.

    With `all_known`, where some questions say which choice is right all must; a publisher keeps those of some files.
    """
    examples = list(examples)
    required = all_known and any(example.answers or "correct" in example.extra for example in examples)
    wrong = {
        "no choices": [example.id for example in examples if not example.choices],
        f"more than {max_choices} choices": [
            example.id for example in examples if len(example.choices) > (max_choices or 10**9)
        ],
        "no extra.correct, the right choice's index": [
            example.id for example in examples if required and "correct" not in example.extra
        ],
    }
    for what, ids in wrong.items():
        if ids:
            raise UserError(
                f"{file}: {len(ids)} of {len(examples)} questions have {what}, first {short_repr(ids[0])}; repair "
                "the file"
            )


def refuse_strangers(name: str, examples: Sequence[Example], answers: AnswersById, why: str) -> None:
    """Refuses answers to questions that are not there."""
    if strangers := sorted(answers.keys() - {example.id for example in examples}):
        message = f"{len(strangers)} {name} answers belong to no question here, first {short_repr(strangers[0])}; {why}"
        raise UserError(message)


def json_lines(records: Sequence[Mapping[str, object]]) -> str:
    """Returns records as a submission's JSON lines."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def published_id(name: str) -> int | str:
    """Returns an id as servers take it: a number where it is one."""
    number = parse_digits(name)
    return name if number is None else number
