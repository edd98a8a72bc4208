"""Boxes and points: where something is in a picture, and the place in a text that holds them.

A text holds them as `<objects>[{"box": [0.1, 0.2, 0.5, 0.6], "label": "dog"}]</objects>`, so they travel as text does:
through records, tables and caches. `box` and `point` are fractions of the picture as it is shown (after EXIF's
turning), `box_px` and `point_px` its pixels; `image` counts the conversation's pictures from 0. What a model reads in
their place is its family's own form (`backbones.families.boxes`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import isfinite
from typing import Any

from dora_vl.data.example import Example
from dora_vl.errors import short_repr

Size = tuple[int, int]
"""Width and height in pixels."""

PLACE = re.compile(r"<objects>(\[\{.*?\}\])</objects>", re.DOTALL)
OVERHANG = 0.01
"""A corner may be outside its picture by this share of a side, as rounded annotations are; it is then moved inside."""


@dataclass(frozen=True)
class Box:
    """A box or a point of one picture.

    Attributes:
        corners: x0, y0, x1, y1 from the picture's top left; x, y of a point; none where only a label is said.
        label: what is there; empty where nothing is said.
        image: the picture's number in its conversation, from 0.
        in_pixels: the corners are pixels, not fractions.
        confidence: the writer's, where there is one.
    """

    corners: tuple[float, ...]
    label: str = ""
    image: int = 0
    in_pixels: bool = False
    confidence: float | None = None

    def in_fractions(self, size: Size) -> Box:
        """Returns the box in fractions of a picture of this size. Raises ValueError: it is not inside the picture."""
        sides = size * 2 if self.in_pixels else (1, 1, 1, 1)
        corners = [corner / side for corner, side in zip(self.corners, sides, strict=False)]
        if any(not -OVERHANG <= corner <= 1 + OVERHANG for corner in corners):
            unit = f"pixels of a picture of {size[0]} x {size[1]}" if self.in_pixels else "fractions, from 0 to 1"
            raise ValueError(f"the {self.named()} is outside its picture; its numbers are {unit}")
        corners = [min(max(corner, 0.0), 1.0) for corner in corners]
        if len(corners) == 4 and (corners[0] >= corners[2] or corners[1] >= corners[3]):
            raise ValueError(f"the {self.named()} is empty or reversed; a box is x0, y0, x1, y1, not x, y, w, h")
        return replace(self, corners=tuple(corners), in_pixels=False)

    def pixels(self, size: Size) -> tuple[float, ...]:
        """Returns the corners in pixels of a picture of this size."""
        return tuple(corner * side for corner, side in zip(self.corners, size * 2, strict=False))

    def named(self) -> str:
        """Names it for a message."""
        kind = {0: "label", 2: "point"}.get(len(self.corners), "box")
        numbers = ", ".join(f"{corner:g}" for corner in self.corners)
        return " ".join(filter(None, (kind, f"[{numbers}]" if numbers else "", self.label and f"of {self.label!r}")))


def iou(box: Box, other: Box) -> float:
    """Returns the area that two boxes share, over the area that both cover; 0 where one is no box."""
    if len(box.corners) != 4 or len(other.corners) != 4 or box.image != other.image:
        return 0.0
    (x0, y0, x1, y1), (u0, v0, u1, v1) = box.corners, other.corners
    shared = max(0.0, min(x1, u1) - max(x0, u0)) * max(0.0, min(y1, v1) - max(y0, v0))
    areas = (x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0)
    return shared / (areas - shared) if areas > shared else 0.0


def place_of(boxes: Sequence[Box]) -> str:
    """Returns the text of a place that holds these."""
    entries: list[dict[str, Any]] = []
    for box in boxes:
        entry: dict[str, Any] = {}
        if box.corners:
            kind = "point" if len(box.corners) == 2 else "box"
            entry[f"{kind}_px" if box.in_pixels else kind] = [round(corner, 6) for corner in box.corners]
        about = {"label": box.label, "image": box.image, "confidence": box.confidence}
        entries.append(entry | {name: value for name, value in about.items() if value not in ("", 0, None)})
    return f"<objects>{json.dumps(entries, ensure_ascii=False)}</objects>"


def asks_for_boxes(example: Example) -> bool:
    """Tells whether the right answer holds boxes."""
    return any(PLACE.search(answer.text) for answer in example.answers)


def matched(true: str, answer: str) -> list[float]:
    """Returns the overlap of each true box with its own of the answer, and a zero for each that is left in either.

    Boxes of one label are matched one to one, the largest overlap first; a true box without a label takes any.
    """
    ours, theirs = (list(chain.from_iterable(boxes_in(text))) for text in (answer, true))
    pairs = [(iou(one, other), i, j) for i, one in enumerate(theirs) for j, other in enumerate(ours)
             if one.label.casefold() in ("", other.label.casefold())]  # fmt: skip
    overlaps, used = [], set[tuple[str, int]]()
    for share, i, j in sorted(pairs, key=lambda pair: -pair[0]):
        if share > 0 and used.isdisjoint({("true", i), ("answer", j)}):
            used |= {("true", i), ("answer", j)}
            overlaps.append(share)
    return overlaps + [0.0] * (max(len(ours), len(theirs)) - len(overlaps))


_CORNERS = {"box": 4, "point": 2, "box_px": 4, "point_px": 2}
_ABOUT: Mapping[str, type | tuple[type, ...]] = {"label": str, "image": int, "confidence": (int, float)}


def _box_of(entry: Any) -> Box:
    kinds = [name for name in _CORNERS if isinstance(entry, dict) and name in entry]
    wrong = not isinstance(entry, dict) or len(kinds) > 1 or (not kinds and not entry.get("label"))
    wrong = wrong or bool(entry.keys() - _CORNERS.keys() - _ABOUT.keys())
    wrong = wrong or any(not isinstance(entry[name], kind) for name, kind in _ABOUT.items() if name in entry)
    corners = entry[kinds[0]] if kinds and not wrong else []
    numbers = isinstance(corners, list) and all(
        isinstance(corner, int | float) and not isinstance(corner, bool) and isfinite(corner) for corner in corners
    )
    if wrong or not numbers or len(corners) != (_CORNERS[kinds[0]] if kinds else 0):
        raise ValueError(
            f"{short_repr(entry, 80)} in its <objects> is none: an object has a 'box' of four fractions, 'box_px' of "
            "four pixels, or a 'point' or 'point_px' of two, and may have 'label', 'image' and 'confidence'"
        )
    about = {name: entry[name] for name in _ABOUT if name in entry}
    return Box(tuple(map(float, corners)), in_pixels=bool(kinds) and kinds[0].endswith("_px"), **about)


def boxes_in(text: str) -> list[list[Box]]:
    """Returns what each place of a text holds. Raises ValueError: a place holds something else."""
    return [_boxes(match[1]) for match in PLACE.finditer(text)]


def _boxes(entries: str) -> list[Box]:
    try:
        return list(map(_box_of, json.loads(entries)))
    except json.JSONDecodeError as error:
        raise ValueError(f"its <objects> {short_repr(entries, 60)} are no JSON: {error.msg}") from None


def with_places(text: str, write: Callable[[Sequence[Box]], str]) -> str:
    """Returns a text with something written for each of its places. Raises ValueError: a place is wrong."""
    return PLACE.sub(lambda match: write(_boxes(match[1])), text) if "<objects>" in text else text


def in_fractions(example: Example, sizes: Sequence[Size]) -> Example:
    """Returns an example whose boxes are fractions of its pictures, whose sizes these are. Raises ValueError."""

    def write(boxes: Sequence[Box]) -> str:
        for box in boxes:
            if not 0 <= box.image < len(sizes):
                raise ValueError(f"the {box.named()} is of picture {box.image + 1}, and it has {len(sizes)} pictures")
        return place_of([box.in_fractions(sizes[box.image]) for box in boxes])

    def fractions(text: str) -> str:
        return with_places(text, write)

    return replace(
        example,
        turns=tuple(
            replace(turn, text=fractions(turn.text)) if PLACE.search(turn.text) else turn for turn in example.turns
        ),
        question=fractions(example.question),
        answers=tuple(replace(answer, text=fractions(answer.text)) for answer in example.answers),
        rejected=tuple(map(fractions, example.rejected)),
    )
