"""Benchmarks by name: the table, those of installed packages, and one's own as a YAML file of a few lines.

What a benchmark is stands in its scorer's file. A package offers benchmarks, each a `Benchmark`, as entry points of the
group `dora_vl.benchmarks`, such as `receipts = "my_package.receipts:RECEIPTS"`. A file holds `name` and `scoring`, and
may say `file` (records, looked for from where the YAML is), `prompt`, `max_new_tokens` and `frames`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.metadata import entry_points
from itertools import islice
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from dora_vl.data.columns import USUAL, Columns
from dora_vl.data.containers import find_files
from dora_vl.data.example import FIELDS, Example, iterate_examples
from dora_vl.data.turns import Turn
from dora_vl.errors import UserError, shown
from dora_vl.evaluation.questions import is_question, read_question_file, read_questions, unread
from dora_vl.evaluation.scores import benchmark as prompts
from dora_vl.evaluation.scores import caption, exact, llava, vqa
from dora_vl.evaluation.scores.benchmark import (
    FRAMES,
    LETTER,
    LETTER_CN,
    SHORT_ANSWER_TOKENS,
    Benchmark,
    Prompt,
    Scorer,
    check_choices,
    has_answer,
    not_scored,
)
from dora_vl.evaluation.scores.exact import PATTERNS, SCORINGS
from dora_vl.evaluation.scores.llava import letter_cn, parsed
from dora_vl.files import read_yaml

BENCHMARKS: Mapping[str, Benchmark] = {
    "exact_match": exact.BENCHMARK,
    "vqav2": vqa.VQA,
    "vqav2_karpathy": vqa.KARPATHY,
    "gqa": vqa.GQA,
    "vizwiz": vqa.VIZWIZ,
    "textvqa": vqa.TEXTVQA,
    "scienceqa": llava.SCIENCEQA,
    "pope": llava.POPE,
    "mmbench": llava.MMBENCH,
    "mmbench_cn": llava.CHINESE,
    "mme": llava.MME,
    "seed": llava.SEED,
    "llava_bench": llava.LLAVA_BENCH,
    "mmvet": llava.MMVET,
    "nlvr": vqa.NLVR,
    "nlvr2": vqa.NLVR2,
    "coco_caption": caption.COCO,
    "tvqa": exact.TVQA,
    "how2qa": exact.HOW2QA,
    "tvc": caption.TVC,
    "yc2c": caption.YC2C,
    **dict.fromkeys(PATTERNS, exact.COMMONSENSE),
}
"""Every benchmark that `dora-vl evaluate` knows, a row each, written by hand."""

GROUP = "dora_vl.benchmarks"
NAME = re.compile(r"[A-Za-z0-9][\w\-]*")
PROMPTS: Mapping[str, Prompt] = {
    "as_is": prompts.as_is,
    "short": prompts.short,
    "letter": prompts.letter,
    "true_or_false": prompts.true_or_false,
    "caption": prompts.caption_of_picture,
    "video": prompts.about_video,
}
"""What `prompt:` may say."""


@dataclass(frozen=True, kw_only=True)
class NamedBenchmark:
    """A benchmark as it was asked for; `file` are its own records, instead of those in the folder of records."""

    name: str
    benchmark: Benchmark
    split: str = ""
    file: Path | None = None


def find_benchmark(request: str) -> NamedBenchmark:
    """Returns the benchmark of `NAME`, `NAME:SPLIT` or `FILE.yaml`."""
    if request.endswith((".yaml", ".yml")):
        return read_own(Path(request))
    name, _, split = request.partition(":")
    if name in BENCHMARKS:
        return NamedBenchmark(name=name, benchmark=BENCHMARKS[name], split=split)
    installed = {point.name: point for point in entry_points(group=GROUP)}
    if name not in installed:
        names = [*BENCHMARKS, *installed]
        nearest = get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise UserError(
            f"no benchmark {shown(name)}; did you mean {nearest!r}? There are {', '.join(names)}; your own is a "
            "FILE.yaml"
        )
    target = installed[name].value
    try:
        benchmark = installed[name].load()
    except (ImportError, AttributeError) as error:
        raise UserError(f"benchmark {name}: {target} of an installed package fails: {error}") from error
    if not isinstance(benchmark, Benchmark):
        raise UserError(f"benchmark {name}: {target} is a {type(benchmark).__name__}, it must be a Benchmark")
    if not NAME.fullmatch(name):
        raise UserError(f"benchmark {shown(name)}: a name is letters, digits, _ and -, as folders have it")
    return NamedBenchmark(name=name, benchmark=benchmark, split=split)


OWN: Mapping[str, tuple[type, Any]] = {
    "name": (str, None),
    "scoring": (str, None),
    "file": (str, None),
    "prompt": (str, None),
    "max_new_tokens": (int, SHORT_ANSWER_TOKENS),
    "frames": (int, FRAMES),
}
"""What a benchmark's YAML may say: its type, and what it is without."""


def read_own(path: Path) -> NamedBenchmark:
    """Returns the benchmark of a YAML file."""
    content = read_yaml(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: must hold settings such as `name: receipts`, found {shown(content)}")
    for key, value in content.items():
        if key not in OWN:
            raise UserError(f"{path}: unknown setting {shown(key)}; there are {', '.join(OWN)}")
        kind = OWN[key][0]
        if value is None and key in ("file", "prompt"):
            continue
        if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 1):
            needed = "a whole number from 1" if kind is int else "text"
            raise UserError(f"{path}: {key} must be {needed}, it is {shown(value)}")
        names = {"scoring": SCORINGS, "prompt": PROMPTS}.get(key)
        if names is not None and value not in names:
            raise UserError(f"{path}: {key} is {shown(value)}; there are {', '.join(names)}")
    if missing := [key for key in ("name", "scoring") if key not in content]:
        raise UserError(f"{path}: {missing[0]} is missing; a benchmark has at least name and scoring")
    settings = {key: content.get(key, default) for key, (_, default) in OWN.items()}
    if not NAME.fullmatch(settings["name"]) or settings["name"] in BENCHMARKS:
        raise UserError(f"{path}: name {shown(settings['name'])} is taken, or not of letters, digits, _ and - alone")
    scoring = settings["scoring"]
    benchmark = Benchmark(
        modes={"": SCORINGS[scoring]},
        prompt=PROMPTS[settings["prompt"] or {"choice": "letter", "caption": "caption"}.get(scoring, "short")],
        max_new_tokens=settings["max_new_tokens"],
        chooses=scoring == "choice",
        together=caption.clip_of if scoring == "caption" else None,
        shares_answers=scoring == "caption",
        frames=settings["frames"],
    )
    return NamedBenchmark(
        name=settings["name"], benchmark=benchmark, file=settings["file"] and path.parent / settings["file"]
    )


def with_choices(example: Example, suffix: str) -> Example:
    """Returns a question of LLaVA's conversations with the choices that its words end with, and the right one.

    The choices are the last lines "A. ...", "B. ..." or the line "Options: (A) ... (B) ..."; the right one is what the
    answer's letter names, or whose text it is.
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


def read_set(
    request: str, records: Path, *, mode: str | None, limit: int | None, columns: Columns = USUAL
) -> EvaluationSet:
    """What `NAME`, `NAME:SPLIT`, `NAME=FILE`, `FILE.yaml` or `FILE.yaml=FILE` stands for; `columns` of its file."""
    name_of_set, _, file = request.partition("=")
    listed = find_benchmark(name_of_set)
    name, benchmark = listed.name, listed.benchmark
    if mode is not None and (mode not in benchmark.modes or mode == ""):
        named = [version for version in benchmark.modes if version]
        raise UserError(f"--mode {name}={mode}: {name} has {', '.join(named) or 'one version only'}")
    path = Path(file) if file else listed.file or _split_file(name, benchmark, listed.split, records)
    examples, unreadable = _read_examples(path, columns, limit)
    if benchmark.chooses:
        suffix = LETTER_CN if benchmark.prompt is letter_cn else LETTER
        for number, example in enumerate(examples):
            if example.id in unreadable:
                examples[number] = replace(example, choices=("",), extra={"correct": 0})
            elif not example.choices and example.turns:
                examples[number] = with_choices(example, suffix)
        askable = [example for example in examples if example.choices or has_answer(example) or not example.turns]
        check_choices(askable, path, all_known=False)
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


def _read_examples(path: Path, columns: Columns, limit: int | None) -> tuple[list[Example], dict[str, str]]:
    """The first `limit` examples of a file of records, of LLaVA's questions, or of any rows that training reads."""
    first = next(find_files(path).rows(), {})
    if is_question(first):
        return read_question_file(path)[:limit], {}
    form = columns.resolve(first, strict=False).format
    if first and first.keys() <= FIELDS and (form is None or form.name == "records"):
        return list(islice(iterate_examples(path), limit)), {}
    examples, unreadable = read_questions(path, limit, columns)
    return [*examples, *unread(unreadable)], unreadable


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
