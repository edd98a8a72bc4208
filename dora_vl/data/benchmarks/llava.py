"""LLaVA's training files, and the sets that its table of benchmarks is made of."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from string import ascii_uppercase

from dora_vl.data.benchmarks.fields import (
    FILE_OWNER,
    UNKNOWN_ID,
    Raw,
    Row,
    Split,
    by_id,
    existing_files,
    files_in,
    join_key,
    member_rows,
    numbered,
    refuse_file,
    soft_answers,
)
from dora_vl.data.columns import USUAL, ColumnsError
from dora_vl.data.example import JSON, MIDDLE_FRAME, Answer, Clip, Example
from dora_vl.data.pictures import save_picture
from dora_vl.data.readers import read_fields
from dora_vl.data.text_file import NotUtf8, json_object, stream_members, stream_records, table_rows, whole_text
from dora_vl.errors import BadSample, UserError, short_repr


def llava_json(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """Any file in LLaVA's form (JSON list or JSON lines), checked row by row and written as JSON lines with unique ids.

    A record holds `id`, `image` (a path or a list of paths, relative to one picture folder; absent for text only) and
    `conversations`, a list of {"from": "human" | "gpt", "value": text} with `<image>` where a picture goes. `dora_vl`
    trains on such a file as it is; preparing it once finds the unusable rows beforehand. `--from` takes the file, or a
    folder of `*.json` and `*.jsonl`; each file becomes `llava/<its name>.jsonl`. Licence: the file's own.

    Quirks: rows stay as they are, except that ids become text and a repeated one gets a number ("x#2"): published files
    repeat them freely.
    """
    files = [folder] if folder.is_file() else sorted([*folder.glob("*.json"), *folder.glob("*.jsonl")])
    if not files:
        raise UserError(f"{folder}: no .json or .jsonl file is in it; --from takes LLaVA's file or its folder")
    names = [file.stem for file in files]
    for file in files:
        if names.count(file.stem) > 1:
            raise UserError(f"{folder}: two files are called {file.stem}; give one of them as --from")
        yield _conversations("llava", file.stem, file)


def llava_mix665k(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """LLaVA-1.5's visual instruction mix (Liu et al., 2023), 665,298 conversations.

    File: `llava_v1_5_mix665k.json` (about 1 GB) from the Hugging Face data set `liuhaotian/LLaVA-Instruct-150K`.
    Licence: CC BY 4.0, bound to OpenAI's terms of use; each picture set under its own. Pictures, fetched from their
    publishers, go into one folder: `coco/train2017`, `gqa/images`, `ocr_vqa/images`, `textvqa/train_images`,
    `vg/VG_100K`, `vg/VG_100K_2`.

    Quirks: ids repeat (one picture is in several of the mixed sets) and some are numbers; some 40 thousand
    conversations of ShareGPT have no picture and an extra key `model`; OCR-VQA's pictures are named .jpg throughout,
    but its publisher serves some as GIF or PNG: rename, do not convert. A few turns are empty or begin with "gpt": an
    empty answer is dropped and named, a leading answer stays and is skipped at reading, as in LLaVA.
    """
    (file,) = existing_files(folder, ["llava_v1_5_mix665k.json"]).values()
    yield _conversations("llava_mix665k", "train", file, 665_298)


def llava_pretrain(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """LLaVA-1.5's projector pretraining captions (LAION, CC, SBU; by BLIP), 558,128 of them.

    Files: `blip_laion_cc_sbu_558k.json` (about 180 MB) and `images.zip` (about 27 GB, unpacks to `00000/000000010.jpg`
    and the like) from the Hugging Face data set `liuhaotian/LLaVA-Pretrain`. Licence: that of the pictures' sets
    (CC-3M, LAION, SBU), captions BLIP's; for research.

    Quirks: the request varies ("Render a clear and concise summary of the photo.\\n<image>", with `<image>` before or
    after), but the `plain` template drops it. `blip_laion_cc_sbu_558k_meta.json` is not needed.
    """
    (file,) = existing_files(folder, ["blip_laion_cc_sbu_558k.json"]).values()
    yield _conversations("llava_pretrain", "train", file, 558_128)


def _conversations(task: str, name: str, file: Path, size: int | None = None) -> Split:
    return Split(task, name, (file,), partial(stream_records, file), conversation_row, size, repeated_ids="number")


def conversation_row(raw: Raw) -> dict[str, JSON]:
    """Returns the record itself, with all of its columns and its id as text, if it can be trained on."""
    row = Row(raw)
    sample_id = row.optional(row.identifier, "id") or UNKNOWN_ID
    try:
        read_fields(USUAL.resolve(raw, strict=False), sample_id)
    except ColumnsError as error:
        raise BadSample(sample_id, str(error)) from None
    return {"id": sample_id, **{name: value for name, value in raw.items() if name != "id"}}


LLAVA_BENCH_FILES = {
    "context.jsonl": ("context", "image", "caption"),
    "answers_gpt4.jsonl": ("reference", "question_id", "text"),
}
"""Each file adds a column to the questions: the new name, the column to join by, the column to take."""


def llava_bench(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """LLaVA-Bench in the wild (Liu et al., 2023): 60 questions about 24 pictures, judged by a language model.

    Files, from the Hugging Face data set `liuhaotian/llava-bench-in-the-wild`: `questions.jsonl`, `context.jsonl` (what
    a person wrote about each picture, for the judge), `answers_gpt4.jsonl` (the reference answers), `images/001.jpg`
    and so on. Licence: Apache-2.0.

    Quirks: the judge's prompt needs the context and GPT-4's answer; both go into the record (`extra["context"]`,
    `answers`). LLaVA's table uses GPT-4-0314, which is no longer served, so figures of other judges are not comparable.
    """
    files = existing_files(folder, ["questions.jsonl"]) | files_in(folder, LLAVA_BENCH_FILES)
    needed = [name for file, (name, *_) in LLAVA_BENCH_FILES.items() if file in files]
    rows, convert = partial(_llava_bench_rows, files), partial(llava_bench_row, needed=needed)
    yield Split("llava_bench", "test", tuple(files.values()), rows, convert, 60, notes={"files": sorted(files)})


def _llava_bench_rows(files: Mapping[str, Path]) -> Iterator[Raw]:
    joins = [
        (name, join, column, by_id(files[file], stream_records(files[file]), join, column))
        for file, (name, join, column) in LLAVA_BENCH_FILES.items()
        if file in files
    ]
    for row in stream_records(files["questions.jsonl"]):
        yield {**row, **{name: rows.get(join_key(row, join), {}).get(column) for name, join, column, rows in joins}}


def llava_bench_row(raw: Raw, *, needed: Sequence[str]) -> Example:
    """Returns one question; `needed` are those of "context" and "reference" whose files are there."""
    row = Row(raw, "question_id")
    for column in needed:
        row.non_empty(column)
    reference = row.optional(row.text, "reference")
    return Example(
        id=row.id,
        images=(f"images/{row.non_empty('image')}",),
        question=row.non_empty("text"),
        answers=(Answer(text=reference),) if reference else (),
        extra={"category": row.non_empty("category")} | row.extra_columns("context"),
    )


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
REFERENCE_CHARACTERS = 64
"""A shorter `image` is another row's index, as VLMEvalKit decides it."""


def mmbench(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """MMBench and MMBench-CN (Liu et al., 2023): single-choice questions, each asked in every rotation of its choices.

    Files, from opencompass' download site: `mmbench_dev_20230712.tsv` (LLaVA-1.5's) or `mmbench_dev_en_20231003.tsv`
    and the like, or VLMEvalKit's `MMBench_DEV_EN.tsv`...; of two files for one split the first of `MMBENCH_FILES`.
    Licence: Apache-2.0. Columns: index, question, hint, A-D, answer, category, image (base64), source, l2-category,
    split.

    Quirks: rotations of a question have the same `index` modulo 1,000,000; circular evaluation wants all of them right.
    The pictures are in the table: they are written once each to `records/mmbench*/media`, which the paths are relative
    to; in VLMEvalKit's files a short `image` is the `index` of another row that has the picture. The choices end at the
    first that is empty, "nan" or "none", as in LLaVA's reader, so a real choice "None" and those after it are lost; a
    row whose answer is lost with them is dropped and named. Test files have no `answer`; the server takes an .xlsx.
    """
    taken: set[tuple[str, str]] = set()
    for file, path in existing_files(folder, MMBENCH_FILES).items():
        task, name, size = MMBENCH_FILES[file]
        if (task, name) not in taken:
            taken.add((task, name))
            rows = partial(_mmbench_rows, path)
            convert = partial(mmbench_row, task_folder=records / task, answered=name != "test")
            notes = {"pictures": "paths are relative to this folder"}
            yield Split(task, name, (path,), rows, convert, size, notes=notes)


def _mmbench_rows(path: Path) -> Iterator[Raw]:
    """Yields the rows; for an `image` that names an earlier row, that row's picture."""
    references = path.name.startswith("MMBench_")  # VLMEvalKit's; the others need no memory of pictures
    pictures: dict[str, str] = {}
    for _, row in table_rows(path, FILE_OWNER, delimiter="\t"):
        image = row.get("image", "")
        if references and len(image) >= REFERENCE_CHARACTERS:
            pictures[row.get("index", "")] = image
        yield {**row, "image": image if len(image) >= REFERENCE_CHARACTERS else pictures.get(image, image)}


def mmbench_row(raw: Raw, *, task_folder: Path, answered: bool) -> Example:
    """Returns one rotation of one question; writes its picture. Where `answered`, its answer must be there."""
    row = Row(raw, "index")
    choices: list[str] = []
    for letter in "ABCDE":
        if (choice := _mmbench_cell(row, letter)) is None:
            break
        choices.append(choice)
    if len(choices) < 2:
        raise row.error(f"it has {len(choices)} choices")
    letters = ascii_uppercase[: len(choices)]
    answer = (row.non_empty("answer") if answered else row.optional(row.text, "answer") or "").strip()
    if len(answer) > 1 or answer not in letters:
        raise row.error(f"its answer is {short_repr(answer)}, but its choices are A to {letters[-1]}")
    correct = letters.index(answer) if answer else None
    extra = {
        "index": row.integer("index"),
        "correct": correct,
        **row.extra_columns("category"),
        "l2_category": row.optional(row.text, "l2-category"),
        **row.extra_columns("source"),
        "hint": _mmbench_cell(row, "hint"),
    }
    try:
        picture = base64.b64decode(row.non_empty("image"), validate=True)
    except ValueError as error:  # also for characters beyond ASCII
        raise row.error(f"its picture is not base64: {error}") from None
    return Example(
        id=row.id,
        images=(save_picture(picture, task_folder, row.id),),
        question=row.non_empty("question"),
        answers=() if correct is None else (Answer(text=choices[correct]),),
        choices=tuple(choices),
        extra={name: value for name, value in extra.items() if value is not None},
    )


def _mmbench_cell(row: Row, column: str) -> str | None:
    cell = row.optional(row.text, column)
    return None if cell is None or cell.lower() in {"", "nan", "none"} else cell


MME_PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
MME_QUESTIONS = "questions_answers_YN"


def mme(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """MME (Fu et al., 2023): two yes/no questions for each picture, 14 subtasks, 2,374 questions.

    Files: `MME_Benchmark_release_version.zip`, given by its authors on request
    (github.com/BradyFU/Awesome-Multimodal-Large-Language-Models). Licence: for research. Layout: a folder a subtask.
    Five (artwork, celebrity, landmark, posters, scene) have `images/*.jpg` and `questions_answers_YN/*.txt`; in the
    others pictures and texts lie side by side. A text has two lines, "question<TAB>Yes" and "question<TAB>No".

    Quirks: questions end in "Please answer yes or no." already; a subtask's score is accuracy + accuracy+ (both of a
    picture right), so at most 200. Some releases hold stray files: only .txt are read.
    """
    for root in (folder, folder / "MME_Benchmark_release_version", folder / "MME_Benchmark"):
        texts: list[Path] = []
        for category in (*MME_PERCEPTION, *MME_COGNITION):
            apart = root / category / MME_QUESTIONS
            texts += sorted((apart if apart.is_dir() else root / category).glob("*.txt"))
        if texts:
            notes = {"rows": "one a picture, each of two questions", "pictures": f"paths are relative to {root.name}"}
            yield Split("mme", "test", tuple(texts), partial(_mme_rows, root, texts), _mme_row, 1_187, notes=notes)
            return
    subtasks = ", ".join(MME_PERCEPTION[:3])
    raise UserError(f"{folder}: none of the subtasks' folders ({subtasks}, ...) with .txt is in it")


def _mme_rows(root: Path, texts: Sequence[Path]) -> Iterator[Raw]:
    for path in texts:
        apart = path.parent.name == MME_QUESTIONS
        folder = path.parent.parent / "images" if apart else path.parent
        pictures = [folder / f"{path.stem}{end}" for end in (".jpg", ".png", ".jpeg", ".JPG", ".PNG")]
        picture = next((picture for picture in pictures if picture.is_file()), None)
        try:
            content = whole_text(path, FILE_OWNER)
        except NotUtf8:
            content = None
        yield {
            "category": (path.parent.parent if apart else path.parent).name,
            "name": path.stem,
            "image": None if picture is None else picture.relative_to(root).as_posix(),
            "text": content,
        }


def _mme_row(raw: Raw) -> list[Example]:
    row = Row(raw)
    category = row.text("category")
    row.id = f"{category}/{row.text('name')}"
    if row.get("image") is None:
        raise row.error("its picture is missing")
    if row.get("text") is None:
        raise row.error("its text is not UTF-8")
    image, lines = row.text("image"), filter(str.strip, row.text("text").splitlines())
    pairs = [[part.strip() for part in line.rsplit("\t", 1)] for line in lines]
    if len(pairs) != 2 or any(len(pair) != 2 for pair in pairs):
        raise row.error(f"it must have two lines of question, tab, answer; it has {len(pairs)} lines")
    examples: list[Example] = []
    for number, (question, answer) in enumerate(pairs, 1):
        row.id = f"{image}#{number}"
        if answer not in {"Yes", "No"}:
            raise row.error(f"question {number}'s answer is {short_repr(answer)}, which is neither Yes nor No")
        if not question:
            raise row.error(f"question {number} is empty")
        extra, answers = {"category": category}, (Answer(text=answer),)
        examples.append(Example(id=row.id, images=(image,), question=question, answers=answers, extra=extra))
    return examples


def mmvet(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """MM-Vet (Yu et al., 2023): 218 open questions about 200 pictures, graded by a language model.

    Files, from github.com/yuweihao/MM-Vet (release `mm-vet.zip`): `mm-vet.json`, one object, "v1_0" -> question, and
    `images/v1_0.png` and so on. Licence: Apache-2.0.

    Quirks: an answer may hold several, all needed ("<AND>") or any ("<OR>"): it stays as it is, because the grader's
    prompt shows it so. The server takes {id: answer text}.
    """
    files = tuple(existing_files(folder, ["mm-vet.json"]).values())
    yield Split("mmvet", "test", files, partial(member_rows, files, "id"), _mmvet_row, 218)


def _mmvet_row(raw: Raw) -> Example:
    row = Row(raw, "id")
    return Example(
        id=row.id,
        images=(f"images/{row.non_empty('imagename')}",),
        question=row.non_empty("question"),
        answers=(Answer(text=row.non_empty("answer")),),
        extra={"capability": row.texts("capability")} | row.extra_columns("imagesource"),
    )


POPE_CATEGORIES = ("random", "popular", "adversarial")
POPE_VERSIONS: Mapping[tuple[int, ...], str] = {
    (2910, 3000, 3000): "e3e3926 (LLaVA-1.5's)",
    (3000, 3000, 3000): "current",
}
"""The number of questions in each category says which version of the labels it is."""
POPE_SETS = {"coco": ("pope", "val2014"), "aokvqa": ("pope_aokvqa", "val2014"), "gqa": ("pope_gqa", "images")}
"""The pictures of a file decide its task and the folder of its pictures."""


def pope(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """POPE (Li et al., 2023): is there such an object in the picture? Half of the answers are no.

    Files, from github.com/RUCAIBox/POPE or AoiDragon/POPE (`output/coco`):
    `coco_pope_{random,popular,adversarial}.json`, JSON lines of {question_id, image, text, label}. Licence: MIT;
    pictures are COCO's val2014. LLaVA's own question file `llava_pope_test.jsonl` is not needed. Sets on other pictures
    (`{aokvqa,gqa}_pope_...json`) become tasks `pope_aokvqa` and `pope_gqa`.

    Quirks: there are two versions of the labels. Today's have 3,000 rows each. LLaVA-1.5's reported figures belong to
    commit e3e3926: 2,910 in `random`, in another order, and "imange" for "image" in its questions. The official script
    compares by position and cuts in silence; here the version is in the manifest and in each row, and ids are
    "<category>-<question_id>" because the three files count from 1 each.
    """
    names = [f"{pictures}_pope_{category}.json" for pictures in POPE_SETS for category in POPE_CATEGORIES]
    paths = existing_files(folder, names, inside=["coco", "output/coco"])
    for pictures, (task, picture_folder) in POPE_SETS.items():
        files = {part: paths[name] for part in POPE_CATEGORIES if (name := f"{pictures}_pope_{part}.json") in paths}
        if files:
            counts = tuple(sum(1 for _ in stream_records(path)) for path in files.values())
            version = POPE_VERSIONS.get(counts, f"unknown: {counts} rows")
            yield Split(
                task,
                "test",
                tuple(files.values()),
                partial(_pope_rows, files),
                partial(_pope_row, pictures=picture_folder, label_version=version),
                sum(counts) if counts in POPE_VERSIONS else 9_000,
                notes={"label_version": version, "rows": dict(zip(files, counts, strict=True))},
            )


def _pope_rows(files: Mapping[str, Path]) -> Iterator[Raw]:
    for category, path in files.items():
        for row in stream_records(path):
            yield {**row, "category": category}


def _pope_row(raw: Raw, *, pictures: str, label_version: str) -> Example:
    row = Row(raw)
    category = row.text("category")
    row.id = f"{category}-{row.identifier('question_id')}"
    return Example(
        id=row.id,
        answers=(Answer(text=row.one_of("label", ("yes", "no"))),),
        images=(f"{pictures}/{row.non_empty('image')}",),
        question=row.non_empty("text"),
        extra={"category": category, "question_id": row.scalar("question_id"), "label_version": label_version},
    )


SCIENCEQA_PARTS = {"train": ("train", 12_726), "val": ("validation", 4_241), "test": ("test", 4_241)}
SCIENCEQA_KEPT = ("hint", "lecture", "solution", "subject", "topic", "category", "skill", "grade", "task")


def scienceqa(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """ScienceQA (Lu et al., 2022): school questions with 2 to 5 choices, about half with a picture.

    Files, from github.com/lupantech/ScienceQA (`data/scienceqa`): `problems.json` (21,208 questions, one object, id ->
    problem) and `pid_splits.json`, and the pictures as `images/{train,val,test}/<id>/image.png`. Licence: CC BY-NC-SA
    4.0. Of the test split 2,017 have a picture (LLaVA's table shows those); minitrain, minival, minitest are parts.

    Quirks: `image` is "image.png" or null; hints may be empty. Prompts with lecture or solution differ from paper to
    paper, so both stay in `extra`.
    """
    names = ["problems.json", "pid_splits.json"]
    paths = existing_files(folder, names, inside=["data/scienceqa"])
    if missing := [name for name in names if name not in paths]:
        raise UserError(f"{folder}: {missing[0]} is missing; fetch both {' and '.join(names)}")
    problems, parts = paths.values()
    with refuse_file(f"{parts}: not the map of splits to ids expected"):
        ids = Row(json_object(parts, FILE_OWNER))
        members = {part: frozenset(ids.texts(part)) for part in SCIENCEQA_PARTS}
    for part, (name, size) in SCIENCEQA_PARTS.items():
        rows = partial(_scienceqa_rows, problems, members[part])
        yield Split("scienceqa", name, (problems, parts), rows, partial(_scienceqa_row, part=part), size)


def _scienceqa_rows(problems: Path, members: frozenset[str]) -> Iterator[Raw]:
    """Yields the problems of one split, then those that it names but nobody has, to be dropped for that."""
    seen: set[str] = set()
    for name, row in stream_members(problems):
        if name in members:
            seen.add(name)
            yield {**row, "pid": name}
    yield from ({"pid": name} for name in sorted(members - seen))


def _scienceqa_row(raw: Raw, *, part: str) -> Example:
    row = Row(raw, "pid")
    choices = row.texts("choices")
    correct = row.choice("answer", choices)
    image = row.optional(row.text, "image")
    return Example(
        id=row.id,
        images=(f"images/{part}/{row.id}/{image}",) if image else (),
        question=row.non_empty("question"),
        answers=(Answer(text=choices[correct]),),
        choices=tuple(choices),
        extra={"correct": correct, "split": part}
        | {name: value for name, value in row.extra_columns(*SCIENCEQA_KEPT).items() if value},
    )


def seed_bench(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """SEED-Bench (Li et al., 2023): 14,232 questions about pictures and 5,010 about videos, four choices each.

    Files, from the Hugging Face data set `AILab-CVC/SEED-Bench`: `SEED-Bench.json` (about 8 MB),
    `SEED-Bench-image.zip`; the videos from their publishers (Something-Something v2, EPIC-Kitchens, Breakfast).
    Licence: CC BY-NC 4.0. Pictures have no ending in their name: `SEED-Bench-image/1454426_2591111986`.

    Quirks: LLaVA-1.5 takes a video's middle frame, as `SEED-Bench-video-image/<question_type_id>_<question_id>.png`;
    that path is `extra["middle_frame"]`. `segment` is in seconds and present for some videos only. Ids may be numbers
    or, in the first dimension's additions, text such as "v1".
    """
    (file,) = existing_files(folder, ["SEED-Bench.json"]).values()
    yield Split("seed", "test", (file,), partial(_seed_bench_rows, file), _seed_bench_row, 19_242)


def _seed_bench_rows(file: Path) -> Iterator[Raw]:
    with refuse_file(file):
        types = Row(json_object(file, FILE_OWNER)).mapping("question_type")
        names = {str(Row(types).integer(name)): name for name in types}
    for row in stream_records(file, "questions"):
        yield {**row, "question_type": names.get(join_key(row, "question_type_id"))}


def _seed_bench_row(raw: Raw) -> Example:
    row = Row(raw, "question_id")
    choices = [row.non_empty(f"choice_{letter}") for letter in "abcd"]
    correct = "ABCD".index(row.one_of("answer", tuple("ABCD")))
    kind = row.one_of("data_type", ("image", "video"))
    data_id, type_id = row.identifier("data_id"), row.integer("question_type_id")
    extra: dict[str, object] = {"correct": correct, "data_type": kind, "question_type_id": type_id}
    extra |= {"question_type": row.optional(row.text, "question_type") or str(type_id)}
    segment: tuple[float | None, float | None] = (None, None)
    if kind == "video":
        extra |= {MIDDLE_FRAME: f"SEED-Bench-video-image/{type_id}_{row.id}.png"}
        segment = row.optional(lambda column: row.span(column, row.get(column)), "segment") or segment
    return Example(
        id=row.id,
        images=(f"SEED-Bench-image/{data_id}",) if kind == "image" else (),
        videos=(Clip(path=data_id, start_seconds=segment[0], end_seconds=segment[1]),) if kind == "video" else (),
        question=row.non_empty("question"),
        answers=(Answer(text=choices[correct]),),
        choices=tuple(choices),
        extra=extra,
    )


TEXTVQA_PARTS = {"train": ("train", 34_602), "val": ("validation", 5_000), "test": ("test", 5_734)}
TEXTVQA_LLAVA = "llava_textvqa_val_v051_ocr.jsonl"
REFERENCE_OCR = "Reference OCR token:"


def textvqa(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """TextVQA (Singh et al., 2019): questions that need the text in the picture, ten answers each.

    Files, from textvqa.org/dataset: `TextVQA_0.5.1_{train,val,test}.json`, and the OCR of them,
    `TextVQA_Rosetta_OCR_v0.2_{train,val,test}.json`. Licence: CC BY 4.0. Pictures (OpenImages):
    `train_images/<image_id>.jpg` for train and val, `test_images/<image_id>.jpg` for test. LLaVA's question file for
    the validation set, `llava_textvqa_val_v051_ocr.jsonl`, holds other OCR tokens than Rosetta's in its prompts; where
    it is there, its tokens are `extra["reference_ocr"]`, so that LLaVA-1.5's prompt can be rebuilt exactly.

    Quirks: `question_id` counts on through the three splits; LLaVA's file has the picture's id as `question_id`, which
    is not unique, so its rows are matched by picture and question in lower case, as LLaVA's own scorer does.
    """
    files = existing_files(folder, [f"TextVQA_0.5.1_{part}.json" for part in TEXTVQA_PARTS])
    for part, (name, size) in TEXTVQA_PARTS.items():
        if questions := files.get(f"TextVQA_0.5.1_{part}.json"):
            names = [f"TextVQA_Rosetta_OCR_v0.2_{part}.json", *([TEXTVQA_LLAVA] if part == "val" else [])]
            ocr = files_in(folder, names)
            rows, convert = partial(_textvqa_rows, questions, ocr), partial(_textvqa_row, answered=part != "test")
            yield Split("textvqa", name, (questions, *ocr.values()), rows, convert, size, notes={"ocr": sorted(ocr)})


def _textvqa_rows(questions: Path, ocr: Mapping[str, Path]) -> Iterator[Raw]:
    rosetta: dict[str, Raw] = {}
    references: dict[tuple[str, str], str] = {}
    for name, path in ocr.items():
        if name != TEXTVQA_LLAVA:
            rosetta = by_id(path, stream_records(path, "data"), "image_id", "ocr_tokens")
            continue
        for where, raw in numbered(path, stream_records(path)):
            with refuse_file(where):
                row = Row(raw, "question_id")
                question, *lines = row.text("text").split("\n")
            for line in lines:
                if line.startswith(REFERENCE_OCR):
                    references[row.id, question.lower()] = line.removeprefix(REFERENCE_OCR).strip()
    for row in stream_records(questions, "data"):
        image = join_key(row, "image_id")
        reference = references.get((image, str(row.get("question")).lower()))
        yield {**row, "ocr_tokens": rosetta.get(image, {}).get("ocr_tokens"), "reference_ocr": reference}


def _textvqa_row(raw: Raw, *, answered: bool) -> Example:
    row = Row(raw, "question_id")
    image = row.identifier("image_id")
    answers = row.check_ten(row.texts("answers")) if answered else []
    extra: dict[str, object] = {"image_id": image, "question_id": row.integer("question_id")}
    extra |= {"human_answers": answers} if answers else {}
    return Example(
        id=row.id,
        images=(f"{'train_images' if answered else 'test_images'}/{image}.jpg",),
        question=row.non_empty("question"),
        answers=soft_answers(answers),
        extra=extra
        | row.extra_columns("ocr_tokens", "image_classes", take=row.texts)
        | row.extra_columns("reference_ocr"),
    )


VIZWIZ_FILES = {"train.json": ("train", 20_523), "val.json": ("validation", 4_319), "test.json": ("test", 8_000)}


def vizwiz(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """VizWiz-VQA (Gurari et al., 2018): questions that blind people asked about their own photographs.

    Ten answers each. Files, from vizwiz.org/tasks-and-datasets/vqa: `Annotations.zip` with `{train,val,test}.json`, and
    the pictures in `train.zip`, `val.zip`, `test.zip`. Licence: CC BY 4.0. Pictures: `train/VizWiz_train_00000000.jpg`
    and so on.

    Quirks: there is no question id; the picture's name is used, for each picture has one question. Test has no answers;
    the server takes [{image, answer}]. "unanswerable" is an answer, "unsuitable image" too. LLaVA-1.5 appends "When the
    provided information is insufficient, respond with 'Unanswerable'.": that belongs to its prompt, not to the record.
    """
    for file, path in existing_files(folder, VIZWIZ_FILES, inside=["Annotations"]).items():
        name, size = VIZWIZ_FILES[file]
        convert = partial(_vizwiz_row, pictures=path.stem, answered=name != "test")
        yield Split("vizwiz", name, (path,), partial(stream_records, path), convert, size)


def _vizwiz_row(raw: Raw, *, pictures: str, answered: bool) -> Example:
    row = Row(raw, "image")
    answers = row.answers_of_people() if answered else []
    return Example(
        id=row.id,
        images=(f"{pictures}/{row.id}",),
        question=row.non_empty("question"),
        answers=soft_answers(answers),
        extra=({"human_answers": answers} if answers else {}) | row.extra_columns("answer_type", "answerable"),
    )
