"""Questions and answers in columns of their own, with choices and hints, and captions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from string import ascii_lowercase, ascii_uppercase

from dora_vl.data.column_names import Row, is_empty, parsed
from dora_vl.data.conversation import as_text
from dora_vl.data.example import LETTER, Example, correct_choice, listed_choices, with_letters
from dora_vl.data.formats.answers import answer_in, answers_in, with_answers
from dora_vl.data.formats.conversations import earlier_rounds, round_of
from dora_vl.data.formats.row_format import Resolved, RowFormat, Trial
from dora_vl.data.turns import Unusable
from dora_vl.errors import short_names, short_repr


def question_answer(row: Row) -> list[object]:
    """Reads question and answer; of several answers the most frequent, the first of equals.

    A hint comes before the question, choices come after it (`written_choices`).
    """
    question, answer = as_text(row["question"], "question"), _answer_of(row)
    if not is_empty(row.get("choices")) and answer.strip():
        labels, choices = _choices(row["choices"])
        if choices and (several := distinct_texts(row["answer"])):
            named = short_names(several)
            raise Unusable(f"its answer names several choices, {named}; write question and answer as texts instead")
        if choices:
            question, answer = written_choices(question, choices, answer, labels)
    hint = as_text(row.get("hint"), "hint").strip()
    if not _says(question, [hint]):
        question = f"{hint}\n{question}"
    return [*earlier_rounds(row), *round_of(question, answer)]


def _answer_of(row: Row) -> str:
    """Returns the answer that the row calls the most frequent (VQAv2, which decides between equals), else that."""
    return as_text(row.get("most_frequent"), "most_frequent").strip() or answer_in(row["answer"])


def distinct_texts(value: object) -> list[str]:
    """Returns the texts of a list of several that all differ; votes, of which some repeat, are none."""
    entries = value if isinstance(value, list) else []
    texts = [str(text) for text in entries if not is_empty(text) and not isinstance(text, Mapping)]
    return texts if len(texts) > 1 and len({*texts}) == len(texts) else []


def _with_several(example: Example, resolved: Resolved) -> Example:
    """Adds the right answers of a question that has several; of choices one is right."""
    row = resolved.fields
    texts = answers_in(row["answer"]) if is_empty(row.get("choices")) else []
    return with_answers(example, [_answer_of(row), *texts]) if len(texts) > 1 else example


def written_choices(
    question: str, choices: Sequence[str], answer: object, labels: Sequence[str] = ()
) -> tuple[str, str]:
    """Returns a question with its choices as LLaVA writes MMBench's, a line each, and the right one's letter.

    A question that says its choices itself stays as it is: with letters, or where the answer is the text of one.

    Args:
        answer: the right choice, by its label or text; without labels but letters, by its letter or number from 0.
        labels: what the file calls the choices, where it calls them something.
    """
    if any(not choice.strip() for choice in choices) or len(choices) > len(ascii_uppercase):
        raise Unusable(f"its {len(choices)} choices must be text, at most {len(ascii_uppercase)} of them")
    lettered = _LETTERED.fullmatch(str(answer).strip())
    if lettered and lettered[2].strip() in (choice.strip() for choice in choices):
        answer = lettered[2]
    names, label = [label.casefold() for label in labels], str(answer).strip(" ().:").casefold()
    in_order = names == list(ascii_lowercase[: len(names)])  # also without names
    if label in names and not in_order:
        index = names.index(label)
    else:
        index = correct_choice(answer, choices, by_place=in_order)
    letter = "" if index is None else ascii_uppercase[index]
    lines = with_letters(choices)
    if _says(question, choices):
        if str(answer).strip() in (choice.strip() for choice in choices):
            return question, str(answer)
        if all(re.search(rf"\b{line[0]}\W", question) for line in lines):
            return question, letter
    return "\n".join([question, *lines, LETTER]), letter


def _choices(value: object) -> tuple[list[str], list[str]]:
    """Returns the choices' own labels, if any, and their texts; empty choices are none."""
    labels: object = []
    if isinstance(value, str):
        value = listed_choices(value)
    if isinstance(value, Mapping) and "text" in value:
        labels, value = value.get("label") or [], value["text"]
    elif isinstance(value, Mapping):
        texts_by_label = {name: text for name, text in value.items() if not is_empty(text)}
        labels, value = [*texts_by_label], [*texts_by_label.values()]
    if not isinstance(value, list | tuple) or not isinstance(labels, list) or len(labels) not in (0, len(value)):
        raise Unusable(f"its choices must be a list of text, got {short_repr(value)}")
    texts = [as_text(text, "choices") for text in value]
    lettered = [_LETTERED.fullmatch(text.strip()) for text in texts]
    letters = [match[1].casefold() for match in lettered if match]
    if not labels and len(texts) > 1 and letters == list(ascii_lowercase[: len(texts)]):
        labels, texts = letters, [match[2] for match in lettered if match]
    return [as_text(label, "choices") for label in labels], texts


_LETTERED = re.compile(r"\(?([A-Za-z])[.):]\)?\s+(.*)", re.DOTALL)  # such as `A. cat`


def _says(question: str, texts: Sequence[str]) -> bool:
    """Tells whether the question holds all of these texts, as whole words; every question holds an empty text."""
    return all(not text or re.search(rf"(?<!\w){re.escape(text.strip())}(?!\w)", question) for text in texts)


def _caption(row: Row) -> list[dict[str, object]]:
    return round_of(row.get("question", ""), answer_in(row["caption"], "caption"))


def _with_captions(example: Example, resolved: Resolved) -> Example:
    return with_answers(example, answers_in(resolved.fields["caption"], "caption"))


def _is_caption(trial: Trial) -> bool:
    """Tells that no caption is a conversation in JSON."""
    return not any(isinstance(parsed(trial.row[name]), dict) for name in trial.candidates["caption"][0])


QUESTIONS = (
    RowFormat(
        "question/answer",
        ("question", "answer"),
        question_answer,
        ("choices", "hint", "history", "most_frequent"),
        complete=_with_several,
        may_lack_question=True,
    ),
)
CAPTIONS = tuple(
    RowFormat(
        "captions", ("caption", media), _caption, fits=_is_caption, complete=_with_captions, may_lack_question=True
    )
    for media in ("images", "videos")
)
