"""Reads annotation files as their tools write them: the objects of each picture, and rows that ask for them.

`FORMS` says by what a file or folder is known and how it is read. No form is guessed: where a file does not say whether
its numbers are pixels, thousandths or fractions, or corners or sizes, and they do not tell either, it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlparse
from xml.etree import ElementTree

import yaml

from dora_vl.data.column_names import ROLES, parsed, plain_name
from dora_vl.data.data_files import DataFiles, find_files
from dora_vl.data.formats.grounded import UNITS
from dora_vl.data.objects import Box, Size, place_of
from dora_vl.data.text_file import json_of, stream_records, whole_text
from dora_vl.errors import UserError, short_names, short_repr

Content = Any
"""What a file holds, or the first entry of its list."""
LABEL = "{label}"
MOST_SHOWN = 1 << 20
"""A first line of more characters is not looked at for JSON lines."""


@dataclass
class Pictured:
    """What a file says of one picture: `image` is its path, or its bytes; `size` is the one that its tool saw."""

    image: object
    boxes: list[Box] = field(default_factory=list)
    size: Size | None = None


@dataclass(frozen=True)
class Form:
    """One tool's form: `fits` tells it by a path and the first of what it holds."""

    name: str
    fits: Callable[[Path, Content], bool]
    read: Callable[[Path], Iterable[Pictured]]


def _numbers(values: Iterable[object], where: str) -> list[float]:
    try:
        numbers = [float(value) for value in values]  # type: ignore[arg-type]
    except (TypeError, ValueError):
        numbers = []
    if not numbers or not all(map(isfinite, numbers)):
        raise UserError(f"{where}: a box is of numbers, got {short_repr(values, 80)}")
    return numbers


def _of(value: object, names: Sequence[str], where: str) -> list[Any]:
    """Returns what an object holds under these names."""
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: must be an object, got {short_repr(value, 60)}")
    if lacking := [name for name in names if name not in value]:
        raise UserError(f"{where}: has no {short_names(map(repr, lacking))}")
    return [value[name] for name in names]


def _by_size(values: Iterable[object], where: str) -> tuple[float, ...]:
    """Returns the corners of a box that is written as left, top, width, height."""
    numbers = _numbers(values, where)
    if len(numbers) != 4 or min(numbers[2:]) <= 0:
        raise UserError(f"{where}: a box is left, top, width, height, both sides above 0, got {numbers}")
    x, y, width, height = numbers
    return x, y, x + width, y + height


def _corners(values: Iterable[object], where: str) -> tuple[float, ...]:
    corners = tuple(_numbers(values, where))
    if len(corners) != 4 or corners[0] >= corners[2] or corners[1] >= corners[3]:
        raise UserError(f"{where}: a box is left, top, right, bottom, got {[*corners]}, which is empty or reversed")
    return corners


def _size(width: object, height: object, where: str) -> Size:
    sides = _numbers((width, height), where)
    if min(sides) < 1:
        raise UserError(f"{where}: a picture of {sides[0]:g} x {sides[1]:g} pixels is none")
    return int(sides[0]), int(sides[1])


def _json(path: Path) -> Content:
    return json_of(whole_text(path, "annotations"), str(path))


def _coco(path: Path) -> Iterator[Pictured]:
    """Reads instances (left, top, width, height in pixels) ; a crowd's box is left out."""
    content = _json(path)
    pictures: dict[object, Pictured] = {}
    for number, entry in enumerate(content["images"], 1):
        where = f"{path}, image {number}"
        key, name = _of(entry, ("id", "file_name"), where)
        size = _size(entry["width"], entry["height"], where) if entry.get("width") and entry.get("height") else None
        if key in pictures:
            raise UserError(f"{where}: the id {key} is an earlier image's too")
        pictures[key] = Pictured(name, size=size)
    names = {entry.get("id"): entry.get("name") for entry in content.get("categories") or ()}
    for number, entry in enumerate(content["annotations"], 1):
        where = f"{path}, annotation {number}"
        (key,) = _of(entry, ("image_id",), where)
        if key not in pictures:
            raise UserError(f"{where}: no image has the id {short_repr(key)}")
        if not entry.get("iscrowd"):
            bbox, kind = _of(entry, ("bbox", "category_id"), where)
            if not names.get(kind):
                raise UserError(f"{where}: no category has the id {short_repr(kind)}")
            box = bbox if isinstance(bbox, list) else [bbox]
            pictures[key].boxes.append(Box(_by_size(box, where), str(names[kind]), in_pixels=True))
    yield from pictures.values()


def _visual_genome(path: Path) -> Iterator[Pictured]:
    """Reads objects or region descriptions; `image_data.json` beside them says sizes and files where it is there."""
    about: dict[object, Mapping[str, Any]] = {}
    if (beside := path.with_name("image_data.json")).is_file():
        about = {entry.get("image_id"): entry for entry in stream_records(beside)}
    for number, entry in enumerate(stream_records(path), 1):
        where = f"{path}, picture {number}"
        kind = "regions" if "regions" in entry else "objects"
        (listed,) = _of(entry, (kind,), where)
        first: Any = listed[0] if listed else {}
        key = entry.get("image_id", entry.get("id", first.get("image_id")))
        known = about.get(key, {})
        name = (
            "/".join(PurePosixPath(urlparse(str(known["url"])).path).parts[-2:]) if known.get("url") else f"{key}.jpg"
        )
        size = _size(known["width"], known["height"], where) if known.get("width") else None
        picture = Pictured(name, size=size)
        for index, each in enumerate(listed, 1):
            at = f"{where}, {kind[:-1]} {index}"
            sides = ("x", "y", "width", "height") if kind == "regions" else ("x", "y", "w", "h")
            box = _by_size(_of(each, sides, at), at)
            label = each.get("phrase") if kind == "regions" else next(iter(each.get("names") or ()), "")
            if not str(label or "").strip():
                raise UserError(f"{at}: says no name or phrase")
            picture.boxes.append(Box(box, str(label).strip(), in_pixels=True))
        yield picture


def _voc(path: Path) -> Iterator[Pictured]:
    """Reads Pascal VOC's XML, whose first pixel is 1; files that have a 0 count from there, all of a folder alike."""
    files = sorted(path.rglob("*.xml")) if path.is_dir() else [path]
    found: list[tuple[Pictured, list[tuple[str, list[float], str]]]] = []
    for file in files:
        try:
            root = ElementTree.fromstring(whole_text(file, "annotations"))
        except ElementTree.ParseError as error:
            raise UserError(f"{file}: not whole XML ({error})") from None
        if root.tag != "annotation":
            continue
        name = (root.findtext("filename") or "").strip()
        sides = root.findtext("size/width"), root.findtext("size/height")
        size = _size(*sides, where=str(file)) if all(sides) and sides != ("0", "0") else None
        if not name:
            raise UserError(f"{file}: has no <filename>")
        boxes = []
        for number, entry in enumerate(root.iter("object"), 1):
            where, label = f"{file}, object {number}", (entry.findtext("name") or "").strip()
            box = entry.find("bndbox")
            if box is None or not label:
                raise UserError(f"{where}: has no {'<name>' if not label else '<bndbox> (a turned box is not read)'}")
            corners = _numbers([box.findtext(side) for side in ("xmin", "ymin", "xmax", "ymax")], where)
            boxes.append((label, corners, where))
        found.append((Pictured(name if PurePosixPath(name).suffix else f"{name}.jpg", size=size), boxes))
    first = 0 if any(0 <= min(corners[:2]) < 1 for _, boxes in found for _, corners, _ in boxes) else 1
    for picture, boxes in found:
        for label, (x0, y0, x1, y1), where in boxes:
            corners = _corners((x0 - first, y0 - first, x1, y1), where)  # its last pixel is inside
            picture.boxes.append(Box(corners, label, in_pixels=True))
        yield picture


def _yolo_names(folder: Path) -> tuple[Path, Sequence[str]] | None:
    """Returns the file of a folder's classes, and their names in order."""
    for file in (folder / "data.yaml", folder / "data.yml", folder / "classes.txt"):
        if not file.is_file():
            continue
        text = whole_text(file, "classes")
        if file.suffix == ".txt":
            return file, [line.strip() for line in text.splitlines() if line.strip()]
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{file}: not whole YAML ({short_repr(str(error), 120)})") from None
        names = content.get("names") if isinstance(content, dict) else None
        if isinstance(names, dict) and sorted(names) == [*range(len(names))]:
            names = [names[number] for number in range(len(names))]
        if isinstance(names, list) and names:
            return file, list(map(str, names))
        raise UserError(f"{file}: has no 'names' that count the classes from 0")
    return None


def _yolo(path: Path) -> Iterator[Pictured]:
    """Reads class, centre x, centre y, width and height in fractions, a file a picture; a sixth is a confidence."""
    folder = path if path.is_dir() else path.parent
    known = _yolo_names(folder)
    assert known is not None
    classes, names = known
    pictures = {
        file.relative_to(folder).with_suffix("").as_posix(): file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.suffix.lower() in (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
    }
    for file in sorted(folder.rglob("*.txt")):
        stem = file.relative_to(folder).with_suffix("").as_posix()
        there = "/".join("images" if part == "labels" else part for part in stem.split("/"))
        if there not in pictures:
            if "labels" in stem.split("/")[:-1]:
                raise UserError(f"{file}: no picture {there} is in {folder}")
            continue
        picture = Pictured(pictures[there])
        for number, line in enumerate(whole_text(file, "annotations").splitlines(), 1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            kind, *sides = _numbers(line.split(), where)
            if len(sides) not in (4, 5):
                what = "a polygon or a turned box" if len(sides) > 5 else "too few"
                raise UserError(f"{where}: {len(sides) + 1} numbers, {what}; a box is class, x, y, w, h")
            if kind != int(kind) or not 0 <= kind < len(names):
                raise UserError(f"{where}: class {kind:g} is none of the {len(names)} in {classes.name}")
            if max(sides[:4]) > 1.01 or min(sides[:4]) < 0:
                raise UserError(f"{where}: its numbers {sides[:4]} must be fractions of the picture, from 0 to 1")
            x, y, w, h = sides[:4]
            box = _by_size((x - w / 2, y - h / 2, w, h), where)
            picture.boxes.append(Box(box, names[int(kind)], confidence=sides[4] if len(sides) == 5 else None))
        yield picture


def _label_studio(path: Path) -> Iterator[Pictured]:
    """Reads tasks in percent, JSON or JSON-MIN; of several annotations of a task the last."""
    for number, task in enumerate(stream_records(path), 1):
        where = f"{path}, task {number}"
        held: Any = task.get("data", task)
        results: list[Any] = []
        if "data" in task:
            listed: Any = task.get("annotations") or task.get("completions") or []
            done: Any = [each for each in listed if _is_kept(each)]
            results = [
                _of(each, ("value",), where)[0]
                for each in (done[-1].get("result") or [] if done else [])
                if each.get("type", "rectanglelabels") == "rectanglelabels"
            ]
        else:
            lists = [value for value in map(parsed, task.values()) if isinstance(value, list)]
            results = [each for value in lists for each in value if _is_rectangle(each)]
        images = [held[name] for name in (*ROLES["images"], *held) if isinstance(held.get(name), str)]
        if not images:
            raise UserError(f"{where}: names no picture")
        name = unquote(urlparse(images[0]).query.partition("d=")[2] or urlparse(images[0]).path)
        picture = Pictured(name.lstrip("/").removeprefix("data/upload/").removeprefix("data/"))
        for index, value in enumerate(results, 1):
            at = f"{where}, result {index}"
            if value.get("rotation"):
                raise UserError(f"{at}: is turned by {value['rotation']} degrees; only an upright box is read")
            percents = _by_size(_of(value, ("x", "y", "width", "height"), at), at)
            if max(percents) > 101:
                raise UserError(f"{at}: its numbers must be percent of the picture, from 0 to 100")
            corners = tuple(percent / 100 for percent in percents)
            picture.boxes += [Box(corners, str(label)) for label in value.get("rectanglelabels") or [""]]
        yield picture


def _is_kept(annotation: Mapping[str, Any]) -> bool:
    return not annotation.get("was_cancelled")


def _is_rectangle(value: object) -> bool:
    return isinstance(value, Mapping) and value.keys() >= {"x", "y", "width", "height", "rectanglelabels"}


def _vott(path: Path) -> Iterator[Pictured]:
    for key, entry in _json(path)["assets"].items():
        where = f"{path}, asset {key}"
        asset, regions = _of(entry, ("asset", "regions"), where)
        (name,) = _of(asset, ("name",), where)
        size = asset.get("size") or {}
        picture = Pictured(name, size=_size(size["width"], size["height"], where) if size.get("width") else None)
        for number, region in enumerate(regions, 1):
            at = f"{where}, region {number}"
            if region.get("type", "RECTANGLE") not in ("RECTANGLE", "SQUARE"):
                raise UserError(f"{at}: is a {region['type']}; only a rectangle is read")
            (sides,) = _of(region, ("boundingBox",), at)
            box = _by_size(_of(sides, ("left", "top", "width", "height"), at), at)
            if not region.get("tags"):
                raise UserError(f"{at}: has no tag")
            picture.boxes += [Box(box, str(label), in_pixels=True) for label in region["tags"]]
        yield picture


_AS_CORNERS = (
    *("x0 y0 x1 y1", "x1 y1 x2 y2", "xmin ymin xmax ymax", "x_min y_min x_max y_max", "left top right bottom"),
)
_AS_SIZE = ("x y w h", "x y width height", "left top width height", "bbox_x bbox_y bbox_width bbox_height")
_IN_ONE = ("bbox", "box")
_LABELS = ("label", "class", "name", "category", "class_name", "label_name", "text", "caption", "ref")


def _box_columns(header: Sequence[str]) -> tuple[list[str], str] | None:
    """Returns the columns of a table's boxes, and whether they are `xyxy`, `xywh` or not said."""
    by_name = {plain_name(name): name for name in header}
    for kinds, kind in ((_AS_CORNERS, "xyxy"), (_AS_SIZE, "xywh")):
        for names in kinds:
            if by_name.keys() >= {*names.split()}:
                return [by_name[name] for name in names.split()], kind
    one = [by_name[name] for name in _IN_ONE if name in by_name]
    return (one[:1], "") if one else None


def _table(path: Path) -> Iterator[Pictured]:
    """Reads a table of a box a row, several rows a picture; `bbox_type` and `bbox_form` say what its numbers are."""
    rows = list(enumerate(find_files(path).rows(), 2))
    known = _box_columns([*rows[0][1]]) if rows else None
    if known is None:
        raise UserError(f"{path}: holds no rows")
    columns, named = known
    by_name = {plain_name(name): name for name in rows[0][1]}
    image = next((by_name[name] for name in ROLES["images"] if name in by_name), None)
    label = next((by_name[name] for name in _LABELS if name in by_name and by_name[name] not in columns), None)
    if image is None or label is None:
        raise UserError(f"{path}: no column of its {short_names(by_name)} is {'a picture' if not image else 'a label'}")
    boxes: list[list[float]] = []
    sizes: list[Size | None] = []
    for line, row in rows:
        where = f"{path}, line {line}"
        cells: Any = [row.get(column) for column in columns]
        if len(columns) == 1:
            held = parsed(cells[0])
            cells = held if isinstance(held, list) else str(cells[0]).split(",")
        boxes.append(_numbers(cells, where))
        if len(boxes[-1]) != 4:
            raise UserError(f"{where}: a box is of four numbers, got {boxes[-1]}")
        if not str(row.get(image) or "").strip() or not str(row.get(label) or "").strip():
            raise UserError(f"{where}: its {image if not str(row.get(image) or '').strip() else label} is empty")
        has_size = {"width", "height"} <= by_name.keys() and not {"width", "height"} & {*map(plain_name, columns)}
        sizes.append(_size(row[by_name["width"]], row[by_name["height"]], where) if has_size else None)
    unit, form = (_said(path, rows, by_name, name) for name in ("bbox_type", "bbox_form"))
    unit = unit or _unit_of(path, boxes, sizes)
    form = named or form or _form_of(path, boxes, sizes, UNITS[unit])
    pictures: dict[str, Pictured] = {}
    for (line, row), box, size in zip(rows, boxes, sizes, strict=True):
        corners = (_by_size if form == "xywh" else _corners)(box, f"{path}, line {line}")
        share = UNITS[unit]
        corners = tuple(corner / share for corner in corners) if share else corners
        name = str(row[image])
        picture = pictures.setdefault(name, Pictured(name, size=size))
        picture.boxes.append(Box(corners, str(row[label]).strip(), in_pixels=not share))
    yield from pictures.values()


_SAYS: Mapping[str, Sequence[str]] = {"bbox_type": [*UNITS], "bbox_form": ["xyxy", "xywh"]}


def _said(path: Path, rows: Sequence[tuple[int, Mapping[str, object]]], by_name: Mapping[str, str], name: str) -> str:
    """Returns what a column says of all rows; "" where there is none."""
    if name not in by_name:
        return ""
    said = {str(row.get(by_name[name])).strip(): line for line, row in reversed(rows)}
    if len(said) > 1 or not {*said} <= {*_SAYS[name]}:
        line = max(said.values())
        raise UserError(f"{path}, line {line}: {name} must be one of {', '.join(_SAYS[name])}, the same in all rows")
    return next(iter(said))


def _unit_of(path: Path, boxes: Sequence[Sequence[float]], sizes: Sequence[Size | None]) -> str:
    """Tells by all of a file's numbers whether they are pixels, thousandths or fractions."""
    most = max(map(max, boxes))
    if most <= 1 and any(0 < number < 1 for box in boxes for number in box):
        return "norm1"
    if most > 1000:
        return "real"
    outside = any(
        size and (max(box[0::2]) > size[0] or max(box[1::2]) > size[1]) for box, size in zip(boxes, sizes, strict=True)
    )
    if outside:
        return "norm1000"
    raise UserError(
        f"{path}, line 2: {[*boxes[0]]} may be pixels or thousandths; which? Add a column bbox_type with real, "
        "norm1000 or norm1 (pixels, thousandths, fractions) in every row"
    )


def _form_of(path: Path, boxes: Sequence[Sequence[float]], sizes: Sequence[Size | None], share: float) -> str:
    """Tells by all of a file's numbers whether they are corners or a corner and sides."""
    as_sides = any(x1 <= x0 or y1 <= y0 for x0, y0, x1, y1 in boxes)
    ends = [(share, share) if share else size for size in sizes]
    as_corners = any(
        end is not None and (box[0] + box[2] > 1.01 * end[0] or box[1] + box[3] > 1.01 * end[1])
        for box, end in zip(boxes, ends, strict=True)
    )
    if as_sides == as_corners:
        both = (
            "some are no x0, y0, x1, y1 and others no x, y, w, h" if as_sides else "may be x0, y0, x1, y1 or x, y, w, h"
        )
        raise UserError(
            f"{path}, line 2: the numbers {[*boxes[0]]} {both}; which? Name four columns so, or add a column bbox_form "
            "with xyxy or xywh in every row"
        )
    return "xywh" if as_sides else "xyxy"


def _refcoco(path: Path) -> Iterator[Pictured]:
    """Reads RefCOCO from the hub: COCO's `bbox` (xywh) with expressions, or corners where `raw_anns` has COCO's."""
    for number, row in enumerate(find_files(path).rows(), 1):
        where = f"{path}, row {number}"
        bbox, has_corners = parsed(row["bbox"]), "raw_anns" in row
        listed = bbox if isinstance(bbox, list) else [bbox]
        box = (_corners if has_corners else _by_size)(listed, where)
        said: Any = parsed(row.get("captions") if has_corners else row.get("answer"))
        phrases = [str(text).strip() for text in (said if isinstance(said, list) else [said]) if text]
        image = next((row[name] for name in ("image", "image_path", "file_name") if row.get(name)), None)
        if image is None or not phrases:
            raise UserError(f"{where}: has no {'picture' if image is None else 'expression'}")
        yield Pictured(image, [Box(box, phrase, in_pixels=True) for phrase in dict.fromkeys(phrases)])


def _first_of(path: Path) -> Content:
    """Returns the first entry of a list, the first row of a table, or the object that a JSON file is."""
    if path.suffix.lower() in (".csv", ".tsv", ".parquet"):
        return next(find_files(path).rows(), None)
    if path.suffix.lower() != ".json":
        return None
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        start = file.readline(MOST_SHOWN).strip()
    if start.startswith("["):
        return [next(stream_records(path), None)]
    try:
        json.loads(start)
    except ValueError:
        return _json(path)
    return json.loads(start)


def _keys(content: Content, *names: str) -> bool:
    """Tells whether a list's first entry, or the object that a file is, has these keys."""
    entry = content[0] if isinstance(content, list) and content else content
    return isinstance(entry, Mapping) and entry.keys() >= {*names}


def _lists(content: Content, *names: str) -> bool:
    return isinstance(content, Mapping) and all(isinstance(content.get(name), list) for name in names)


def _is_table(path: Path, content: Content) -> bool:
    return path.suffix.lower() in (".csv", ".tsv") and isinstance(content, Mapping) and bool(_box_columns([*content]))


def _is_minimal(content: Content) -> bool:
    """Tells JSON-MIN by a list of rectangles in its first task."""
    return (
        isinstance(content, list)
        and _keys(content)
        and any(
            isinstance(value, list) and value and _is_rectangle(value[0]) for value in map(parsed, content[0].values())
        )
    )


def _is_voc(path: Path, _: Content) -> bool:
    file = path if path.suffix.lower() == ".xml" else next(path.rglob("*.xml"), None) if path.is_dir() else None
    return file is not None and "<annotation" in whole_text(file, "annotations")[:2000]


def _in_list(*names: str) -> Callable[[Path, Content], bool]:
    return lambda path, content: isinstance(content, list) and _keys(content, *names)


FORMS = (
    Form(
        "COCO",
        lambda path, content: _lists(content, "images", "annotations") and _keys(content["annotations"], "bbox"),
        _coco,
    ),
    Form("Visual Genome's objects", _in_list("image_id", "objects"), _visual_genome),
    Form("Visual Genome's regions", _in_list("regions"), _visual_genome),
    Form("Label Studio's JSON", _in_list("data", "annotations"), _label_studio),
    Form("Label Studio's JSON", _in_list("data", "completions"), _label_studio),
    Form("Label Studio's JSON-MIN", lambda path, content: _is_minimal(content), _label_studio),
    Form("VoTT", lambda path, content: _keys(content, "assets") and isinstance(content, dict), _vott),
    Form(
        "RefCOCO",
        lambda path, content: (
            _keys(content, "bbox")
            and (_keys(content, "answer", "segmentation") or _keys(content, "raw_anns", "captions"))
        ),
        _refcoco,
    ),
    Form("a table of boxes", _is_table, _table),
    Form("YOLO", lambda path, content: path.is_dir() and _yolo_names(path) is not None, _yolo),
    Form("Pascal VOC", _is_voc, _voc),
)
"""A file or folder has the first of these forms that fits it."""


def form_of(path: Path) -> Form | None:
    """Returns the form of a file or folder of annotations; None where it is none."""
    try:
        content = _first_of(path) if path.is_file() else None
    except (UserError, OSError):
        return None  # whoever reads it as something else says what is wrong
    return next((form for form in FORMS if form.fits(path, content)), None)


@dataclass(frozen=True)
class AnnotatedPictures(DataFiles):
    """The pictures of a file of annotations, as rows that ask for their objects, or for those of each label."""

    form: Form
    ask: str

    def rows(self) -> Iterator[dict[str, object]]:
        """Yields a row a picture and label where the question has `{label}`, else a row a picture."""
        for number, picture in enumerate(self.form.read(self.files[0]), 1):
            about: dict[str, object] = {"image": picture.image}
            if picture.size:
                about |= {"width": picture.size[0], "height": picture.size[1]}
            asked: dict[str, list[Box]] = {}
            for box in picture.boxes:
                asked.setdefault(box.label if LABEL in self.ask else "", []).append(box)
            answers = [(self.ask.replace(LABEL, label), place_of(boxes)) for label, boxes in asked.items()]
            for index, (question, answer) in enumerate(answers, 1):
                turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
                yield {"id": f"{number}-{index}", **about, "conversations": turns}


def annotated_pictures(path: Path, ask: str) -> AnnotatedPictures | None:
    """Returns a file or folder of annotations, or the one file of them in a folder; None where there is none.

    Raises UserError: it has several, or `ask`, the question of its rows, is missing.
    """
    found = {path: form} if (form := form_of(path)) else {}
    if not found and path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in (".json", ".csv", ".tsv")]
        found = {file: form for file in files if (form := form_of(file))}
    if not found:
        return None
    if len(found) > 1:
        raise UserError(f"{path}: several files of annotations, {short_names(file.name for file in found)}; name one")
    (at, form), *_ = found.items()
    if not ask:
        raise UserError(
            f'{at}: {form.name}, which asks nothing; say the question by --ask "where is the {LABEL}?", for a row a '
            'picture and label, or --ask "what is where?", for a row a picture'
        )
    return AnnotatedPictures(str(at), (at,), form, ask)
