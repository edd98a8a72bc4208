"""Benchmarks by name: the table, and one's own as a YAML file of a few lines.

What a benchmark is, its scorer's file says. A file of one's own holds `name` and `scoring`, and may say `file`
(records, looked for from where the YAML is), `prompt`, `max_new_tokens` and `frames`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from itertools import islice
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from dora_vl.data.columns import USUAL, Columns
from dora_vl.data.data_files import find_files
from dora_vl.data.example import FIELDS, Example, iterate_examples, right_choice
from dora_vl.errors import UserError, short_repr
from dora_vl.evaluation.baselines import right_text
from dora_vl.evaluation.questions import (
    choice_text,
    is_question,
    likeliest_ending,
    read_question_file,
    read_questions,
    right_ending,
    unread,
)
from dora_vl.evaluation.scores import benchmark as prompts
from dora_vl.evaluation.scores import caption, exact, llava, vqa
from dora_vl.evaluation.scores.benchmark import (
    FRAMES,
    LETTER,
    LETTER_CN,
    SHORT_ANSWER_TOKENS,
    Benchmark,
    PromptFunction,
    check_choices,
    has_answer,
    not_scored,
)
from dora_vl.evaluation.scores.exact import CLOZE, PATTERNS, SCORINGS, final_answer
from dora_vl.evaluation.scores.llava import letter_cn, with_choices
from dora_vl.evaluation.test_sets import TestSet
from dora_vl.files import file_sha256
from dora_vl.yaml_files import read_yaml

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

NAME = re.compile(r"[A-Za-z0-9][\w\-]*")
PROMPTS: Mapping[str, PromptFunction] = {
    "as_is": prompts.as_is,
    "short": prompts.short,
    "letter": prompts.letter,
    "true_or_false": prompts.true_or_false,
    "caption": prompts.caption_of_picture,
    "video": prompts.about_video,
}
"""`prompt:` of a benchmark's YAML takes these names."""


@dataclass(frozen=True, kw_only=True)
class NamedBenchmark:
    """A benchmark as it was asked for; `file` are its own records, instead of those in the folder of records."""

    name: str
    benchmark: Benchmark
    split: str = ""
    file: Path | None = None


def find_benchmark(request: str) -> NamedBenchmark:
    """Finds the benchmark of `NAME`, `NAME:SPLIT` or `FILE.yaml`."""
    if request.endswith((".yaml", ".yml")):
        return read_own(Path(request))
    name, _, split = request.partition(":")
    if name not in BENCHMARKS:
        nearest = get_close_matches(name, BENCHMARKS, n=1, cutoff=0.0)[0]
        raise UserError(
            f"no benchmark {short_repr(name)}; did you mean {nearest!r}? There are {', '.join(BENCHMARKS)}; your "
            "own is a FILE.yaml"
        )
    return NamedBenchmark(name=name, benchmark=BENCHMARKS[name], split=split)


OWN: Mapping[str, tuple[type, Any]] = {
    "name": (str, None),
    "scoring": (str, None),
    "file": (str, None),
    "prompt": (str, None),
    "max_new_tokens": (int, SHORT_ANSWER_TOKENS),
    "frames": (int, FRAMES),
}
"""A benchmark's YAML takes these settings; each has a type and a default."""


def read_own(path: Path) -> NamedBenchmark:
    """Reads the benchmark of a YAML file."""
    content = read_yaml(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: must hold settings such as `name: receipts`, found {short_repr(content)}")
    for key, value in content.items():
        if key not in OWN:
            raise UserError(f"{path}: unknown setting {short_repr(key)}; there are {', '.join(OWN)}")
        kind = OWN[key][0]
        if value is None and key in ("file", "prompt"):
            continue
        if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 1):
            needed = "a whole number from 1" if kind is int else "text"
            raise UserError(f"{path}: {key} must be {needed}, it is {short_repr(value)}")
        names = {"scoring": SCORINGS, "prompt": PROMPTS}.get(key)
        if names is not None and value not in names:
            raise UserError(f"{path}: {key} is {short_repr(value)}; there are {', '.join(names)}")
    if missing := [key for key in ("name", "scoring") if key not in content]:
        raise UserError(f"{path}: {missing[0]} is missing; a benchmark has at least name and scoring")
    settings = {key: content.get(key, default) for key, (_, default) in OWN.items()}
    name, file, scoring = settings["name"], settings["file"], settings["scoring"]
    if not NAME.fullmatch(name) or name in BENCHMARKS:
        raise UserError(f"{path}: name {short_repr(name)} is taken, or has more than letters, digits, _ and -")
    benchmark = Benchmark(
        modes={"": SCORINGS[scoring]},
        prompt=PROMPTS[settings["prompt"] or {"choice": "letter", "caption": "caption"}.get(scoring, "short")],
        max_new_tokens=settings["max_new_tokens"],
        chooses=scoring == "choice",
        together=caption.clip_of if scoring == "caption" else None,
        shares_answers=scoring == "caption",
        frames=settings["frames"],
    )
    return NamedBenchmark(name=name, benchmark=benchmark, file=file and path.parent / file)


def read_set(
    request: str,
    records: Path,
    *,
    mode: str | None = None,
    limit: int | None = None,
    columns: Columns = USUAL,
    answer_after: str | None = None,
) -> TestSet:
    """Returns the test set of `NAME`, `NAME:SPLIT`, `NAME=FILE`, `FILE.yaml` or `FILE.yaml=FILE`, for no model yet.

    Without a `mode` its score is the benchmark's usual one; `answer_after` is of `exact_match`.
    """
    name_of_set, _, path = request.partition("=")
    listed = find_benchmark(name_of_set)
    name, benchmark = listed.name, listed.benchmark
    if mode is not None and (mode not in benchmark.modes or mode == ""):
        named = [version for version in benchmark.modes if version]
        raise UserError(f"--mode {name}={mode}: {name} has {', '.join(named) or 'one version only'}")
    mode = next(iter(benchmark.modes), "") if mode is None else mode
    file = Path(path) if path else listed.file or _split_file(listed, records)
    examples, unreadable = _read_examples(file, columns, limit)
    if benchmark.chooses:
        suffix = LETTER_CN if benchmark.prompt is letter_cn else LETTER
        examples = _all_with_choices(examples, unreadable, suffix, file)
    left_out = not_scored(benchmark, examples, unreadable)
    scorer = benchmark.modes[mode] if benchmark.modes and len(left_out) < len(examples) else None
    if scorer is exact.score:
        scorer = partial(exact.score, answer_after=answer_after)

    def truth(example: Example) -> str:
        if mode == CLOZE:
            return right_ending(example)
        if not benchmark.chooses and not benchmark.labels_choices:
            return final_answer(right_text(example), answer_after)
        index = right_choice(example)
        return f"a{index}" if benchmark.labels_choices else ascii_uppercase[index]

    def compared(example: Example, text: str) -> str:
        return (
            likeliest_ending(example, text) if mode == CLOZE else choice_text(example, final_answer(text, answer_after))
        )

    return TestSet(
        name=name,
        examples=examples,
        score=scorer,
        benchmark=benchmark,
        truth=truth,
        compared=compared,
        unreadable=unreadable,
        not_scored=left_out,
        together=benchmark.together,
        item=caption.clip_of if benchmark.shares_answers else lambda example: example.id,
        submission=benchmark.submissions.get(mode, benchmark.submission),
        about={"file": str(file), "file_sha256": file_sha256(file), **({"mode": mode} if mode else {})},
    )


def _all_with_choices(
    examples: Sequence[Example], unreadable: Mapping[str, str], suffix: str, file: Path
) -> list[Example]:
    """Returns a choosing benchmark's examples with their choices, once each can be answered and scored."""

    def with_own(example: Example) -> Example:
        if example.id in unreadable:
            return replace(example, choices=("",), extra={"correct": 0} if example.answers else {})
        return with_choices(example, suffix) if not example.choices and example.turns else example

    chosen = list(map(with_own, examples))
    askable = [example for example in chosen if example.choices or has_answer(example) or not example.turns]
    check_choices(askable, file, all_known=False)
    return chosen


def _read_examples(path: Path, columns: Columns, limit: int | None) -> tuple[list[Example], dict[str, str]]:
    """Reads `limit` examples of a file of records, of LLaVA's questions, or of rows that training reads."""
    first = next(find_files(path).rows(), {})
    if is_question(first):
        return read_question_file(path)[:limit], {}
    form = columns.resolve(first, strict=False).format
    if first and first.keys() <= FIELDS and (form is None or form.name == "records"):
        return list(islice(iterate_examples(path), limit)), {}
    examples, unreadable = read_questions(path, limit, columns)
    return [*examples, *unread(unreadable)], unreadable


def _split_file(listed: NamedBenchmark, records: Path) -> Path:
    name, folder = listed.name, records / listed.name
    splits = sorted(path.stem for path in folder.glob("*.jsonl"))
    names = (listed.split,) if listed.split else listed.benchmark.splits
    matching = [split for split in names if split in splits]
    if not matching and not listed.split and len(splits) == 1:
        matching = splits
    if not matching:
        others = f"there are {', '.join(splits)}; name one as {name}:SPLIT" if splits else "there is none"
        raise UserError(
            f"no {' or '.join(names)} split of {name} in {folder}: {others} (`dora-vl prepare` writes it; "
            f"--records names the folder of records, {name}=FILE any file)"
        )
    return folder / f"{matching[0]}.jsonl"
