"""VQA v2 in Karpathy's split, as VL-T5 and VL-BART report it: 605,102 / 26,729 / 26,280 questions.

Two forms, whichever is in the folder:

- the official files of `vqav2` (train2014 and val2014, questions and annotations) with Karpathy's
  `dataset_coco.json`: always obtainable, and the same partition, because a question goes where its picture goes;
- VL-T5's own `karpathy_{train,val,test}.json` (its shared drive is no longer answered): a list of {question_id,
  img_id, sent, label, answer_type, question_type, answers}.

`trainval_ans2label.json` (a map of 3,129 answers, from LXMERT), where present, limits the weighted answers to those
that VL-BART is trained on; a question none of whose answers is in it has no `answers` then and is dropped from
training, as in VL-T5. Licence: CC BY 4.0.

Quirks: VL-T5's questions are cut at 20 tokens later, not here; `img_id` is the picture's name without its ending.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from dora_vl.data.examples import Answer, Example
from dora_vl.data.text_file import json_object
from dora_vl.errors import BadSample, UserError
from dora_vl.sources import vqav2
from dora_vl.sources.fields import filled, given, identifier, kept, key, optional, scalar, text, weights
from dora_vl.sources.joins import people_answers, soft_answers
from dora_vl.sources.karpathy import FILE, split_of_pictures
from dora_vl.sources.published import WANTED, Progress, Raw, Split, json_rows, present

SIZES = {"train": 605_102, "validation": 26_729, "test": 26_280}
VLT5_FILES = {"train": "karpathy_train.json", "validation": "karpathy_val.json", "test": "karpathy_test.json"}
ANSWERS_FILE = "trainval_ans2label.json"
PARTS = ("train2014", "val2014")


def splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """The splits of VL-T5's files where they are there, else those made of the official ones."""
    known = present(folder, [ANSWERS_FILE])
    allowed = frozenset(json_object(known[ANSWERS_FILE], WANTED)) if known else None
    own = present(folder, VLT5_FILES.values())
    official = () if own else _official_files(folder)
    for name, file in VLT5_FILES.items():
        if own and file not in own:
            continue
        limit = allowed if name == "train" else None
        rows_of: Callable[[Progress], Iterator[Raw]] = (
            partial(json_rows, own[file]) if own else partial(_official_rows, folder, name)
        )
        yield Split(
            task="vqav2_karpathy",
            name=name,
            inputs=(*((own[file],) if own else official), *known.values()),
            rows=rows_of,
            convert=partial(convert_vlt5 if own else convert_official, allowed=limit),
            published_rows=SIZES[name],
            notes={
                "form": "VL-T5's files" if own else f"official files and {FILE}",
                "answers_allowed": len(allowed or ()),
            },
        )


def _official_files(folder: Path) -> tuple[Path, ...]:
    names = [f"v2_OpenEnded_mscoco_{part}_questions.json" for part in PARTS]
    names += [f"v2_mscoco_{part}_annotations.json" for part in PARTS] + [FILE]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: {missing[0]} is missing; it takes {', '.join(names)}, or VL-T5's karpathy_*.json")
    return tuple(folder / name for name in names)


def _official_rows(folder: Path, split: str, progress: Progress) -> Iterator[Raw]:
    """The questions about the split's pictures; one about no picture of the file is in each, to be dropped there."""
    split_of = split_of_pictures(folder / FILE, progress)
    for part in PARTS:
        questions = folder / f"v2_OpenEnded_mscoco_{part}_questions.json"
        for row in vqav2.joined_rows(questions, vqav2.annotation_file(folder, part), progress):
            known = split_of.get(key(row, "image_id") or "")
            if known in {split, None}:
                yield {**row, "part": part, "split": known}


def convert_official(raw: Raw, *, allowed: frozenset[str] | None) -> Example:
    """One question of the official files."""
    example = vqav2.convert(raw, pictures=text(raw, "part"), answered=True)
    if given(raw, "split") is None:
        raise BadSample(example.id, f"its picture {example.images[0]} is not in {FILE}")
    return replace(example, answers=_allowed(example.answers, allowed, example.id))


def convert_vlt5(raw: Raw, *, allowed: frozenset[str] | None) -> Example:
    """One question of VL-T5's files."""
    sample_id = identifier(raw, "question_id")
    picture = filled(raw, "img_id", sample_id)
    human_answers = optional(raw, "answers", people_answers, sample_id) or []
    label = optional(raw, "label", weights, sample_id) or {}
    answers = tuple(Answer(text=answer, weight=weight) for answer, weight in label.items())
    if not answers and not human_answers:
        raise BadSample(sample_id, "it has no answer: neither 'label' nor 'answers' holds one")
    return Example(
        id=sample_id,
        images=(f"{picture.split('_')[1] if picture.count('_') == 2 else '.'}/{picture}.jpg",),
        question=filled(raw, "sent", sample_id),
        answers=_allowed(answers or soft_answers(human_answers), allowed, sample_id),
        extra={"question_id": _as_number(scalar(raw, "question_id")), "image_name": picture}
        | ({"human_answers": human_answers} if human_answers else {})
        | kept(raw, "question_type", "answer_type", "is_topk_optimal", sample_id=sample_id),
    )


def _as_number(question_id: object) -> object:
    """The server wants a number, which some of VL-T5's files write as text."""
    return int(question_id) if isinstance(question_id, str) and question_id.isdecimal() else question_id


def _allowed(answers: tuple[Answer, ...], allowed: frozenset[str] | None, sample_id: str) -> tuple[Answer, ...]:
    if allowed is None:
        return answers
    left = tuple(answer for answer in answers if answer.text in allowed)
    if not left:
        raise BadSample(sample_id, f"none of its answers is in {ANSWERS_FILE}")
    return left
