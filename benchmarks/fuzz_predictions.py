"""What `fuzz_files` damages of predictions: right answers to every benchmark, in every form that `evaluate` reads.

Beside a line an answer those are what the benchmarks' own servers and scripts take, LLaVA's answer files, its question
files, conversations, and a benchmark of one's own as YAML.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from benchmarks.fuzz_targets import FIXTURES, OTHER_NAMES, PREDICTIONS, Target
from dora_vl.cli import main
from dora_vl.data.example import Example, iterate_examples, to_record
from dora_vl.errors import UserError
from dora_vl.evaluation.benchmarks import BENCHMARKS
from dora_vl.evaluation.scores import prompts, vqa
from dora_vl.evaluation.scores.commonsense import PATTERNS
from dora_vl.evaluation.scores.exact import SCORINGS

CAPTIONS, JAVA_WEIGHT = frozenset({"coco_caption", "tvc", "yc2c"}), 0.02
"""Captions are scored by Java programs, seconds for ten of them: most cases take the tokenizer that stands in."""
LIKE = {"exact_match": "textvqa", **dict.fromkeys(sorted(PATTERNS.keys() - {"boolq", "openbookqa"}), "openbookqa")}
"""Benchmarks without a fixture, and whose records they are asked with."""
ANSWERS, RECORDS, OWN = "predictions.jsonl", "records.jsonl", "own.yaml"

LISTED = {
    "vqav2_karpathy": vqa.vqa_submission,
    **{
        name: benchmark.submission
        for name, benchmark in BENCHMARKS.items()
        if benchmark.submission is not None and name != "llava_bench"
    },
}
"""Benchmarks whose servers and scripts take a file; LLaVA-Bench's is a judge's questions."""

LLAVA_IDS: Mapping[str, Callable[[Example, int], object]] = {
    "textvqa": lambda example, place: example.extra["image_id"],
    "mme": lambda example, place: f"{example.extra['category']}/{PurePosixPath(example.images[0]).stem}.png",
    "vizwiz": lambda example, place: PurePosixPath(example.images[0]).name,
    "pope": lambda example, place: place,
}
"""What LLaVA's files have for an id where it is another one than the publisher's."""
LLAVA = (*LLAVA_IDS, "vqav2", "gqa", "scienceqa", "mmbench", "mmbench_cn", "seed", "mmvet", "llava_bench")

OWN_LIKE = {"choice": "seed", "caption": "coco_caption"}
"""Whose records a benchmark of one's own is asked with; else TextVQA's."""


@dataclass(frozen=True, kw_only=True)
class _Benchmark:
    """A benchmark's records and the right answers to them."""

    name: str
    path: Path
    examples: Sequence[Example]

    @property
    def answers(self) -> dict[str, str]:
        return {example.id: example.answers[0].text if example.answers else "a" for example in self.examples}

    def target(
        self, form: str, files: Mapping[str, bytes], *, questions: str = "", predictions: str = ANSWERS, more: str = ""
    ) -> Target:
        """Its files beside the records, and the command for them."""
        asked = questions or f"{self.name}={{files}}/{RECORDS}"
        words = ["evaluate", "--benchmarks", asked, "--predictions", f"{{files}}/{predictions}", "--to", "{out}"]
        return Target(
            kind=PREDICTIONS,
            name=f"{self.name} {form}".strip(),
            files=files if questions and RECORDS not in questions else {RECORDS: self.path.read_bytes(), **files},
            words=(*words, *more.split()),
            java=False,
        )


def prediction_targets(scratch: Path) -> list[Target]:
    """Every benchmark in every form; where no fixture is of it, records of one like it."""
    records = _records(scratch / "records")
    sets: dict[str, _Benchmark] = {}
    for name in BENCHMARKS:
        path = next((path for path in records if path.parent.name == LIKE.get(name, name)), None)
        if path is None:
            raise UserError(f"{FIXTURES}: no records for the benchmark {name}")
        sets[name] = _Benchmark(name=name, path=path, examples=list(iterate_examples(path)))
    made = [target for one in sets.values() for target in _targets(one)]
    made += [_own(sets[OWN_LIKE.get(scoring, "textvqa")], scoring) for scoring in SCORINGS]
    made += [_conversations(sets["textvqa"]), _compared(sets["gqa"])]
    return made


def _records(to: Path) -> list[Path]:
    """The records of all fixtures; of a benchmark's splits one with answers comes first."""
    for folder in sorted(FIXTURES.iterdir()):
        source = OTHER_NAMES.get(folder.name, folder.name)
        with contextlib.redirect_stdout(io.StringIO()):
            main(["prepare", source, "--from", str(folder), "--to", str(to / folder.name), "--workers", "0"])
    found = [path for path in sorted(to.glob("*/*/*.jsonl")) if not path.parent.name.startswith("llava_m")]
    found = [path for path in found if path.parent.name != "llava_pretrain"]
    return sorted(found, key=lambda path: not next(iterate_examples(path)).answers)


def _targets(one: _Benchmark) -> Iterator[Target]:
    """Lines of id and answer, the server's file, LLaVA's answers, and its questions with them."""
    plain = {ANSWERS: _lines({"id": name, "answer": answer} for name, answer in one.answers.items())}
    yield one.target("", plain)
    if one.name in CAPTIONS:
        found = one.target("with Java", plain)
        yield Target(**{**vars(found), "java": True, "weight": JAVA_WEIGHT})
    if one.name in LISTED:
        name, text = LISTED[one.name](one.examples, one.answers)
        yield one.target("server's file", {name: text.encode()}, predictions=name)
    if one.name in LLAVA:
        said = {ANSWERS: _lines(_llava_answers(one))}
        yield one.target("LLaVA's answers", said | _records_told_apart(one))
        asked = {"questions.jsonl": _lines(_llava_questions(one))}
        yield one.target("LLaVA's questions", said | asked, questions=f"{one.name}={{files}}/questions.jsonl")


def _lines(rows: Iterator[dict[str, object]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _llava_id(one: _Benchmark, example: Example, place: int) -> object:
    return LLAVA_IDS[one.name](example, place) if one.name in LLAVA_IDS else example.id


def _llava_answers(one: _Benchmark) -> Iterator[dict[str, object]]:
    for place, example in enumerate(one.examples):
        yield {
            "question_id": _llava_id(one, example, place),
            "prompt": f"{_words_of(one, example, place)}\n{prompts.SHORT}",
            "text": one.answers[example.id],
            "answer_id": f"a{place}",
            "model_id": "llava-v1.5-7b",
            "metadata": {},
        }


def _records_told_apart(one: _Benchmark) -> dict[str, bytes]:
    """POPE's questions with other words each, as the order of its categories is found by them."""
    if one.name != "pope":
        return {}
    apart = (replace(example, question=_words_of(one, example, at)) for at, example in enumerate(one.examples))
    return {RECORDS: _lines(map(to_record, apart))}


def _words_of(one: _Benchmark, example: Example, place: int) -> str:
    return f"{place}: {example.question}" if one.name == "pope" else example.question


def _llava_questions(one: _Benchmark) -> Iterator[dict[str, object]]:
    for place, example in enumerate(one.examples):
        row: dict[str, object] = {"question_id": _llava_id(one, example, place)}
        row |= {"image": example.images[0]} if example.images else {}
        yield {
            **row,
            "text": f"{_words_of(one, example, place)}\n{prompts.SHORT}",
            "category": str(example.extra.get("category", "default")),
        }


def _own(one: _Benchmark, scoring: str) -> Target:
    """A benchmark of one's own."""
    said = {ANSWERS: _lines({"id": name, "answer": answer} for name, answer in one.answers.items())}
    prompt = "letter" if scoring == "choice" else "short"
    settings = f"name: own\nscoring: {scoring}\nfile: {RECORDS}\nprompt: {prompt}\nmax_new_tokens: 64\nframes: 4\n"
    return one.target(
        f"as one's own, {scoring}",
        {OWN: settings.encode(), RECORDS: one.path.read_bytes()} | said,
        questions=f"{{files}}/{OWN}",
    )


def _conversations(one: _Benchmark) -> Target:
    """Questions in LLaVA's JSON with their answers."""
    rows = [
        {
            "id": example.id,
            "image": example.images[0],
            "conversations": [
                {"from": "human", "value": f"<image>\n{example.question}"},
                {"from": "gpt", "value": one.answers[example.id]},
            ],
        }
        for example in one.examples
    ]
    said = {ANSWERS: _lines({"id": name, "answer": answer} for name, answer in one.answers.items())}
    files = {"conversations.json": json.dumps(rows).encode(), **said}
    return one.target("as conversations", files, questions="exact_match={files}/conversations.json")


def _compared(one: _Benchmark) -> Target:
    """Two files of predictions against each other."""
    said = _lines({"id": name, "answer": answer} for name, answer in one.answers.items())
    others = _lines({"id": name, "answer": "no"} for name in one.answers)
    return one.target("against others", {ANSWERS: said, "others.jsonl": others}, more="--against {files}/others.jsonl")
