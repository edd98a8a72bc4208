"""Any file in LLaVA's form (JSON list or JSON lines), checked row by row and written as JSON lines with unique ids.

A record holds `id`, `image` (a path or a list of paths, relative to one picture folder; absent for text alone) and
`conversations`, a list of {"from": "human" | "gpt", "value": text} with `<image>` where a picture goes. `dora_vl`
trains on such a file as it is; preparing it once finds the unusable rows beforehand. Rows stay as they are, except
that ids become text and a repeated one gets a number ("x#2"): published files repeat them freely.

`--from` takes the file, or a folder of `*.json` and `*.jsonl`; each file becomes `llava/<its name>.jsonl`.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from dora_vl.data.benchmarks.fields import (
    UNKNOWN_ID,
    WANTED,
    Progress,
    Raw,
    Split,
    column_by_id,
    filled,
    given,
    identifier,
    if_text,
    index_of,
    integer,
    json_rows,
    kept,
    key,
    mapping,
    numbered,
    only_test_split,
    optional,
    people_answers,
    present,
    refusing,
    scalar,
    seconds,
    soft_answers,
    some_present,
    ten_answers,
    text,
    texts,
)
from dora_vl.data.benchmarks.table import save_picture
from dora_vl.data.columns import USUAL
from dora_vl.data.example import JSON, MIDDLE_FRAME, Answer, Clip, Example, as_conversation
from dora_vl.data.readers import read_conversations
from dora_vl.data.text_file import NotUtf8, json_object, stream_members, table_rows, whole_text
from dora_vl.errors import BadSample, UserError, shown
from dora_vl.evaluation.scores.llava import CATEGORIES, VERSIONS


def llava_json_splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """One split for each file."""
    files = [folder] if folder.is_file() else sorted([*folder.glob("*.json"), *folder.glob("*.jsonl")])
    if not files:
        raise UserError(f"{folder}: no .json or .jsonl file is in it; --from takes LLaVA's file or its folder")
    names = [file.stem for file in files]
    for file in files:
        if names.count(file.stem) > 1:
            raise UserError(f"{folder}: two files are called {file.stem}; give one of them as --from")
        yield llava_split(file, task="llava", name=file.stem)


def llava_split(file: Path, *, task: str, name: str, published_rows: int | None = None) -> Split:
    """A file of LLaVA's form as one split."""
    return Split(
        task=task,
        name=name,
        inputs=(file,),
        rows=partial(json_rows, file),
        convert=llava_json_convert,
        published_rows=published_rows,
        repeated_ids="number",
    )


def llava_json_convert(raw: Raw) -> dict[str, JSON]:
    """The record itself, its id as text, if it can be trained on.

    Raises:
        BadSample: see `readers.read_conversations`; or its id is neither text nor a number.
    """
    sample_id = optional(raw, "id", identifier, UNKNOWN_ID)
    fields = USUAL.resolve(raw, strict=False).fields  # the record keeps all of its columns
    as_conversation(read_conversations(fields, str(sample_id)))
    return {"id": sample_id, **{name: value for name, value in raw.items() if name != "id"}}


# LLaVA-1.5's visual instruction mix (Liu et al., 2023), 665,298 conversations, to LLaVA's JSON lines.
#
# Files: `llava_v1_5_mix665k.json` (about 1 GB) from the Hugging Face data set `liuhaotian/LLaVA-Instruct-150K`.
# Licence: CC BY 4.0, bound to OpenAI's terms of use; each picture set under its own. Pictures, fetched from their
# publishers, go into one folder: `coco/train2017`, `gqa/images`, `ocr_vqa/images`, `textvqa/train_images`,
# `vg/VG_100K`, `vg/VG_100K_2`.
#
# Quirks:
# - ids repeat (one picture stands in several of the mixed sets) and some are numbers: they become text, repeated ones
#   get a number ("000000033471#2");
# - some 40 thousand conversations of ShareGPT have no picture and an extra key `model`;
# - OCR-VQA's pictures are named .jpg throughout, but its publisher serves some as GIF or PNG: rename, do not convert;
# - a few turns are empty or begin with "gpt"; an empty answer is dropped and named, a leading answer stays and is
#   skipped at reading, as in LLaVA.


LLAVA_MIX665K_FILE = "llava_v1_5_mix665k.json"


def llava_mix665k_splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """The mix, as training split."""
    file = some_present(folder, [LLAVA_MIX665K_FILE])[LLAVA_MIX665K_FILE]
    yield llava_split(file, task="llava_mix665k", name="train", published_rows=665_298)


# LLaVA-1.5's projector pretraining captions (LAION, CC, SBU; by BLIP), 558,128 of them, to LLaVA's JSON lines.
#
# Files: `blip_laion_cc_sbu_558k.json` (about 180 MB) and `images.zip` (about 27 GB, unpacks to `00000/000000010.jpg`
# and the like) from the Hugging Face data set `liuhaotian/LLaVA-Pretrain`. Licence: that of the pictures' sets
# (CC-3M, LAION, SBU), captions BLIP's; for research.
#
# Quirks: the request varies ("Render a clear and concise summary of the photo.\n<image>", with `<image>` before or
# after), but the `plain` template drops it; one turn each. `blip_laion_cc_sbu_558k_meta.json` beside it is not
# needed.


LLAVA_PRETRAIN_FILE = "blip_laion_cc_sbu_558k.json"


def llava_pretrain_splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """The captions, as training split."""
    file = some_present(folder, [LLAVA_PRETRAIN_FILE])[LLAVA_PRETRAIN_FILE]
    yield llava_split(file, task="llava_pretrain", name="train", published_rows=558_128)


# LLaVA-Bench in the wild (Liu et al., 2023): 60 questions about 24 pictures, judged by a language model.
#
# Files, from the Hugging Face data set `liuhaotian/llava-bench-in-the-wild`: `questions.jsonl`, `context.jsonl` (what
# a person wrote about each picture, for the judge), `answers_gpt4.jsonl` (the reference answers), `images/001.jpg`
# and so on. Licence: Apache-2.0.
#
# Quirks: the judge's prompt needs the context and GPT-4's answer; both go into the record (`extra["context"]`,
# `answers`). LLaVA's table uses GPT-4-0314, which is no longer served, so figures of other judges are not comparable.


LLAVA_BENCH_QUESTIONS, CONTEXT, REFERENCES = "questions.jsonl", "context.jsonl", "answers_gpt4.jsonl"
ADDED = {"context": (CONTEXT, "image", "caption"), "reference": (REFERENCES, "question_id", "text")}
"""What other files add to a question: file, what it is joined by, what is taken."""


def llava_bench_splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """The one test split."""
    files = some_present(folder, [LLAVA_BENCH_QUESTIONS]) | present(folder, [CONTEXT, REFERENCES])
    yield Split(
        task="llava_bench",
        name="test",
        inputs=tuple(files.values()),
        rows=partial(_llava_bench_rows, files),
        convert=partial(llava_bench_convert, needed=[name for name, (file, *_) in ADDED.items() if file in files]),
        published_rows=60,
        notes={"files": sorted(files)},
    )


def _llava_bench_rows(files: Mapping[str, Path], progress: Progress) -> Iterator[Raw]:
    known = {
        name: (join, column_by_id(files[file], json_rows(files[file], progress), join, column))
        for name, (file, join, column) in ADDED.items()
        if file in files
    }
    for row in json_rows(files[LLAVA_BENCH_QUESTIONS], progress):
        found = {name: values.get(key(row, join) or "") for name, (join, values) in known.items()}
        yield {**row, "context": None, "reference": None, **found}


def llava_bench_convert(raw: Raw, *, needed: Collection[str]) -> Example:
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


# MMBench and MMBench-CN (Liu et al., 2023): single-choice questions, each asked in every rotation of its choices.
#
# Files, from opencompass' download site: `mmbench_dev_20230712.tsv` (4,377 rows; LLaVA-1.5's) or
# `mmbench_dev_en_20231003.tsv`, `mmbench_test_20230712.tsv` and the like, `mmbench_dev_cn_20231003.tsv`, or
# VLMEvalKit's `MMBench_DEV_EN.tsv`, `MMBench_DEV_CN.tsv`, `MMBench_TEST_EN.tsv`, `MMBench_TEST_CN.tsv`. Licence:
# Apache-2.0. Columns: index, question, hint, A-D, answer, category, image (base64), source, l2-category, comment,
# split.
#
# Quirks:
# - rotations of a question have the same `index` modulo 1,000,000; circular evaluation wants all of them right;
# - the pictures are in the table: they are written once each to `records/mmbench*/media`, which the paths are
#   relative to;
# - in VLMEvalKit's files a short `image` is the `index` of another row that has the picture;
# - the choices end at the first that is empty, "nan" or "none", as in LLaVA's reader, so a real choice "None" and
#   those after it are lost there and here; a row whose answer is lost with them is dropped and named;
# - test files have no `answer`; the server takes an .xlsx with all rows.


MMBENCH_FILES = {
    "mmbench_dev_20230712.tsv": ("mmbench", "validation", 4_377),
    "mmbench_dev_en_20231003.tsv": ("mmbench", "validation", 4_329),
    "MMBench_DEV_EN.tsv": ("mmbench", "validation", 4_329),
    "mmbench_test_20230712.tsv": ("mmbench", "test", 6_718),
    "mmbench_test_en_20231003.tsv": ("mmbench", "test", 6_666),
    "MMBench_TEST_EN.tsv": ("mmbench", "test", 6_666),
    "mmbench_dev_cn_20231003.tsv": ("mmbench_cn", "validation", 4_329),
    "MMBench_DEV_CN.tsv": ("mmbench_cn", "validation", 4_329),
    "mmbench_test_cn_20231003.tsv": ("mmbench_cn", "test", 6_666),
    "MMBench_TEST_CN.tsv": ("mmbench_cn", "test", 6_666),
}
MMBENCH_LETTERS = "ABCDE"
NEEDED = ("index", "question", "A", "B", "image")
MISSING = frozenset({"", "nan", "none"})
REFERENCE_CHARACTERS = 64
"""A shorter `image` is another row's index, as VLMEvalKit decides it."""


def mmbench_splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """English and Chinese, validation and test; of two files for one split the first of the list above."""
    found = present(folder, MMBENCH_FILES)
    if not found:
        raise UserError(
            f"{folder}: none of {', '.join(MMBENCH_FILES)} is in it; --from takes the folder with the files"
        )
    taken: set[tuple[str, str]] = set()
    for file, path in found.items():
        task, name, size = MMBENCH_FILES[file]
        if (task, name) in taken:
            continue
        taken.add((task, name))
        yield Split(
            task=task,
            name=name,
            inputs=(path,),
            rows=partial(_mmbench_rows, path, NEEDED if name == "test" else (*NEEDED, "answer")),
            convert=partial(mmbench_convert, task_folder=records / task, answered=name != "test"),
            published_rows=size,
            notes={"pictures": "paths are relative to this folder"},
        )


def _mmbench_rows(path: Path, needed: Sequence[str], progress: Progress) -> Iterator[Raw]:
    """The rows; for an `image` that names an earlier row, that row's picture."""
    references = path.name.startswith("MMBench_")  # VLMEvalKit's; the others need no memory of pictures
    pictures: dict[str, str] = {}
    for _, row in table_rows(path, WANTED, delimiter="\t", required=needed, progress=progress):
        image = text(row, "image")
        if len(image) >= REFERENCE_CHARACTERS:
            if references:
                pictures[text(row, "index")] = image
            yield row
        else:
            yield {**row, "image": pictures.get(image, image)}


def mmbench_convert(raw: Raw, *, task_folder: Path, answered: bool) -> Example:
    """One rotation of one question; writes its picture. `answered` says that its answer must be there."""
    index = integer(raw, "index")
    sample_id = str(index)
    choices = _choices(raw, sample_id)
    answer = filled(raw, "answer", sample_id) if answered else optional(raw, "answer", text, sample_id) or ""
    correct = _index(answer.strip(), len(choices), sample_id) if answer.strip() else None
    extra = {
        "index": index,
        "correct": correct,
        **kept(raw, "category", sample_id=sample_id),
        "l2_category": optional(raw, "l2-category", text, sample_id),
        **kept(raw, "source", sample_id=sample_id),
        "hint": _value(raw, "hint"),
    }
    return Example(
        id=sample_id,
        images=(save_picture(_decoded(raw, sample_id), task_folder, sample_id),),
        question=filled(raw, "question", sample_id),
        answers=() if correct is None else (Answer(text=choices[correct]),),
        choices=choices,
        extra={name: value for name, value in extra.items() if value is not None},
    )


def _index(answer: str, choices: int, sample_id: str) -> int:
    if len(answer) != 1 or answer not in MMBENCH_LETTERS[:choices]:
        raise BadSample(
            sample_id, f"its answer is {shown(answer)}, but its choices are A to {MMBENCH_LETTERS[choices - 1]}"
        )
    return MMBENCH_LETTERS.index(answer)


def _choices(raw: Raw, sample_id: str) -> tuple[str, ...]:
    choices: list[str] = []
    for letter in MMBENCH_LETTERS:
        value = _value(raw, letter)
        if value is None:
            break
        choices.append(value)
    if len(choices) < 2:
        raise BadSample(sample_id, f"it has {len(choices)} choices")
    return tuple(choices)


def _value(raw: Raw, column: str) -> str | None:
    value = optional(raw, column, text, UNKNOWN_ID)
    return None if value is None or value.lower() in MISSING else value


def _decoded(raw: Raw, sample_id: str) -> bytes:
    try:
        return base64.b64decode(filled(raw, "image", sample_id), validate=True)
    except ValueError as error:  # also for characters beyond ASCII
        raise BadSample(sample_id, f"its picture is no base64: {error}") from None


# MME (Fu et al., 2023): two yes/no questions for each picture, 14 subtasks, 2,374 questions.
#
# Files: `MME_Benchmark_release_version.zip`, given by its authors on request
# (github.com/BradyFU/Awesome-Multimodal-Large- Language-Models). Licence: for research. Layout: a folder a subtask.
# Five (artwork, celebrity, landmark, posters, scene) have `images/*.jpg` and `questions_answers_YN/*.txt`; in the
# others pictures and texts lie side by side. A text has two lines, "question<TAB>Yes" and "question<TAB>No".
#
# Quirks: questions end in "Please answer yes or no." already; a subtask's score is accuracy + accuracy+ (both of a
# picture right), so at most 200; perception has 10 subtasks, cognition 4. Some releases hold stray files: only .txt
# are read.


COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
MME_QUESTIONS, MME_PICTURES = "questions_answers_YN", "images"
ENDINGS = (".jpg", ".png", ".jpeg", ".JPG", ".PNG")


def mme_splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """The one test split, of `folder` or of the release's folder in it."""
    root = next(
        (
            place
            for place in (folder, folder / "MME_Benchmark_release_version", folder / "MME_Benchmark")
            if _texts(place)
        ),
        None,
    )
    if root is None:
        raise UserError(
            f"{folder}: none of the subtasks' folders ({', '.join(PERCEPTION[:3])}, ...) with .txt is in it"
        )
    yield Split(
        task="mme",
        name="test",
        inputs=tuple(_texts(root)),
        rows=partial(_mme_rows, root),
        convert=mme_convert,
        published_rows=1_187,
        notes={"rows": "one a picture, each of two questions", "pictures": f"paths are relative to {root.name}"},
    )


def _texts(root: Path) -> list[Path]:
    found: list[Path] = []
    for category in (*PERCEPTION, *COGNITION):
        split = root / category / MME_QUESTIONS
        found += sorted((split if split.is_dir() else root / category).glob("*.txt"))
    return found


def _mme_rows(root: Path, progress: Progress) -> Iterator[Raw]:
    for path in _texts(root):
        progress(path.stat().st_size)
        apart = path.parent.name == MME_QUESTIONS
        folder = path.parent.parent / MME_PICTURES if apart else path.parent
        picture = next(
            (folder / f"{path.stem}{end}" for end in ENDINGS if (folder / f"{path.stem}{end}").is_file()), None
        )
        yield {
            "category": (path.parent.parent if apart else path.parent).name,
            "name": path.stem,
            "image": None if picture is None else picture.relative_to(root).as_posix(),
            "text": _content(path),
        }


def _content(path: Path) -> str | None:
    """The text, None where it is not UTF-8."""
    try:
        return whole_text(path, WANTED)
    except NotUtf8:
        return None


def mme_convert(raw: Raw) -> list[Example]:
    """The two questions of one picture."""
    category = text(raw, "category")
    name = f"{category}/{text(raw, 'name')}"
    if given(raw, "image") is None:
        raise BadSample(name, "its picture is missing")
    if given(raw, "text") is None:
        raise BadSample(name, "its text is not UTF-8")
    lines = [line for line in text(raw, "text", name).splitlines() if line.strip()]
    pairs = [line.rsplit("\t", 1) for line in lines]
    if len(pairs) != 2 or any(len(pair) != 2 for pair in pairs):
        raise BadSample(name, f"it must have two lines of question, tab, answer; it has {len(lines)} lines")
    return [
        _example(filled(raw, "image"), category, number, question.strip(), answer.strip())
        for number, (question, answer) in enumerate(pairs, 1)
    ]


def _example(image: str, category: str, number: int, question: str, answer: str) -> Example:
    sample_id = f"{image}#{number}"
    if answer not in {"Yes", "No"}:
        raise BadSample(sample_id, f"question {number}'s answer is {shown(answer)}, which is neither Yes nor No")
    if not question:
        raise BadSample(sample_id, f"question {number} is empty")
    return Example(
        id=sample_id,
        images=(image,),
        question=question,
        answers=(Answer(text=answer),),
        extra={"category": category},
    )


# MM-Vet (Yu et al., 2023): 218 open questions about 200 pictures, graded by a language model.
#
# Files, from github.com/yuweihao/MM-Vet (release `mm-vet.zip`): `mm-vet.json`, one object, "v1_0" -> question, and
# `images/v1_0.png` and so on. Licence: Apache-2.0.
#
# Quirks: an answer may hold several, all needed ("<AND>") or any ("<OR>"): it stays as it is, because the grader's
# prompt shows it so. The server takes {id: answer text}.


MMVET_FILE = "mm-vet.json"


def mmvet_splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """The one test split."""
    file = some_present(folder, [MMVET_FILE])[MMVET_FILE]
    yield only_test_split(file, task="mmvet", rows=_mmvet_rows, convert=mmvet_convert, published_rows=218)


def _mmvet_rows(file: Path, progress: Progress) -> Iterator[Raw]:
    for sample_id, row in stream_members(file, progress=progress):
        yield {**row, "id": sample_id}


def mmvet_convert(raw: Raw) -> Example:
    """One question."""
    sample_id = identifier(raw, "id")
    return Example(
        id=sample_id,
        images=(f"images/{filled(raw, 'imagename', sample_id)}",),
        question=filled(raw, "question", sample_id),
        answers=(Answer(text=filled(raw, "answer", sample_id)),),
        extra={"capability": list(texts(raw, "capability", sample_id))} | kept(raw, "imagesource", sample_id=sample_id),
    )


# POPE (Li et al., 2023): is there such an object in the picture? Half of the answers are no.
#
# Files, from github.com/RUCAIBox/POPE or AoiDragon/POPE (`output/coco`):
# `coco_pope_{random,popular,adversarial}.json`, JSON lines of {question_id, image, text, label}. Licence: MIT;
# pictures are COCO's val2014. LLaVA's own question file `llava_pope_test.jsonl` is not needed: it holds the same
# questions with LLaVA's prompt suffix.
#
# Quirks: there are two versions of the labels. Today's have 3,000 rows each. LLaVA-1.5's reported figures belong to
# commit e3e3926: 2,910 in `random`, in another order, and "imange" for "image" in its questions. The official script
# compares by position and cuts in silence; here the version is in the manifest and in each row, and ids are
# "<category>-<question_id>" because the three files count from 1 each. Questions repeat: the same object is asked for
# in more than one category.
#
# Sets on other pictures (`{aokvqa,gqa}_pope_{random,popular,adversarial}.json`) become tasks `pope_aokvqa` and
# `pope_gqa`.


SETS = {"coco": "pope", "aokvqa": "pope_aokvqa", "gqa": "pope_gqa"}
POPE_PICTURES = {"coco": "val2014", "aokvqa": "val2014", "gqa": "images"}


def pope_splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """One test split for each set of pictures, with the categories that are there."""
    names = [f"{pictures}_pope_{category}.json" for pictures in SETS for category in CATEGORIES]
    inner = next((place for place in (folder / "coco", folder / "output" / "coco") if present(place, names)), folder)
    found = some_present(inner, names)
    for pictures, task in SETS.items():
        files = {
            category: found[name] for category in CATEGORIES if (name := f"{pictures}_pope_{category}.json") in found
        }
        if files:
            counts = tuple(_count(path) for path in files.values())
            version = VERSIONS.get(counts, f"unknown: {counts} rows")
            yield Split(
                task=task,
                name="test",
                inputs=tuple(files.values()),
                rows=partial(_pope_rows, files),
                convert=partial(pope_convert, pictures=POPE_PICTURES[pictures], label_version=version),
                published_rows=sum(counts) if counts in VERSIONS else 9_000,
                notes={"label_version": version, "rows": dict(zip(files, counts, strict=True))},
            )


def _count(path: Path) -> int:
    return sum(1 for _ in json_rows(path, lambda _: None))


def _pope_rows(files: Mapping[str, Path], progress: Progress) -> Iterator[Raw]:
    for category, path in files.items():
        for row in json_rows(path, progress):
            yield {**row, "category": category}


def pope_convert(raw: Raw, *, pictures: str, label_version: str) -> Example:
    """One question; `pictures` is the folder of its picture."""
    category = filled(raw, "category")
    sample_id = f"{category}-{identifier(raw, 'question_id')}"
    label = filled(raw, "label", sample_id)
    if label not in {"yes", "no"}:
        raise BadSample(sample_id, f"its label is {shown(label)}, which is neither 'yes' nor 'no'")
    return Example(
        id=sample_id,
        images=(f"{pictures}/{filled(raw, 'image', sample_id)}",),
        question=filled(raw, "text", sample_id),
        answers=(Answer(text=label),),
        extra={"category": category, "question_id": scalar(raw, "question_id"), "label_version": label_version},
    )


# ScienceQA (Lu et al., 2022): school questions with 2 to 5 choices, about half with a picture.
#
# Files, from github.com/lupantech/ScienceQA (`data/scienceqa`): `problems.json` (21,208 questions) and
# `pid_splits.json`, and the pictures as `images/{train,val,test}/<id>/image.png`. Licence: CC BY-NC-SA 4.0. Splits:
# train 12,726, val 4,241, test 4,241 of which 2,017 have a picture (LLaVA's table shows those); minitrain, minival
# and minitest are parts of them.
#
# Quirks: `problems.json` is one object, id -> problem; `image` is "image.png" or null; hints may be empty. Prompts
# with lecture or solution differ from paper to paper, so both stay in `extra`.


SCIENCEQA_SPLITS = {"train": ("train", 12_726), "val": ("validation", 4_241), "test": ("test", 4_241)}
PROBLEMS, PARTS = "problems.json", "pid_splits.json"


def scienceqa_splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """Training, validation and test, of `folder` or of `folder/data/scienceqa`."""
    inner = folder / "data" / "scienceqa"
    found = some_present(inner if inner.is_dir() else folder, [PROBLEMS, PARTS])
    for needed in (PROBLEMS, PARTS):
        if needed not in found:
            raise UserError(f"{folder}: {needed} is missing; fetch both {PROBLEMS} and {PARTS}")
    members = _members(found[PARTS])
    for part, (name, size) in SCIENCEQA_SPLITS.items():
        yield Split(
            task="scienceqa",
            name=name,
            inputs=(found[PROBLEMS], found[PARTS]),
            rows=partial(_scienceqa_rows, found[PROBLEMS], frozenset(members[part])),
            convert=partial(scienceqa_convert, part=part),
            published_rows=size,
        )


def _members(path: Path) -> Mapping[str, tuple[str, ...]]:
    members = json_object(path, WANTED)
    with refusing(f"{path}: not the map of splits to ids expected"):
        return {part: texts(members, part) for part in SCIENCEQA_SPLITS}


def _scienceqa_rows(problems: Path, wanted: frozenset[str], progress: Progress) -> Iterator[Raw]:
    """The problems of one split; one that the split names but nobody has comes last, to be dropped with that reason."""
    found: set[str] = set()
    for problem_id, row in stream_members(problems, progress=progress):
        if problem_id in wanted:
            found.add(problem_id)
            yield {**row, "pid": problem_id}
    for problem_id in sorted(wanted - found):
        yield {"pid": problem_id}


def scienceqa_convert(raw: Raw, *, part: str) -> Example:
    """One question; `part` is the folder of its picture."""
    sample_id = identifier(raw, "pid")
    choices = texts(raw, "choices", sample_id)
    correct = index_of(integer(raw, "answer", sample_id), choices, "answer", sample_id)
    image = optional(raw, "image", text, sample_id)
    columns = ("hint", "lecture", "solution", "subject", "topic", "category", "skill", "grade", "task")
    return Example(
        id=sample_id,
        images=(f"images/{part}/{sample_id}/{image}",) if image else (),
        question=filled(raw, "question", sample_id),
        answers=(Answer(text=choices[correct]),),
        choices=choices,
        extra={"correct": correct, "split": part}
        | {name: said for name, said in kept(raw, *columns, sample_id=sample_id).items() if said},
    )


# SEED-Bench (Li et al., 2023): 14,232 questions about pictures and 5,010 about videos, four choices each.
#
# Files, from the Hugging Face data set `AILab-CVC/SEED-Bench`: `SEED-Bench.json` (about 8 MB),
# `SEED-Bench-image.zip`; the videos from their publishers (Something-Something v2, EPIC-Kitchens, Breakfast).
# Licence: CC BY-NC 4.0. Pictures have no ending in their name: `SEED-Bench-image/1454426_2591111986`.
#
# Quirks: LLaVA-1.5 takes a video's middle frame, as `SEED-Bench-video-image/<question_type_id>_<question_id>.png`;
# that path is `extra["middle_frame"]`. `segment` is in seconds and present for some videos only. Ids may be numbers
# or, in the first dimension's additions, text such as "v1".


SEED_BENCH_FILE = "SEED-Bench.json"
SEED_BENCH_LETTERS = "ABCD"


def seed_bench_splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """The one test split."""
    file = some_present(folder, [SEED_BENCH_FILE])[SEED_BENCH_FILE]
    yield only_test_split(file, task="seed", rows=_seed_bench_rows, convert=seed_bench_convert, published_rows=19_242)


def _seed_bench_rows(file: Path, progress: Progress) -> Iterator[Raw]:
    names = _question_types(file)
    for row in json_rows(file, progress, "questions"):
        yield {**row, "question_type": names.get(key(row, "question_type_id") or "")}


def _question_types(file: Path) -> dict[str, str]:
    """Number, as text -> name."""
    with refusing(file):
        types = mapping(json_object(file, WANTED), "question_type")
        return {str(integer(types, name)): name for name in types}


def seed_bench_convert(raw: Raw) -> Example:
    """One question."""
    sample_id = identifier(raw, "question_id")
    choices = tuple(filled(raw, f"choice_{letter.lower()}", sample_id) for letter in SEED_BENCH_LETTERS)
    answer = filled(raw, "answer", sample_id)
    if answer not in SEED_BENCH_LETTERS or len(answer) != 1:
        raise BadSample(sample_id, f"its answer is {shown(answer)}, which is not one of {SEED_BENCH_LETTERS}")
    kind = filled(raw, "data_type", sample_id)
    if kind not in {"image", "video"}:
        raise BadSample(sample_id, f"its data_type is {shown(kind)}, which is neither 'image' nor 'video'")
    data_id, type_id = identifier(raw, "data_id", sample_id), integer(raw, "question_type_id", sample_id)
    correct = SEED_BENCH_LETTERS.index(answer)
    frame = {MIDDLE_FRAME: f"SEED-Bench-video-image/{type_id}_{sample_id}.png"} if kind == "video" else {}
    return Example(
        id=sample_id,
        images=(f"SEED-Bench-image/{data_id}",) if kind == "image" else (),
        videos=(_clip(raw, data_id, sample_id),) if kind == "video" else (),
        question=filled(raw, "question", sample_id),
        answers=(Answer(text=choices[correct]),),
        choices=choices,
        extra={"correct": correct, "data_type": kind, "question_type_id": type_id}
        | {"question_type": optional(raw, "question_type", text, sample_id) or str(type_id)}
        | frame,
    )


def _clip(raw: Raw, path: str, sample_id: str) -> Clip:
    segment = given(raw, "segment")
    if segment is None:
        return Clip(path=path)
    start, end = seconds(segment, "segment", sample_id)
    return Clip(path=path, start_seconds=start, end_seconds=end)


# TextVQA (Singh et al., 2019): questions that need the text in the picture, ten answers each.
#
# Files, from textvqa.org/dataset: `TextVQA_0.5.1_{train,val,test}.json` (34,602 / 5,000 / 5,734), and the OCR of
# them, `TextVQA_Rosetta_OCR_v0.2_{train,val,test}.json`. Licence: CC BY 4.0. Pictures (OpenImages):
# `train_images/<image_id>.jpg` for train and val, `test_images/<image_id>.jpg` for test.
#
# LLaVA's question file for the validation set, `llava_textvqa_val_v051_ocr.jsonl`, holds other OCR tokens than
# Rosetta's in its prompts ("Reference OCR token: ..."); where it is in the folder, its tokens are what
# `extra["reference_ocr"]` holds, so that LLaVA-1.5's prompt can be rebuilt exactly.
#
# Quirks: `question_id` counts on through the three splits; LLaVA's file has the picture's id as `question_id`, which
# is not unique, so its rows are matched by picture and question in lower case, as LLaVA's own scorer does.


TEXTVQA_SPLITS = {"train": ("train", 34_602), "val": ("validation", 5_000), "test": ("test", 5_734)}
LLAVA_FILE = "llava_textvqa_val_v051_ocr.jsonl"
REFERENCE = "Reference OCR token:"


def textvqa_splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """The splits whose questions are there."""
    found = some_present(folder, [f"TextVQA_0.5.1_{part}.json" for part in TEXTVQA_SPLITS])
    for part, (name, size) in TEXTVQA_SPLITS.items():
        questions = found.get(f"TextVQA_0.5.1_{part}.json")
        if questions is not None:
            ocr = present(folder, [f"TextVQA_Rosetta_OCR_v0.2_{part}.json", *([LLAVA_FILE] if part == "val" else [])])
            yield Split(
                task="textvqa",
                name=name,
                inputs=(questions, *ocr.values()),
                rows=partial(_textvqa_rows, questions, dict(ocr)),
                convert=partial(textvqa_convert, answered=part != "test"),
                published_rows=size,
                notes={"ocr": sorted(ocr)},
            )


def _textvqa_rows(questions: Path, ocr: Mapping[str, Path], progress: Progress) -> Iterator[Raw]:
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


def textvqa_convert(raw: Raw, *, answered: bool) -> Example:
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


# VizWiz-VQA (Gurari et al., 2018): questions that blind people asked about their own photographs, ten answers each.
#
# Files, from vizwiz.org/tasks-and-datasets/vqa: `Annotations.zip` with `{train,val,test}.json` (20,523 / 4,319 /
# 8,000), and the pictures in `train.zip`, `val.zip`, `test.zip`. Licence: CC BY 4.0. Pictures:
# `train/VizWiz_train_00000000.jpg` and so on.
#
# Quirks: there is no question id; the picture's name is one, for each picture has one question. Test has no answers;
# the server takes [{image, answer}]. "unanswerable" is an answer, "unsuitable image" too. LLaVA-1.5 appends "When the
# provided information is insufficient, respond with 'Unanswerable'." to the question: that belongs to its prompt, not
# to the record.


VIZWIZ_FILES = {"train": ("train.json", 20_523), "validation": ("val.json", 4_319), "test": ("test.json", 8_000)}


def vizwiz_splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """The splits whose annotations are there, in `folder` or in `folder/Annotations`."""
    names = [file for file, _ in VIZWIZ_FILES.values()]
    found = present(folder / "Annotations", names) or some_present(folder, names)
    for name, (file, size) in VIZWIZ_FILES.items():
        if file in found:
            yield Split(
                task="vizwiz",
                name=name,
                inputs=(found[file],),
                rows=partial(json_rows, found[file]),
                convert=partial(vizwiz_convert, pictures=Path(file).stem, answered=name != "test"),
                published_rows=size,
            )


def vizwiz_convert(raw: Raw, *, pictures: str, answered: bool) -> Example:
    """One question; `pictures` is the folder of its picture, `answered` that its answers must be there."""
    image = identifier(raw, "image")
    answers = people_answers(raw, "answers", image) if answered else []
    return Example(
        id=image,
        images=(f"{pictures}/{image}",),
        question=filled(raw, "question", image),
        answers=soft_answers(answers),
        extra=({"human_answers": answers} if answers else {}) | kept(raw, "answer_type", "answerable", sample_id=image),
    )
