"""What a model is asked: questions with known answers from a file of any format, and benchmarks' sets of examples."""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from dora_vl.data.columns import USUAL, Columns, ColumnsError
from dora_vl.data.containers import find_files
from dora_vl.data.example import MIDDLE_FRAME, Answer, Example, as_conversation, iterate_examples
from dora_vl.data.readers import id_of, read_row
from dora_vl.data.text_file import stream_values
from dora_vl.data.turns import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Clip, Turn
from dora_vl.errors import BadSample, UserError, shown, shown_text
from dora_vl.evaluation.benchmarks import find_benchmark
from dora_vl.evaluation.scores.benchmark import Benchmark, Scorer, check_choices, has_answer, not_scored
from dora_vl.evaluation.scores.llava import letter_cn, parsed
from dora_vl.evaluation.scores.prompts import LETTER, LETTER_CN, Prompt
from dora_vl.evaluation.scores.prompts import turns_of as prompt_turns


@dataclass(frozen=True, kw_only=True)
class Question:
    """What the model is asked and what it should say.

    Attributes:
        images: paths relative to the picture folder.
        turns: the prompt: everything up to and with the last question; earlier rounds keep their true answers.
        answer: the part of it that is scored, where the row says it; else empty.
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
    answer = example.answers[0].text if example.turns and example.answers else ""
    return question_of_turns(as_conversation(example), answer=answer, kind=None if kind is None else str(kind))


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
    """The outputs that the question's last line, `Answer format: a/b/...`, admits, in its order.

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
        if not isinstance(record, Mapping) or not is_question(record):
            raise UserError(f"{where}: not a question with question_id and text, found {shown(record)}")
        name, text, image = record["question_id"], record["text"], record.get("image")
        is_number = isinstance(name, int) and not isinstance(name, bool) and abs(name) < 1 << 64
        if not is_number and not (isinstance(name, str) and name):
            raise UserError(f"{where}: question_id must be text or a whole number, it is {shown(name)}")
        if not isinstance(text, str) or not isinstance(image, str | None):
            raise UserError(f"{where}: text and image must be text, they are {shown(text)} and {shown(image)}")
        if (first := lines.setdefault((str(name), text), line)) != line:
            raise UserError(
                f"{path}: id {shown(name)} in lines {first} and {line} with one text; ids keep answers apart"
            )
        rows.append((str(name), record))
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


def with_choices(example: Example, suffix: str) -> Example:
    """A multiple-choice question of LLaVA's conversations with its choices, read out of its words, and the right one.

    The choices are the last lines "A. ...", "B. ..." or the line "Options: (A) ... (B) ..."; the right one is what the
    answer's letter names, or whose text it is. Without choices the example stays as it is.
    """
    turn, text = example.turns[-1], example.turns[-1].text
    choices = _choices(text)
    if not choices:
        return example
    extra = dict(example.extra)
    truth = example.answers[0].text.strip() if example.answers else ""
    same = [letter for letter, choice in zip(ascii_uppercase, choices, strict=False) if choice == truth]
    letter = parsed(truth) or parsed(truth + ".") or (same[0] if len(same) == 1 else "none")
    if letter in ascii_uppercase[: len(choices)]:
        extra["correct"] = ascii_uppercase.index(letter)
    if suffix not in text:
        turn = Turn("user", f"{text.rstrip()}\n{suffix}")
    return replace(example, choices=choices, extra=extra, turns=(*example.turns[:-1], turn))


def _choices(text: str) -> tuple[str, ...]:
    if in_line := re.findall(r"^Options: (\(A\) .*)$", text, re.MULTILINE):
        return tuple(choice.strip() for choice in re.split(r"\([A-Z]\) ", in_line[-1])[1:])
    choices: list[str] = []
    for letter, choice in re.findall(r"^([A-Z])\. ?(.*)$", text, re.MULTILINE):
        choices = [] if letter == "A" else choices
        if letter == ascii_uppercase[len(choices) : len(choices) + 1]:
            choices.append(choice)
    return tuple(choices) if len(choices) > 1 else ()


# One benchmark as it was asked for on the command line: which file, which version, which examples.


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """A benchmark's examples and how they are scored.

    Attributes:
        unreadable: the reason for each record that cannot be asked, by id; it counts as wrong.
        not_scored: the reason for each that is asked but in no score, by id: its right answer is not there.
    """

    request: str
    name: str
    benchmark: Benchmark
    mode: str
    file: Path
    examples: Sequence[Example]
    unreadable: Mapping[str, str]
    not_scored: Mapping[str, str]

    @property
    def scored(self) -> Sequence[Example]:
        """The examples that a score is over."""
        return [example for example in self.examples if example.id not in self.not_scored]

    @property
    def scorer(self) -> Scorer | None:
        """The chosen version's, None where a judge or a server scores."""
        scorable = len(self.not_scored) < len(self.examples)
        return self.benchmark.modes[self.mode] if self.benchmark.modes and scorable else None


def read_set(request: str, records: Path, *, mode: str | None, limit: int | None) -> EvaluationSet:
    """What `NAME`, `NAME:SPLIT`, `NAME=FILE`, `FILE.yaml` or `FILE.yaml=FILE` stands for."""
    listed = find_benchmark(request.partition("=")[0])
    file = request.partition("=")[2]
    name, benchmark = listed.name, listed.benchmark
    if mode is not None and (mode not in benchmark.modes or mode == ""):
        named = [version for version in benchmark.modes if version]
        raise UserError(f"--mode {name}={mode}: {name} has {', '.join(named) or 'one version only'}")
    path = Path(file) if file else listed.file or _split_file(name, benchmark, listed.split, records)
    examples, unreadable = _read_examples(path, limit)
    if benchmark.chooses:
        suffix = LETTER_CN if benchmark.prompt is letter_cn else LETTER
        for number, example in enumerate(examples):
            if example.id in unreadable:
                examples[number] = replace(example, choices=("",), extra={"correct": 0})
            elif not example.choices and example.turns:
                examples[number] = with_choices(example, suffix)
        choosing = [example for example in examples if example.choices or has_answer(example) or not example.turns]
        check_choices(choosing, path, all_known=False)
    return EvaluationSet(
        request=request,
        name=name,
        benchmark=benchmark,
        mode=next(iter(benchmark.modes), "") if mode is None else mode,
        file=path,
        examples=examples,
        unreadable=unreadable,
        not_scored=not_scored(benchmark, examples, unreadable),
    )


def _read_examples(path: Path, limit: int | None) -> tuple[list[Example], dict[str, str]]:
    """The first `limit` examples of a file of records, or of questions in a LLaVA format, and what cannot be read."""
    needed = "questions; `dora-vl prepare` writes records, or give LLaVA's JSON as NAME=FILE"
    _, first = next(stream_values(path, needed), (0, None))
    if is_question(first):
        return read_question_file(path)[:limit], {}
    with path.open("rb") as file:
        is_list = file.read(1 << 12).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    if not is_list and not (isinstance(first, dict) and "conversations" in first):
        examples = list(islice(iterate_examples(path), limit))
        if not examples:
            raise UserError(f"{path}: holds no examples")
        return examples, {}
    questions, unreadable = read_questions(path, limit)
    return examples_of(questions, unreadable), unreadable


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


def _split_file(name: str, benchmark: Benchmark, split: str, records: Path) -> Path:
    folder = records / name
    splits = sorted(path.stem for path in folder.glob("*.jsonl"))
    names = (split,) if split else benchmark.splits
    matching = [name for name in names if name in splits]
    if not matching and not split and len(splits) == 1:
        matching = splits
    if not matching:
        others = f"there are {', '.join(splits)}; name one as {name}:SPLIT" if splits else "there is none"
        raise UserError(
            f"no {' or '.join(names)} split of {name} in {folder}: {others} (`dora-vl prepare` writes it; "
            f"--records names the folder of records, {name}=FILE any file)"
        )
    return folder / f"{matching[0]}.jsonl"
