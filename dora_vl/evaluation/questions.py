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
from dora_vl.evaluation.scores.benchmark import (
    Benchmark,
    Scorer,
    check_choices,
    has_answer,
    has_right_choice,
    not_scored,
)
from dora_vl.evaluation.scores.llava import letter_cn, parsed
from dora_vl.evaluation.scores.prompts import LETTER, LETTER_CN, Prompt
from dora_vl.evaluation.scores.prompts import turns_of as prompt_turns


@dataclass(frozen=True, kw_only=True)
class Question:
    """What the model is asked and what it should say.

    Attributes:
        images: paths relative to the picture folder.
        turns: the prompt: everything up to and with the last question; earlier rounds keep their true answers.
        truth: the answer to the last question.
        answer: the part of it that is scored, where the row says it; else empty.
        kind: the record's `kind`, if it has one; scores are also given by kind.
        videos: in the order of their `<video>` in `turns`.
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
    """The last round of one row, of any format that training reads, as a question.

    Raises:
        BadSample: the record cannot be read.
        ColumnsError: a column that means something would be left out.
    """
    example = read_row(record, columns=columns)
    if example.image_bytes:
        raise BadSample(example.id, "its file holds its pictures itself; write them to files, which a test reads")
    conversation = as_conversation(example)
    kind = record.get("kind")
    answer = example.answers[0].text if example.turns and example.answers else ""
    return question_of_turns(conversation, answer=answer, kind=None if kind is None else str(kind))


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
        user = next((place for place, turn in enumerate(turns) if turn.role == "user"), None)
        if example.videos and user is not None and not any(VIDEO_PLACEHOLDER in turn.text for turn in turns):
            first = Turn("user", f"{VIDEO_PLACEHOLDER}\n" * len(example.videos) + turns[user].text)
            turns = (*turns[:user], first, *turns[user + 1 :])
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


_FORMAT = re.compile(r"Answer format:\s*(\S.*?)\s*$")


def outputs_of(question: Question) -> list[str]:
    """The outputs that the question's last line, `Answer format: a/b/...`, admits, in its order.

    What stands before the answer in the true output stands before each: "the correct answer is ".

    Raises:
        BadSample: no such line, or the true answer is not among them or does not end the true output.
    """
    line = _FORMAT.search(question.turns[-1].instruction)
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
    """The first `limit` questions of a file of any format that training reads.

    Beside them the reason for each that cannot be read, by id.

    Raises:
        UserError: the file is missing, malformed or empty, or two records share an id, so that their answers could
            not be told apart.
    """
    found = find_files(path)
    numbered = stream_values(found.files[0], "questions") if found.is_json else enumerate(found.rows(), 1)
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


ID, TEXT, IMAGE, CATEGORY = "question_id", "text", "image", "category"
QUESTIONS_WANTED = "questions; give LLaVA's JSON lines"
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
    rows = [(line, _checked(record, f"{path}, line {line}")) for line, record in stream_values(path, QUESTIONS_WANTED)]
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


# One benchmark as it was asked for on the command line: which file, which version, which examples.


LLAVA_KEY = "conversations"
UNREADABLE_CHOICES = ("",)
EVALUATION_SET_WANTED = "questions; `dora-vl prepare` writes records, or give LLaVA's JSON as NAME=FILE"


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """A benchmark's examples and how they are scored.

    Attributes:
        request: what was asked for on the command line.
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
    def has_videos(self) -> bool:
        """Whether any example is about a video."""
        return any(example.videos for example in self.examples)

    @property
    def scorer(self) -> Scorer | None:
        """The chosen version's, None where a judge or a server scores."""
        scorable = len(self.not_scored) < len(self.examples)
        return self.benchmark.modes[self.mode] if self.benchmark.modes and scorable else None


def read_set(request: str, records: Path, *, mode: str | None, limit: int | None) -> EvaluationSet:
    """What `NAME`, `NAME:SPLIT`, `NAME=FILE`, `FILE.yaml` or `FILE.yaml=FILE` stands for.

    Raises:
        UserError: no such benchmark, version, split or file, or the file is broken; it names what there is. A question
            of a multiple-choice benchmark has no choices.
    """
    wanted, _, file = request.partition("=")
    found = find_benchmark(wanted)
    name, benchmark = found.name, found.benchmark
    path = Path(file) if file else found.file or _split_file(name, benchmark, found.split, records)
    examples, unreadable = read_file(path, limit)
    if benchmark.chooses:
        examples = [_choosing(example, benchmark, unreadable) for example in examples]
        asked = [one for one in examples if one.choices or has_answer(one) or not one.turns]
        check_choices(asked, path, all_known=False)
    missing = not_scored(
        examples,
        unreadable,
        known=has_right_choice if benchmark.chooses else has_answer,
        together=benchmark.together,
        shared=benchmark.shares_answers,
    )
    return EvaluationSet(
        request=request,
        name=name,
        benchmark=benchmark,
        mode=_mode(name, benchmark, mode),
        file=path,
        examples=examples,
        unreadable=unreadable,
        not_scored=missing,
    )


def _choosing(example: Example, benchmark: Benchmark, unreadable: Mapping[str, str]) -> Example:
    """A multiple-choice question with its choices, also where they stand in LLaVA's prompt."""
    if example.id in unreadable:
        return replace(example, choices=UNREADABLE_CHOICES, extra={"correct": 0})
    if example.choices or not example.turns:
        return example
    return with_choices(example, LETTER_CN if benchmark.prompt is letter_cn else LETTER)


def read_file(path: Path, limit: int | None) -> tuple[list[Example], dict[str, str]]:
    """The first `limit` examples of a file of records, or of questions in a LLaVA format, and what cannot be read.

    Raises:
        UserError: no such file, or it is broken or empty.
    """
    _, first = next(stream_values(path, EVALUATION_SET_WANTED), (0, None))
    if is_question(first):
        return read_question_file(path)[:limit], {}
    if not (isinstance(first, dict) and LLAVA_KEY in first) and not _is_list(path):
        examples = list(islice(iterate_examples(path), limit))
        if not examples:
            raise UserError(f"{path}: holds no examples")
        return examples, {}
    questions, unreadable = read_questions(path, limit)
    lost = [Example(id=name, answers=(Answer(text=""),)) for name in unreadable]
    return [*map(example_of, questions), *lost], unreadable


def _is_list(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1 << 12).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def example_of(question: Question) -> Example:
    """A question of a LLaVA format, or of a run's test, as an example."""
    return Example(
        id=question.id,
        images=question.images,
        videos=question.videos,
        question=question.text,
        turns=question.turns,
        answers=(Answer(text=question.truth),),
        extra={} if question.kind is None else {"kind": question.kind},
    )


def _split_file(name: str, benchmark: Benchmark, split: str, records: Path) -> Path:
    folder = records / name
    found = sorted(path.stem for path in folder.glob("*.jsonl"))
    looked_for = (split,) if split else benchmark.splits
    wanted = [one for one in looked_for if one in found]
    if not wanted and not split and len(found) == 1:
        wanted = found
    if not wanted:
        there = f"there are {', '.join(found)}; name one as {name}:SPLIT" if found else "there is none"
        raise UserError(
            f"no {' or '.join(looked_for)} split of {name} in {folder}: {there} (`dora-vl prepare` writes it; "
            f"--records names the folder of records, {name}=FILE any file)"
        )
    return folder / f"{wanted[0]}.jsonl"


def _mode(name: str, benchmark: Benchmark, asked: str | None) -> str:
    if asked is None:
        return next(iter(benchmark.modes), "")
    if asked not in benchmark.modes or asked == "":
        named = [mode for mode in benchmark.modes if mode]
        raise UserError(f"--mode {name}={asked}: {name} has {', '.join(named) or 'one version only'}")
    return asked
