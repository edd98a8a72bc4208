"""LLaVA-Bench in the wild (Liu et al., 2023): 60 questions about 24 pictures, judged by a language model.

Files, from the Hugging Face data set `liuhaotian/llava-bench-in-the-wild`: `questions.jsonl`, `context.jsonl` (what
a person wrote about each picture, for the judge), `answers_gpt4.jsonl` (the reference answers), `images/001.jpg`
and so on. Licence: Apache-2.0.

Quirks: the judge's prompt needs the context and GPT-4's answer; both go into the record (`extra["context"]`,
`answers`). LLaVA's table uses GPT-4-0314, which is no longer served, so figures of other judges are not comparable.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from data_prep.fields import filled, identifier, kept
from data_prep.published import Progress, Raw, Split, json_rows, present, some_present
from dora_vl.data.examples import Answer, Example

QUESTIONS, CONTEXT, REFERENCES = "questions.jsonl", "context.jsonl", "answers_gpt4.jsonl"


def splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """The one test split."""
    files = some_present(folder, [QUESTIONS]) | present(folder, [CONTEXT, REFERENCES])
    yield Split(
        task="llava_bench",
        name="test",
        inputs=tuple(files.values()),
        rows=partial(_rows, files),
        convert=convert,
        published_rows=60,
        notes={"files": sorted(files)},
    )


def _rows(files: Mapping[str, Path], progress: Progress) -> Iterator[Raw]:
    contexts: dict[object, object] = {}
    references: dict[object, object] = {}
    if CONTEXT in files:
        contexts = {row.get("image"): row.get("caption") for row in json_rows(files[CONTEXT], progress)}
    if REFERENCES in files:
        references = {row.get("question_id"): row.get("text") for row in json_rows(files[REFERENCES], progress)}
    for row in json_rows(files[QUESTIONS], progress):
        reference = references.get(row.get("question_id"))
        yield {**row, "context": contexts.get(row.get("image")), "reference": reference}


def convert(raw: Raw) -> Example:
    """One question."""
    sample_id = identifier(raw, "question_id")
    reference = raw.get("reference")
    return Example(
        id=sample_id,
        images=(f"images/{filled(raw, 'image', sample_id)}",),
        question=filled(raw, "text", sample_id),
        answers=(Answer(text=reference),) if isinstance(reference, str) and reference.strip() else (),
        extra={"category": filled(raw, "category", sample_id)} | kept(raw, "context"),
    )
