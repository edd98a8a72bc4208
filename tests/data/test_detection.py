"""Annotation files, as their tools write them, become one form; wrong ones say where they are wrong."""

import argparse
import contextlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dora_vl.data import check as check_command
from dora_vl.data.detection import annotated_pictures, form_of
from dora_vl.data.objects import Box, boxes_in
from dora_vl.data.readers import read_row
from dora_vl.errors import BadSample, UserError
from dora_vl.start import init

COCO: dict[str, Any] = {
    "images": [{"id": 397133, "file_name": "000000397133.jpg", "width": 640, "height": 427}],
    "annotations": [
        {
            **{"area": 1481.3806499999994, "iscrowd": 0, "image_id": 397133, "bbox": [217.62, 240.54, 38.99, 57.75]},
            **{"category_id": 44, "id": 82445},
        }
    ],
    "categories": [{"supercategory": "kitchen", "id": 44, "name": "bottle"}],
}
REGIONS: list[Any] = [
    {
        "regions": [
            {
                **{"region_id": 1382, "width": 82, "height": 139, "image_id": 1, "y": 57, "x": 421},
                "phrase": "the clock is green in colour",
            }
        ],
        "id": 1,
    }
]
OBJECTS: list[Any] = [
    {
        "image_id": 1,
        "objects": [
            {
                **{"synsets": ["tree.n.01"], "h": 557, "object_id": 1058549, "merged_object_ids": []},
                **{"names": ["trees"], "w": 799, "y": 0, "x": 0},
            }
        ],
    }
]
VOC = """<annotation><folder>JPEGImages</folder><filename>BloodImage_00001.jpg</filename>
<size><width>640</width><height>480</height><depth>3</depth></size><segmented>0</segmented>
<object><name>WBC</name><pose>Unspecified</pose><truncated>1</truncated><difficult>0</difficult>
<bndbox><xmin>68</xmin><ymin>315</ymin><xmax>286</xmax><ymax>480</ymax></bndbox></object></annotation>"""
YOLO = "2 0.49765625 0.46200607902735563 0.9640625 0.8693009118541033\n"
RECTANGLE: dict[str, Any] = {
    **{"x": 37.15846994535519, "y": 70.67395264116576, "width": 4.189435336976321, "height": 4.735883424408015},
    **{"rotation": 0, "rectanglelabels": ["parasites"]},
}
SIZED = {"original_width": 2800, "original_height": 2800}
STUDIO: list[Any] = [
    {
        "id": 1,
        "data": {"image": "/data/upload/1/a.jpg"},
        "annotations": [
            {
                "id": 2,
                "result": [
                    {
                        **{**SIZED, "image_rotation": 0, "value": RECTANGLE, "id": "C7oHaRDVVC", "origin": "manual"},
                        **{"from_name": "label", "to_name": "image", "type": "rectanglelabels"},
                    }
                ],
            }
        ],
    }
]
MINIMAL: list[Any] = [
    {"image": "/data/upload/1/a.jpg", "id": 1, "label": [RECTANGLE | SIZED], "annotator": 2, "lead_time": 3.1}
]
VOTT: dict[str, Any] = {
    "name": "people",
    "assets": {
        "4e1f": {
            "asset": {"name": "p.jpg", "path": "file:p.jpg", "size": {"width": 640, "height": 480}},
            "regions": [
                {
                    **{"id": "8u1F_c4vs", "type": "RECTANGLE", "tags": ["Murtadha"]},
                    "boundingBox": {
                        **{"height": 147.33590733590734, "width": 78.72648335745296},
                        **{"left": 276.931982633864, "top": 65.5019305019305},
                    },
                }
            ],
        }
    },
}
TF = "filename,width,height,class,xmin,ymin,xmax,ymax,bbox_type\nr.jpg,640,480,cat,10,20,110,220,real\n"
PERCENT = tuple(value / 100 for value in (37.158470, 70.673953, 37.158470 + 4.189435, 70.673953 + 4.735883))
RIGHT: list[tuple[str, Any, str, tuple[float, ...], str, bool]] = [
    ("i.json", COCO, "000000397133.jpg", (217.62, 240.54, 256.61, 298.29), "bottle", True),
    ("region_descriptions.json", REGIONS, "1.jpg", (421, 57, 503, 196), "the clock is green in colour", True),
    ("objects.json", OBJECTS, "1.jpg", (0, 0, 799, 557), "trees", True),
    ("v.xml", VOC, "BloodImage_00001.jpg", (67, 314, 286, 480), "WBC", True),
    ("s.json", STUDIO, "1/a.jpg", PERCENT, "parasites", False),
    ("m.json", MINIMAL, "1/a.jpg", PERCENT, "parasites", False),
    ("p-export.json", VOTT, "p.jpg", (276.931983, 65.501931, 355.658466, 212.837838), "Murtadha", True),
    ("t.csv", TF, "r.jpg", (10, 20, 110, 220), "cat", True),
    ("f.csv", "image,label,x,y,w,h\na.jpg,cat,0.1,0.2,0.3,0.4\n", "a.jpg", (0.1, 0.2, 0.4, 0.6), "cat", False),
    ("b.csv", 'image,label,bbox\na.jpg,cat,"[1200, 20, 30, 40]"\n', "a.jpg", (1200, 20, 1230, 60), "cat", True),
]


def written(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def yolo(folder: Path, line: str = YOLO, names: str = "names:\n  0: closed_door\n  1: opened_door\n  2: bus\n") -> Path:
    for name in ("images", "labels"):
        (folder / name).mkdir()
    (folder / "data.yaml").write_text(f"path: .\ntrain: images\n{names}")
    Image.new("RGB", (64, 64)).save(folder / "images" / "img_1.jpg")
    (folder / "labels" / "img_1.txt").write_text(line)
    return folder


def only(path: Path) -> tuple[str, Box]:
    pictures = annotated_pictures(path, "where is the {label}?")
    assert pictures is not None
    (row,) = pictures.rows()
    example = read_row(row)
    (place,) = boxes_in(example.turns[-1].text)
    assert example.turns[0].text == f"<image>\nwhere is the {place[0].label}?"
    return example.images[0], place[0]


@pytest.mark.parametrize(("name", "content", "image", "corners", "label", "in_pixels"), RIGHT)
def test_a_file_as_its_tool_writes_it(
    tmp_path: Path, name: str, content: Any, image: str, corners: tuple[float, ...], label: str, in_pixels: bool
) -> None:
    picture, box = only(written(tmp_path, name, content))
    assert (picture, box.label, box.in_pixels) == (image, label, in_pixels)
    assert box.corners == pytest.approx(corners, abs=1e-5)


def test_yolos_folder_and_captions(tmp_path: Path) -> None:
    picture, box = only(yolo(tmp_path))
    assert (picture, box.label) == ("images/img_1.jpg", "bus")
    assert box.corners == pytest.approx((0.015625, 0.027356, 0.979688, 0.896657), abs=1e-5)
    told = {"images": COCO["images"], "annotations": [{"id": 1, "image_id": 397133, "caption": "A bottle."}]}
    assert form_of(written(tmp_path, "c.json", told)) is None  # its rows are read as they are


def test_refcoco_from_the_hub(tmp_path: Path) -> None:
    row = {
        **{"question_id": "1", "image": {"bytes": b"x", "path": "a.jpg"}, "question": "what?", "answer": ["left man"]},
        **{"segmentation": [1.0, 2.0], "bbox": [10.0, 20.0, 30.0, 40.0], "iscrowd": 0, "file_name": "a.jpg"},
    }
    pq.write_table(pa.Table.from_pylist([row]), path := tmp_path / "val.parquet")
    form = form_of(path)
    assert form is not None
    (picture,) = form.read(path)
    assert picture.boxes == [Box((10, 20, 40, 60), "left man", in_pixels=True)]


def test_other_files_are_none(tmp_path: Path) -> None:
    rows = [{"image": "a.jpg", "question": "q", "answer": "a"}]
    assert form_of(written(tmp_path, "q.json", rows)) is None
    assert form_of(written(tmp_path, "q.csv", "image,question,answer\na.jpg,q,a\n")) is None


def coco(**changes: Any) -> dict[str, Any]:
    return {**COCO, "annotations": [{**COCO["annotations"][0], **changes}]}


def studio(**changes: Any) -> list[Any]:
    return [{**MINIMAL[0], "label": [{**RECTANGLE, **changes}]}]


def vott(**changes: Any) -> dict[str, Any]:
    asset = VOTT["assets"]["4e1f"]
    return {"assets": {"4e1f": {**asset, "regions": [{**asset["regions"][0], **changes}]}}}


HEAD = "image,label,x0,y0,x1,y1\n"
WRONG: list[tuple[str, Any, str]] = [
    ("c.json", coco(bbox=[1, 2, 3]), "annotation 1: a box is left, top, width"),
    ("c.json", coco(bbox=[1, 2, 0, 4]), "annotation 1: a box is left, top, width"),
    ("c.json", coco(bbox=[1, 2, -3, 4]), "annotation 1: a box is left, top, width"),
    ("c.json", coco(bbox=["a", 2, 3, 4]), "annotation 1: a box is of numbers"),
    ("c.json", coco(bbox=7), "annotation 1: a box is left"),
    ("c.json", coco(image_id=1), "annotation 1: no image has the id 1"),
    ("c.json", coco(category_id=1), "annotation 1: no category has the id 1"),
    ("c.json", {**COCO, "images": [*COCO["images"]] * 2}, "image 2: the id 397133 is an earlier"),
    ("c.json", {**COCO, "images": [{"id": 397133}]}, "image 1: has no 'file_name'"),
    ("o.json", [{"image_id": 1, "objects": [{"x": 1, "y": 2, "w": 3}]}], "picture 1, object 1: has no 'h'"),
    ("o.json", [{"image_id": 1, "objects": [{"x": 1, "y": 2, "w": 3, "h": 4}]}], "object 1: says no name"),
    ("r.json", [{"id": 1, "regions": [{"x": 1, "y": 2, "phrase": "a"}]}], "region 1: has no 'width', 'height'"),
    ("v.xml", VOC.replace("<xmax>286</xmax>", ""), "object 1: a box is of numbers"),
    ("v.xml", VOC.replace("<xmax>286", "<xmax>28"), "object 1: a box is left, top, right"),
    ("v.xml", VOC.replace("<name>WBC</name>", ""), "object 1: has no <name>"),
    ("v.xml", VOC.replace("bndbox", "robndbox"), "object 1: has no <bndbox> (a turned"),
    ("v.xml", VOC[:-5], "not whole XML"),
    ("v.xml", VOC.replace("filename", "file"), "has no <filename>"),
    ("s.json", studio(rotation=12), "task 1, result 1: is turned by 12"),
    ("s.json", studio(x=370), "task 1, result 1: its numbers must be percent"),
    ("s.json", studio(width=0), "task 1, result 1: a box is left"),
    ("s.json", [{key: MINIMAL[0][key] for key in ("id", "label")}], "task 1: names no picture"),
    ("p.json", vott(type="POLYGON"), "asset 4e1f, region 1: is a POLYGON"),
    ("p.json", vott(tags=[]), "asset 4e1f, region 1: has no tag"),
    ("p.json", vott(boundingBox={"left": 1}), "region 1: has no 'top'"),
    ("t.csv", f"{HEAD}a.jpg,cat,1,2,3,4\n", "line 2: [1.0, 2.0, 3.0, 4.0] may be pixels or thousandths"),
    ("t.csv", f"{HEAD}a.jpg,cat,1,2,3000,4\na.jpg,cat,9,2,3,4\n", "line 3: a box is left, top, right"),
    ("t.csv", f"{HEAD}a.jpg,,1,2,3000,4\n", "line 2: its label is empty"),
    ("t.csv", f"{HEAD}a.jpg,cat,x,2,3000,4\n", "line 2: a box is of numbers"),
    ("t.csv", 'image,label,bbox\na.jpg,cat,"[0.1,0.1,0.3,0.4]"\n', "which? Name four columns so"),
    ("t.csv", 'image,label,bbox\na.jpg,cat,"[0.1,0.1,0.3]"\n', "line 2: a box is of four numbers"),
    ("t.csv", TF.replace(",real", ",inch"), "line 2: bbox_type must be one of"),
]


@pytest.mark.parametrize(("name", "content", "message"), WRONG)
def test_a_wrong_file_says_where(tmp_path: Path, name: str, content: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        only(written(tmp_path, name, content))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("7 0.5 0.5 0.1 0.1", "line 1: class 7 is none of the 3"),
        ("1 0.5 0.5 0.1", "line 1: 4 numbers, too few"),
        ("1 0.1 0.1 0.2 0.1 0.2 0.2 0.1 0.2", "line 1: 9 numbers, a polygon"),
        ("1 120 80 20 20", "line 1: its numbers"),
        ("1 a b c d", "line 1: a box is of numbers"),
    ],
)
def test_a_wrong_line_of_yolo(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        only(yolo(tmp_path, line))
    assert message in str(caught.value)


def swift(answer: str, **objects: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": "<image>Find"}, {"role": "assistant", "content": answer}]
    return {"images": ["a.jpg"], "messages": turns, "objects": objects}


ROWS: list[tuple[dict[str, Any], Box]] = [
    (swift("<ref-object><bbox>", ref=["dog"], bbox=[[1, 2, 30, 40]]), Box((1, 2, 30, 40), "dog", in_pixels=True)),
    (swift("<bbox>", ref=[], bbox=[[0.1, 0.2, 0.3, 0.4]], bbox_type="norm1"), Box((0.1, 0.2, 0.3, 0.4))),
    (swift("<bbox>", bbox=[[10, 20, 30, 40]], width=[100], height=[200]), Box((0.1, 0.1, 0.3, 0.2))),
    (
        swift('[{"bbox_2d": <bbox>, "label": "<ref-object>"}]', ref=["dog"], bbox=[[1, 2, 3, 4]]),
        Box((1, 2, 3, 4), "dog", in_pixels=True),
    ),
    (
        {
            **{"image": "a.jpg", "question": "where?", "bbox_type": "norm1000"},
            "answer": '```json\n[\n\t{"bbox_2d": [100, 200, 300, 400], "label": "dog"}\n]\n```',
        },
        Box((0.1, 0.2, 0.3, 0.4), "dog"),
    ),
    (
        {"image": "a.jpg", "prefix": "detect cat ; dog", "suffix": "<loc0000><loc0000><loc1023><loc1023> dog"},
        Box((0, 0, 1, 1), "dog"),
    ),
]


@pytest.mark.parametrize(("row", "box"), ROWS)
def test_rows_that_say_where(row: dict[str, Any], box: Box) -> None:
    assert boxes_in(read_row(row).turns[-1].text) == [[box]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (swift("<bbox><bbox>", bbox=[[1, 2, 3, 4]]), "more <bbox> than"),
        (swift("<bbox>", bbox=[[1, 2, 3, 4], [1, 2, 3, 4]]), "1 <bbox>, and its objects 2"),
        (swift("<bbox>", bbox=[[1, 2, 3, 4]], bbox_type="inch"), "bbox_type must be one of"),
        (swift("<bbox>", bbox=[[1, 2, 3]]), "has four numbers"),
        (swift("<bbox>", bbox=[[9, 2, 3, 4]]), "empty or reversed"),
        (swift("<bbox>", bbox=[[1, 2, 3, 4]], image_id=[1]), "of picture 2, and it has 1"),
        ({"image": "a.jpg", "prefix": "detect a", "suffix": "<loc0001><loc0002> a"}, "must be four of"),
    ],
)
def test_rows_that_do_not_match(row: dict[str, Any], message: str) -> None:
    with pytest.raises(BadSample) as caught:
        read_row(row)
    assert message in str(caught.value)


def lines_of(command: Any, *words: str) -> list[str]:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    lines: list[str] = []
    arguments = parser.parse_args(list(words))
    arguments.words = list(words)
    with contextlib.suppress(SystemExit):
        lines.extend(command.run(arguments))
    return lines


def test_check_data_finds_wrong_boxes_and_draws_the_others(tmp_path: Path) -> None:
    Image.new("RGB", (100, 50)).save(tmp_path / "a.jpg")
    answers = ["<bbox>"] * 3 + ["it is at [10, 20, 300, 400]"]
    boxes = [[[1, 2, 30, 40]], [[1, 2, 30, 60]], [[1, 2, 2, 40]], []]
    rows = [
        {**swift(answer, bbox=box), "id": str(number)}
        for number, (answer, box) in enumerate(zip(answers, boxes, strict=True))
    ]
    path, sheet = written(tmp_path, "rows.json", rows), tmp_path / "boxes.png"
    text = "\n".join(lines_of(check_command, str(path), "--media", str(tmp_path), "--sheet", str(sheet)))
    for problem in ("a wrong box", "a box under two pixels", "numbers in a text that look like"):
        assert problem in text
    assert sheet.is_file()


def test_init_asks_for_the_question_and_writes_fractions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    images, annotations = [], []
    for number in range(10):
        Image.new("RGB", (100, 50), (number, 0, 0)).save(data / f"{number}.jpg")
        images.append({"id": number, "file_name": f"{number}.jpg", "width": 100, "height": 50})
        annotations.append({"id": number, "image_id": number, "category_id": 1, "bbox": [10, 10, 20, 20]})
    written(data, "i.json", {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cup"}]})
    with pytest.raises(UserError, match="say the question by --ask"):
        lines_of(init, str(data))
    lines_of(init, str(data), "--ask", "where is the {label}?", "--to", "runs/x")
    first = json.loads((tmp_path / "runs/x/train.jsonl").read_text().splitlines()[0])
    assert first["conversations"][1]["value"] == '<objects>[{"box": [0.1, 0.2, 0.3, 0.6], "label": "cup"}]</objects>'
