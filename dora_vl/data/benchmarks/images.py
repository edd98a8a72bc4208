"""Sets of pictures that VL-BART is trained on: COCO captions, GQA, NLVR, NLVR2 and VQA v2."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from dora_vl.data.benchmarks.fields import (
    FILE_OWNER,
    Raw,
    Row,
    Split,
    by_id,
    existing_files,
    files_in,
    join_key,
    member_rows,
    numbered,
    soft_answers,
)
from dora_vl.data.example import Answer, Example
from dora_vl.data.text_file import json_object, stream_records
from dora_vl.errors import BadSample, UserError, short_repr, short_text

KARPATHY = "dataset_coco.json"
"""Karpathy's split of COCO's 2014 pictures is in `caption_datasets.zip` (cs.stanford.edu/people/karpathy)."""
PARTS = {"train": "train", "restval": "train", "val": "validation", "test": "test"}
"""Maps Karpathy's name of a part to ours; everybody trains on train + restval (82,783 + 30,504 pictures)."""


def coco_caption(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """COCO captions in Karpathy's split: one example per picture, its five (or six or seven) captions as answers.

    File: `dataset_coco.json` (about 150 MB). Licence: captions CC BY 4.0, pictures under Flickr's terms. Pictures:
    COCO's, as `train2014/COCO_train2014_...jpg` and `val2014/...`; restval, val and test are all of val2014.

    Quirks: captions are `raw`, not the tokens beside them; white space at their ends is taken off as VL-T5 does. What
    is inside stays; the metrics' tokenizer gets a space for a line break. VL-BART trains on one item a caption: expand
    `answers`, do not sample, to have its number of steps.
    """
    file = existing_files(folder, [KARPATHY])[KARPATHY]
    for name, size in {"train": 113_287, "validation": 5_000, "test": 5_000}.items():
        yield Split("coco_caption", name, (file,), partial(_karpathy_rows, file, name), coco_caption_row, size)


def _karpathy_rows(file: Path, split: str) -> Iterator[Raw]:
    """Yields the pictures of one of our splits; each split gets one of no known part, to drop it with its reason."""
    for row in stream_records(file, "images"):
        if PARTS.get(str(row.get("split")), split) == split:
            yield row


def coco_caption_row(raw: Raw) -> Example:
    """Returns one picture with its captions."""
    row = Row(raw, "cocoid")
    captions = [sentence.text("raw").strip() for sentence in row.rows("sentences")]
    if not any(captions):
        raise row.error("it has no caption")
    return Example(
        id=row.id,
        images=(f"{row.non_empty('filepath')}/{row.non_empty('filename')}",),
        answers=tuple(Answer(text=caption) for caption in captions if caption),
        extra={"image_id": row.integer("cocoid"), "split": row.one_of("split", [*PARTS])},
    )


GQA_FILES = {
    "train_balanced_questions.json": ("train", 943_000),
    "val_balanced_questions.json": ("validation", 132_062),
    "testdev_balanced_questions.json": ("testdev", 12_578),
    "test_balanced_questions.json": ("test", 95_336),
    "val_all_questions.json": ("validation_all", 2_011_853),
    "testdev_all_questions.json": ("testdev_all", 172_174),
}
GQA_ALL_TRAIN = [f"train_all_questions/train_all_questions_{part}.json" for part in range(10)]


def gqa(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """GQA (Hudson and Manning, 2019): questions made from scene graphs, one word or phrase each.

    Files, from cs.stanford.edu/people/dorarad/gqa (`questions1.2.zip`, 1.4 GB): the balanced ones, and where present
    `{val,testdev}_all_questions.json` and `train_all_questions/train_all_questions_{0..9}.json` (14,305,356), which
    make one split. Licence: CC BY 4.0. Pictures: `images/<imageId>.jpg` (148,854, from Visual Genome; `images.zip`,
    20 GB).

    Quirks: a file is one object, question id -> question; `test` has no answers, its scores come from the server;
    LLaVA-1.5 reports testdev_balanced, VL-BART trains on train + val and reports testdev. The official script needs
    `types`, `entailed`, `groups` and `isBalanced` for all of its figures, so they stay in `extra`.
    """
    files = existing_files(folder, [*GQA_FILES, *GQA_ALL_TRAIN])
    splits: list[tuple[str, int, tuple[Path, ...]]] = [
        (*GQA_FILES[file], (path,)) for file, path in files.items() if file in GQA_FILES
    ]
    if parts := tuple(path for file, path in files.items() if file in GQA_ALL_TRAIN):
        splits.append(("train_all", 14_305_356, parts))
    for name, size, paths in splits:
        rows, convert = partial(member_rows, paths, "question_id"), partial(_gqa_row, answered=name != "test")
        yield Split("gqa", name, paths, rows, convert, size)


def _gqa_row(raw: Raw, *, answered: bool = True) -> Example:
    row = Row(raw, "question_id")
    answer = row.non_empty("answer") if answered else row.optional(row.non_empty, "answer")
    groups = Row(row.optional(row.mapping, "groups") or {}, sample_id=row.id)
    types, entailed = row.optional(row.mapping, "types"), row.get("entailed")
    extra = {
        "types": None if types is None else Row(types, sample_id=row.id).extra_columns(*types),
        "is_balanced": row.optional(row.scalar, "isBalanced"),
        # ids of questions: a list, or the names of an object
        "entailed": list(entailed) if isinstance(entailed, Mapping) else row.optional(row.texts, "entailed"),
        "global_group": groups.optional(groups.text, "global"),
        "full_answer": row.optional(row.text, "fullAnswer"),
    }
    return Example(
        id=row.id,
        images=(f"images/{row.identifier('imageId')}.jpg",),
        question=row.non_empty("question"),
        answers=(Answer(text=answer),) if answer else (),
        extra={name: value for name, value in extra.items() if value is not None},
    )


ORDERS = 6
NLVR_FILES = {"train": ("train", 12_409), "dev": ("validation", 989), "test": ("test", 989)}


def nlvr(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """NLVR (Suhr et al., 2017): is the sentence true of the picture of three boxes? Six orders of the boxes each.

    Files, from github.com/lil-lab/nlvr (folder `nlvr`): `{train,dev,test}/{split}.json`, JSON lines of {sentence,
    label, identifier, directory, evals, structured_rep}; pictures
    `{split}/images/<directory>/<split>-<identifier>-<order>.png`, order 0 to 5. Licence: CC BY 4.0. Each row becomes
    six examples, id "<identifier>-<order>", or as many as `orders` says. With `shares` the rows of all files are
    divided anew, by sentence.

    Quirks: one sentence comes with up to four pictures ("1572-0" ... "1572-3"), and sentences repeat under other
    numbers. So `shares` divides by the sentence's words: the six orders, the four pictures and the repeated sentences
    stay together, and a test set never holds a sentence that was trained on. `evals` are the votes of validators, not
    all of whom agree.
    """
    paths = existing_files(folder, [name for part in NLVR_FILES for name in (f"{part}/{part}.json", f"{part}.json")])
    files = {path.stem: (path, f"{path.stem}/images" if "/" in name else "images") for name, path in paths.items()}
    if (orders := options.get("orders", str(ORDERS))) not in [*"123456"]:
        raise UserError(f"--set orders={short_text(orders, 100)}: must be 1 to {ORDERS}")
    notes = {"records": f"{orders} a row, one for each order of the boxes"}
    split = partial(Split, "nlvr", convert=partial(_nlvr_row, orders=int(orders)), notes=notes)
    if "shares" not in options:
        for part, (path, pictures) in files.items():
            name, size = NLVR_FILES[part]
            rows = partial(_nlvr_rows, {part: (path, pictures)})
            yield split(name, (path,), rows, published_rows=size)
        return
    shares, seed = read_shares(options["shares"]), options.get("seed", "0")
    for name in shares:
        rows = partial(_shared_rows, files, name, shares, seed)
        inputs = tuple(path for path, _ in files.values())
        yield split(name, inputs, rows, settings={"shares": dict(shares), "seed": seed})


def read_shares(option: str) -> dict[str, float]:
    """Reads `train:0.8,test:0.2` as shares that add up to 1."""
    shares: dict[str, float] = {}
    for part in option.split(","):
        name, _, value = part.partition(":")
        try:
            shares[name] = float(value)
        except ValueError:
            shares[name] = math.nan
    if not all(name.isidentifier() and 0 < share <= 1 for name, share in shares.items()):
        raise UserError(f"--set shares={short_text(option, 100)}: must be like train:0.8,validation:0.1,test:0.1")
    if not math.isclose(sum(shares.values()), 1.0, abs_tol=1e-6):
        raise UserError(f"--set shares={short_text(option, 100)}: the shares make {sum(shares.values()):g}, not 1")
    return shares


def share_of(sentence: str, shares: Mapping[str, float], seed: str) -> str:
    """Returns the share that a sentence falls to, decided only by its words: the same wherever it occurs again."""
    digest = hashlib.sha256(f"{seed}\0{_words(sentence)}".encode()).digest()
    fraction = int.from_bytes(digest[:8], "big") / 2**64
    *others, last = shares
    for name in others:
        fraction -= shares[name]
        if fraction < 0:
            return name
    return last


def _words(sentence: str) -> str:
    return " ".join(sentence.lower().split())


def _shared_rows(
    files: Mapping[str, tuple[Path, str]], name: str, shares: Mapping[str, float], seed: str
) -> Iterator[Raw]:
    """Yields the rows of one share; one without a sentence is in each, to be named there as unusable."""
    is_caught, row = False, None
    for row in _nlvr_rows(files):
        sentence = row.get("sentence")
        if not isinstance(sentence, str) or share_of(sentence, shares, seed) == name:
            is_caught = True
            yield row
    if row is not None and not is_caught:
        remedy = f"make it larger, or take another --set seed=... than {seed}"
        raise UserError(f"--set shares: the share {name} ({shares[name]:g}) catches no sentence; {remedy}")


def _nlvr_rows(files: Mapping[str, tuple[Path, str]]) -> Iterator[Raw]:
    for part, (path, pictures) in files.items():
        for row in stream_records(path):
            yield {**row, "part": part, "pictures": pictures}


def _nlvr_row(raw: Raw, orders: int = ORDERS) -> list[Example]:
    row = Row(raw, "identifier")
    label = row.one_of("label", ("true", "false"))
    sentence, directory, part = row.non_empty("sentence"), row.identifier("directory"), row.text("part")
    return [
        Example(
            id=f"{row.id}-{order}",
            images=(f"{row.text('pictures')}/{directory}/{part}-{row.id}-{order}.png",),
            question=sentence,
            answers=(Answer(text=label),),
            extra={
                "identifier": row.id,
                "order": order,
                "part": part,
                "unit": row.id.split("-")[0],
                "group": _words(sentence),
            },
        )
        for order in range(orders)
    ]


NLVR2_FILES = {
    "train.json": ("train", 86_373),
    "dev.json": ("validation", 6_982),
    "test1.json": ("test", 6_967),
    "test2.json": ("test2", 6_970),
}


def nlvr2(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """NLVR2 (Suhr et al., 2019): is the sentence true of the two photographs?

    Files, from github.com/lil-lab/nlvr (`nlvr2/data`): `{train,dev,test1,test2}.json`, JSON lines; test1 is the public
    test set. Licence: CC BY 4.0. The photographs are given on request; they are named after the row:
    `images/dev/dev-850-0-img0.png` (left) and `-img1.png`, in training
    `images/train/<directory>/train-10171-0-img0.png`.

    Quirks: labels are "True" and "False" here and "true"/"false" in NLVR; consistency counts a sentence (the identifier
    without its last field) when all of its rows are right; the submission is "identifier,True".
    """
    for file, path in existing_files(folder, NLVR2_FILES, inside=["data"]).items():
        name, size = NLVR2_FILES[file]
        yield Split("nlvr2", name, (path,), partial(stream_records, path), _nlvr2_row, size)


def _nlvr2_row(raw: Raw) -> Example:
    row = Row(raw, "identifier")
    label = str(row.scalar("label"))
    if label not in {"True", "False"}:
        raise row.error(f"its label is {short_repr(row.get('label'))}, which is neither True nor False")
    part, pair = row.id.split("-", 1)[0], row.id.rsplit("-", 1)[0]
    directory = row.optional(row.identifier, "directory")
    folder = "/".join(["images", part, *([directory] if directory else [])])
    return Example(
        id=row.id,
        images=(f"{folder}/{pair}-img0.png", f"{folder}/{pair}-img1.png"),
        question=row.non_empty("sentence"),
        answers=(Answer(text=label),),
        extra=row.extra_columns("synset", "writer", "uid"),
    )


VQAV2_PARTS = {
    "train2014": ("train", 443_757),
    "val2014": ("validation", 214_354),
    "test2015": ("test", 447_793),
    "test-dev2015": ("test_dev", 107_394),
}
QUESTIONS, ANNOTATIONS = "v2_OpenEnded_mscoco_{}_questions.json", "v2_mscoco_{}_annotations.json"


def vqav2(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """VQA v2 (Goyal et al., 2017): open questions about COCO pictures, ten answers each, the official splits.

    Files, from visualqa.org/download.html: `v2_OpenEnded_mscoco_{train2014,val2014}_questions.json` with
    `v2_mscoco_{train2014,val2014}_annotations.json`, and only the questions of `test2015` and `test-dev2015`. Licence:
    CC BY 4.0, pictures under Flickr's terms. Pictures: COCO's, as `train2014/COCO_train2014_000000000009.jpg`.

    Quirks: questions and annotations are joined by `question_id`; `answer_confidence` is in every annotation but no
    score uses it; an upload must hold an answer for all ids of test2015 even when only test-dev is scored. The ten
    answers stay raw in `extra["human_answers"]`, as the official normaliser needs them; `answers` are the distinct ones
    with LXMERT's weights, for training.
    """
    files = existing_files(folder, [QUESTIONS.format(part) for part in VQAV2_PARTS])
    for part, (name, size) in VQAV2_PARTS.items():
        if questions := files.get(QUESTIONS.format(part)):
            test = part.startswith("test")
            answers = folder / ANNOTATIONS.format(part)
            if not test and not answers.is_file():
                raise UserError(f"{answers}: the answers of the {part} questions are missing; fetch them too")
            inputs, rows = (questions, answers), partial(_joined_rows, questions, answers)
            if test:
                inputs, rows = (questions,), partial(stream_records, questions, key="questions")
            convert = partial(vqav2_row, pictures="test2015" if test else part, answered=not test)
            yield Split("vqav2", name, inputs, rows, convert, size)


def _joined_rows(questions: Path, annotations: Path) -> Iterator[Raw]:
    """Yields each annotation with its question's text, then questions without one, to be dropped for that."""
    rows = stream_records(questions, "questions")
    question_rows = by_id(questions, rows, "question_id", "question", "image_id")
    answered: set[str] = set()
    for where, row in numbered(annotations, stream_records(annotations, "annotations")):
        name = join_key(row, "question_id")
        if name and name not in question_rows:
            raise UserError(f"{where}: question_id {short_repr(name)} is not in {questions.name}; fetch both again")
        answered.add(name)
        yield {**row, "question": question_rows[name]["question"]} if name else row
    for name in [name for name in question_rows if name not in answered]:
        yield {"question_id": name, **question_rows[name]}


def vqav2_row(raw: Raw, *, pictures: str, answered: bool) -> Example:
    """Returns one question; `pictures` is the folder of its picture and part of the picture's name."""
    row = Row(raw, "question_id")
    image_id = row.integer("image_id")
    answers = row.answers_of_people() if answered else []
    extra: dict[str, object] = {"question_id": row.integer("question_id"), "image_id": image_id}
    if answered:
        extra |= {"human_answers": answers}
        extra |= row.extra_columns("question_type", "answer_type", "multiple_choice_answer")
    return Example(
        id=row.id,
        images=(f"{pictures}/COCO_{pictures}_{image_id:012d}.jpg",),
        question=row.non_empty("question"),
        answers=soft_answers(answers),
        extra=extra,
    )


KARPATHY_SIZES = {"train": 605_102, "validation": 26_729, "test": 26_280}
KNOWN_ANSWERS = "trainval_ans2label.json"
KARPATHY_PARTS = ("train2014", "val2014")


def vqav2_karpathy(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """VQA v2 in Karpathy's split, as VL-T5 and VL-BART report it.

    Files: the official ones of `vqav2` (train2014 and val2014) with Karpathy's `dataset_coco.json`, which make the same
    partition as VL-T5's own, because a question goes where its picture goes. `trainval_ans2label.json` (3,129 answers,
    from LXMERT), where present, limits the weighted answers to those that VL-BART is trained on: a training question
    none of whose answers is in it is dropped, as in VL-T5. Licence: CC BY 4.0.

    Quirks: VL-T5's questions are cut at 20 tokens later, not here.
    """
    answer_list = files_in(folder, [KNOWN_ANSWERS])
    allowed = frozenset(json_object(answer_list[KNOWN_ANSWERS], FILE_OWNER)) if answer_list else None
    names = [form.format(part) for form in (QUESTIONS, ANNOTATIONS) for part in KARPATHY_PARTS] + [KARPATHY]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"{folder}: {missing[0]} is missing; it takes {', '.join(names)}")
    inputs = (*(folder / name for name in names), *answer_list.values())
    notes = {"form": f"official files and {KARPATHY}", "answers_allowed": len(allowed or ())}
    for name, size in KARPATHY_SIZES.items():
        convert = partial(_vqav2_karpathy_row, allowed=allowed if name == "train" else None)
        rows = partial(_official_rows, folder, name)
        yield Split("vqav2_karpathy", name, inputs, rows, convert, size, notes=notes)


def _official_rows(folder: Path, split: str) -> Iterator[Raw]:
    """Yields the questions about the split's pictures; each split gets those of no part, to drop them."""
    pictures = by_id(folder / KARPATHY, stream_records(folder / KARPATHY, "images"), "cocoid", "split")
    for part in KARPATHY_PARTS:
        for row in _joined_rows(folder / QUESTIONS.format(part), folder / ANNOTATIONS.format(part)):
            of_split = PARTS.get(str(pictures.get(join_key(row, "image_id"), {}).get("split")))
            if of_split in {split, None}:
                yield {**row, "part": part, "split": of_split}


def _vqav2_karpathy_row(raw: Raw, *, allowed: frozenset[str] | None) -> Example:
    example = vqav2_row(raw, pictures=raw["part"], answered=True)
    if raw["split"] is None:
        raise BadSample(example.id, f"its picture {example.images[0]} is in no part of {KARPATHY}")
    answers = tuple(answer for answer in example.answers if allowed is None or answer.text in allowed)
    if not answers:
        raise BadSample(example.id, f"none of its answers is in {KNOWN_ANSWERS}")
    return replace(example, answers=answers)
