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
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from data_prep.fields import filled, integer, optional, text
from data_prep.published import WANTED, Progress, Raw, Split, present, some_present
from data_prep.subtitles import Subtitles, span, subtitles_of
from data_prep.video_questions import convert_question, question_rows
from dora_vl.data.examples import Answer, Clip, Example
from dora_vl.data.text_file import table_rows

FILES = {
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
SUBTITLES = ("how2_subtitles.jsonl", "how2qa_subtitles.jsonl")
CHOICES = 4


def splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """VALUE's splits where they are there, else those of the authors' tables."""
    found = some_present(folder, [*FILES, *CSV_FILES])
    subtitles = Subtitles(folder, SUBTITLES)
    notes = {"subtitles": subtitles.path.name if subtitles.path else "none found"}
    for file, path in present(folder, FILES).items():
        name, size = FILES[file]
        yield Split(
            task="how2qa",
            name=name,
            inputs=(path, *subtitles.inputs),
            rows=partial(question_rows, path, subtitles, None),
            convert=partial(convert_question, choices=CHOICES, answered=not name.startswith("test")),
            published_rows=size,
            notes=notes,
        )
    taken = {FILES[file][0] for file in found if file in FILES}
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
    choices = [*(filled(raw, f"wrong{number}", sample_id) for number in range(CHOICES - 1)), right]
    places = list(range(CHOICES))
    random.Random("\0".join([text(raw, "vid_name"), text(raw, "question"), *choices])).shuffle(places)
    start, end = span((optional(raw, "ts", text, sample_id) or "").strip("[]").replace(":", "-"), sample_id)
    name = filled(raw, "vid_name", sample_id)
    return Example(
        id=sample_id,
        video=Clip(path=f"{name}.mp4", start_seconds=start, end_seconds=end),
        question=filled(raw, "question", sample_id),
        answers=(Answer(text=right),),
        choices=tuple(choices[place] for place in places),
        subtitles=subtitles_of(raw, sample_id),
        extra={"vid_name": name, "ts": f"{start}-{end}", "correct": places.index(CHOICES - 1)},
    )
