"""SEED-Bench (Li et al., 2023): 14,232 questions about pictures and 5,010 about videos, four choices each.

Files, from the Hugging Face data set `AILab-CVC/SEED-Bench`: `SEED-Bench.json` (about 8 MB),
`SEED-Bench-image.zip`; the videos from their publishers (Something-Something v2, EPIC-Kitchens, Breakfast).
Licence: CC BY-NC 4.0. Pictures have no ending in their name: `SEED-Bench-image/1454426_2591111986`.

Quirks: LLaVA-1.5 takes a video's middle frame, as `SEED-Bench-video-image/<question_type_id>_<question_id>.png`;
that path is `extra["middle_frame"]`. `segment` is in seconds and present for some videos only. Ids may be numbers
or, in the first dimension's additions, text such as "v1".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from dora_vl.data.examples import MIDDLE_FRAME, Answer, Clip, Example
from dora_vl.data.text_file import json_object
from dora_vl.errors import BadSample, shown
from dora_vl.sources.fields import filled, given, identifier, integer, key, mapping, optional, seconds, text
from dora_vl.sources.joins import refusing
from dora_vl.sources.published import WANTED, Progress, Raw, Split, json_rows, only_test_split, some_present

FILE = "SEED-Bench.json"
LETTERS = "ABCD"


def splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """The one test split."""
    file = some_present(folder, [FILE])[FILE]
    yield only_test_split(file, task="seed", rows=_rows, convert=convert, published_rows=19_242)


def _rows(file: Path, progress: Progress) -> Iterator[Raw]:
    names = _question_types(file)
    for row in json_rows(file, progress, "questions"):
        yield {**row, "question_type": names.get(key(row, "question_type_id") or "")}


def _question_types(file: Path) -> dict[str, str]:
    """Number, as text -> name."""
    with refusing(file):
        types = mapping(json_object(file, WANTED), "question_type")
        return {str(integer(types, name)): name for name in types}


def convert(raw: Raw) -> Example:
    """One question."""
    sample_id = identifier(raw, "question_id")
    choices = tuple(filled(raw, f"choice_{letter.lower()}", sample_id) for letter in LETTERS)
    answer = filled(raw, "answer", sample_id)
    if answer not in LETTERS or len(answer) != 1:
        raise BadSample(sample_id, f"its answer is {shown(answer)}, which is not one of {LETTERS}")
    kind = filled(raw, "data_type", sample_id)
    if kind not in {"image", "video"}:
        raise BadSample(sample_id, f"its data_type is {shown(kind)}, which is neither 'image' nor 'video'")
    data_id, type_id = identifier(raw, "data_id", sample_id), integer(raw, "question_type_id", sample_id)
    correct = LETTERS.index(answer)
    frame = {MIDDLE_FRAME: f"SEED-Bench-video-image/{type_id}_{sample_id}.png"} if kind == "video" else {}
    return Example(
        id=sample_id,
        images=(f"SEED-Bench-image/{data_id}",) if kind == "image" else (),
        video=_clip(raw, data_id, sample_id) if kind == "video" else None,
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
