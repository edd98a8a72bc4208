"""One benchmark as it was asked for on the command line: which file, which version, which examples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

from dora_vl.data.examples import Answer, Example, iterate_examples
from dora_vl.errors import UserError
from dora_vl.evaluation.benchmarks import BENCHMARKS, Benchmark, Scorer
from dora_vl.evaluation.choices import check_choices
from dora_vl.evaluation.questions import Question, read_questions

LLAVA_KEY = "conversations"


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """A benchmark's examples and how they are scored.

    Attributes:
        unreadable: the reason for each record that cannot be asked, by id; it counts as wrong.
    """

    name: str
    benchmark: Benchmark
    mode: str
    file: Path
    examples: Sequence[Example]
    unreadable: Mapping[str, str]

    @property
    def scorer(self) -> Scorer | None:
        """The chosen version's, None where a judge or a server scores."""
        scorable = all(example.answers or "correct" in example.extra for example in self.examples)
        return self.benchmark.modes[self.mode] if self.benchmark.modes and scorable else None


def read_set(request: str, records: Path, *, mode: str | None, limit: int | None) -> EvaluationSet:
    """What `NAME`, `NAME:SPLIT` or `NAME=FILE` stands for.

    Raises:
        UserError: no such benchmark, version, split or file, or the file is broken; it names what there is. A question
            of a multiple-choice benchmark has no choices, or does not say which is right.
    """
    name, _, file = request.partition("=")
    name, _, split = name.partition(":")
    if name not in BENCHMARKS:
        nearest = get_close_matches(name, BENCHMARKS, n=1, cutoff=0.0)[0]
        raise UserError(f"no benchmark {name!r}; did you mean {nearest!r}? There are {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    path = Path(file) if file else _split_file(name, benchmark, split, records)
    examples, unreadable = read_file(path, limit)
    if benchmark.chooses:
        check_choices(examples, path)
    return EvaluationSet(
        name=name,
        benchmark=benchmark,
        mode=_mode(name, benchmark, mode),
        file=path,
        examples=examples,
        unreadable=unreadable,
    )


def read_file(path: Path, limit: int | None) -> tuple[list[Example], dict[str, str]]:
    """The first `limit` examples of a file of records, or of questions in LLaVA's format, and what cannot be read.

    Raises:
        UserError: no such file, or it is broken or empty.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; `dora-vl prepare` writes records, or give LLaVA's JSON as NAME=FILE")
    if not _is_llava(path):
        examples = list(islice(iterate_examples(path), limit))
        if not examples:
            raise UserError(f"{path}: holds no examples")
        return examples, {}
    questions, unreadable = read_questions(path, limit)
    lost = [Example(id=name, answers=(Answer(text=""),)) for name in unreadable]
    return [*map(_example, questions), *lost], unreadable


def _is_llava(path: Path) -> bool:
    """A JSON list, or lines whose first holds conversations."""
    with path.open(encoding="utf-8", errors="replace") as stream:
        first = next((line.strip() for line in stream if line.strip()), "")
    if first.startswith("["):
        return True
    try:
        return LLAVA_KEY in json.loads(first)
    except (ValueError, TypeError):
        return False  # reading it says what is wrong


def _example(question: Question) -> Example:
    return Example(
        id=question.id,
        images=question.images,
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
