"""LLaVA-Bench in the wild (Liu et al., 2023): 60 questions about 24 pictures, judged by a language model.

Files, from the Hugging Face data set `liuhaotian/llava-bench-in-the-wild`: `questions.jsonl`, `context.jsonl` (what
a person wrote about each picture, for the judge), `answers_gpt4.jsonl` (the reference answers), `images/001.jpg`
and so on. Licence: Apache-2.0.

Quirks: the judge's prompt needs the context and GPT-4's answer; both go into the record (`extra["context"]`,
`answers`). LLaVA's table uses GPT-4-0314, which is no longer served, so figures of other judges are not comparable.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path

from dora_vl.data.examples import Answer, Example
from dora_vl.sources.fields import filled, identifier, kept, key, optional, text
from dora_vl.sources.joins import column_by_id
from dora_vl.sources.published import Progress, Raw, Split, json_rows, present, some_present

QUESTIONS, CONTEXT, REFERENCES = "questions.jsonl", "context.jsonl", "answers_gpt4.jsonl"
ADDED = {"context": (CONTEXT, "image", "caption"), "reference": (REFERENCES, "question_id", "text")}
"""What other files add to a question: file, what it is joined by, what is taken."""


def splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """The one test split."""
    files = some_present(folder, [QUESTIONS]) | present(folder, [CONTEXT, REFERENCES])
    yield Split(
        task="llava_bench",
        name="test",
        inputs=tuple(files.values()),
        rows=partial(_rows, files),
        convert=partial(convert, needed=[name for name, (file, *_) in ADDED.items() if file in files]),
        published_rows=60,
        notes={"files": sorted(files)},
    )


def _rows(files: Mapping[str, Path], progress: Progress) -> Iterator[Raw]:
    known = {
        name: (join, column_by_id(files[file], json_rows(files[file], progress), join, column))
        for name, (file, join, column) in ADDED.items()
        if file in files
    }
    for row in json_rows(files[QUESTIONS], progress):
        found = {name: values.get(key(row, join) or "") for name, (join, values) in known.items()}
        yield {**row, "context": None, "reference": None, **found}


def convert(raw: Raw, *, needed: Collection[str]) -> Example:
    """One question; `needed` are those of "context" and "reference" whose files are there."""
    sample_id = identifier(raw, "question_id")
    for column in needed:
        filled(raw, column, sample_id)
    reference = optional(raw, "reference", text, sample_id)
    return Example(
        id=sample_id,
        images=(f"images/{filled(raw, 'image', sample_id)}",),
        question=filled(raw, "text", sample_id),
        answers=(Answer(text=reference),) if reference else (),
        extra={"category": filled(raw, "category", sample_id)} | kept(raw, "context", sample_id=sample_id),
    )
