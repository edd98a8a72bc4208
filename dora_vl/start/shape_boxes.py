"""Pictures of several shapes, composed of easy-VQA's, and where each is: what the demo of boxes learns from.

`convert` writes pictures, and as LLaVA's JSON

- `train.json`: pictures of easy-VQA's training shapes, with a question about each shape in them;
- `test.json`: pictures of its test shapes, with one question each;
- `manifest.json`: the settings that it was made by.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dora_vl.data.objects import Box, place_of
from dora_vl.files import json_or_nothing, whole_folder, write_json
from dora_vl.start.easy_vqa import conversation, picture_path, read_questions, seen_in_pictures

QUESTION = "where is the {}?"
SIDE, SIZES, SHAPES = 224, (48, 112), (2, 4)
"""A picture's side, the least and most pixels of a shape's longer side, and the fewest and most shapes of a picture."""
CONTRAST = 24
"""A pixel that differs by more than this from the background belongs to the shape."""
PICTURES: Mapping[str, int] = {"train": 1600, "test": 300}


def shapes_of(source: Path, split: str) -> Mapping[str, Sequence[Image.Image]]:
    """Cuts out the shapes of a split by what they are ("blue circle"); what is not the shape is transparent."""
    shapes: dict[str, list[Image.Image]] = defaultdict(list)
    for number, name in seen_in_pictures(read_questions(source, split)).items():
        pixels = np.asarray(Image.open(source / picture_path(split, number)).convert("RGB")).astype(int)
        background = np.median(pixels[[0, 0, -1, -1], [0, -1, 0, -1]], axis=0)
        is_shape = np.abs(pixels - background).max(axis=-1) > CONTRAST
        rows, columns = is_shape.any(axis=1).nonzero()[0], is_shape.any(axis=0).nonzero()[0]
        if len(rows) and len(columns):
            picture = Image.fromarray(np.dstack([pixels, 255 * is_shape]).astype(np.uint8), "RGBA")
            shapes[name].append(picture.crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)))
    return shapes


def composed(shapes: Mapping[str, Sequence[Image.Image]], rng: random.Random) -> tuple[Image.Image, dict[str, Box]]:
    """Places shapes of different names beside each other; returns the picture and where each is."""
    picture = Image.new("RGBA", (SIDE, SIDE), tuple(rng.randint(220, 255) for _ in range(3)))
    boxes: dict[str, Box] = {}
    for name in rng.sample(sorted(shapes), rng.randint(*SHAPES)):
        shape = rng.choice(shapes[name])
        scale = rng.randint(*SIZES) / max(shape.size)
        width, height = (max(8, round(length * scale)) for length in shape.size)
        for _ in range(50):  # a crowded picture has fewer shapes
            left, top = rng.randint(0, SIDE - width), rng.randint(0, SIDE - height)
            corners = left, top, left + width, top + height
            if all(_apart(corners, other.corners) for other in boxes.values()):
                picture.alpha_composite(shape.resize((width, height), Image.Resampling.BICUBIC), (left, top))
                boxes[name] = Box(tuple(map(float, corners)), in_pixels=True)
                break
    return picture.convert("RGB"), boxes


def _apart(corners: Sequence[float], other: Sequence[float]) -> bool:
    x0, y0, x1, y1 = corners
    return x1 < other[0] or other[2] < x0 or y1 < other[1] or other[3] < y0


def convert(source: Path, to: Path, *, seed: int = 0) -> None:
    """Makes the folder `to` from easy-VQA's package, unless it exists with the same settings."""
    settings = {"source": "easy-vqa 1.0", "seed": seed, "side": SIDE, "pictures": dict(PICTURES)}
    if json_or_nothing(to / "manifest.json") == settings:
        return
    with whole_folder(to) as folder:
        (folder / "pictures").mkdir()
        for split, count in PICTURES.items():
            rng, shapes, rows = random.Random(f"{seed}/{split}"), shapes_of(source, split), list[dict[str, object]]()
            for number in range(count):
                picture, boxes = composed(shapes, rng)
                name = f"pictures/{split}-{number:04d}.png"
                picture.save(folder / name)
                for label in boxes if split == "train" else [*boxes][:1]:
                    answer = place_of([boxes[label].in_fractions(picture.size)])
                    turns = conversation([(QUESTION.format(label), answer)])
                    rows.append({"id": f"{split}-{number:04d}-{label.replace(' ', '-')}", "image": name,
                                 "kind": label.split()[-1], "conversations": turns})  # fmt: skip
            rng.shuffle(rows)
            (folder / f"{split}.json").write_text(json.dumps(rows, indent=0), encoding="utf-8")
        write_json(folder / "manifest.json", settings)
