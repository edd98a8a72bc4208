"""YC2C (VALUE, 2021, from YouCook2, Zhou et al., 2018): one description of each step of a cooking video.

Two forms, whichever is in the folder:

- VALUE's JSON lines: `yc2c_train_release.jsonl`, `yc2c_val_release.jsonl`, `yc2c_test_release.jsonl` (10,337 /
  3,492 / 1,604; the validation file is in VALUE's EvaluationTools), with `yc2_subtitles.jsonl`. MIT;
- YouCook2's own `youcookii_annotations_trainval.json` (youcook2.eecs.umich.edu; 1,333 and 457 videos): training and
  validation steps with their place in the whole video. Its test descriptions were never published.

Quirks: VALUE cuts the videos: "<YouTube id>_<step>" is a video of its own, has `duration` and no `ts`. From
YouCook2's file the record points into the whole video instead, and its id is that same name, because it has no
`clip_id`. VALUE's table of sizes is a copy of VATEX's; those above are counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from data_prep.fields import filled, given, integer, mapping, optional, rows, seconds, text
from data_prep.joins import refusing
from data_prep.published import WANTED, Progress, Raw, Split, present, some_present
from data_prep.subtitles import Subtitles
from data_prep.video_captions import caption_split
from dora_vl.data.examples import Answer, Clip, Example
from dora_vl.data.text_file import json_object
from dora_vl.errors import shown

FILES = {
    "yc2c_train_release.jsonl": ("train", 10_337),
    "yc2c_val_release.jsonl": ("validation", 3_492),
    "yc2c_test_release.jsonl": ("test", 1_604),
}
YOUCOOK2 = "youcookii_annotations_trainval.json"
SUBSETS = {"training": "train", "validation": "validation"}
SUBTITLES = ("yc2_subtitles.jsonl",)


def splits(folder: Path, options: Mapping[str, str], records: Path) -> Iterator[Split]:
    """VALUE's splits where they are there, else YouCook2's."""
    found = some_present(folder, [*FILES, YOUCOOK2])
    subtitles = Subtitles(folder, SUBTITLES)
    value = present(folder, FILES)
    for file, path in value.items():
        name, size = FILES[file]
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
        video=Clip(path=f"{video}.mp4", start_seconds=start, end_seconds=end),
        answers=(Answer(text=" ".join(filled(raw, "sentence", name).split())),),
        extra={"clip_id": name, "vid_name": name, "recipe_type": optional(raw, "recipe_type", text, name)},
    )
