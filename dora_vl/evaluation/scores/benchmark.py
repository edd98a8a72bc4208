"""What a benchmark is: its question, its official score, its server's file, and how its files name its questions.

Each benchmark's own stands in a scorer's file, and one row of `evaluation.benchmarks` makes it known.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path, PurePosixPath
from string import ascii_uppercase
from typing import Protocol, runtime_checkable

from dora_vl.data.example import Example, right_choice
from dora_vl.data.text_file import opened, stream_values, table_rows, text_lines
from dora_vl.data.turns import IMAGE_PLACEHOLDER
from dora_vl.errors import UserError, number_of, shown, shown_names
from dora_vl.evaluation.scores import prompts
from dora_vl.evaluation.scores.prompts import Prompt, as_is
from dora_vl.evaluation.scores.scored import Answers, Scored

IDS = ("id", "question_id", "questionId", "qid", "image_id", "image", "index", "identifier", "clip_id")
"""Where a row's id stands; of several the first is its own."""
MODEL_ANSWERS = (
    *("prediction", "pred", "predict", "pred_answer", "predicted_answer"),
    *("response", "output", "model_answer", "model_output"),
)
"""Keys of what a model said, whatever stands beside them: ours, SEED-Bench's and GQA's first, then Video-LLaVA's and
other tools'. An `answer` in such a row is the true one."""
ANSWERS = ("answer", "text", "caption")
"""Where the answer stands in rows that hold none of those: VQA's; LLaVA's; COCO's."""
WANTED = "predictions; give JSON lines with an id and an answer each"
DELIMITERS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True, kw_only=True)
class AnswerRow:
    """One answer of a file of predictions.

    Attributes:
        where: file and line.
        ids: everything in the row that names a question or its picture, by field; the row's own id first.
        prompt: what was asked, "" where the row does not say.
        is_number: the file has a whole number, which VALUE's submissions have for a choice.
    """

    where: str
    ids: Mapping[str, str]
    answer: str
    prompt: str = ""
    is_number: bool = False

    @property
    def id(self) -> str:
        """The row's own id."""
        return next(iter(self.ids.values()))


def read_answers(path: Path) -> dict[str, str]:
    """Answers by the rows' own ids; of two with one id the later stands, as in a run that was resumed."""
    return {row.id: row.answer for row in read_rows(path)}


def read_rows(path: Path) -> list[AnswerRow]:
    """Every answer of a file of predictions, in its order; which question a row answers is `Join`'s matter.

    | form | whose |
    | --- | --- |
    | JSON lines or a list of objects with an id and an answer | this project; LLaVA; VQA, COCO, GQA, SEED-Bench |
    | JSON lines with `clip_id` and `descs` | VALUE's captions |
    | one object, id -> answer; a whole number is a choice's index | MM-Vet; VALUE's TVQA and How2QA |
    | `.csv` of an identifier and an answer, without a header | NLVR2 |
    | `.csv` or `.tsv` whose first row names the columns | MMBench |
    """
    with opened(path, WANTED) as file:
        if file.read(4) == b"PK\x03\x04":
            raise UserError(f"{path}: an .xlsx or another packed file; save the table as tab-separated text, NAME.tsv")
    delimiter = DELIMITERS.get(path.suffix.lower())
    rows = list(_json(path) if delimiter is None else _table(path, delimiter))
    if not rows:
        raise UserError(f"{path}: holds no predictions")
    return rows


def _json(path: Path) -> Iterator[AnswerRow]:
    values = stream_values(path, WANTED)
    first = next(values, None)
    second = next(values, None)
    only = first[1] if first is not None and second is None else None
    if isinstance(only, dict) and not any(key in only for key in (*IDS, *MODEL_ANSWERS, *ANSWERS)):
        for name, answer in only.items():
            if not _is_id(answer):
                raise UserError(
                    f"{path}: an object of answers by id must hold text or a choice's index, {shown(name)} has "
                    f"{shown(answer)}"
                )
            where, is_number = f"{path}, {shown(name)}", not isinstance(answer, str)
            yield AnswerRow(where=where, ids={"id": name}, answer=str(answer), is_number=is_number)
        return
    for numbered in (first, second):
        if numbered is not None:
            yield _row(numbered[1], f"{path}, line {numbered[0]}")
    yield from (_row(value, f"{path}, line {number}") for number, value in values)


def _row(record: object, where: str) -> AnswerRow:
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: a {type(record).__name__}, not an object with an id and an answer")
    ids = {key: str(record[key]) for key in IDS if _is_id(record.get(key))}
    answer = _answer(record, where)
    first_id = next((key for key in IDS if key in record), None)
    if first_id not in ids or not isinstance(answer, str):
        wanted = f"an id ({', '.join(IDS)}), and {' or '.join((*MODEL_ANSWERS, *ANSWERS))} as text"
        raise UserError(f"{where}: needs {wanted}; has {shown_names(record)}")
    prompt = next((value for key in ("prompt", "question") if isinstance(value := record.get(key), str)), "")
    return AnswerRow(where=where, ids=ids, answer=answer, prompt=prompt)


def _answer(record: Mapping[str, object], where: str) -> object:
    """What the model said; a true answer beside it is left alone."""
    names = next((names for names in (MODEL_ANSWERS, ANSWERS) if any(key in record for key in names)), ())
    (first, answer), *others = [(key, record[key]) for key in names if record.get(key) is not None] or [("", None)]
    for other, value in others:
        if value != answer:
            raise UserError(
                f"{where}: {first} is {shown(answer)} and {other} is {shown(value)}, and either may be the model's "
                "answer; leave out or rename the one that is not"
            )
    descriptions = record.get("descs")  # VALUE's, of which there is one for a clip
    if answer is None and isinstance(descriptions, list) and len(descriptions) == 1:
        return descriptions[0].get("desc") if isinstance(descriptions[0], Mapping) else None
    return answer


def _is_id(value: object) -> bool:
    """Text, or a whole number of no more digits than an id has."""
    is_number = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 64
    return isinstance(value, str) or is_number


def _table(path: Path, delimiter: str) -> Iterator[AnswerRow]:
    header = next((line for _, line in text_lines(path, WANTED)), "")
    names = {cell.strip('"') for cell in header.split(delimiter)}
    if names & set(IDS) and names & {*MODEL_ANSWERS, *ANSWERS}:
        for number, row in table_rows(path, WANTED, delimiter=delimiter):
            yield _row(row, f"{path}, line {number}")
        return
    for number, line in text_lines(path, WANTED):  # as NLVR2's script reads them, quotes included
        name, *answers = line.strip().split(delimiter)
        if line.strip() and not answers:
            raise UserError(f"{path}, line {number}: {shown(line)} is no identifier, {shown(delimiter)} and answer")
        if answers:
            yield AnswerRow(where=f"{path}, line {number}", ids={"id": name}, answer=answers[0])


# Ways to find which question a row of a predictions file answers, beside the id.
#
# LLaVA's question files name TextVQA's, MME's, VizWiz' and POPE's questions otherwise than the publishers' annotations
# do. A row's prompt tells questions about one picture apart. Source of the names: LLaVA c121f04,
# `llava/eval/eval_textvqa.py`, `eval_pope.py`, `scripts/convert_*.py`, and MME's `convert_answer_to_mme.py`.


Key = Hashable | None
REPEATED = re.compile(r"#\d+$")
"""How `questions` tells questions of one id apart."""
_SUFFIXES = (prompts.SHORT, prompts.LETTER, prompts.LETTER_CN, prompts.UNANSWERABLE, prompts.YES_OR_NO)
_OCR = re.compile(r"^Reference OCR token:.*$", re.MULTILINE)


@runtime_checkable
class Join(Protocol):
    """One way to find a row's question."""

    @property
    def by(self) -> str:
        """What the two have in common, for people."""
        ...

    def pairs(self, rows: Sequence[AnswerRow], examples: Sequence[Example]) -> list[str | None]:
        """The id of each row's question; None where there is none.

        Raises:
            UserError: several questions could be meant.
        """
        ...


@dataclass(frozen=True)
class ByKey:
    """By something that both sides have; several questions of one key are told apart by their order, if all are there.

    Attributes:
        of_row: a row's key; None where it has none.
        of_example: a question's.
    """

    by: str
    of_row: Callable[[AnswerRow], Key]
    of_example: Callable[[Example], Key]

    def pairs(self, rows: Sequence[AnswerRow], examples: Sequence[Example]) -> list[str | None]:
        """See `Join`."""
        named: defaultdict[Key, list[str]] = defaultdict(list)
        for example in examples:
            named[self.of_example(example)].append(example.id)
        named.pop(None, None)
        keys = [self.of_row(row) for row in rows]
        counts = Counter(keys)
        unequal = [key for key, ids in named.items() if len(ids) > 1 and counts[key] not in (0, len(ids))]
        if unequal:
            key = unequal[0]
            raise UserError(
                f"{len(unequal)} keys ({self.by}) fit several questions, first {shown(key)}: {counts[key]} answers "
                f"for {len(named[key])} questions; give each answer its question's id"
            )
        turn: Counter[Key] = Counter()
        found: list[str | None] = []
        for key in keys:
            several = named.get(key, ())
            found.append(several[min(turn[key], len(several) - 1)] if several else None)
            turn[key] += 1
        return found


@dataclass(frozen=True)
class ByOrder:
    """By place, where each row's prompt holds the words of the question at its place; categories in any order."""

    by: str

    def pairs(self, rows: Sequence[AnswerRow], examples: Sequence[Example]) -> list[str | None]:
        """See `Join`."""
        asked = [question_in(row.prompt) for row in rows]
        categories: defaultdict[str, list[Example]] = defaultdict(list)
        for example in examples:
            categories[str(example.extra.get("category"))].append(example)
        if len(rows) != len(examples) or not all(asked) or len(categories) > 4:  # 24 orders are tried
            return [None] * len(rows)
        orders = [[example for name in names for example in categories[name]] for names in permutations(categories)]
        fitting = [order for order in orders if [plain(example.question) for example in order] == asked]
        if len(fitting) > 1:
            raise UserError(f"the answers fit the questions in {len(fitting)} orders of their categories; give ids")
        return [example.id for example in fitting[0]] if fitting else [None] * len(rows)


def question_in(prompt: str) -> str:
    """A prompt's question alone, in lower case with single spaces: suffixes, OCR tokens and placeholders go."""
    for suffix in _SUFFIXES:  # before the line of tokens, which they end
        prompt = prompt.replace(suffix, " ")
    return plain(_OCR.sub(" ", prompt.replace(IMAGE_PLACEHOLDER, " ")))


def plain(question: str) -> str:
    """A question in lower case with single spaces, without suffixes; POPE's "imange" is an image."""
    for suffix in _SUFFIXES:
        question = question.replace(suffix, " ")
    return " ".join(question.lower().replace("imange", "image").split())


def picture_stem(path: str) -> str:
    """A picture's name without its folders and ending."""
    return PurePosixPath(path).stem


OWN_ID = ByKey("id", lambda row: row.id, lambda example: example.id)


# Which examples can be scored: those whose right answer the file holds, and whole groups of them.
#
# A test split has none, and its publisher scores it. A file that has most of them is scored without the others, which
# are counted and named.


Group = Callable[[Example], Hashable]
NO_ANSWER = "its record holds no right answer"
GROUP_WITHOUT = "it is scored together with records of which one or more hold no right answer"


def has_answer(example: Example) -> bool:
    """Whether any right answer is there that is not blank."""
    people = example.extra.get("human_answers")
    texts = [answer.text for answer in example.answers]
    texts += [str(answer) for answer in people] if isinstance(people, list | tuple) else []
    return "correct" in example.extra or any(text.strip() for text in texts)


def right_answer(example: Example) -> str:
    """The first right answer's text."""
    if not example.answers:
        raise UserError(f"example {shown(example.id)} has no right answer; prepare the set again")
    return example.answers[0].text


def has_right_choice(example: Example) -> bool:
    """Whether the record says which of its choices is right."""
    return "correct" in example.extra


def not_scored(
    examples: Sequence[Example],
    unreadable: Mapping[str, str],
    *,
    known: Callable[[Example], bool] = has_answer,
    together: Group | None = None,
    shared: bool = False,
) -> dict[str, str]:
    """The reason for each example that no score can take, by id.

    Args:
        unreadable: ids of records that count as wrong, whatever they hold.
        together: examples with equal values are scored as one (rotations of a question, items of a sentence).
        shared: one answer serves all of a group (captions of a clip); else each example needs its own.
    """
    bare = {example.id for example in examples if example.id not in unreadable and not known(example)}
    if together is None or not bare or len(bare) == len(examples):
        return {example.id: NO_ANSWER for example in examples if example.id in bare}
    groups: defaultdict[Hashable, list[str]] = defaultdict(list)
    for example in examples:
        groups[together(example)].append(example.id)
    reasons: dict[str, str] = {}
    for members in groups.values():
        without = [name for name in members if name in bare]
        if without and (not shared or len(without) == len(members)):
            reasons |= {name: NO_ANSWER if name in bare else GROUP_WITHOUT for name in members}
    return reasons


Scorer = Callable[[Sequence[Example], Answers], Scored]
Submission = Callable[[Sequence[Example], Answers], tuple[str, str]]

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


def letters(example: Example) -> str:
    """The letters of the example's choices: "ABCD" for four."""
    return ascii_uppercase[: len(example.choices)]


def correct_index(example: Example) -> int:
    """Which choice is right."""
    if "correct" not in example.extra:
        raise UserError(
            f"example {shown(example.id)} does not say which of its {len(example.choices)} choices is right "
            "(extra.correct); a split whose answers the publisher keeps cannot be scored here"
        )
    return right_choice(example.extra["correct"], example.choices, example.id)


def check_choices(
    examples: Iterable[Example], file: Path, *, most: int | None = len(ascii_uppercase), all_known: bool = True
) -> None:
    """Sees, before a model is asked, that every question of a file can be answered and scored.

    A file that gives no right answer at all is one whose answers the publisher keeps.

    Args:
        most: choices that a question may have; the letters end with Z.
        all_known: where some questions say which choice is right, all must.
    """
    examples = list(examples)
    known = all_known and any(example.answers or "correct" in example.extra for example in examples)
    wrong = {
        "no choices": [example.id for example in examples if not example.choices],
        f"more than {most} choices": [example.id for example in examples if len(example.choices) > (most or 10**9)],
        "no extra.correct, the right choice's index": [
            example.id for example in examples if known and "correct" not in example.extra
        ],
    }
    for what, ids in wrong.items():
        if ids:
            raise UserError(
                f"{file}: {len(ids)} of {len(examples)} questions have {what}, first {shown(ids[0])}; repair the file"
            )
