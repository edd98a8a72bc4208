"""Boxes come back from every family's form: through the processor, the template, the labels and the decoding."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from tokenizers import decoders
from transformers import AutoTokenizer

from dora_vl.backbones.encoder import Encoder, open_encoder
from dora_vl.backbones.families.boxes import BOX_FORMATS, OF_PROCESSOR, boxes_of
from dora_vl.data.example import Example
from dora_vl.data.objects import Box, Size, iou, place_of
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample
from tests.backbones.tiny_image_text import write_tiny
from tests.training.tiny_run import write_tiny_llava

SIZES = ((57, 31), (640, 480), (333, 1000), (2000, 60), (1920, 1080), (4000, 3000))
TYPES = (
    *("llava", "qwen2_5_vl", "internvl"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2_vl", "qwen3_vl", "paligemma", "glm4v", "smolvlm")),
)


def drawn(seed: int, count: int, *, labelled: bool, points: bool = False) -> list[Box]:
    rng, boxes = random.Random(seed), []
    for _ in range(count):
        (x0, x1), (y0, y1) = ((rng.randrange(1, 450), rng.randrange(550, 1000)) for _ in range(2))
        corners = (x0 / 1000, y0 / 1000) if points else (x0 / 1000, y0 / 1000, x1 / 1000, y1 / 1000)
        boxes.append(Box(corners, rng.choice(("dog", "a red cat")) if labelled else ""))
    return boxes


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made: dict[str, Path] = {}
    return made | {"": tmp_path_factory.mktemp("families")}


def encoder_of(model_type: str, folders: dict[str, Path], boxes: str | None = None) -> Encoder:
    if model_type not in folders:
        folder = folders[""] / model_type
        write_tiny_llava(folder) if model_type == "llava" else write_tiny(model_type, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        form = boxes_of(open_encoder(str(folder), max_tokens=99).processor)
        tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
        tokens = {"additional_special_tokens": list(form.tokens)}
        tokenizer.add_special_tokens(tokens, replace_extra_special_tokens=False)
        tokenizer.save_pretrained(folder)
        folders[model_type] = folder
    return open_encoder(str(folders[model_type]), max_tokens=1_000_000, boxes=boxes)


def worst(encoder: Encoder, boxes: list[Box], read: list[Box], size: Size) -> float:
    """Returns the largest distance of a corner, in the family's own units."""
    assert [box.label for box in read] == [box.label for box in boxes]
    units = encoder.boxes.unit(size, encoder.made) * 2
    return max(
        abs(corner - other) / unit
        for box, back in zip(boxes, read, strict=True)
        for corner, other, unit in zip(box.corners, back.corners, units, strict=False)
    )


@pytest.mark.parametrize("points", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("name", BOX_FORMATS)
def test_every_form_reads_what_it_writes(name: str, labelled: bool, points: bool) -> None:
    form, made = BOX_FORMATS[name], lambda size: (max(28, size[0] // 56 * 28), max(28, size[1] // 56 * 28))
    for seed, size in enumerate(SIZES):
        units = form.unit(size, made) * 2
        boxes = [
            box
            for box in drawn(seed, 40, labelled=labelled, points=points)
            if points
            or all(high - low > 1.5 * u for low, high, u in zip(box.corners, box.corners[2:], units, strict=False))
        ]
        text = form.write(boxes, [size], made)
        read = form.read(f"It is here: {text}" if form.labelled.startswith("<") else text, size, made)
        assert len(read) > 20
        for box, back in zip(boxes, read, strict=True):
            assert back.label == box.label
            assert all(abs(a - b) <= u for a, b, u in zip(box.corners, back.corners, units, strict=False))


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("model_type", TYPES)
def test_boxes_come_back_from_the_labels(model_type: str, labelled: bool, folders: dict[str, Path]) -> None:
    encoder = encoder_of(model_type, folders)
    for seed, size in enumerate(SIZES[:3]):
        boxes = drawn(seed, 3, labelled=labelled)
        turns = Turn("user", "<image>\nFind them."), Turn("assistant", f"Here: {place_of(boxes)}")
        encoded = encoder.encode(Example("x", images=("a",), turns=turns), [Image.new("RGB", size, "red")])
        answer = encoder.decode(encoded.labels[encoded.labels >= 0])
        read = [replace(box, label=box.label.removeprefix("Here: ").strip()) for box in encoder.boxes_in(answer, size)]
        assert worst(encoder, boxes, read, size) <= 1.0
        (answers,) = [encoder.answers(Example("x", images=("a",), turns=encoded.written))]
        assert answers[0].text == encoded.written[1].text


def test_pixels_of_the_picture_become_the_familys(folders: dict[str, Path]) -> None:
    """One box of a picture of 4000 x 3000, written out for three families."""
    place = f"<objects>{json.dumps([{'box_px': [400, 600, 2000, 1500], 'label': 'dog'}])}</objects>"
    turns = Turn("user", "<image>\nWhere is the dog?"), Turn("assistant", place)
    texts = {}
    for name in ("thousandths", "qwen2_5", "fractions", "paligemma", "gemma4"):
        encoder = encoder_of("qwen2_5_vl", folders, boxes=name)
        encoded = encoder.encode(Example("x", images=("a",), turns=turns), [Image.new("RGB", (4000, 3000))])
        texts[name] = encoded.written[1].text
    width, height = encoder_of("qwen2_5_vl", folders).made((4000, 3000))
    corners = f"{round(width / 10)}, {round(height / 5)}, {round(width / 2)}, {round(height / 2)}"
    assert texts == {
        "thousandths": '[{"bbox_2d": [100, 200, 500, 500], "label": "dog"}]',
        "qwen2_5": f'```json\n[\n\t{{"bbox_2d": [{corners}], "label": "dog"}}\n]\n```',
        "gemma4": '```json\n[\n  {"box_2d": [200, 100, 500, 500], "label": "dog"}\n]\n```',
        "fractions": '[{"bbox_2d": [0.10, 0.20, 0.50, 0.50], "label": "dog"}]',
        "paligemma": "<loc0205><loc0102><loc0512><loc0512> dog",
    }


@pytest.mark.parametrize(
    "entry",
    [
        {"box": [0.5, 0.1, 0.2, 0.3]},
        {"box": [0.5, 0.1, 0.5, 0.3]},
        {"box": [0.5, 0.1, 1.2, 0.3]},
        {"box": [0.1, 0.1, 0.2]},
        {"box": [0.1, 0.1, 0.2, "0.3"]},
        {"box": [0.1, 0.1, 0.2, 0.3], "image": 1},
        {"box": [0.1, 0.1, 0.2, 0.3], "colour": "red"},
        {"box": [0.1, 0.1, 0.2, 0.3], "point": [0.1, 0.1]},
        {"box_px": [0, 0, 100, 100]},
        {"point": [0.5, 0.5, 0.5]},
        {"label": ""},
    ],
)
def test_wrong_boxes_are_bad_samples(entry: dict[str, object], folders: dict[str, Path]) -> None:
    encoder = encoder_of("qwen2_5_vl", folders)
    turns = Turn("user", "<image>\nWhere?"), Turn("assistant", f"<objects>{json.dumps([entry])}</objects>")
    with pytest.raises(BadSample) as bad:
        encoder.encode(Example("seven", images=("a",), turns=turns), [Image.new("RGB", (64, 64))])
    assert bad.value.sample_id == "seven"


def test_a_box_too_small_for_the_form_is_said(folders: dict[str, Path]) -> None:
    """A hundredth of LLaVA's square is 20 pixels of a line of 2000 x 60, a third of its height."""
    encoder = encoder_of("llava", folders)
    turns = Turn("user", "<image>\nWhere?"), Turn("assistant", place_of([Box((0.2, 0.45, 0.3, 0.55))]))
    with pytest.raises(BadSample, match="20 x 20 pixels"):
        encoder.encode(Example("seven", images=("a",), turns=turns), [Image.new("RGB", (2000, 60))])


def test_words_hold_no_box() -> None:
    for form in BOX_FORMATS.values():
        assert form.read("There are 4 dogs, 3 cats, 2 birds and 1 fish; it costs 1,200.50.", (9, 9), lambda s: s) == []


def test_iou_is_the_area_counted_in_cells() -> None:
    for seed in range(20):
        one, other = drawn(seed, 2, labelled=False)
        cells = [{(x, y) for x in range(int(b[0]), int(b[2])) for y in range(int(b[1]), int(b[3]))}
                 for b in (one.pixels((100, 100)), other.pixels((100, 100)))]  # fmt: skip
        if all(cells):
            rounded = [Box(tuple(int(c) / 100 for c in box.pixels((100, 100)))) for box in (one, other)]
            assert iou(*rounded) == pytest.approx(len(cells[0] & cells[1]) / len(cells[0] | cells[1]))


def test_the_table_names_forms() -> None:
    assert {*OF_PROCESSOR.values()} <= {*BOX_FORMATS}


def test_the_page_shows_what_each_form_writes() -> None:
    page = Path("docs/data.md").read_text(encoding="utf-8")
    box = Box((400.0, 600.0, 2000.0, 1500.0), "dog", in_pixels=True).in_fractions((4000, 3000))
    rows = dict[str, list[str]]()
    for processor, name in OF_PROCESSOR.items():
        rows.setdefault(BOX_FORMATS[name].write([box], [(4000, 3000)], lambda _: (1148, 868)), []).append(
            "LLaVA-1.5" if processor == "PieceProcessor" else f"`{processor}`"
        )
    lines = [f"| {', '.join(names)} | {shown(text)} |" for text, names in rows.items()]
    assert "\n".join(lines) in page, "\n".join(lines)


def shown(text: str) -> str:
    """Writes a text on one line of a table."""
    line = text.removeprefix("```json\n").removesuffix("\n```").replace("\n", "").replace("\t", "").replace("  ", "")
    return f"`{line}`".replace("|", "\\|")
