"""What a model is asked: examples with known answers, from a file of any format."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from dora_vl.data.column_names import plain_name
from dora_vl.data.columns import USUAL, Columns, ColumnsError
from dora_vl.data.data_files import SPLIT_COLUMNS, DataFiles, find_files, split_of, split_taken
from dora_vl.data.example import MIDDLE_FRAME, Answer, Example, named_in
from dora_vl.data.formats.choices import CountedFromOne
from dora_vl.data.readers import read_row
from dora_vl.data.text_file import stream_values
from dora_vl.data.turns import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Turn
from dora_vl.errors import EMPTY_ANSWER, NO_ANSWER, BadSample, UserError, short_repr, short_text
from dora_vl.evaluation.predictions import is_id
from dora_vl.evaluation.scores.benchmark import PromptFunction, prompt_turns

ANSWER, OUTPUT = "answer", "output"
KEPT = ("kind", "unit", "group")
"""A test keeps these columns of a row in `extra`."""


def turns_asked(example: Example) -> tuple[Turn, ...]:
    """Returns the turns up to the last question, which is the example's own text where it has none."""
    return example.turns or (Turn("user", example.question),)


def text_asked(example: Example) -> str:
    """Returns the last question's words, without placeholders."""
    text = turns_asked(example)[-1].text.replace(IMAGE_PLACEHOLDER, "")
    return (text.replace(VIDEO_PLACEHOLDER, "") if example.videos else text).strip()


def all_asked(example: Example) -> str:
    """Returns what was said to the model up to the last question."""
    return "\n".join(turn.text for turn in turns_asked(example) if turn.role != "assistant")


def kind_of(example: Example) -> str | None:
    """Returns the kind of question, by which accuracies are told apart."""
    kind = example.extra.get("kind")
    return None if kind is None else str(kind)


def last_round(conversation: Example) -> Example:
    """Returns the last round of a conversation as an example; earlier rounds keep their true answers.

    The right answers are the conversation's last answer, then the others that it names. An answer that is to be avoided
    leaves none.
    """
    *turns, answer = conversation.turns
    if answer.more:
        raise BadSample(conversation.id, "its last answer calls a tool, and scores compare texts")
    named = [right.text for right in conversation.answers]
    texts = dict.fromkeys([answer.text, *named] if answer.text in named else [answer.text])
    answers = () if conversation.is_good is False else tuple(Answer(text=text) for text in texts)
    example = replace(conversation, turns=tuple(turns), answers=answers)
    return replace(example, question=text_asked(example))


def example_of_row(row: Mapping[str, object], columns: Columns = USUAL) -> Example:
    """Returns the last round of a row of any format that training reads; `extra` has its answer and kind."""
    example = read_row(row, columns=columns)
    if example.image_bytes:
        raise BadSample(example.id, "its file holds its pictures itself; write them to files, which a test reads")
    extra = {name: value for name in KEPT if (value := named_in(row, name)) is not None}
    extra |= {ANSWER: example.answers[0].text} if example.answers else {}
    return replace(last_round(example), extra=extra)


def as_asked(example: Example, prompt: PromptFunction) -> Example:
    """Returns the example with the turns that a decoder is asked it by."""
    turns: Sequence[Turn] = prompt_turns(example, prompt)
    first = next((turn for turn in turns if turn.role == "user"), None)
    if example.videos and not any(VIDEO_PLACEHOLDER in turn.text for turn in turns):
        placeholders = f"{VIDEO_PLACEHOLDER}\n" * len(example.videos)
        turns = [replace(turn, text=placeholders + turn.text) if turn is first else turn for turn in turns]
    return replace(example, turns=tuple(turns))


def with_middle_frame(example: Example) -> Example:
    """Returns the example with its video's middle frame as its picture, where the record names one (SEED-Bench)."""
    frame = example.extra.get(MIDDLE_FRAME)
    if example.video is None or not isinstance(frame, str):
        return example
    return replace(example, images=(frame,), videos=())


def expected(example: Example) -> str:
    """Returns the right answer as a model says it: a choice's label, or the first answer."""
    if example.choices and "correct" in example.extra:
        return f"a{example.extra['correct']}"
    return example.answers[0].text if example.answers else ""


def choice_text(example: Example, text: str) -> str:
    """Returns an answer as people read it: a choice's label as its words."""
    return {f"a{index}": words for index, words in enumerate(example.choices)}.get(text, text)


def has_truth(examples: Sequence[Example]) -> bool:
    """Returns True where a file holds right answers; publishers keep those of some."""
    return any(example.answers or "correct" in example.extra for example in examples)


def outputs_of(example: Example) -> list[str]:
    """Returns the outputs that the question's last line, `Answer format: a/b/...`, admits.

    What precedes the answer in the true output (`extra["output"]`) precedes each: "the correct answer is ".
    """
    line = re.search(r"Answer format:\s*(\S.*?)\s*$", turns_asked(example)[-1].instruction)
    if line is None:
        raise BadSample(example.id, "its last line names no choices (`Answer format: a/b/...`)")
    choices = [choice.strip() for choice in line[1].split("/")]
    answer, output = expected(example), str(example.extra.get(OUTPUT, ""))
    if answer not in choices or not output.endswith(answer):
        allowed = short_text("/".join(choices))
        raise BadSample(example.id, f"its answer {short_repr(answer)} is not one of {allowed}, or not its output's end")
    return [output.removesuffix(answer) + choice for choice in choices]


def endings_of(example: Example) -> list[tuple[str, str]]:
    """Returns context and ending of each choice of a cloze record."""
    contexts, endings = example.extra.get("contexts"), example.extra.get("endings")
    if not (isinstance(contexts, list) and isinstance(endings, list) and len(contexts) == len(endings) > 1):
        raise BadSample(example.id, "it has no contexts and endings; `dora-vl prepare cloze` writes such records")
    return [(str(context), str(ending)) for context, ending in zip(contexts, endings, strict=True)]


def right_ending(example: Example) -> str:
    """Returns the answer of a model that is sure of the right ending: a log-likelihood for each."""
    correct, endings = example.extra["correct"], example.extra["endings"]
    return " ".join("0" if index == correct else "-1" for index in range(len(endings)))


def likeliest_ending(example: Example, text: str) -> str:
    """Returns the ending of the largest log-likelihood, for people to read."""
    scores = [float(number) for number in text.split()]
    return str(example.extra["endings"][scores.index(max(scores))]).strip() if scores else ""


class Unanswered(str):
    """Says why a row cannot be read that holds no right answer, so that it is in no score; others count as wrong."""

    __slots__ = ()


def _of_test(files: DataFiles) -> Iterator[tuple[int, object]]:
    """Yields the rows with their numbers; of a file whose rows name several splits those of the test."""

    def numbered() -> Iterator[tuple[int, object]]:
        return stream_values(files.files[0], "questions") if files.is_json else enumerate(files.rows(), 1)

    _, first = next(numbered(), (0, None))
    if not isinstance(first, Mapping) or not any(plain_name(name) in SPLIT_COLUMNS for name in first):
        return numbered()
    splits = Counter(split_of(record) for _, record in numbered() if isinstance(record, Mapping))
    split = split_taken(files.name, splits, "test", "validation", level=logging.WARNING)  # which `evaluate` shows
    if split is None:
        return numbered()
    return ((row, record) for row, record in numbered() if isinstance(record, Mapping) and split_of(record) == split)


def read_questions(
    path: Path, limit: int | None = None, columns: Columns = USUAL
) -> tuple[list[Example], dict[str, str]]:
    """Reads `limit` questions of a file of any format of training; says by id why others cannot be read."""
    numbered = _of_test(find_files(path))
    examples: list[Example] = []
    unreadable: dict[str, str] = {}
    seen: dict[str, int] = {}
    for number, (row, record) in enumerate(islice(numbered, limit)):
        if not isinstance(record, Mapping):
            raise UserError(f"{path}, row {row}: a record must be an object, found {type(record).__name__}")
        name = columns.id_of(record, f"row {row}")
        first = seen.setdefault(name, row)
        if len(seen) <= number:
            raise UserError(
                f"{path}: two questions have the id {short_repr(name)}, in rows {first} and {row}; ids keep their "
                "answers apart"
            )
        try:
            examples.append(example_of_row({**record, "id": name}, columns))
        except (ColumnsError, CountedFromOne) as error:
            raise UserError(f"{path}, row {row} ({name}): {error}") from None
        except BadSample as error:
            has_none = error.kind in (EMPTY_ANSWER, NO_ANSWER)
            unreadable[name] = Unanswered(error.reason) if has_none else error.reason
    if not seen:
        raise UserError(f"{path}: holds no questions")
    if not examples:
        name, reason = next(iter(unreadable.items()))
        raise UserError(f"{path}: not one question can be read; {short_repr(name)}: {reason}")
    return examples, unreadable


def is_question(record: object) -> bool:
    """Returns True for a record of LLaVA's question files."""
    return isinstance(record, Mapping) and "question_id" in record and "text" in record


def read_question_file(path: Path) -> list[Example]:
    """Reads LLaVA's JSON lines as examples without answers, words and placeholder as turns.

    An id that several questions have (TextVQA's and MME's are the picture's) gets `#1`, `#2`, ... in the file's order.
    """
    examples: list[Example] = []
    numbers: dict[tuple[str, str], int] = {}
    for number, record in stream_values(path, "questions; give LLaVA's JSON lines"):
        fields = record if isinstance(record, Mapping) else {}
        name, words, image, category = (fields.get(key) for key in ("question_id", "text", "image", "category"))
        if not is_id(name) or name == "" or not isinstance(words, str) or not isinstance(image, str | None):
            needed = "question_id as text or a whole number, text and perhaps image as text"
            raise UserError(f"{path}, row {number}: a question has {needed}; found {short_repr(record)}")
        if (first := numbers.setdefault((str(name), words), number)) != number:
            raise UserError(
                f"{path}: id {short_repr(name)} in rows {first} and {number} with one text; ids keep answers apart"
            )
        text = words.replace(IMAGE_PLACEHOLDER, "").strip()
        examples.append(
            Example(
                id=str(name),
                images=(image,) if image else (),
                question=text,
                turns=(Turn("user", f"{IMAGE_PLACEHOLDER}\n{text}" if image else text),),
                extra={"category": category} if isinstance(category, str) else {},
            )
        )
    if not examples:
        raise UserError(f"{path}: holds no questions")
    counts, seen = Counter(example.id for example in examples), Counter[str]()
    for index, example in enumerate(examples):
        if counts[example.id] > 1:
            seen[example.id] += 1
            examples[index] = replace(example, id=f"{example.id}#{seen[example.id]}")
    return examples


def unread(reasons: Mapping[str, str]) -> list[Example]:
    """Returns an example for each row that cannot be read; with an answer, which no answer is, it counts as wrong."""
    nothing = (Answer(text=""),)
    return [
        Example(id=name, answers=() if isinstance(reason, Unanswered) else nothing) for name, reason in reasons.items()
    ]
