"""VQA v2 (Goyal et al., 2017): open questions about COCO pictures, ten answers each, the official splits.

Files, from visualqa.org/download.html: `v2_OpenEnded_mscoco_{train2014,val2014}_questions.json` with
`v2_mscoco_{train2014,val2014}_annotations.json` (443,757 and 214,354 questions), and the questions alone of
`test2015` (447,793) and `test-dev2015` (107,394). Licence: CC BY 4.0, pictures under Flickr's terms. Pictures:
COCO's, as `train2014/COCO_train2014_000000000009.jpg`, `val2014/...`, `test2015/COCO_test2015_...`.

Quirks: questions and annotations are two files joined by `question_id`; `answer_confidence` is in every annotation
but no score uses it; an upload must hold an answer for all ids of test2015 even when only test-dev is scored. The
ten answers stay raw in `extra["human_answers"]`: the official normaliser works on them. `answers` are the distinct
ones with LXMERT's weights, for training.

The Karpathy splits that VL-BART uses are in `vqav2_karpathy`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from dora_vl.data.examples import JSON, Example
from dora_vl.errors import UserError, shown
from dora_vl.sources.fields import filled, given, identifier, integer, kept, key
from dora_vl.sources.joins import numbered, people_answers, refusing, soft_answers
from dora_vl.sources.published import Progress, Raw, Split, json_rows, some_present

SIZES = {"train2014": 443_757, "val2014": 214_354, "test2015": 447_793, "test-dev2015": 107_394}
NAMES = {"train2014": "train", "val2014": "validation", "test2015": "test", "test-dev2015": "test_dev"}


def splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """Those of the four splits whose questions are there."""
    names = {part: f"v2_OpenEnded_mscoco_{part}_questions.json" for part in SIZES}
    found = some_present(folder, list(names.values()))
    for part, name in names.items():
        if name in found:
            annotations = annotation_file(folder, part)
            yield Split(
                task="vqav2",
                name=NAMES[part],
                inputs=(found[name],) if annotations is None else (found[name], annotations),
                rows=partial(joined_rows, found[name], annotations),
                convert=partial(
                    convert, pictures="test2015" if part.startswith("test") else part, answered=annotations is not None
                ),
                published_rows=SIZES[part],
            )


def annotation_file(folder: Path, part: str) -> Path | None:
    """The answers of a part; None for test sets.

    Raises:
        UserError: the publisher gives them, but they are not in the folder.
    """
    if part.startswith("test"):
        return None
    path = folder / f"v2_mscoco_{part}_annotations.json"
    if not path.is_file():
        raise UserError(f"{path}: the answers of the {part} questions are missing; fetch them too")
    return path


def joined_rows(questions: Path, annotations: Path | None, progress: Progress) -> Iterator[Raw]:
    """Each annotation with its question's text, or the questions alone.

    A question without an annotation comes last, without answers, to be dropped with that reason.

    Raises:
        UserError: an annotation of a question that is not in the questions' file, or a question twice or without an id.
    """
    if annotations is None:
        yield from json_rows(questions, progress, "questions")
        return
    known = _questions(questions, progress)
    answered: set[str] = set()
    for where, row in numbered(annotations, json_rows(annotations, progress, "annotations")):
        name = key(row, "question_id")
        if name is None:
            yield row  # its conversion says what is wrong with the id
            continue
        if name not in known:
            raise UserError(f"{where}: question_id {shown(name)} is not in {questions.name}; fetch both again")
        answered.add(name)
        yield {**row, "question": known[name][0]}
    for name in known:
        if name not in answered:
            yield {"question_id": name, "question": known[name][0], "image_id": known[name][1]}


def _questions(file: Path, progress: Progress) -> dict[str, tuple[JSON, JSON]]:
    """Question and picture by question id; conversion checks both."""
    known: dict[str, tuple[JSON, JSON]] = {}
    for where, row in numbered(file, json_rows(file, progress, "questions")):
        with refusing(where):
            name = identifier(row, "question_id")
        if name in known:
            raise UserError(f"{where}: question_id {shown(name)} stands in an earlier row too; fetch the file again")
        known[name] = given(row, "question"), given(row, "image_id")
    return known


def convert(raw: Raw, *, pictures: str, answered: bool) -> Example:
    """One question.

    Args:
        pictures: the folder of its picture, which is part of the picture's name.
        answered: its answers must be there.
    """
    question_id = integer(raw, "question_id")
    sample_id = str(question_id)
    image_id = integer(raw, "image_id", sample_id)
    extra: dict[str, object] = {"question_id": question_id, "image_id": image_id}
    answers: list[str] = []
    if answered:
        answers = people_answers(raw, "answers", sample_id)
        extra |= {"human_answers": answers}
        extra |= kept(raw, "question_type", "answer_type", "multiple_choice_answer", sample_id=sample_id)
    return Example(
        id=sample_id,
        images=(f"{pictures}/COCO_{pictures}_{image_id:012d}.jpg",),
        question=filled(raw, "question", sample_id),
        answers=soft_answers(answers),
        extra=extra,
    )
