"""Rows that say where things are: ms-swift's `objects`, Qwen's JSON in a text, and Roboflow's PaliGemma lines."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dora_vl.data.column_names import Row, is_empty, parsed
from dora_vl.data.formats.row_format import RowFormat
from dora_vl.data.objects import Box, place_of
from dora_vl.data.turns import Unusable
from dora_vl.errors import short_repr

UNITS: Mapping[str, float] = {"real": 0, "norm1": 1, "norm1000": 1000}
"""What `bbox_type` may say, pixels, fractions or thousandths, with what a number is then divided by."""
READ = frozenset(("ref", "bbox", "bbox_type", "image_id", "width", "height"))
DIFFER = "places differ from objects"
_PLACES = re.compile(
    r"(?:```(?:json)?\s*)?(?P<json>\[\s*\{[^{}]*\"(?:bbox|point)_2d\".*?\}\s*\])(?:\s*```)?"
    r"|(?P<ref><ref-object>)?(?P<boxes>(?:<bbox>)+)|<ref-object>",
    re.DOTALL,
)


def is_swift(value: object) -> bool:
    """Tells whether a column holds what ms-swift's `objects` may; sets of other tools have one of that name."""
    value = parsed(value)
    return isinstance(value, Mapping) and READ.issuperset(value) and not {"ref", "bbox"}.isdisjoint(value)


class Objects:
    """What a row's `objects` says, for the places that its texts leave: each takes the next label or box."""

    def __init__(self, row: Row) -> None:
        held: Any = parsed(row.get("objects"))
        self._held: Mapping[str, Any] | None = None if is_empty(held) else held
        held = self._held or {}
        self._unit = str(held.get("bbox_type") or ("real" if self._held else row.get("bbox_type") or ""))
        if self._unit and self._unit not in UNITS:
            raise Unusable(f"its bbox_type must be one of {', '.join(UNITS)}, got {self._unit!r}")
        self._labels, self._boxes = (_list(held, name) for name in ("ref", "bbox"))
        self._images = _list(held, "image_id") or [0] * len(self._boxes)
        self._sides = [_list(held, name) for name in ("width", "height")]
        self._labels_taken = self._boxes_taken = 0

    def fill(self, text: str) -> str:
        """Returns a text with `<objects>` for its places."""
        if (self._held is None and not self._unit) or not ("_2d" in text or "<bbox>" in text or "<ref-object>" in text):
            return text
        return _PLACES.sub(self._place, text)

    def check_taken(self) -> None:
        """Raises Unusable: some of the objects have no place."""
        for tag, taken, held in (
            ("<ref-object>", self._labels_taken, self._labels),
            ("<bbox>", self._boxes_taken, self._boxes),
        ):
            if taken != len(held):
                raise Unusable(f"its texts have {taken} {tag}, and its objects {len(held)}", DIFFER)

    def _place(self, match: re.Match[str]) -> str:
        if match["json"]:
            return place_of(self._listed(match["json"]))
        if self._held is None:
            return match[0]
        label = self._label() if match["ref"] or not match["boxes"] else ""
        boxes = [self._box(*self._next_box(), label) for _ in range((match["boxes"] or "").count("<bbox>"))]
        return place_of(boxes or [Box((), label)])

    def _listed(self, text: str) -> list[Box]:
        """Reads Qwen's JSON; places may stand for its boxes and labels."""
        images: list[int] = []

        def numbers(_: re.Match[str]) -> str:
            box, image = self._next_box()
            images.append(image)
            return json.dumps(box)

        text = re.sub(r'"<ref-object>"|<ref-object>', lambda match: json.dumps(self._label()), text)
        text = re.sub(r'"<bbox>"|<bbox>', numbers, text)
        try:
            entries = json.loads(text)
        except ValueError as error:
            raise Unusable(f"its objects {short_repr(text, 60)} are no JSON ({error})") from None
        boxes: list[Box] = []
        for number, entry in enumerate(entries):
            corners = entry.get("bbox_2d", entry.get("point_2d")) if isinstance(entry, Mapping) else None
            if corners is None or len(entry) > 2 or (len(entry) == 2 and "label" not in entry):
                raise Unusable(f"its object {short_repr(entry, 80)} must have 'bbox_2d' or 'point_2d', and a 'label'")
            image = images[number] if number < len(images) else 0
            boxes.append(self._box(corners, image, str(entry.get("label", ""))))
        return boxes

    def _label(self) -> str:
        self._labels_taken += 1
        if self._labels_taken > len(self._labels):
            raise Unusable(f"its texts have more <ref-object> than its objects' {len(self._labels)}", DIFFER)
        return str(self._labels[self._labels_taken - 1])

    def _next_box(self) -> tuple[object, int]:
        self._boxes_taken += 1
        if self._boxes_taken > len(self._boxes):
            raise Unusable(f"its texts have more <bbox> than its objects' {len(self._boxes)}", DIFFER)
        if self._boxes_taken > len(self._images):
            raise Unusable(f"its objects have {len(self._boxes)} 'bbox' and {len(self._images)} 'image_id'", DIFFER)
        return self._boxes[self._boxes_taken - 1], self._images[self._boxes_taken - 1]

    def _box(self, corners: object, image: int, label: str) -> Box:
        are_numbers = isinstance(corners, list) and all(type(corner) in (int, float) for corner in corners)
        if not isinstance(corners, list) or not are_numbers or len(corners) not in (2, 4):
            raise Unusable(f"a box of its objects has four numbers, a point two, got {short_repr(corners, 60)}")
        share = UNITS[self._unit]
        sides: Sequence[float] = (share, share) if share else [side[image] for side in self._sides if image < len(side)]
        if len(sides) == 2 and all(sides):
            return Box(tuple(corner / sides[at % 2] for at, corner in enumerate(corners)), label, image)
        return Box(tuple(map(float, corners)), label, image, in_pixels=True)


def _list(held: Mapping[str, Any], name: str) -> list[Any]:
    """Returns a list that an object has under a name, or its one entry."""
    value = held.get(name)
    if name == "bbox" and isinstance(value, list) and value and not isinstance(value[0], list):
        return [value]
    return value if isinstance(value, list) else [] if value is None else [value]


_LOCATED = re.compile(r"((?:<loc\d{4}>)+)\s*([^<;]*)")


def _from_loc(text: str) -> str:
    """Returns PaliGemma's `<loc>` text, y0, x0, y1, x1 of 0 to 1023, as a place of its objects."""
    boxes: list[Box] = []
    if "<seg" in text:
        raise Unusable("its suffix has <seg>, an outline, which is not read")
    for locations, label in _LOCATED.findall(text):
        numbers = [int(number) / 1023 for number in re.findall(r"\d{4}", locations)]
        if len(numbers) != 4 or max(numbers) > 1:
            raise Unusable(f"{locations} must be four of <loc0000> to <loc1023>: y0, x0, y1, x1")
        y0, x0, y1, x1 = numbers
        boxes.append(Box((x0, y0, x1, y1), label.strip()))
    if rest := _LOCATED.sub("", text).replace(";", "").strip():
        raise Unusable(f"its suffix has {short_repr(rest, 40)} outside of its objects")
    return place_of(boxes)


def _paligemma(row: Row) -> list[dict[str, object]]:
    suffix = str(row["suffix"])
    answer = _from_loc(suffix) if "<loc" in suffix else suffix
    return [{"role": "user", "content": row["prefix"]}, {"role": "assistant", "content": answer}]


def _is_detection(row: Row, *_: object) -> bool:
    """Tells a prompt or an answer of PaliGemma from code to be filled in, which has the same columns."""
    return "<loc" in str(row.get("suffix")) or str(row.get("prefix")).startswith("detect ")


GROUNDED = (RowFormat("PaliGemma's prefix/suffix", ("prefix", "suffix", "images"), _paligemma, fits=_is_detection),)
