"""One benchmark as it was asked for on the command line: which file, which version, which examples."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from dora_vl.data.examples import Answer, Example, clip_fields, iterate_examples
from dora_vl.data.records import stream_values
from dora_vl.errors import UserError
from dora_vl.evaluation.benchmarks import find_benchmark
from dora_vl.evaluation.questions import Question, is_question, read_question_file, read_questions, with_choices
from dora_vl.scores.benchmark import Benchmark, Scorer
from dora_vl.scores.choices import check_choices
from dora_vl.scores.known_truth import has_answer, has_right_choice, not_scored
from dora_vl.scores.mmbench import letter_cn
from dora_vl.scores.prompts import LETTER, LETTER_CN

LLAVA_KEY = "conversations"
UNREADABLE_CHOICES = ("",)
WANTED = "questions; `dora-vl prepare` writes records, or give LLaVA's JSON as NAME=FILE"


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
        return any(example.clips for example in self.examples)

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
    _, first = next(stream_values(path, WANTED), (0, None))
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
        **clip_fields(question.videos),
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
