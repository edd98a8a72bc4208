"""Sets of videos that VL-BART is trained on: TVQA, How2QA, TVC and YC2C, with subtitles."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

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
    refuse_file,
)
from dora_vl.data.example import JSON, Answer, Clip, Example, Subtitle
from dora_vl.data.text_file import NotUtf8, json_object, opened, stream_records, table_rows, whole_text
from dora_vl.errors import short_repr

_TIMES = re.compile(r"\s*{0}\s*-->\s*{0}".format(r"([0-9]{1,3}):([0-9]{1,2}):([0-9]{1,2})[,.]([0-9]{1,9})"))


class Subtitles:
    """Subtitles by video name, in the forms that are still available; from the first of `names` that exists.

    VALUE's JSON lines: {vid_name, sub: [{text, start, end}]} with seconds (also TVR's and TVC's
    `tvqa_preprocessed_subtitles.jsonl`), read at once; or a folder of `<vid_name>.srt`, as in TVQA's
    `tvqa_subtitles.tar.gz`, read one by one and not hashed.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.path = next((folder / name for name in names if (folder / name).exists()), None)
        self.inputs = (self.path,) if self.path is not None and self.path.is_file() else ()
        self.notes = {"subtitles": self.path.name if self.path else "none found"}
        self._known: dict[str, Raw] | None = None

    def joined(self, annotations: Iterable[Raw]) -> Iterator[Raw]:
        """Yields each row with its video's subtitles under `sub`; without subtitles the rows as they are."""
        for row in annotations:
            yield row if self.path is None else {**row, "sub": self._of(self.path, join_key(row, "vid_name"))}

    def _of(self, path: Path, video: str) -> JSON:
        if path.is_dir():
            file = path / f"{video}.srt"
            return read_srt(file) if video and file.is_file() else []
        if self._known is None:
            self._known = by_id(path, stream_records(path), "vid_name", "sub")
        return self._known.get(video, {"sub": []})["sub"]

    def rows(self, file: Path, solution: Mapping[str, int]) -> Iterator[Raw]:
        """Returns the rows with their subtitles, and the right choice from `solution` where the row lacks it."""
        rows = stream_records(file)
        if solution:
            rows = (
                {"answer_idx": solution.get(join_key(row, "qid"))}
                | {name: row[name] for name in row if row[name] is not None}
                for row in rows
            )
        return self.joined(rows)


def read_srt(path: Path) -> list[dict[str, object]]:
    """Returns the cues of an .srt file, as VALUE's JSON has them."""
    try:
        content = whole_text(path, FILE_OWNER)
    except NotUtf8:
        with opened(path, FILE_OWNER) as file:
            content = file.read().decode("latin-1")  # some of TVQA's are
    return list(parse_srt(content))


def parse_srt(content: str) -> Iterator[dict[str, object]]:
    """Yields {text, start, end} of each cue, its lines joined by spaces; times that cannot be read are None."""
    for block in re.split(r"\r?\n\s*\r?\n", content):
        lines = [line.strip() for line in block.splitlines()]
        times = next(((index, match) for index, line in enumerate(lines) if (match := _TIMES.match(line))), None)
        if times is None:
            spoken = [line for line in lines if line and not line.isdigit()]
            start = end = None
        else:
            spoken = [line for line in lines[times[0] + 1 :] if line]
            start, end = _seconds(times[1].groups()[:4]), _seconds(times[1].groups()[4:])
        if spoken:
            yield {"text": " ".join(spoken), "start": start, "end": end}


def _seconds(parts: Sequence[str]) -> float:
    hours, minutes, seconds, fraction = parts
    return round(int(hours) * 3600 + int(minutes) * 60 + int(seconds) + float(f"0.{fraction}"), 3)


def subtitles_of(row: Row) -> tuple[Subtitle, ...]:
    """Returns the subtitles in order, those of empty text too: VL-BART's prompt joins them all; without a text none."""
    return tuple(
        Subtitle(
            entry.text("text").strip(),
            *(None if entry.get(name) is None else entry.number(name, entry.get(name)) for name in ("start", "end")),
        )
        for entry in row.optional(row.rows, "sub") or ()
        if entry.get("text") is not None
    )


def span(value: JSON, sample_id: str = UNKNOWN_ID) -> tuple[float, float] | tuple[None, None]:
    """Returns start and end of "20.16-25.12" or of [20.16, 25.12]; None where there is none, or it is "nan-nan"."""
    if value is None or (isinstance(value, str) and value.strip().lower() in {"", "nan", "nan-nan"}):
        return None, None
    return Row({}, sample_id=sample_id).span("ts", value.split("-") if isinstance(value, str) else value)


def _clip(row: Row) -> tuple[Clip, dict[str, object]]:
    """Returns the part of a video that a row is about, and what `extra` keeps: VL-BART's prompt shows `ts` as it is."""
    name, (start, end) = row.identifier("vid_name"), span(row.get("ts"), row.id)
    extra: dict[str, object] = {"vid_name": name, **({} if row.get("ts") is None else {"ts": row.get("ts")})}
    return Clip(path=f"{name}.mp4", start_seconds=start, end_seconds=end), extra


def question_row(raw: Raw, *, choices: int, answered: bool) -> Example:
    """Returns one question of TVQA or How2QA with its choices; where `answered`, its right choice must be there."""
    row = Row(raw, "qid")
    texts = [row.non_empty(f"a{number}") for number in range(choices)]
    correct = row.choice("answer_idx", texts) if answered or row.get("answer_idx") is not None else None
    clip, extra = _clip(row)
    return Example(
        id=row.id,
        videos=(clip,),
        question=row.non_empty("q"),
        answers=() if correct is None else (Answer(text=texts[correct]),),
        choices=tuple(texts),
        subtitles=subtitles_of(row),
        extra=extra | row.extra_columns("show_name") | ({} if correct is None else {"correct": correct}),
    )


TV_SUBTITLES = ("tv_subtitles.jsonl", "tvqa_preprocessed_subtitles.jsonl", "tvqa_subtitles")
TVQA_FILES = {
    "tvqa_train.jsonl": ("train", 122_039),
    "tvqa_val.jsonl": ("validation", 15_253),
    "tvqa_test_public.jsonl": ("test_public", 7_623),
    "tvqa_test_release.jsonl": ("test", 15_253),
}
TVQA_SOLUTION = "tvqa_val_solution.json"


def tvqa(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """TVQA (Lei et al., 2018): five-choice questions about clips of six television series, with subtitles.

    Files: `tvqa_{train,val,test_public}.jsonl` (`tvqa_qa_release.tar.gz` at
    nlp.cs.unc.edu/data/jielei/tvqa/tvqa_public_html), in VALUE also `tvqa_test_release.jsonl` (test-public and
    -private). Subtitles: `tv_subtitles.jsonl` (VALUE), `tvqa_preprocessed_subtitles.jsonl` (TVR, TVC), or TVQA's
    `tvqa_subtitles/*.srt`. Licence: the annotations MIT-like for research; the clips are the broadcasters' and are
    given as frames after a form is signed.

    Quirks: `ts` is text, "20.16-25.12", and "nan-nan" in some rows: those keep no span. Test keeps `answer_idx` back;
    the server takes {qid: index}. `tvqa_val_solution.json` of VALUE's EvaluationTools ({"solution": {series: {qid:
    index}}}) fills in the answers of a validation file that lacks them. Videos are called "<vid_name>.mp4" here.
    """
    subtitles = Subtitles(folder, TV_SUBTITLES)
    for file, path in existing_files(folder, TVQA_FILES).items():
        name, size = TVQA_FILES[file]
        solved = files_in(folder, [TVQA_SOLUTION] if name == "validation" else [])
        solution = {qid: index for answers in solved.values() for qid, index in read_solution(answers).items()}
        rows = partial(subtitles.rows, path, solution)
        convert = partial(question_row, choices=5, answered=not name.startswith("test"))
        inputs = (path, *subtitles.inputs, *solved.values())
        yield Split("tvqa", name, inputs, rows, convert, size, notes=subtitles.notes)


def read_solution(path: Path) -> dict[str, int]:
    """Reads VALUE's solution file: maps a question's id to the right choice."""
    with refuse_file(f"{path}: not {{'solution': {{series: {{qid: index}}}}}}"):
        all_series = Row(json_object(path, FILE_OWNER)).mapping("solution")
        solutions = [Row(all_series).mapping(series) for series in all_series]
        return {qid: Row(answers).integer(qid) for answers in solutions for qid in answers}


HOW2QA_FILES = {
    "how2qa_train_release.jsonl": ("train", 34_187),
    "how2qa_val_release.jsonl": ("validation", 3_115),
    "how2qa_test_public_release.jsonl": ("test_public", 3_095),
}
HOW2QA_CSV = {
    "how2QA_train_release.csv": "train",
    "how2QA_val_release.csv": "validation",
    "how2QA_test_public_release.csv": "test_public",
}


def how2qa(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """How2QA (Li et al., 2020): four-choice questions about minute-long parts of instructional videos.

    Two forms, whichever is in the folder: VALUE's JSON lines `how2qa_{train,val,test_public}_release.jsonl` (the
    validation file is in VALUE's EvaluationTools), with `how2_subtitles.jsonl`, licence MIT; or the authors' CSV,
    github.com/ych133/How2R-and-How2QA (`how2QA_{train,val,test_public}_release.csv`), without a header: YouTube id,
    "[start:end]", three wrong answers, the question, the right answer.

    Quirks: VALUE's `vid_name` is a number of its own ("25848"), to be mapped to YouTube by DataRelease's vid_mapping,
    and part of it is not mapped. VALUE's validation answers are balanced over the places; the CSV's right answer always
    comes last, so the choices of those rows are put into an order drawn from the row's own text, and rows get ids by
    their number. Some spans of the CSV begin and end at the same second. Duplicate wrong answers occur.
    """
    files = existing_files(folder, [*HOW2QA_FILES, *HOW2QA_CSV])
    subtitles = Subtitles(folder, ("how2_subtitles.jsonl", "how2qa_subtitles.jsonl"))
    taken: set[str] = set()
    for file, path in files.items():
        inputs, notes = (path, *subtitles.inputs), subtitles.notes
        if file in HOW2QA_FILES:
            name, size = HOW2QA_FILES[file]
            taken.add(name)
            convert = partial(question_row, choices=4, answered=not name.startswith("test"))
            yield Split("how2qa", name, inputs, partial(subtitles.rows, path, {}), convert, size, notes=notes)
        elif (name := HOW2QA_CSV[file]) not in taken:
            rows, convert = partial(_how2qa_csv_rows, path, subtitles), partial(_how2qa_csv_row, split=name)
            notes = {**notes, "form": "the authors' CSV"}
            yield Split("how2qa", name, inputs, rows, convert, ids_by_place=True, notes=notes)


def _how2qa_csv_rows(path: Path, subtitles: Subtitles) -> Iterator[Raw]:
    columns = ("vid_name", "ts", "wrong0", "wrong1", "wrong2", "question", "right")
    rows = table_rows(path, FILE_OWNER, delimiter=",", columns=columns)
    return subtitles.joined(({**row, "row": number} for number, (_, row) in enumerate(rows, start=1)))


def _how2qa_csv_row(raw: Raw, *, split: str) -> Example:
    row = Row(raw)
    row.id = f"{split}-{row.integer('row')}"
    right = row.non_empty("right")
    choices = [*(row.non_empty(f"wrong{number}") for number in range(3)), right]
    order = list(range(4))
    random.Random("\0".join([row.text("vid_name"), row.text("question"), *choices])).shuffle(order)
    start, end = span((row.optional(row.text, "ts") or "").strip("[]").replace(":", "-"), row.id)
    name = row.non_empty("vid_name")
    return Example(
        id=row.id,
        videos=(Clip(path=f"{name}.mp4", start_seconds=start, end_seconds=end),),
        question=row.non_empty("question"),
        answers=(Answer(text=right),),
        choices=tuple(choices[index] for index in order),
        subtitles=subtitles_of(row),
        extra={"vid_name": name, "ts": f"{start}-{end}", "correct": order.index(3)},
    )


TVC_FILES = {
    "tvc_train_release.jsonl": ("train", 86_603),
    "tvc_val_release.jsonl": ("validation", 10_895),
    "tvc_test_public_release.jsonl": ("test_public", None),
    "tvc_test_release.jsonl": ("test", None),
}


def tvc(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """TVC (Lei et al., 2020): descriptions of moments in television clips, with subtitles.

    Files: `tvc_{train,val}_release.jsonl` (github.com/jayleicn/TVCaption; about two descriptions a clip, four in
    validation) and `tvc_test_public_release.jsonl` (VALUE's `tvc_test_release.jsonl`; about 10,840, descriptions kept
    back). Subtitles as for TVQA. Licence: MIT (annotations); the clips are the broadcasters'.

    Quirks: one record a clip, with all its descriptions: official scoring groups references by `clip_id`, and the
    reference code, which treats each description as an item of its own, generates for every validation clip four times.
    `ts` is a list here, text in TVQA; VL-BART's prompt shows it as Python does, "([16.48, 33.87])". VALUE's table gives
    15,253 test clips, copied from TVQA.
    """
    yield from _clip_splits("tvc", existing_files(folder, TVC_FILES), TVC_FILES, Subtitles(folder, TV_SUBTITLES))


def _clip_splits(
    task: str, paths: Mapping[str, Path], files: Mapping[str, tuple[str, int | None]], subtitles: Subtitles
) -> Iterator[Split]:
    """Yields each file of clips as one split; the descriptions of test sets are kept back."""
    for file, path in paths.items():
        name, size = files[file]
        rows, convert = partial(subtitles.rows, path, {}), partial(clip_row, answered=not name.startswith("test"))
        yield Split(task, name, (path, *subtitles.inputs), rows, convert, size, notes=subtitles.notes)


def clip_row(raw: Raw, *, answered: bool) -> Example:
    """Returns one clip of TVC or YC2C with all of its descriptions; where `answered`, it must have one."""
    row = Row(raw, "clip_id")
    entries = row.optional(row.rows, "descs") or []
    descriptions = [text for entry in entries if (text := entry.text("desc")).strip()]
    if answered and not descriptions:
        raise row.error("it has no description")
    clip, extra = _clip(row)
    extra = {"clip_id": row.integer("clip_id"), **extra, **row.extra_columns("duration")}
    # whether each description was written from video, text or both, where the set says it
    if kinds := [kind for entry in entries if (kind := entry.optional(entry.text, "type"))]:
        extra |= {"description_types": kinds}
    return Example(
        id=row.id,
        videos=(clip,),
        answers=tuple(Answer(text=description) for description in descriptions),
        subtitles=subtitles_of(row),
        extra=extra,
    )


YC2C_FILES = {
    "yc2c_train_release.jsonl": ("train", 10_337),
    "yc2c_val_release.jsonl": ("validation", 3_492),
    "yc2c_test_release.jsonl": ("test", 1_604),
}
YOUCOOK2 = "youcookii_annotations_trainval.json"


def yc2c(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """YC2C (VALUE, 2021, from YouCook2, Zhou et al., 2018): one description of each step of a cooking video.

    Two forms, whichever is in the folder: VALUE's JSON lines `yc2c_{train,val,test}_release.jsonl` (the validation file
    is in VALUE's EvaluationTools), with `yc2_subtitles.jsonl`, licence MIT; or YouCook2's own
    `youcookii_annotations_trainval.json` (youcook2.eecs.umich.edu; 1,333 and 457 videos): training and validation steps
    with their place in the whole video. Its test descriptions were never published.

    Quirks: VALUE cuts the videos: "<YouTube id>_<step>" is a video of its own, has `duration` and no `ts`. From
    YouCook2's file the record points into the whole video instead, and its id is that same name, because it has no
    `clip_id`. VALUE's table of sizes is a copy of VATEX's; those here are counted.
    """
    files = existing_files(folder, [*YC2C_FILES, YOUCOOK2])
    if value := files_in(folder, YC2C_FILES):
        yield from _clip_splits("yc2c", value, YC2C_FILES, Subtitles(folder, ("yc2_subtitles.jsonl",)))
        return
    file, notes = files[YOUCOOK2], {"form": "YouCook2's annotations"}
    for subset, name in (("training", "train"), ("validation", "validation")):
        yield Split("yc2c", name, (file,), partial(_youcook2_rows, file, subset), _youcook2_row, notes=notes)


def _youcook2_rows(path: Path, subset: str) -> Iterator[Raw]:
    with refuse_file(f"{path}: not YouCook2's {{'database': {{video: ...}}}}"):
        videos = Row(json_object(path, FILE_OWNER)).mapping("database")
    for video in videos:
        with refuse_file(f"{path}, video {short_repr(video)}"):
            entry = Row(Row(videos).mapping(video))
            steps = entry.rows("annotations") if entry.non_empty("subset") == subset else ()
        for step in steps:
            yield {**step.raw, "video": video, "recipe_type": entry.get("recipe_type")}


def _youcook2_row(raw: Raw) -> Example:
    row = Row(raw)
    video = row.non_empty("video")
    row.id = f"{video}_{row.integer('id')}"
    start, end = row.span("segment", row.get("segment"))
    return Example(
        id=row.id,
        videos=(Clip(path=f"{video}.mp4", start_seconds=start, end_seconds=end),),
        answers=(Answer(text=" ".join(row.non_empty("sentence").split())),),
        extra={"clip_id": row.id, "vid_name": row.id, "recipe_type": row.optional(row.text, "recipe_type")},
    )
