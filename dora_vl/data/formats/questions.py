"""Questions and answers in columns of their own, with choices and hints, and captions."""

from __future__ import annotations

from collections.abc import Mapping

from dora_vl.data.column_names import Row, is_empty, parsed
from dora_vl.data.conversation import as_text
from dora_vl.data.example import Example
from dora_vl.data.formats.answers import answer_in, answers_in, with_answers
from dora_vl.data.formats.choices import choices_in, says, written_choices
from dora_vl.data.formats.conversations import earlier_rounds, round_of
from dora_vl.data.formats.row_format import Candidates, Resolved, Roles, RowFormat
from dora_vl.data.turns import Unusable
from dora_vl.errors import short_names


def question_answer(row: Row) -> list[object]:
    """Reads question and answer; of several answers the most frequent, the first of equals.

    A hint comes before the question, choices come after it (`written_choices`).
    """
    question, answer = as_text(row["question"], "question"), _answer_of(row)
    if not is_empty(row.get("choices")) and answer.strip():
        labels, choices = choices_in(row["choices"])
        if choices and (several := distinct_texts(row["answer"])):
            named = short_names(several)
            raise Unusable(f"its answer names several choices, {named}; write question and answer as texts instead")
        if choices:
            question, answer = written_choices(question, choices, answer, labels)
    hint = as_text(row.get("hint"), "hint").strip()
    if hint and not says(question, [hint]):
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


def _caption(row: Row) -> list[dict[str, object]]:
    return round_of(row.get("question", ""), answer_in(row["caption"], "caption"))


def _with_captions(example: Example, resolved: Resolved) -> Example:
    return with_answers(example, answers_in(resolved.fields["caption"], "caption"))


def _is_caption(row: Row, candidates: Candidates, _: Roles) -> bool:
    """Tells that no caption is a conversation in JSON."""
    return not any(isinstance(parsed(row[name]), dict) for name in candidates["caption"][0])


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
