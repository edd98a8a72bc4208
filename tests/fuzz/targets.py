"""What is damaged: the fixtures of every source, and right answers to every benchmark in every form that is read."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dora_vl.cli import main
from dora_vl.data.example import Example, iterate_examples, to_record
from dora_vl.evaluation.benchmarks import BENCHMARKS
from dora_vl.evaluation.scores import vqa
from dora_vl.evaluation.scores.benchmark import SHORT
from dora_vl.evaluation.scores.exact import PATTERNS, SCORINGS

FIXTURES = Path(__file__).parents[1] / "data" / "fixtures"
SOURCE_OF = {"vqav2-vlt5": "vqav2-karpathy", "gqa-vlt5": "gqa", "nlvr2-vlt5": "nlvr2"}
SOURCE_OF |= {"how2qa-csv": "how2qa", "yc2c-youcook2": "yc2c"}
"""Fixtures of a source's second form."""
LIKE = {"exact_match": "textvqa", **dict.fromkeys(sorted(PATTERNS.keys() - {"boolq", "openbookqa"}), "openbookqa")}
"""Benchmarks without a fixture, and whose records they are asked with."""
OWN = {"seed": ["choice"], "coco_caption": ["caption"], "textvqa": sorted(SCORINGS.keys() - {"choice", "caption"})}
"""Benchmarks whose records are those of one's own, and how that is scored."""
SUBMISSIONS = {"vqav2_karpathy": vqa.vqa_submission} | {
    name: benchmark.submission
    for name, benchmark in BENCHMARKS.items()
    if benchmark.submission is not None and name != "llava_bench"  # whose file holds a judge's questions
}
LLAVA = ("vqav2", "gqa", "scienceqa", "mmbench", "mmbench_cn", "seed", "mmvet", "llava_bench")
"""Benchmarks whose answers LLaVA writes by the publisher's ids."""
ANSWERS, RECORDS = "predictions.jsonl", "records.jsonl"


@dataclass(frozen=True)
class Target:
    """A command and the files that it reads, by path; `{files}` and `{out}` in its words are the case's folders."""

    name: str
    files: Mapping[str, bytes]
    words: Sequence[str]


def publisher_targets() -> list[Target]:
    """One for each fixture, and one for each option that reads otherwise."""
    targets: list[Target] = []
    for folder in sorted(FIXTURES.iterdir()):
        source = SOURCE_OF.get(folder.name, folder.name)
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        targets.append(_prepare(folder.name, source, files))
        if source == "nlvr":
            targets.append(_prepare("nlvr in shares", source, files, "--set", "shares=train:0.5,test:0.5"))
        if source == "llava-pretrain":
            targets.append(_prepare("llava-json", "llava-json", files))
    return targets


def _prepare(name: str, source: str, files: Mapping[str, bytes], *more: str) -> Target:
    return Target(name, files, ("prepare", source, "--from", "{files}", "--to", "{out}", "--workers", "0", *more))


def prediction_targets(scratch: Path) -> list[Target]:
    """Every benchmark; where no fixture is of it, with records of one like it. Some forms are those of two alone."""
    for fixture in sorted(FIXTURES.iterdir()):
        source = SOURCE_OF.get(fixture.name, fixture.name)
        with contextlib.redirect_stdout(io.StringIO()):
            main(["prepare", source, "--from", str(fixture), "--to", str(scratch / fixture.name), "--workers", "0"])
    llava = {"llava_mix665k", "llava_pretrain"}
    paths = [path for path in sorted(scratch.glob("*/*/*.jsonl")) if path.parent.name not in llava]
    paths.sort(key=lambda path: not next(iterate_examples(path)).answers)  # of a benchmark's splits one with answers
    targets = []
    for name in BENCHMARKS:
        records = next(path for path in paths if path.parent.name == LIKE.get(name, name))
        examples = list(iterate_examples(records))
        answers = {example.id: example.answers[0].text if example.answers else "a" for example in examples}
        files = {RECORDS: records.read_bytes(), ANSWERS: _lines({"id": id, "answer": answers[id]} for id in answers)}
        targets.append(_evaluate(name, files))
        if name in SUBMISSIONS:
            file, text = SUBMISSIONS[name](examples, answers)
            targets.append(_evaluate(f"{name} server's file", {**files, file: text.encode()}, predictions=file))
        if name == "gqa":
            others = {"others.jsonl": _lines({"id": id, "answer": "no"} for id in answers)}
            against = _evaluate("gqa against others", files | others)
            targets.append(replace(against, words=(*against.words, "--against", "{files}/others.jsonl")))
        if name in LLAVA:
            targets += _llava(name, examples, answers)
        targets += _own(files, OWN.get(name, ()))
    return targets


def _evaluate(name: str, files: Mapping[str, bytes], *, questions: str = "", predictions: str = ANSWERS) -> Target:
    benchmark = questions or f"{name.split()[0]}={{files}}/{RECORDS}"
    words = ("evaluate", "--benchmarks", benchmark, "--predictions", f"{{files}}/{predictions}", "--to", "{out}")
    return Target(name, files, words)


def _lines(rows: Iterable[Mapping[str, object]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _llava(name: str, examples: Sequence[Example], answers: Mapping[str, str]) -> Iterator[Target]:
    """LLaVA's answers, and its questions with them."""
    questions, lines = [], []
    for example in examples:
        row = {"question_id": example.id, "text": f"{example.question}\n{SHORT}"}
        lines.append({**row, "prompt": row["text"], "text": answers[example.id], "metadata": {}})
        picture = {"image": example.images[0]} if example.images else {}
        questions.append({**row, **picture, "category": str(example.extra.get("category", "default"))})
    answered = {ANSWERS: _lines(lines), RECORDS: _lines(map(to_record, examples))}
    yield _evaluate(f"{name} LLaVA's answers", answered)
    asked_files = answered | {"questions.jsonl": _lines(questions)}
    yield _evaluate(f"{name} LLaVA's questions", asked_files, questions=f"{name}={{files}}/questions.jsonl")


def _own(files: Mapping[str, bytes], scorings: Iterable[str]) -> Iterator[Target]:
    """A benchmark of one's own, by each of these ways to score."""
    for scoring in scorings:
        prompt = "letter" if scoring == "choice" else "short"
        settings = f"name: own\nscoring: {scoring}\nfile: {RECORDS}\nprompt: {prompt}\nmax_new_tokens: 64\nframes: 4\n"
        own = {"own.yaml": settings.encode(), **files}
        yield _evaluate(f"own, {scoring}", own, questions="{files}/own.yaml")
