"""How each family writes boxes and points: the numbers that its models were taught, and the text around them.

Inside, a box is a fraction of the picture as it is shown (`data.objects`). Most families count thousandths of the whole
picture, whatever their processor makes of it: a stretch and tiles leave fractions as they are. Two kinds need more:
Qwen2.5-VL counts pixels of the picture that its processor makes, LLaVA-1.5 fractions of the square that it pads to.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby
from types import MappingProxyType
from typing import Any, Literal

from PIL import Image

from dora_vl.data.objects import Box, Size

Made = Callable[[Size], Size]
"""Says which size a processor makes of a picture."""
PLACES = ("x0", "y0", "x1", "y1")


@dataclass(frozen=True, kw_only=True)
class BoxFormat:
    """How boxes and points are written as text.

    Attributes:
        box: names its numbers `{x0}`, `{y0}`, `{x1}` and `{y1}`, in any order.
        point: names its numbers `{x0}` and `{y0}`.
        several: encloses the boxes of one label, which `between` parts; also boxes without one.
        phrase: a label without a box.
        labelled: a label with its boxes, as `{label}` and `{boxes}`; empty where these are JSON, a list of objects.
        separator: parts what two labels have, or two objects.
        repeats: each box has a label of its own; else a label's boxes stand together.
        keys: an object's key of a box and of a point.
        listed: encloses the objects.
        units: how many a side has; "pixels" are those of the picture that the processor makes.
        last: the largest number that is written; 0 is `units`, and the last pixel of pixels.
        padded: the side is that of the square that a picture is padded to.
        decimals: of each number, which `digits` characters show at least; None is two without zeros at the end.
        tokens: the tokenizer's special tokens among all this, which answers may hold.
    """

    box: str = "[{x0}, {y0}, {x1}, {y1}]"
    point: str = "[{x0}, {y0}]"
    several: str = "{}"
    between: str = ", "
    phrase: str = "{}"
    labelled: str = ""
    separator: str = ", "
    repeats: bool = False
    keys: tuple[str, str] = ("bbox_2d", "point_2d")
    listed: str = "[{}]"
    units: float | Literal["pixels"] = 1000.0
    last: float = 0.0
    padded: bool = False
    decimals: int | None = 0
    digits: int = 1
    tokens: tuple[str, ...] = ()

    def write(self, boxes: Sequence[Box], sizes: Sequence[Size], made: Made) -> str:
        """Writes what one place holds, for pictures of these sizes. Raises ValueError: a box is too small for it."""
        texts = [self._corners(box, sizes[box.image], made) if box.corners else "" for box in boxes]
        if not any(box.label for box in boxes):
            return self.several.format(self.between.join(texts))
        if not self.labelled and any(texts):
            return self.listed.format(self.separator.join(map(self._object, boxes, texts)))
        pairs = list(zip(boxes, texts, strict=True))
        groups = (
            [[pair] for pair in pairs] if self.repeats else [[*of] for _, of in groupby(pairs, lambda it: it[0].label)]
        )
        return self.separator.join(self._labelled(of[0][0].label, [text for _, text in of if text]) for of in groups)

    def _labelled(self, label: str, texts: Sequence[str]) -> str:
        if not texts:
            return self.phrase.format(label)
        return self.labelled.format(label=label, boxes=self.several.format(self.between.join(texts)))

    def _object(self, box: Box, corners: str) -> str:
        place = f'"{self.keys[len(box.corners) == 2]}": {corners}' if corners else ""
        label = f'"label": {json.dumps(box.label, ensure_ascii=False)}' if box.label else ""
        return f"{{{', '.join(filter(None, (place, label)))}}}"

    def _corners(self, box: Box, size: Size, made: Made) -> str:
        numbers = {}
        for name, corner, (share, offset, units) in zip(PLACES, box.corners, self._axes(size, made) * 2, strict=False):
            value = round((corner * share + offset) * units, 2 if self.decimals is None else self.decimals)
            value = min(value, self.last or units - (self.units == "pixels"))
            numbers[name] = str(value) if self.decimals is None else f"{value:0{self.digits}.{self.decimals}f}"
        text = (self.box if len(numbers) == 4 else self.point).format(**numbers)
        if len(numbers) == 4 and (numbers["x0"] == numbers["x1"] or numbers["y0"] == numbers["y1"]):
            across, down = (unit * side for unit, side in zip(self.unit(size, made), size, strict=True))
            units = f"one unit is {across:.3g} x {down:.3g} pixels of its {size[0]} x {size[1]}"
            raise ValueError(f"the {box.named()} would be written as {text}, which is empty: {units}")
        return text

    def _axes(self, size: Size, made: Made) -> list[tuple[float, float, float]]:
        """Returns for x and y the picture's share of what the units count, where it begins there, and the units."""
        units = made(size) if self.units == "pixels" else (self.units, self.units)
        square = max(size) if self.padded else 0  # `expand2square` puts whole pixels before the picture
        return [
            (length / square, (square - length) // 2 / square, count) if square else (1.0, 0.0, count)
            for length, count in zip(size, units, strict=True)
        ]

    def unit(self, size: Size, made: Made) -> tuple[float, float]:
        """Returns one written unit along x and y, in fractions of a picture of this size."""
        fine = 0.01 if self.decimals is None else 10**-self.decimals
        across, down = (fine / (units * share) for share, _, units in self._axes(size, made))
        return across, down

    def read(self, text: str, size: Size, made: Made, image: int = 0) -> list[Box]:
        """Reads the boxes and points of an answer about a picture of this size, in their order; none from words."""
        boxes, axes = [], self._axes(size, made) * 2
        for numbers, label in self._numbers_in(text):
            corners = [
                min(max((number / units - offset) / share, 0.0), 1.0)
                for number, (share, offset, units) in zip(numbers, axes, strict=False)
            ]
            boxes.append(Box(tuple(corners), label.strip(), image))
        return boxes

    def _numbers_in(self, text: str) -> Iterator[tuple[list[float], str]]:
        at, pattern = 0, self._patterns[not any(token in text for token in self.tokens)]
        while at < len(text):
            if not self.labelled and text[at] in "[{" and (read := self._json_at(text, at)):
                entries, at = read
                yield from entries
            elif match := self._labelled_pattern.match(text, at) if self.labelled else None:
                for corners in pattern.finditer(match["boxes"]):
                    yield _in_order(corners), match["label"]
                at = match.end()
            elif match := pattern.match(text, at):
                yield _in_order(match), ""
                at = match.end()
            else:
                at += 1

    def _json_at(self, text: str, at: int) -> tuple[list[tuple[list[float], str]], int] | None:
        """Reads an object or a list of objects; returns corners and labels, and where it ends."""
        try:
            value, end = json.JSONDecoder().raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError):
            return None
        order, entries = re.findall(r"{(\w\d)}", self.box), []
        for entry in value if isinstance(value, list) else [value]:
            corners: Any = (
                next((entry[key] for key in self.keys if key in entry), None) if isinstance(entry, dict) else None
            )
            if not isinstance(corners, list) or len(corners) not in (2, 4):
                return None
            if not all(isinstance(corner, int | float) for corner in corners):
                return None
            places = sorted(
                zip(order if len(corners) == 4 else order[:2], corners, strict=True), key=lambda it: it[0][::-1]
            )
            entries.append(([float(corner) for _, corner in places], str(entry.get("label", ""))))
        return (entries, end) if entries else None

    @cached_property
    def _patterns(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        """Finds a box or a point as it is written, and in a text that was decoded without special tokens."""
        forms = self.box, self.point.replace("0}", "}")  # other names, since an expression has each once
        bare = [re.sub("|".join(map(re.escape, self.tokens)) or "(?!)", "", form) for form in forms]
        bare = [form for form in bare if re.search(r"[^\s\w{}]", form)]  # mere numbers are any text's
        exact, loose = (
            re.compile("|".join(_expression(form, "(?P<{}>{})") for form in of) or "(?!)") for of in (forms, bare)
        )
        return exact, loose

    @cached_property
    def _labelled_pattern(self) -> re.Pattern[str]:
        """Finds a label with its boxes."""
        corners = "|".join(_expression(form, "{1}") for form in (self.box, self.point))
        boxes = f"(?:{corners})(?:\\s*{_expression(self.between)}\\s*(?:{corners}))*"
        before, after = map(_expression, self.several.split("{}"))
        fields = {"{label}": r"(?P<label>[^<>;\[\]]+)", "{boxes}": f"{before}(?P<boxes>{boxes}){after}"}
        pieces = re.split(r"(\{label\}|\{boxes\})", self.labelled)
        return re.compile("".join(fields.get(piece) or _expression(piece) for piece in pieces))


def _expression(form: str, number: str = "") -> str:
    """Makes a regular expression of a form, in which spaces count for nothing."""
    pieces = re.split(r"\{(\w+)\}", form)
    literals = [r"\s*".join(map(re.escape, re.split(r"\s+", piece))) for piece in pieces[::2]]
    numbers = [number.format(name, r"-?\d+(?:\.\d+)?") for name in pieces[1::2]]
    return r"\s*".join(part for pair in zip(literals, [*numbers, ""], strict=True) for part in pair if part)


def _in_order(match: re.Match[str]) -> list[float]:
    """Returns the numbers of a box as x0, y0, x1, y1, of a point as x, y."""
    return [float(number) for name in (*PLACES, "x", "y") if (number := match.groupdict().get(name)) is not None]


_REF_AND_BOX = ("<ref>", "</ref>", "<box>", "</box>")
_THOUSANDTHS = BoxFormat()

_FENCED = "```json\n[\n\t{}\n]\n```"

BOX_FORMATS: Mapping[str, BoxFormat] = MappingProxyType(
    {
        "thousandths": BoxFormat(),
        "fractions": BoxFormat(units=1.0, decimals=2),
        # process_bbox.ipynb of Qwen's finetuning code; the text by issue 105 of its repository
        "qwen2": BoxFormat(
            box="<|box_start|>({x0},{y0}),({x1},{y1})<|box_end|>",
            point="<|box_start|>({x0},{y0})<|box_end|>",
            between="",
            phrase="<|object_ref_start|>{}<|object_ref_end|>",
            labelled="<|object_ref_start|>{label}<|object_ref_end|>{boxes}",
            separator="",
            tokens=("<|box_start|>", "<|box_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
        ),
        "qwen2_5": BoxFormat(units="pixels", listed=_FENCED, separator=",\n\t"),
        # Qwen's 2d_grounding.ipynb: its answers end at 999
        "qwen3": BoxFormat(last=999, listed=_FENCED, separator=",\n\t"),
        # InternVL's "Chat Data Format"
        "internvl": BoxFormat(
            several="<box>[{}]</box>",
            phrase="<ref>{}</ref>",
            labelled="<ref>{label}</ref>{boxes}",
            separator="\n",
            tokens=_REF_AND_BOX,
        ),
        # big_vision's segmentation.py, and answers printed in Google's cookbook
        "paligemma": BoxFormat(
            box="<loc{y0}><loc{x0}><loc{y1}><loc{x1}>",
            point="<loc{y0}><loc{x0}>",
            between=" ; ",
            repeats=True,
            labelled="{boxes} {label}",
            separator=" ; ",
            units=1023.0,
            digits=4,
        ),
        # GLM's skill for grounding
        "glm": BoxFormat(several="<|begin_of_box|>[{}]<|end_of_box|>", tokens=("<|begin_of_box|>", "<|end_of_box|>")),
        # Hugging Face's account of Gemma 4
        "gemma4": BoxFormat(
            box="[{y0}, {x0}, {y1}, {x1}]",
            point="[{y0}, {x0}]",
            keys=("box_2d", "point"),
            listed="```json\n[\n  {}\n]\n```",
            separator=",\n  ",
        ),
        # Liquid's satellite example
        "lfm2": BoxFormat(units=1.0, decimals=2, keys=("bbox", "point")),
        # issues 606 and 822 of LLaVA's repository
        "llava": BoxFormat(units=1.0, padded=True, decimals=None),
        # DeepSeek-VL2's and MiniCPM-V's own code; transformers has neither's processor
        "deepseek": BoxFormat(
            several="<|det|>[{}]<|/det|>",
            phrase="<|ref|>{}<|/ref|>",
            labelled="<|ref|>{label}<|/ref|>{boxes}",
            separator="",
            units=999.0,
            tokens=("<|det|>", "<|/det|>", "<|ref|>", "<|/ref|>"),
        ),
        "minicpm": BoxFormat(
            box="<box>{x0} {y0} {x1} {y1}</box>",
            point="<point>{x0} {y0}</point>",
            between="",
            phrase="<ref>{}</ref>",
            labelled="<ref>{label}</ref>{boxes}",
            separator="",
            tokens=(*_REF_AND_BOX, "<point>", "</point>"),
        ),
    }
)
"""Every form, by the name that `data.boxes` gives it, with its source."""

OF_PROCESSOR: Mapping[str, str] = MappingProxyType(
    {
        "Gemma4Processor": "gemma4",
        "Glm4vProcessor": "glm",
        "Glm46VProcessor": "glm",
        "InternVLProcessor": "internvl",
        "Lfm2VlProcessor": "lfm2",
        "PaliGemmaProcessor": "paligemma",
        "PieceProcessor": "llava",
        "Qwen2VLProcessor": "qwen2",
        "Qwen2_5OmniProcessor": "qwen2_5",
        "Qwen2_5_VLProcessor": "qwen2_5",
        "Qwen3OmniMoeProcessor": "qwen3",
        "Qwen3VLProcessor": "qwen3",
    }
)
"""Maps the classes of transformers' processors to the form that their models were taught; others get thousandths."""


def boxes_of(processor: Any, name: str | None = None) -> BoxFormat:
    """Returns the form of this name, else the one that a processor's models were taught."""
    if name is None:
        name = OF_PROCESSOR.get(type(processor).__name__, "thousandths")
    return BOX_FORMATS[name]


def made_by(processor: Any) -> Made:
    """Returns the rule by which a processor resizes pictures, asked only where boxes are in its pixels.

    Its module's `smart_resize` answers in microseconds; a processor without one is given a blank picture.
    """
    images = vars(processor).get("image_processor")
    rule = vars(sys.modules[type(images).__module__]).get("smart_resize")

    @lru_cache(maxsize=4096)
    def made(size: Size) -> Size:
        if images is None:
            return size
        if rule is not None:
            least, most = (images.size[f"{edge}_edge"] for edge in ("shortest", "longest"))
            factor = images.patch_size * images.merge_size
            height, width = rule(size[1], size[0], factor=factor, min_pixels=least, max_pixels=most)
            return width, height
        grid = dict(images(images=[Image.new("RGB", size)], return_tensors="pt")).get("image_grid_thw")
        if grid is None:
            return size
        _, rows, columns = grid[0].tolist()
        return columns * int(images.patch_size), rows * int(images.patch_size)

    return made
