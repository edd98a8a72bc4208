"""COCO captions in Karpathy's split: one example a picture, its five (sometimes six or seven) captions as answers.

File: `dataset_coco.json` (see `karpathy`; about 150 MB). 113,287 pictures to train on (train + restval, 566,747
captions), 5,000 for validation, 5,000 for test. Licence: captions CC BY 4.0, pictures under Flickr's terms.
Pictures: COCO's, as `train2014/COCO_train2014_...jpg` and `val2014/...`; restval, val and test are all of val2014.

Quirks: captions are taken raw (`raw`), not the tokens beside them; some begin or end with white space or a line
break, which is taken off as VL-T5 does. What is inside stays; the metrics' tokenizer gets a space for a line break.
VL-BART trains on one item a caption: expand `answers`, do not sample, to have its number of steps.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from dora_vl.data.benchmarks.fields import (
    FILE,
    SPLITS,
    WANTED,
    Progress,
    Raw,
    Split,
    filled,
    given,
    identifier,
    if_text,
    integer,
    json_rows,
    karpathy_rows,
    kept,
    key,
    mapping,
    numbered,
    optional,
    people_answers,
    present,
    refusing,
    rows,
    scalar,
    soft_answers,
    some_present,
    split_of_pictures,
    text,
    texts,
    weights,
)
from dora_vl.data.example import JSON, Answer, Example
from dora_vl.data.text_file import json_object, stream_members
from dora_vl.errors import BadSample, UserError, shown, shown_text

COCO_CAPTION_SIZES = {"train": 113_287, "validation": 5_000, "test": 5_000}


def coco_caption_splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """Training, validation and test."""
    file = some_present(folder, [FILE])[FILE]
    for name, size in COCO_CAPTION_SIZES.items():
        yield Split(
            task="coco_caption",
            name=name,
            inputs=(file,),
            rows=partial(karpathy_rows, file, name),
            convert=coco_caption_convert,
            published_rows=size,
        )


def coco_caption_convert(raw: Raw) -> Example:
    """One picture with its captions."""
    image_id = integer(raw, "cocoid")
    sample_id = str(image_id)
    part = text(raw, "split", sample_id)
    if part not in SPLITS:
        raise BadSample(sample_id, f"it is in the part {shown(part)}, which is not one of {', '.join(SPLITS)}")
    captions = [text(sentence, "raw", sample_id).strip() for sentence in rows(raw, "sentences", sample_id)]
    if not any(captions):
        raise BadSample(sample_id, "it has no caption")
    return Example(
        id=sample_id,
        images=(f"{filled(raw, 'filepath', sample_id)}/{filled(raw, 'filename', sample_id)}",),
        answers=tuple(Answer(text=caption) for caption in captions if caption),
        extra={"image_id": image_id, "split": part},
    )


# GQA (Hudson and Manning, 2019): questions made from scene graphs, one word or phrase each.
#
# Files, from cs.stanford.edu/people/dorarad/gqa (`questions1.2.zip`, 1.4 GB):
# `{train,val,testdev,test}_balanced_questions.json` (943,000 / 132,062 / 12,578 / 95,336) and, where present,
# `val_all_questions.json`, `testdev_all_questions.json` and the folder
# `train_all_questions/train_all_questions_{0..9}.json` (14,305,356). Licence: CC BY 4.0. Pictures:
# `images/<imageId>.jpg` (148,854, from Visual Genome; `images.zip`, 20 GB).
#
# VL-T5's form of the same, `{train,valid,testdev}.json` as a list of {question_id, img_id, sent, label}, is read too.
#
# Quirks: a file is one object, question id -> question, not a list; `test` has no answers and its scores come from
# the server; LLaVA-1.5 reports testdev_balanced, VL-BART trains on train + val and reports testdev. The official
# script needs `types`, `entailed`, `groups` and `isBalanced` for all of its figures, so they stay in `extra` where
# the file has them.


OFFICIAL = {
    "train_balanced_questions.json": ("train", 943_000),
    "val_balanced_questions.json": ("validation", 132_062),
    "testdev_balanced_questions.json": ("testdev", 12_578),
    "test_balanced_questions.json": ("test", 95_336),
    "val_all_questions.json": ("validation_all", 2_011_853),
    "testdev_all_questions.json": ("testdev_all", 172_174),
}
VLT5 = {"train.json": ("train", 943_000), "valid.json": ("validation", 132_062), "testdev.json": ("testdev", 12_578)}
ALL_TRAIN = [f"train_all_questions/train_all_questions_{part}.json" for part in range(10)]


def gqa_splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """Each official file as a split, and all of the unbalanced training files as one; or VL-T5's."""
    found = some_present(folder, [*OFFICIAL, *ALL_TRAIN, *VLT5])
    official = present(folder, OFFICIAL)
    for file, path in official.items():
        name, size = OFFICIAL[file]
        yield _gqa_split(name, [path], size)
    parts = list(present(folder, ALL_TRAIN).values())
    if parts:
        yield _gqa_split("train_all", parts, 14_305_356)
    if official or parts:
        return
    for file, path in found.items():
        name, size = VLT5[file]
        yield Split(
            task="gqa",
            name=name,
            inputs=(path,),
            rows=partial(json_rows, path),
            convert=gqa_convert_vlt5,
            published_rows=size,
            notes={"form": "VL-T5's files"},
        )


def _gqa_split(name: str, paths: list[Path], size: int) -> Split:
    return Split(
        task="gqa",
        name=name,
        inputs=tuple(paths),
        rows=partial(_gqa_rows, paths),
        convert=partial(gqa_convert, answered=name != "test"),
        published_rows=size,
    )


def _gqa_rows(paths: list[Path], progress: Progress) -> Iterator[Raw]:
    for path in paths:
        for question_id, row in stream_members(path, progress=progress):
            yield {**row, "question_id": question_id}


def gqa_convert(raw: Raw, *, answered: bool = True) -> Example:
    """One question of the official files.

    Args:
        answered: its answer must be there.
    """
    sample_id = identifier(raw, "question_id")
    answer = filled(raw, "answer", sample_id) if answered else optional(raw, "answer", filled, sample_id)
    groups = optional(raw, "groups", mapping, sample_id) or {}
    extra = {
        **kept(raw, "types", sample_id=sample_id, take=_types),
        "is_balanced": optional(raw, "isBalanced", scalar, sample_id),
        "entailed": optional(raw, "entailed", _entailed, sample_id),
        "global_group": optional(groups, "global", text, sample_id),
        "full_answer": optional(raw, "fullAnswer", text, sample_id),
    }
    return Example(
        id=sample_id,
        images=(f"images/{identifier(raw, 'imageId', sample_id)}.jpg",),
        question=filled(raw, "question", sample_id),
        answers=(Answer(text=answer),) if answer else (),
        extra={name: value for name, value in extra.items() if value is not None},
    )


def _types(raw: Raw, column: str, sample_id: str) -> dict[str, object]:
    found = mapping(raw, column, sample_id)
    return kept(found, *found, sample_id=sample_id)


def _entailed(raw: Raw, column: str, sample_id: str) -> list[str]:
    """Ids of questions: a list, or the names of an object."""
    if isinstance(given(raw, column), Mapping):
        return list(mapping(raw, column, sample_id))
    return list(texts(raw, column, sample_id))


def gqa_convert_vlt5(raw: Raw) -> Example:
    """One question of VL-T5's files."""
    sample_id = identifier(raw, "question_id")
    label = weights(raw, "label", sample_id)
    if not label:
        raise BadSample(sample_id, "it has no answer: 'label' holds none")
    return Example(
        id=sample_id,
        images=(f"images/{filled(raw, 'img_id', sample_id)}.jpg",),
        question=filled(raw, "sent", sample_id),
        answers=tuple(Answer(text=answer, weight=weight) for answer, weight in label.items()),
    )


# NLVR (Suhr et al., 2017): is the sentence true of the picture of three boxes? Six orders of the boxes each.
#
# Files, from github.com/lil-lab/nlvr (folder `nlvr`): `{train,dev,test}/{split}.json`, JSON lines of {sentence,
# label, identifier, directory, evals, structured_rep} (12,409 / 989 / 989 rows), pictures
# `{split}/images/<directory>/<split>-<identifier>-<order>.png`, order 0 to 5. Licence: CC BY 4.0. Each row becomes
# six examples, id "<identifier>-<order>".
#
# Quirks:
# - the last line has no line break, so `wc -l` counts one less;
# - one sentence stands with up to four different pictures ("1572-0" ... "1572-3"), and sentences repeat under other
#   numbers. So `shares` divides by the sentence's words: the six orders, the four pictures and the repeated sentences
#   stay together, and a test set never holds a sentence that was trained on;
# - labels are "true" and "false"; `evals` are the votes of validators, not all of whom agree.


ORDERS = 6
NLVR_SIZES = {"train": 12_409, "dev": 989, "test": 989}
NLVR_SPLITS = {"train": "train", "dev": "validation", "test": "test"}


def nlvr_splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """The publisher's splits, or with `shares` the rows of all files divided anew by sentence."""
    names = [place for part in NLVR_SIZES for place in (f"{part}/{part}.json", f"{part}.json")]
    found = {Path(name).stem: (name, path) for name, path in some_present(folder, names).items()}
    nested = {part: "/" in name for part, (name, _) in found.items()}
    files = {part: path for part, (_, path) in found.items()}
    if "shares" not in options:
        for part, path in files.items():
            rows = partial(_nlvr_rows, {part: path}, nested)
            yield _nlvr_split(NLVR_SPLITS[part], {part: path}, rows, published_rows=NLVR_SIZES[part])
        return
    shares, seed = read_shares(options["shares"]), options.get("seed", "0")
    for name in shares:
        rows = partial(_shared_rows, files, nested, name, shares, seed)
        yield _nlvr_split(name, files, rows, settings={"shares": dict(shares), "seed": seed})


def _nlvr_split(
    name: str,
    files: Mapping[str, Path],
    rows: Callable[[Progress], Iterator[Raw]],
    *,
    published_rows: int | None = None,
    settings: Mapping[str, object] | None = None,
) -> Split:
    return Split(
        task="nlvr",
        name=name,
        inputs=tuple(files.values()),
        rows=rows,
        convert=nlvr_convert,
        published_rows=published_rows,
        settings=settings or {},
        notes={"records": f"{ORDERS} a row, one for each order of the boxes"},
    )


def read_shares(wanted: str) -> dict[str, float]:
    """`train:0.8,test:0.2` as numbers that make 1.

    Raises:
        UserError: not of that form, or they do not make 1.
    """
    shares: dict[str, float] = {}
    for part in wanted.split(","):
        name, _, value = part.partition(":")
        try:
            shares[name] = float(value)
        except ValueError:
            shares[name] = math.nan
    if not all(name.isidentifier() and 0 < share <= 1 for name, share in shares.items()):
        raise UserError(f"--set shares={shown_text(wanted, 100)}: must be like train:0.8,validation:0.1,test:0.1")
    if not math.isclose(sum(shares.values()), 1.0, abs_tol=1e-6):
        raise UserError(f"--set shares={shown_text(wanted, 100)}: the shares make {sum(shares.values()):g}, not 1")
    return shares


def share_of(sentence: str, shares: Mapping[str, float], seed: str) -> str:
    """The share that a sentence falls to: by its words alone, so wherever it stands again it falls to the same."""
    place = int.from_bytes(hashlib.sha256(f"{seed}\0{words_of(sentence)}".encode()).digest()[:8], "big") / 2**64
    names = list(shares)
    for name in names[:-1]:
        place -= shares[name]
        if place < 0:
            return name
    return names[-1]


def words_of(sentence: str) -> str:
    """What makes two sentences the same: letter case and white space do not count."""
    return " ".join(sentence.lower().split())


def _shared_rows(
    files: Mapping[str, Path],
    nested: Mapping[str, bool],
    name: str,
    shares: Mapping[str, float],
    seed: str,
    progress: Progress,
) -> Iterator[Raw]:
    """The rows of one share; one without a sentence is in each, to be named there as unusable."""
    sentences, caught = set[str](), False
    for row in _nlvr_rows(files, nested, progress):
        sentence = if_text(row, "sentence")
        if sentence is not None:
            sentences.add(words_of(sentence))
        if sentence is None or share_of(sentence, shares, seed) == name:
            caught = True
            yield row
    if sentences and not caught:
        raise UserError(
            f"--set shares: the share {name} ({shares[name]:g}) catches none of the {len(sentences)} sentences of "
            f"{', '.join(map(str, files.values()))}; make it larger, or take another --set seed=... than {seed}"
        )


def _nlvr_rows(files: Mapping[str, Path], nested: Mapping[str, bool], progress: Progress) -> Iterator[Raw]:
    for part, path in files.items():
        for row in json_rows(path, progress):
            yield {**row, "part": part, "pictures": f"{part}/images" if nested[part] else "images"}


def nlvr_convert(raw: Raw) -> list[Example]:
    """The six examples of one row."""
    name = identifier(raw, "identifier")
    label = filled(raw, "label", name)
    if label not in {"true", "false"}:
        raise BadSample(name, f"its label is {shown(label)}, which is neither 'true' nor 'false'")
    sentence, directory = filled(raw, "sentence", name), identifier(raw, "directory", name)
    part, pictures = text(raw, "part", name), text(raw, "pictures", name)
    return [
        Example(
            id=f"{name}-{order}",
            images=(f"{pictures}/{directory}/{part}-{name}-{order}.png",),
            question=sentence,
            answers=(Answer(text=label),),
            extra={"identifier": name, "order": order, "part": part},
        )
        for order in range(ORDERS)
    ]


# NLVR2 (Suhr et al., 2019): is the sentence true of the two photographs?
#
# Files, from github.com/lil-lab/nlvr (`nlvr2/data`): `{train,dev,test1,test2}.json`, JSON lines (86,373 / 6,982 /
# 6,967 / 6,970 rows); test1 is the public test set. Licence: CC BY 4.0. The photographs are given on request; they
# are named after the row: `images/dev/dev-850-0-img0.png` (left) and `-img1.png`, in training
# `images/train/<directory>/train-10171-0-img0.png`.
#
# VL-T5's form of the same, `{train,valid,test}.json` with {identifier, img0, img1, sent, label 0/1}, is read too.
#
# Quirks: labels are "True" and "False" here and "true"/"false" in NLVR; consistency counts a sentence (the identifier
# without its last field) when all of its rows are right; the submission is "identifier,True".


FILES = {
    "train.json": ("train", 86_373),
    "dev.json": ("validation", 6_982),
    "test1.json": ("test", 6_967),
    "test2.json": ("test2", 6_970),
}
NLVR2_VLT5_FILES = {"train.json": ("train", 86_373), "valid.json": ("validation", 6_982), "test.json": ("test", 6_967)}


def nlvr2_splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """The splits that are in `folder` or in `folder/data`."""
    names = [*FILES, *NLVR2_VLT5_FILES]
    found = present(folder / "data", names) or some_present(folder, names)
    table = NLVR2_VLT5_FILES if "valid.json" in found else FILES | NLVR2_VLT5_FILES
    for file, path in found.items():
        if file in table:
            name, size = table[file]
            yield Split(
                task="nlvr2",
                name=name,
                inputs=(path,),
                rows=partial(json_rows, path),
                convert=nlvr2_convert,
                published_rows=size,
            )


def nlvr2_convert(raw: Raw) -> Example:
    """One sentence and its two photographs, in either form."""
    sample_id = identifier(raw, "identifier")
    vlt5 = given(raw, "img0") is not None
    label = {0: "False", 1: "True"}.get(integer(raw, "label", sample_id), "") if vlt5 else str(scalar(raw, "label"))
    if label not in {"True", "False"}:
        raise BadSample(sample_id, f"its label is {shown(given(raw, 'label'))}, which is neither True nor False")
    pair = sample_id.rsplit("-", 1)[0]
    names = [identifier(raw, "img0"), identifier(raw, "img1")] if vlt5 else [f"{pair}-img0", f"{pair}-img1"]
    part = sample_id.split("-", 1)[0]
    directory = optional(raw, "directory", identifier, sample_id)
    inner = "" if directory is None else f"{directory}/"
    return Example(
        id=sample_id,
        images=tuple(f"images/{part}/{inner}{name}.png" for name in names),
        question=filled(raw, "sent" if vlt5 else "sentence", sample_id),
        answers=(Answer(text=label),),
        extra=kept(raw, "synset", "writer", "uid", sample_id=sample_id),
    )


# VQA v2 (Goyal et al., 2017): open questions about COCO pictures, ten answers each, the official splits.
#
# Files, from visualqa.org/download.html: `v2_OpenEnded_mscoco_{train2014,val2014}_questions.json` with
# `v2_mscoco_{train2014,val2014}_annotations.json` (443,757 and 214,354 questions), and the questions alone of
# `test2015` (447,793) and `test-dev2015` (107,394). Licence: CC BY 4.0, pictures under Flickr's terms. Pictures:
# COCO's, as `train2014/COCO_train2014_000000000009.jpg`, `val2014/...`, `test2015/COCO_test2015_...`.
#
# Quirks: questions and annotations are two files joined by `question_id`; `answer_confidence` is in every annotation
# but no score uses it; an upload must hold an answer for all ids of test2015 even when only test-dev is scored. The
# ten answers stay raw in `extra["human_answers"]`: the official normaliser works on them. `answers` are the distinct
# ones with LXMERT's weights, for training.
#
# The Karpathy splits that VL-BART uses are in `vqav2_karpathy`.


VQAV2_SIZES = {"train2014": 443_757, "val2014": 214_354, "test2015": 447_793, "test-dev2015": 107_394}
NAMES = {"train2014": "train", "val2014": "validation", "test2015": "test", "test-dev2015": "test_dev"}


def vqav2_splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """Those of the four splits whose questions are there."""
    names = {part: f"v2_OpenEnded_mscoco_{part}_questions.json" for part in VQAV2_SIZES}
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
                    vqav2_convert,
                    pictures="test2015" if part.startswith("test") else part,
                    answered=annotations is not None,
                ),
                published_rows=VQAV2_SIZES[part],
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


def vqav2_convert(raw: Raw, *, pictures: str, answered: bool) -> Example:
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


# VQA v2 in Karpathy's split, as VL-T5 and VL-BART report it: 605,102 / 26,729 / 26,280 questions.
#
# Two forms, whichever is in the folder:
#
# - the official files of `vqav2` (train2014 and val2014, questions and annotations) with Karpathy's
#   `dataset_coco.json`: always obtainable, and the same partition, because a question goes where its picture goes;
# - VL-T5's own `karpathy_{train,val,test}.json` (its shared drive is no longer answered): a list of {question_id,
#   img_id, sent, label, answer_type, question_type, answers}.
#
# `trainval_ans2label.json` (a map of 3,129 answers, from LXMERT), where present, limits the weighted answers to those
# that VL-BART is trained on; a question none of whose answers is in it has no `answers` then and is dropped from
# training, as in VL-T5. Licence: CC BY 4.0.
#
# Quirks: VL-T5's questions are cut at 20 tokens later, not here; `img_id` is the picture's name without its ending.


VQAV2_KARPATHY_SIZES = {"train": 605_102, "validation": 26_729, "test": 26_280}
VQAV2_KARPATHY_VLT5_FILES = {
    "train": "karpathy_train.json",
    "validation": "karpathy_val.json",
    "test": "karpathy_test.json",
}
ANSWERS_FILE = "trainval_ans2label.json"
PARTS = ("train2014", "val2014")


def vqav2_karpathy_splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """The splits of VL-T5's files where they are there, else those made of the official ones."""
    known = present(folder, [ANSWERS_FILE])
    allowed = frozenset(json_object(known[ANSWERS_FILE], WANTED)) if known else None
    own = present(folder, VQAV2_KARPATHY_VLT5_FILES.values())
    official = () if own else _official_files(folder)
    for name, file in VQAV2_KARPATHY_VLT5_FILES.items():
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
            convert=partial(vqav2_karpathy_convert_vlt5 if own else convert_official, allowed=limit),
            published_rows=VQAV2_KARPATHY_SIZES[name],
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
        for row in joined_rows(questions, annotation_file(folder, part), progress):
            known = split_of.get(key(row, "image_id") or "")
            if known in {split, None}:
                yield {**row, "part": part, "split": known}


def convert_official(raw: Raw, *, allowed: frozenset[str] | None) -> Example:
    """One question of the official files."""
    example = vqav2_convert(raw, pictures=text(raw, "part"), answered=True)
    if given(raw, "split") is None:
        raise BadSample(example.id, f"its picture {example.images[0]} is not in {FILE}")
    return replace(example, answers=_allowed(example.answers, allowed, example.id))


def vqav2_karpathy_convert_vlt5(raw: Raw, *, allowed: frozenset[str] | None) -> Example:
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
