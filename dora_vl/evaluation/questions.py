"""What a model is asked: questions with known answers from a file of any format."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from dora_vl.data.columns import USUAL, Columns, ColumnsError
from dora_vl.data.containers import find_files
from dora_vl.data.example import MIDDLE_FRAME, Answer, Example
from dora_vl.data.readers import id_of, read_row
from dora_vl.data.text_file import stream_values
from dora_vl.data.turns import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Clip, Turn
from dora_vl.errors import BadSample, UserError, shown, shown_text
from dora_vl.evaluation.predictions import is_id
from dora_vl.evaluation.scores.benchmark import Prompt, prompt_turns


@dataclass(frozen=True, kw_only=True)
class Question:
    """What the model is asked and what it should say.

    Attributes:
        turns: everything up to and with the last question; earlier rounds keep their true answers.
        answer: the part of the truth that is scored, where the row says it.
        example: what the question was made of, with its choices.
    """

    id: str
    images: tuple[str, ...] = ()
    turns: tuple[Turn, ...]
    truth: str = ""
    answer: str = ""
    kind: str | None = None
    videos: tuple[Clip, ...] = ()
    example: Example | None = None

    @property
    def text(self) -> str:
        """The last question's words, without placeholders."""
        text = self.turns[-1].text.replace(IMAGE_PLACEHOLDER, "")
        return (text.replace(VIDEO_PLACEHOLDER, "") if self.videos else text).strip()


def question_of(record: Mapping[str, object], columns: Columns = USUAL) -> Question:
    """The last round of one row, of any format that training reads, as a question."""
    example = read_row(record, columns=columns)
    if example.image_bytes:
        raise BadSample(example.id, "its file holds its pictures itself; write them to files, which a test reads")
    kind = record.get("kind")
    answer = example.answers[0].text if example.answers else ""
    return question_of_turns(example, answer=answer, kind=None if kind is None else str(kind))


def question_of_turns(conversation: Example, **more: Any) -> Question:
    """The last round of a conversation, its answer being the right one."""
    *turns, answer = conversation.turns
    return Question(
        id=conversation.id,
        images=conversation.images,
        turns=tuple(turns),
        truth=answer.text,
        videos=conversation.videos,
        **more,
    )


def as_question(example: Example, prompt: Prompt | None = None) -> Question:
    """An example as a model is asked it; without a prompt in its own words alone, as a VL-BART's tasks are."""
    turns: Sequence[Turn] = (Turn("user", example.question),)
    if prompt is not None:
        turns = prompt_turns(example, prompt)
        first = next((turn for turn in turns if turn.role == "user"), None)
        if example.videos and not any(VIDEO_PLACEHOLDER in turn.text for turn in turns):
            placeholders = f"{VIDEO_PLACEHOLDER}\n" * len(example.videos)
            turns = [Turn("user", placeholders + turn.text) if turn is first else turn for turn in turns]
    return Question(
        id=example.id,
        images=example.images,
        turns=tuple(turns),
        truth=example.answers[0].text if example.answers else "",
        kind=str(example.extra["kind"]) if example.extra.get("kind") is not None else None,
        videos=example.videos,
        example=example,
    )


def with_middle_frame(example: Example) -> Example:
    """The example with its video's middle frame as its picture, where the record names one, as SEED-Bench's do."""
    frame = example.extra.get(MIDDLE_FRAME)
    if example.video is None or not isinstance(frame, str):
        return example
    return replace(example, images=(frame,), videos=())


def expected(example: Example) -> str:
    """The right answer as a model says it: a choice's label, or the first answer."""
    if example.choices and "correct" in example.extra:
        return f"a{example.extra['correct']}"
    return example.answers[0].text if example.answers else ""


def in_words(example: Example | None, text: str) -> str:
    """An answer as people read it: a choice's label as its words."""
    labels = {} if example is None else {f"a{index}": words for index, words in enumerate(example.choices)}
    return labels.get(text, text)


def media_of(example: Example) -> list[str]:
    """Paths of an example's pictures, or of its video."""
    return list(example.images) or ([] if example.video is None else [example.video.path])


def has_truth(examples: Sequence[Example]) -> bool:
    """Whether a file says what is right; publishers keep the answers of some."""
    return any(example.answers or "correct" in example.extra for example in examples)


def outputs_of(question: Question) -> list[str]:
    """The outputs that the question's last line, `Answer format: a/b/...`, admits.

    What stands before the answer in the true output stands before each: "the correct answer is ".
    """
    line = re.search(r"Answer format:\s*(\S.*?)\s*$", question.turns[-1].instruction)
    if line is None:
        raise BadSample(question.id, "its last line names no choices (`Answer format: a/b/...`)")
    choices = [choice.strip() for choice in line[1].split("/")]
    if question.answer not in choices or not question.truth.endswith(question.answer):
        allowed = shown_text("/".join(choices))
        raise BadSample(
            question.id, f"its answer {shown(question.answer)} is not one of {allowed}, or not its output's end"
        )
    before = question.truth.removesuffix(question.answer)
    return [before + choice for choice in choices]


def endings_of(question: Question) -> list[tuple[str, str]]:
    """Context and ending of each choice of a cloze record."""
    extra = {} if question.example is None else question.example.extra
    contexts, endings = extra.get("contexts"), extra.get("endings")
    if not (isinstance(contexts, list) and isinstance(endings, list) and len(contexts) == len(endings) > 1):
        raise BadSample(question.id, "it has no contexts and endings; `dora-vl prepare cloze` writes such records")
    return [(str(context), str(ending)) for context, ending in zip(contexts, endings, strict=True)]


def read_questions(
    path: Path, limit: int | None = None, columns: Columns = USUAL
) -> tuple[list[Question], dict[str, str]]:
    """The first `limit` questions of a file of any format that training reads; why each other cannot be read, by id."""
    files = find_files(path)
    numbered = stream_values(files.files[0], "questions") if files.is_json else enumerate(files.rows(), 1)
    questions: list[Question] = []
    unreadable: dict[str, str] = {}
    seen: dict[str, int] = {}
    for number, (line, record) in enumerate(islice(numbered, limit)):
        if not isinstance(record, Mapping):
            raise UserError(f"{path}, line {line}: a record must be an object, found {type(record).__name__}")
        name = id_of(record, number, columns)
        first = seen.setdefault(name, line)
        if len(seen) <= number:
            raise UserError(
                f"{path}: two questions have the id {shown(name)}, in lines {first} and {line}; ids keep their answers "
                "apart"
            )
        try:
            questions.append(question_of({**record, "id": name}, columns))
        except ColumnsError as error:
            raise UserError(f"{path}, row {number + 1} ({name}): {error}") from None
        except BadSample as error:
            unreadable[name] = error.reason
    if not seen:
        raise UserError(f"{path}: holds no questions")
    if not questions:
        name, reason = next(iter(unreadable.items()))
        raise UserError(f"{path}: not one question can be read; {shown(name)}: {reason}")
    return questions, unreadable


def is_question(record: object) -> bool:
    """Whether a file whose first record this is holds LLaVA's questions."""
    return isinstance(record, Mapping) and "question_id" in record and "text" in record


def read_question_file(path: Path) -> list[Example]:
    """Every question of LLaVA's JSON lines as an example without answers, its words and placeholder as turns.

    An id that several questions have (TextVQA's and MME's are the picture's) gets `#1`, `#2`, ... in the file's order.
    """
    rows: list[tuple[str, Mapping[str, object]]] = []
    lines: dict[tuple[str, str], int] = {}
    for line, record in stream_values(path, "questions; give LLaVA's JSON lines"):
        where = f"{path}, line {line}"
        fields = record if isinstance(record, Mapping) else {}
        name, text, image = fields.get("question_id"), fields.get("text"), fields.get("image")
        if not is_id(name) or name == "" or not isinstance(text, str) or not isinstance(image, str | None):
            needed = "question_id as text or a whole number, text and perhaps image as text"
            raise UserError(f"{where}: a question has {needed}; found {shown(record)}")
        if (first := lines.setdefault((str(name), text), line)) != line:
            raise UserError(
                f"{path}: id {shown(name)} in lines {first} and {line} with one text; ids keep answers apart"
            )
        rows.append((str(name), fields))
    if not rows:
        raise UserError(f"{path}: holds no questions")
    counts, seen = Counter(name for name, _ in rows), Counter[str]()
    examples = []
    for name, record in rows:
        seen[name] += 1
        image, category = str(record.get("image") or ""), record.get("category")
        text = str(record["text"]).replace(IMAGE_PLACEHOLDER, "").strip()
        examples.append(
            Example(
                id=f"{name}#{seen[name]}" if counts[name] > 1 else name,
                images=(image,) if image else (),
                question=text,
                turns=(Turn("user", f"{IMAGE_PLACEHOLDER}\n{text}" if image else text),),
                extra={"category": category} if isinstance(category, str) else {},
            )
        )
    return examples


def examples_of(questions: Sequence[Question], unreadable: Mapping[str, str]) -> list[Example]:
    """Questions of a LLaVA format, or of a run's test, as examples; what cannot be read counts as wrong."""
    return [
        *(
            Example(
                id=question.id,
                images=question.images,
                videos=question.videos,
                question=question.text,
                turns=question.turns,
                answers=(Answer(text=question.truth),),
                extra={} if question.kind is None else {"kind": question.kind},
            )
            for question in questions
        ),
        *(Example(id=name, answers=(Answer(text=""),)) for name in unreadable),
    ]
