"""TextVQA (Singh et al., 2019): questions that need the text in the picture, ten answers each.

Files, from textvqa.org/dataset: `TextVQA_0.5.1_{train,val,test}.json` (34,602 / 5,000 / 5,734), and the OCR of
them, `TextVQA_Rosetta_OCR_v0.2_{train,val,test}.json`. Licence: CC BY 4.0. Pictures (OpenImages):
`train_images/<image_id>.jpg` for train and val, `test_images/<image_id>.jpg` for test.

LLaVA's question file for the validation set, `llava_textvqa_val_v051_ocr.jsonl`, holds other OCR tokens than
Rosetta's in its prompts ("Reference OCR token: ..."); where it is in the folder, its tokens are what
`extra["reference_ocr"]` holds, so that LLaVA-1.5's prompt can be rebuilt exactly.

Quirks: `question_id` counts on through the three splits; LLaVA's file has the picture's id as `question_id`, which
is not unique, so its rows are matched by picture and question in lower case, as LLaVA's own scorer does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from dora_vl.data.examples import Example
from dora_vl.sources.fields import filled, identifier, if_text, integer, kept, key, text, texts
from dora_vl.sources.joins import column_by_id, numbered, refusing, soft_answers, ten_answers
from dora_vl.sources.published import Progress, Raw, Split, json_rows, present, some_present

SPLITS = {"train": ("train", 34_602), "val": ("validation", 5_000), "test": ("test", 5_734)}
LLAVA_FILE = "llava_textvqa_val_v051_ocr.jsonl"
REFERENCE = "Reference OCR token:"


def splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """The splits whose questions are there."""
    found = some_present(folder, [f"TextVQA_0.5.1_{part}.json" for part in SPLITS])
    for part, (name, size) in SPLITS.items():
        questions = found.get(f"TextVQA_0.5.1_{part}.json")
        if questions is not None:
            ocr = present(folder, [f"TextVQA_Rosetta_OCR_v0.2_{part}.json", *([LLAVA_FILE] if part == "val" else [])])
            yield Split(
                task="textvqa",
                name=name,
                inputs=(questions, *ocr.values()),
                rows=partial(_rows, questions, dict(ocr)),
                convert=partial(convert, answered=part != "test"),
                published_rows=size,
                notes={"ocr": sorted(ocr)},
            )


def _rows(questions: Path, ocr: Mapping[str, Path], progress: Progress) -> Iterator[Raw]:
    rosetta: dict[str, object] = {}
    references: dict[tuple[str, str], str] = {}
    for name, path in ocr.items():
        if name == LLAVA_FILE:
            references = dict(_references(path, progress))
        else:
            rosetta = column_by_id(path, json_rows(path, progress, "data"), "image_id", "ocr_tokens")
    for row in json_rows(questions, progress, "data"):
        image = key(row, "image_id") or ""
        reference = references.get((image, (if_text(row, "question") or "").lower()))
        yield {**row, "ocr_tokens": rosetta.get(image), "reference_ocr": reference}


def _references(path: Path, progress: Progress) -> Iterator[tuple[tuple[str, str], str]]:
    for where, row in numbered(path, json_rows(path, progress)):
        with refusing(where):
            image, (question, *lines) = identifier(row, "question_id"), text(row, "text").split("\n")
        for line in lines:
            if line.startswith(REFERENCE):
                yield (image, question.lower()), line.removeprefix(REFERENCE).strip()


def convert(raw: Raw, *, answered: bool) -> Example:
    """One question; `answered` says that its answers must be there."""
    question_id = integer(raw, "question_id")
    sample_id = str(question_id)
    image = identifier(raw, "image_id", sample_id)
    answers = ten_answers(texts(raw, "answers", sample_id), sample_id) if answered else []
    extra = {"image_id": image, "question_id": question_id} | ({"human_answers": answers} if answers else {})
    return Example(
        id=sample_id,
        images=(f"{'train_images' if answered else 'test_images'}/{image}.jpg",),
        question=filled(raw, "question", sample_id),
        answers=soft_answers(answers),
        extra=extra
        | kept(raw, "ocr_tokens", "image_classes", sample_id=sample_id, take=_list)
        | kept(raw, "reference_ocr", sample_id=sample_id),
    )


def _list(raw: Raw, column: str, sample_id: str) -> list[str]:
    return list(texts(raw, column, sample_id))
