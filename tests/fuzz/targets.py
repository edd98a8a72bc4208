"""What is damaged: the fixtures of every source, and right answers to every benchmark in every form that is read."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from dora_vl.cli import main
from dora_vl.data.example import Example, iterate_examples, to_record
from dora_vl.evaluation.benchmarks import BENCHMARKS
from dora_vl.evaluation.scores import prompts, vqa
from dora_vl.evaluation.scores.commonsense import PATTERNS
from dora_vl.evaluation.scores.exact import SCORINGS

FIXTURES = Path(__file__).parents[1] / "sources" / "fixtures"
SOURCE_OF = {"vqav2-vlt5": "vqav2-karpathy", "gqa-vlt5": "gqa", "nlvr2-vlt5": "nlvr2"}
SOURCE_OF |= {"how2qa-csv": "how2qa", "yc2c-youcook2": "yc2c"}
"""Fixtures of a source's second form."""
SHARDS = "hugging-face"
LIKE = {"exact_match": "textvqa", **dict.fromkeys(sorted(PATTERNS.keys() - {"boolq", "openbookqa"}), "openbookqa")}
"""Benchmarks without a fixture, and whose records they are asked with."""
OWN_LIKE = {"choice": "seed", "caption": "coco_caption"}
"""The same of benchmarks of one's own; else TextVQA's."""
SUBMISSIONS = {"vqav2_karpathy": vqa.vqa_submission} | {
    name: benchmark.submission
    for name, benchmark in BENCHMARKS.items()
    if benchmark.submission is not None and name != "llava_bench"  # whose file holds a judge's questions
}
LLAVA_IDS: Mapping[str, Callable[[Example, int], object]] = {
    "textvqa": lambda example, place: example.extra["image_id"],
    "mme": lambda example, place: f"{example.extra['category']}/{PurePosixPath(example.images[0]).stem}.png",
    "vizwiz": lambda example, place: PurePosixPath(example.images[0]).name,
    "pope": lambda example, place: place,
}
"""What LLaVA's files have for an id where it is another one than the publisher's."""
LLAVA = (*LLAVA_IDS, "vqav2", "gqa", "scienceqa", "mmbench", "mmbench_cn", "seed", "mmvet", "llava_bench")
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
    picture = next((FIXTURES / "mme").rglob("*.png")).read_bytes()
    row = {"question": "What is it?", "answers": ["cat", "dog"], "image": {"bytes": picture}}
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"id": f"q{number}", **row} for number in range(6)]), stream)
    return [*targets, _prepare(SHARDS, SHARDS, {"a.parquet": stream.getvalue()}, "--set", "task=own")]


def _prepare(name: str, source: str, files: Mapping[str, bytes], *more: str) -> Target:
    return Target(name, files, ("prepare", source, "--from", "{files}", "--to", "{out}", "--workers", "0", *more))


def prediction_targets(scratch: Path) -> list[Target]:
    """Every benchmark in every form; where no fixture is of it, with records of one like it."""
    paths = _records(scratch)
    named = {name: next(path for path in paths if path.parent.name == LIKE.get(name, name)) for name in BENCHMARKS}
    sets = {name: _Answered(name, path, list(iterate_examples(path))) for name, path in named.items()}
    return [
        *(target for answered in sets.values() for target in _targets(answered)),
        *(_own(sets[OWN_LIKE.get(scoring, "textvqa")], scoring) for scoring in SCORINGS),
        _conversations(sets["textvqa"]),
    ]


@dataclass(frozen=True)
class _Answered:
    """A benchmark's records and the right answers to them."""

    name: str
    path: Path
    examples: Sequence[Example]

    @property
    def answers(self) -> dict[str, str]:
        return {example.id: example.answers[0].text if example.answers else "a" for example in self.examples}

    @property
    def plain(self) -> dict[str, bytes]:
        return {ANSWERS: _lines({"id": name, "answer": answer} for name, answer in self.answers.items())}

    def target(
        self, form: str, files: Mapping[str, bytes], *, questions: str = "", predictions: str = ANSWERS
    ) -> Target:
        """Its files beside the records, and the command for them."""
        asked = questions or f"{self.name}={{files}}/{RECORDS}"
        words = ("evaluate", "--benchmarks", asked, "--predictions", f"{{files}}/{predictions}", "--to", "{out}")
        return Target(f"{self.name} {form}", {RECORDS: self.path.read_bytes(), **files}, words)


def _records(folder: Path) -> list[Path]:
    """The records of all fixtures; of a benchmark's splits one with answers comes first."""
    for fixture in sorted(FIXTURES.iterdir()):
        source = SOURCE_OF.get(fixture.name, fixture.name)
        with contextlib.redirect_stdout(io.StringIO()):
            main(["prepare", source, "--from", str(fixture), "--to", str(folder / fixture.name), "--workers", "0"])
    llava = {"llava_mix665k", "llava_pretrain"}
    paths = [path for path in sorted(folder.glob("*/*/*.jsonl")) if path.parent.name not in llava]
    return sorted(paths, key=lambda path: not next(iterate_examples(path)).answers)


def _targets(of: _Answered) -> Iterator[Target]:
    """Lines of id and answer, the server's file, LLaVA's answers, and its questions with them."""
    yield of.target("", of.plain)
    if of.name == "gqa":
        others = {"others.jsonl": _lines({"id": name, "answer": "no"} for name in of.answers)}
        against = of.target("against others", of.plain | others)
        yield replace(against, words=(*against.words, "--against", "{files}/others.jsonl"))
    if of.name in SUBMISSIONS:
        name, text = SUBMISSIONS[of.name](of.examples, of.answers)
        yield of.target("server's file", {name: text.encode()}, predictions=name)
    if of.name not in LLAVA:
        return
    questions, answers = [], []
    examples = list(of.examples)
    if of.name == "pope":  # whose order is found by the questions, so each has words of its own
        examples = [replace(each, question=f"{place}: {each.question}") for place, each in enumerate(examples)]
    for place, example in enumerate(examples):
        name = LLAVA_IDS.get(of.name, lambda example, place: example.id)(example, place)
        prompt = f"{example.question}\n{prompts.SHORT}"
        answers.append({"question_id": name, "prompt": prompt, "text": of.answers[example.id], "metadata": {}})
        picture = {"image": example.images[0]} if example.images else {}
        category = str(example.extra.get("category", "default"))
        questions.append({"question_id": name, **picture, "text": prompt, "category": category})
    answered = {ANSWERS: _lines(answers), RECORDS: _lines(map(to_record, examples))}
    yield of.target("LLaVA's answers", answered)
    asked = answered | {"questions.jsonl": _lines(questions)}
    yield of.target("LLaVA's questions", asked, questions=f"{of.name}={{files}}/questions.jsonl")


def _lines(rows: Iterable[Mapping[str, object]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _own(of: _Answered, scoring: str) -> Target:
    """A benchmark of one's own."""
    prompt = "letter" if scoring == "choice" else "short"
    settings = f"name: own\nscoring: {scoring}\nfile: {RECORDS}\nprompt: {prompt}\nmax_new_tokens: 64\nframes: 4\n"
    files = {"own.yaml": settings.encode(), **of.plain}
    return of.target(f"as one's own, {scoring}", files, questions="{files}/own.yaml")


def _conversations(of: _Answered) -> Target:
    """Questions in LLaVA's JSON with their answers."""
    rows = [
        {
            "id": example.id,
            "image": example.images[0],
            "conversations": [
                {"from": "human", "value": f"<image>\n{example.question}"},
                {"from": "gpt", "value": of.answers[example.id]},
            ],
        }
        for example in of.examples
    ]
    files = {"conversations.json": json.dumps(rows).encode(), **of.plain}
    return of.target("as conversations", files, questions="exact_match={files}/conversations.json")
