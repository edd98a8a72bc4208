"""How2QA (Li et al., 2020): four-choice questions about minute-long parts of instructional videos.

Two forms, whichever is in the folder:

- VALUE's JSON lines: `how2qa_train_release.jsonl`, `how2qa_val_release.jsonl`, `how2qa_test_public_release.jsonl`
  (34,187 / 3,115 / 3,095; the validation file is in VALUE's EvaluationTools), with `how2_subtitles.jsonl`. MIT;
- the authors' CSV, github.com/ych133/How2R-and-How2QA (`how2QA_{train,val,test_public}_release.csv`), without a
  header: YouTube id, "[start:end]", three wrong answers, the question, the right answer.

Quirks: VALUE's `vid_name` is a number of its own ("25848"), to be mapped to YouTube by DataRelease's vid_mapping,
and part of it is not mapped. VALUE's validation answers are balanced over the places; the CSV's right answer always
comes last, so the choices of those rows are put into an order drawn from the row's own text, and rows get ids by
their number. Some spans of the CSV begin and end at the same second. Duplicate wrong answers occur.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    index_of,
    integer,
    json_rows,
    kept,
    key,
    mapping,
    number,
    optional,
    present,
    refusing,
    rows,
    seconds,
    some_present,
    text,
)
from dora_vl.data.example import JSON, Answer, Clip, Example, Subtitle
from dora_vl.data.text_file import NotUtf8, json_object, opened, table_rows, whole_text
from dora_vl.errors import BadSample, shown

# Subtitles of the video sets, in the forms in which they are still to be had, by video name.
#
# - VALUE's JSON lines: {vid_name, sub: [{text, start, end}]} with seconds (`tv_subtitles.jsonl`,
#   `how2_subtitles.jsonl`, `yc2_subtitles.jsonl`; also TVR's and TVC's `tvqa_preprocessed_subtitles.jsonl`);
# - a folder of `<vid_name>.srt`, as in TVQA's `tvqa_subtitles.tar.gz`. Lines of one cue are joined by spaces; a cue
#   whose times cannot be read keeps its text without times.


NO_SPAN = frozenset({"", "nan", "nan-nan"})

_TIMES = re.compile(r"\s*{0}\s*-->\s*{0}".format(r"([0-9]{1,3}):([0-9]{1,2}):([0-9]{1,2})[,.]([0-9]{1,9})"))


class Subtitles:
    """The subtitles in a folder: all of a JSON lines file at once, or one `.srt` file when it is asked for.

    Args:
        folder: where the annotations are.
        names: files and folders to look for; the first that is there counts.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.path = next((folder / name for name in names if (folder / name).exists()), None)
        self._known: dict[str, JSON] | None = None

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The file that the records depend on; a folder's files are not hashed one by one."""
        return (self.path,) if self.path is not None and self.path.is_file() else ()

    def joined(self, annotations: Iterable[Raw], progress: Progress) -> Iterator[Raw]:
        """Each row with its video's subtitles under `sub`; without subtitles the rows as they are."""
        for row in annotations:
            yield row if self.path is None else {**row, "sub": self._of(key(row, "vid_name"), progress)}

    def _of(self, video: str | None, progress: Progress) -> JSON:
        assert self.path is not None
        if video is None:
            return []
        if self.path.is_dir():
            file = self.path / f"{video}.srt"
            return read_srt(file) if file.is_file() else []
        if self._known is None:
            self._known = column_by_id(self.path, json_rows(self.path, progress), "vid_name", "sub")
        return self._known.get(video, [])


def subtitles_of(raw: Raw, sample_id: str) -> tuple[Subtitle, ...]:
    """The subtitles that `Subtitles.joined` added, in order, those of empty text too: VL-BART's prompt joins them all.

    Entries without a text are left out.
    """
    found = optional(raw, "sub", rows, sample_id) or ()
    return tuple(_subtitle(entry, sample_id) for entry in found if optional(entry, "text", text, sample_id) is not None)


def _subtitle(entry: Raw, sample_id: str) -> Subtitle:
    start, end = (
        None if given(entry, name) is None else number(given(entry, name), name, sample_id) for name in ("start", "end")
    )
    return Subtitle(text(entry, "text", sample_id).strip(), start, end)


def read_srt(path: Path) -> list[dict[str, object]]:
    """The cues of an .srt file, as VALUE's JSON has them.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        content = whole_text(path, WANTED)
    except NotUtf8:
        with opened(path, WANTED) as file:
            content = file.read().decode("latin-1")  # some of TVQA's are
    return list(parse_srt(content))


def parse_srt(content: str) -> Iterator[dict[str, object]]:
    """Yields {text, start, end} of each cue; blocks are parted by empty lines."""
    for block in re.split(r"\r?\n\s*\r?\n", content):
        lines = [line.strip() for line in block.splitlines()]
        times = next(((place, match) for place, line in enumerate(lines) if (match := _TIMES.match(line))), None)
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


def span(value: JSON, sample_id: str = UNKNOWN_ID) -> tuple[float, float] | tuple[None, None]:
    """Start and end of "20.16-25.12" or of [20.16, 25.12]; None where there is none, or it is "nan-nan".

    Raises:
        BadSample: anything else; without a span the question would be about the whole video.
    """
    if value is None or (isinstance(value, str) and value.strip().lower() in NO_SPAN):
        return None, None
    return seconds(value.split("-") if isinstance(value, str) else value, "ts", sample_id)


def video_name(raw: Raw, sample_id: str) -> str:
    """The video's name, which is text even where it is a number."""
    return identifier(raw, "vid_name", sample_id)


def kept_span(raw: Raw, sample_id: str) -> Mapping[str, object]:
    """`ts` as published, which is part of VL-BART's prompt; `span` has read it."""
    return {} if given(raw, "ts", sample_id) is None else {"ts": given(raw, "ts", sample_id)}


# What TVQA and How2QA share: VALUE's JSON lines of a question about a span of a video, with its choices.


def question_rows(
    file: Path, subtitles: Subtitles, solution: Mapping[str, int] | None, progress: Progress
) -> Iterator[Raw]:
    """The rows with their subtitles, and the right choice from `solution` where the row keeps it back."""
    rows = json_rows(file, progress)
    if solution is not None:
        rows = (_solved(row, solution) for row in rows)
    return subtitles.joined(rows, progress)


def _solved(row: Raw, solution: Mapping[str, int]) -> Raw:
    known = given(row, "answer_idx")
    return {**row, "answer_idx": solution.get(key(row, "qid") or "")} if known is None else row


def convert_question(raw: Raw, *, choices: int, answered: bool) -> Example:
    """One question.

    Args:
        choices: how many it has.
        answered: its right choice must be there.
    """
    sample_id = identifier(raw, "qid")
    texts = tuple(filled(raw, f"a{number}", sample_id) for number in range(choices))
    correct: int | None = None
    if answered or given(raw, "answer_idx") is not None:
        correct = index_of(integer(raw, "answer_idx", sample_id), texts, "answer_idx", sample_id)
    name = video_name(raw, sample_id)
    start, end = span(given(raw, "ts"), sample_id)
    return Example(
        id=sample_id,
        videos=(Clip(path=f"{name}.mp4", start_seconds=start, end_seconds=end),),
        question=filled(raw, "q", sample_id),
        answers=() if correct is None else (Answer(text=texts[correct]),),
        choices=texts,
        subtitles=subtitles_of(raw, sample_id),
        extra={"vid_name": name, **kept_span(raw, sample_id), **kept(raw, "show_name", sample_id=sample_id)}
        | ({} if correct is None else {"correct": correct}),
    )


HOW2QA_FILES = {
    "how2qa_train_release.jsonl": ("train", 34_187),
    "how2qa_val_release.jsonl": ("validation", 3_115),
    "how2qa_test_public_release.jsonl": ("test_public", 3_095),
}
CSV_FILES = {
    "how2QA_train_release.csv": "train",
    "how2QA_val_release.csv": "validation",
    "how2QA_test_public_release.csv": "test_public",
}
COLUMNS = ("vid_name", "ts", "wrong0", "wrong1", "wrong2", "question", "right")
HOW2QA_SUBTITLES = ("how2_subtitles.jsonl", "how2qa_subtitles.jsonl")
HOW2QA_CHOICES = 4


def how2qa_splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """VALUE's splits where they are there, else those of the authors' tables."""
    found = some_present(folder, [*HOW2QA_FILES, *CSV_FILES])
    subtitles = Subtitles(folder, HOW2QA_SUBTITLES)
    notes = {"subtitles": subtitles.path.name if subtitles.path else "none found"}
    for file, path in present(folder, HOW2QA_FILES).items():
        name, size = HOW2QA_FILES[file]
        yield Split(
            task="how2qa",
            name=name,
            inputs=(path, *subtitles.inputs),
            rows=partial(question_rows, path, subtitles, None),
            convert=partial(convert_question, choices=HOW2QA_CHOICES, answered=not name.startswith("test")),
            published_rows=size,
            notes=notes,
        )
    taken = {HOW2QA_FILES[file][0] for file in found if file in HOW2QA_FILES}
    for file, path in found.items():
        if file in CSV_FILES and CSV_FILES[file] not in taken:
            yield Split(
                task="how2qa",
                name=CSV_FILES[file],
                inputs=(path, *subtitles.inputs),
                rows=partial(_csv_rows, path, subtitles),
                convert=partial(convert_csv, split=CSV_FILES[file]),
                ids_by_place=True,
                notes={**notes, "form": "the authors' CSV"},
            )


def _csv_rows(path: Path, subtitles: Subtitles, progress: Progress) -> Iterator[Raw]:
    rows = table_rows(path, WANTED, delimiter=",", columns=COLUMNS, progress=progress)
    numbered = ({**row, "row": number} for number, (_, row) in enumerate(rows, start=1))
    return subtitles.joined(numbered, progress)


def convert_csv(raw: Raw, *, split: str) -> Example:
    """One row of the authors' table."""
    sample_id = f"{split}-{integer(raw, 'row')}"
    right = filled(raw, "right", sample_id)
    choices = [*(filled(raw, f"wrong{number}", sample_id) for number in range(HOW2QA_CHOICES - 1)), right]
    places = list(range(HOW2QA_CHOICES))
    random.Random("\0".join([text(raw, "vid_name"), text(raw, "question"), *choices])).shuffle(places)
    start, end = span((optional(raw, "ts", text, sample_id) or "").strip("[]").replace(":", "-"), sample_id)
    name = filled(raw, "vid_name", sample_id)
    return Example(
        id=sample_id,
        videos=(Clip(path=f"{name}.mp4", start_seconds=start, end_seconds=end),),
        question=filled(raw, "question", sample_id),
        answers=(Answer(text=right),),
        choices=tuple(choices[place] for place in places),
        subtitles=subtitles_of(raw, sample_id),
        extra={"vid_name": name, "ts": f"{start}-{end}", "correct": places.index(HOW2QA_CHOICES - 1)},
    )


# TVQA (Lei et al., 2018): five-choice questions about clips of six television series, with subtitles.
#
# Files: `tvqa_train.jsonl`, `tvqa_val.jsonl`, `tvqa_test_public.jsonl` (122,039 / 15,253 / 7,623;
# `tvqa_qa_release.tar.gz` at nlp.cs.unc.edu/data/jielei/tvqa/tvqa_public_html), in VALUE also
# `tvqa_test_release.jsonl` (15,253: test-public and -private). Subtitles: `tv_subtitles.jsonl` (VALUE),
# `tvqa_preprocessed_subtitles.jsonl` (TVR, TVC), or TVQA's `tvqa_subtitles/*.srt`. Licence: the annotations MIT-like
# for research; the clips are the broadcasters' and are given as frames after a form is signed.
#
# Quirks: `ts` is text, "20.16-25.12", and "nan-nan" in some rows: those keep no span. Test keeps `answer_idx` back;
# the server takes {qid: index}. `tvqa_val_solution.json` of VALUE's EvaluationTools ({"solution": {series: {qid:
# index}}}), where present, fills in the answers of a validation file that lacks them. Videos are called
# "<vid_name>.mp4" here; frames come as folders.


TVQA_FILES = {
    "tvqa_train.jsonl": ("train", 122_039),
    "tvqa_val.jsonl": ("validation", 15_253),
    "tvqa_test_public.jsonl": ("test_public", 7_623),
    "tvqa_test_release.jsonl": ("test", 15_253),
}
TVQA_SUBTITLES = ("tv_subtitles.jsonl", "tvqa_preprocessed_subtitles.jsonl", "tvqa_subtitles")
SOLUTION = "tvqa_val_solution.json"
TVQA_CHOICES = 5


def tvqa_splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """The splits whose questions are there."""
    found = some_present(folder, list(TVQA_FILES))
    subtitles = Subtitles(folder, TVQA_SUBTITLES)
    solved = present(folder, [SOLUTION])
    for file, path in found.items():
        name, size = TVQA_FILES[file]
        solution = solved.get(SOLUTION) if name == "validation" else None
        yield Split(
            task="tvqa",
            name=name,
            inputs=(path, *subtitles.inputs, *([solution] if solution else [])),
            rows=partial(question_rows, path, subtitles, read_solution(solution) if solution else None),
            convert=partial(convert_question, choices=TVQA_CHOICES, answered=not name.startswith("test")),
            published_rows=size,
            notes={"subtitles": subtitles.path.name if subtitles.path else "none found"},
        )


def read_solution(path: Path) -> dict[str, int]:
    """VALUE's solution file as question id -> right choice.

    Raises:
        UserError: it has another form.
    """
    with refusing(f"{path}: not {{'solution': {{series: {{qid: index}}}}}}"):
        all_series = mapping(json_object(path, WANTED), "solution")
        return {
            qid: integer(answers, qid)
            for series in all_series
            for answers in [mapping(all_series, series)]
            for qid in answers
        }


# What TVC and YC2C share: VALUE's JSON lines of a clip and its descriptions.


def caption_split(task: str, name: str, file: Path, subtitles: Subtitles, size: int | None) -> Split:
    """A file of clips as one split; the descriptions of test sets are kept back."""
    return Split(
        task=task,
        name=name,
        inputs=(file, *subtitles.inputs),
        rows=partial(_rows, file, subtitles),
        convert=partial(convert_clip, answered=not name.startswith("test")),
        published_rows=size,
        notes={"subtitles": subtitles.path.name if subtitles.path else "none found"},
    )


def _rows(file: Path, subtitles: Subtitles, progress: Progress) -> Iterator[Raw]:
    return subtitles.joined(json_rows(file, progress), progress)


def convert_clip(raw: Raw, *, answered: bool) -> Example:
    """One clip with all of its descriptions.

    Args:
        answered: it must have one.
    """
    clip_id = integer(raw, "clip_id")
    sample_id = str(clip_id)
    found = optional(raw, "descs", rows, sample_id) or ()
    descriptions = [told for entry in found if (told := text(entry, "desc", sample_id)).strip()]
    if answered and not any(descriptions):
        raise BadSample(sample_id, "it has no description")
    name = video_name(raw, sample_id)
    start, end = span(given(raw, "ts"), sample_id)
    return Example(
        id=sample_id,
        videos=(Clip(path=f"{name}.mp4", start_seconds=start, end_seconds=end),),
        answers=tuple(Answer(text=description) for description in descriptions if description),
        subtitles=subtitles_of(raw, sample_id),
        extra={
            "clip_id": clip_id,
            "vid_name": name,
            **kept_span(raw, sample_id),
            **kept(raw, "duration", sample_id=sample_id),
            **_kinds(found, sample_id),
        },
    )


def _kinds(found: Iterable[Raw], sample_id: str) -> Mapping[str, object]:
    """Whether each description was written from video, text or both, where the set says it."""
    kinds = [kind for entry in found if (kind := optional(entry, "type", text, sample_id))]
    return {"description_types": kinds} if kinds else {}


# TVC (Lei et al., 2020): descriptions of moments in television clips, with subtitles.
#
# Files: `tvc_train_release.jsonl`, `tvc_val_release.jsonl` (github.com/jayleicn/TVCaption; 86,603 clips with about
# two descriptions each, 10,895 with four) and `tvc_test_public_release.jsonl` (VALUE's `tvc_test_release.jsonl`;
# about 10,840, descriptions kept back). Subtitles as for TVQA. Licence: MIT (annotations); the clips are the
# broadcasters'.
#
# Quirks: one record a clip, with all its descriptions: official scoring groups references by `clip_id`, and the
# reference code, which treats each description as an item of its own, generates for every validation clip four times.
# `ts` is a list here, text in TVQA; VL-BART's prompt shows it as Python does, "([16.48, 33.87])". VALUE's table gives
# 15,253 test clips, copied from TVQA.


TVC_FILES = {
    "tvc_train_release.jsonl": ("train", 86_603),
    "tvc_val_release.jsonl": ("validation", 10_895),
    "tvc_test_public_release.jsonl": ("test_public", None),
    "tvc_test_release.jsonl": ("test", None),
}


def tvc_splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """The splits that are there."""
    subtitles = Subtitles(folder, TVQA_SUBTITLES)
    for file, path in some_present(folder, list(TVC_FILES)).items():
        name, size = TVC_FILES[file]
        yield caption_split("tvc", name, path, subtitles, size)


# YC2C (VALUE, 2021, from YouCook2, Zhou et al., 2018): one description of each step of a cooking video.
#
# Two forms, whichever is in the folder:
#
# - VALUE's JSON lines: `yc2c_train_release.jsonl`, `yc2c_val_release.jsonl`, `yc2c_test_release.jsonl` (10,337 /
#   3,492 / 1,604; the validation file is in VALUE's EvaluationTools), with `yc2_subtitles.jsonl`. MIT;
# - YouCook2's own `youcookii_annotations_trainval.json` (youcook2.eecs.umich.edu; 1,333 and 457 videos): training and
#   validation steps with their place in the whole video. Its test descriptions were never published.
#
# Quirks: VALUE cuts the videos: "<YouTube id>_<step>" is a video of its own, has `duration` and no `ts`. From
# YouCook2's file the record points into the whole video instead, and its id is that same name, because it has no
# `clip_id`. VALUE's table of sizes is a copy of VATEX's; those above are counted.


YC2C_FILES = {
    "yc2c_train_release.jsonl": ("train", 10_337),
    "yc2c_val_release.jsonl": ("validation", 3_492),
    "yc2c_test_release.jsonl": ("test", 1_604),
}
YOUCOOK2 = "youcookii_annotations_trainval.json"
SUBSETS = {"training": "train", "validation": "validation"}
YC2C_SUBTITLES = ("yc2_subtitles.jsonl",)


def yc2c_splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """VALUE's splits where they are there, else YouCook2's."""
    found = some_present(folder, [*YC2C_FILES, YOUCOOK2])
    subtitles = Subtitles(folder, YC2C_SUBTITLES)
    value = present(folder, YC2C_FILES)
    for file, path in value.items():
        name, size = YC2C_FILES[file]
        yield caption_split("yc2c", name, path, subtitles, size)
    for subset, name in {} if value else SUBSETS.items():
        yield Split(
            task="yc2c",
            name=name,
            inputs=(found[YOUCOOK2],),
            rows=partial(_youcook2_rows, found[YOUCOOK2], subset),
            convert=convert_youcook2,
            notes={"form": "YouCook2's annotations"},
        )


def _youcook2_rows(path: Path, subset: str, progress: Progress) -> Iterator[Raw]:
    with refusing(f"{path}: not YouCook2's {{'database': {{video: ...}}}}"):
        videos = mapping(json_object(path, WANTED), "database")
        progress(path.stat().st_size)
    for video in videos:
        with refusing(f"{path}, video {shown(video)}"):
            entry = mapping(videos, video)
            steps = rows(entry, "annotations") if filled(entry, "subset") == subset else ()
        for step in steps:
            yield {**step, "video": video, "recipe_type": given(entry, "recipe_type")}


def convert_youcook2(raw: Raw) -> Example:
    """One step of a recipe."""
    video = filled(raw, "video")
    name = f"{video}_{integer(raw, 'id', video)}"
    start, end = seconds(given(raw, "segment"), "segment", name)
    return Example(
        id=name,
        videos=(Clip(path=f"{video}.mp4", start_seconds=start, end_seconds=end),),
        answers=(Answer(text=" ".join(filled(raw, "sentence", name).split())),),
        extra={"clip_id": name, "vid_name": name, "recipe_type": optional(raw, "recipe_type", text, name)},
    )
