"""Questions as LLaVA's evaluation takes them: JSON lines of `question_id`, `image`, `text`, `category`, no answers.

They are asked as they stand, since `text` holds the benchmark's suffix already. Source: LLaVA c121f04,
`llava/eval/model_vqa.py` and `model_vqa_loader.py`. ScienceQA's file has conversations: `with_choices` reads those.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from string import ascii_uppercase

from dora_vl.data.examples import Example
from dora_vl.data.records import stream_values
from dora_vl.data.turns import IMAGE_PLACEHOLDER, Turn
from dora_vl.errors import UserError, shown
from dora_vl.scores.scienceqa import parsed

ID, TEXT, IMAGE, CATEGORY = "question_id", "text", "image", "category"
WANTED = "questions; give LLaVA's JSON lines"
_OPTION = re.compile(r"^([A-Z])\. ?(.*)$")
_OPTIONS_LINE = re.compile(r"^Options: (\(A\) .*)$", re.MULTILINE)
_IN_LINE = re.compile(r"\([A-Z]\) ")


def is_question(record: object) -> bool:
    """Whether a file whose first record this is holds LLaVA's questions."""
    return isinstance(record, Mapping) and ID in record and TEXT in record


def read_question_file(path: Path) -> list[Example]:
    """Every question as an example without answers, its words and placeholder as turns.

    An id that several questions have (TextVQA's and MME's are the picture's) gets `#1`, `#2`, ... in the file's order.

    Raises:
        UserError: no such file, malformed, a record that is no question, or one question twice.
    """
    rows = [(line, _checked(record, f"{path}, line {line}")) for line, record in stream_values(path, WANTED)]
    if not rows:
        raise UserError(f"{path}: holds no questions")
    asked: dict[tuple[str, str], int] = {}
    for line, record in rows:
        first = asked.setdefault((str(record[ID]), str(record[TEXT])), line)
        if first != line:
            raise UserError(
                f"{path}: id {shown(record[ID])} in lines {first} and {line} with one text; ids keep answers apart"
            )
    counts, seen = Counter(str(record[ID]) for _, record in rows), Counter[str]()
    examples = []
    for _, record in rows:
        name = str(record[ID])
        seen[name] += 1
        examples.append(_example(record, f"{name}#{seen[name]}" if counts[name] > 1 else name))
    return examples


def _checked(record: object, where: str) -> Mapping[str, object]:
    if not isinstance(record, Mapping) or not is_question(record):
        raise UserError(f"{where}: not a question with {ID} and {TEXT}, found {shown(record)}")
    name, image = record[ID], record.get(IMAGE)
    is_number = isinstance(name, int) and not isinstance(name, bool) and abs(name) < 1 << 64
    if not is_number and not (isinstance(name, str) and name):
        raise UserError(f"{where}: {ID} must be text or a whole number, it is {shown(name)}")
    if not isinstance(record[TEXT], str) or not isinstance(image, str | None):
        raise UserError(f"{where}: {TEXT} and {IMAGE} must be text, they are {shown(record[TEXT])} and {shown(image)}")
    return record


def _example(record: Mapping[str, object], name: str) -> Example:
    image = str(record.get(IMAGE) or "")
    text = str(record[TEXT]).replace(IMAGE_PLACEHOLDER, "").strip()
    category = record.get(CATEGORY)
    return Example(
        id=name,
        images=(image,) if image else (),
        question=text,
        turns=(Turn("user", f"{IMAGE_PLACEHOLDER}\n{text}" if image else text),),
        extra={CATEGORY: category} if isinstance(category, str) else {},
    )


def with_choices(example: Example, suffix: str) -> Example:
    """A multiple-choice question of LLaVA's conversations with its choices, read out of its words, and the right one.

    The choices are the last lines "A. ...", "B. ..." or the line "Options: (A) ... (B) ..."; the right one is what the
    answer's letter names, or whose text it is. Without choices the example stays as it is.

    Args:
        suffix: what LLaVA's script puts behind the question.
    """
    asked, text = example.turns[-1], example.turns[-1].text
    choices = _choices(text)
    if not choices:
        return example
    extra = dict(example.extra)
    truth = example.answers[0].text.strip() if example.answers else ""
    letter = parsed(truth) or parsed(truth + ".") or _of_text(truth, choices)
    if letter in ascii_uppercase[: len(choices)]:
        extra["correct"] = ascii_uppercase.index(letter)
    if suffix not in text:
        asked = Turn("user", f"{text.rstrip()}\n{suffix}")
    return replace(example, choices=choices, extra=extra, turns=(*example.turns[:-1], asked))


def _of_text(truth: str, choices: tuple[str, ...]) -> str:
    same = [letter for letter, choice in zip(ascii_uppercase, choices, strict=False) if choice == truth]
    return same[0] if len(same) == 1 else "none"


def _choices(text: str) -> tuple[str, ...]:
    in_line = _OPTIONS_LINE.findall(text)
    if in_line:
        return tuple(one.strip() for one in _IN_LINE.split(in_line[-1])[1:])
    found: list[str] = []
    for line in text.split("\n"):
        option = _OPTION.match(line)
        if option and option.group(1) == "A":
            found = []
        if option and len(found) < len(ascii_uppercase) and option.group(1) == ascii_uppercase[len(found)]:
            found.append(option.group(2))
    return tuple(found) if len(found) > 1 else ()
