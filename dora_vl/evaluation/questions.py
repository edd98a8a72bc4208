"""Questions with known answers, from a file of any format that training reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from dora_vl.data.examples import Clip
from dora_vl.data.readers.containers import find_files
from dora_vl.data.readers.row_formats import read_row, turns_of
from dora_vl.data.records import stream_values
from dora_vl.data.turns import IMAGE_PLACEHOLDER, Turn, as_conversation
from dora_vl.errors import BadSample, UserError, shown


@dataclass(frozen=True, kw_only=True)
class Question:
    """What the model is asked and what it should say.

    Attributes:
        images: paths relative to the picture folder.
        turns: the prompt: everything up to and with the last question; earlier rounds keep their true answers.
        truth: the answer to the last question.
        kind: the record's `kind`, if it has one; scores are also given by kind.
        video: shown before everything else as frames, each a picture; their placeholders are not in `turns`.
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    truth: str
    kind: str | None = None
    video: Clip | None = None

    @property
    def text(self) -> str:
        """The last question's words, without placeholders."""
        return self.turns[-1].text.replace(IMAGE_PLACEHOLDER, "").strip()


def question_of(record: Mapping[str, object]) -> Question:
    """The last round of one row, of any format that training reads, as a question.

    Raises:
        BadSample: the record cannot be read.
    """
    example = read_row(record)
    if example.image_bytes:
        raise BadSample(example.id, "its file holds its pictures itself; write them to files, which a test reads")
    if example.clips:
        raise BadSample(example.id, "it has a video, which this task cannot read yet; leave the sample out")
    conversation = as_conversation(example.id, example.images, turns_of(example))
    *prompt, answer = conversation.turns
    kind = record.get("kind")
    return Question(
        id=conversation.id,
        images=conversation.images,
        turns=tuple(prompt),
        truth=answer.text,
        kind=None if kind is None else str(kind),
    )


def read_questions(path: Path, limit: int | None = None) -> tuple[list[Question], dict[str, str]]:
    """The first `limit` questions of a file of any format that training reads.

    Beside them the reason for each that cannot be read, by id.

    Raises:
        UserError: the file is missing, malformed or empty, or two records share an id, so that their answers could
            not be told apart.
    """
    found = find_files(path)
    numbered = stream_values(path, "questions") if found.is_json else enumerate(found.rows(), 1)
    questions: list[Question] = []
    unreadable: dict[str, str] = {}
    seen: dict[str, int] = {}
    for number, (line, record) in enumerate(islice(numbered, limit)):
        if not isinstance(record, Mapping):
            raise UserError(f"{path}, line {line}: a record must be an object, found {type(record).__name__}")
        name = str(record.get("id", f"record {number}"))
        first = seen.setdefault(name, line)
        if len(seen) <= number:
            raise UserError(
                f"{path}: two questions have the id {shown(name)}, in lines {first} and {line}; ids keep their answers "
                "apart"
            )
        try:
            questions.append(question_of({**record, "id": name}))
        except BadSample as error:
            unreadable[name] = error.reason
    if not seen:
        raise UserError(f"{path}: holds no questions")
    return questions, unreadable
