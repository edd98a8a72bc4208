"""Public sets in the columns and value forms in which they are published, with invented rows.

Each goes from its file through `init`, with the options that `init` prints where it needs any, and `check-data` to an
encoded sample whose labels are the row's answer. The columns are those of the sets' cards on the hub (FineVision,
AI4Math/MathVista, derek-thomas/ScienceQA, nlphuji/flickr30k, lmms-lab/DocVQA, HuggingFaceM4/ChartQA,
openbmb/RLAIF-V-Dataset, openbmb/RLHF-V-Dataset, facebook/winoground, lmms-lab/VQAv2) and of COCO's and VQA's own files.
"""

import argparse
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset
from PIL import Image

from dora_vl.backbones.encoder import IGNORED_LABEL, open_encoder
from dora_vl.data import check, prepare
from dora_vl.data.data_files import find_files
from dora_vl.data.readers import read_row
from dora_vl.errors import UserError
from dora_vl.start import init
from tests.data.published import FIXTURES, manifest
from tests.start.people import picture
from tests.training.tiny_run import write_tiny_llava

ROWS = 8
QUESTION, ANSWER = "What is shown in 0?", "colour 0"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("published") / "llava")


def image(number: int) -> dict[str, Any]:
    return {"bytes": picture(number), "path": f"{number}.png"}


def question(number: int) -> str:
    return f"What is shown in {number}?"


def answer(number: int) -> str:
    return f"colour {number}"


def origin(number: int) -> dict[str, Any]:
    about = json.dumps({"model": "llava", "type": "question_answering"})
    return {"origin_dataset": "coco", "origin_split": about, "idx": f"{number}", "image_path": f"{number}.png"}


def finevision(number: int) -> dict[str, Any]:
    ratings = {
        f"{name}_ratings": [5] for name in ("relevance", "visual_dependency", "image_correspondence", "formatting")
    }
    least = {f"{name.removesuffix('_ratings')}_min": 5 for name in ratings}
    texts = [{"user": question(number), "assistant": answer(number)}]
    return {"images": [image(number)], "texts": texts, "source": "ai2d_merged", **ratings, **least}


def mathvista(number: int) -> dict[str, Any]:
    about = {"category": "general-vqa", "context": "chart", "grade": "daily life", "img_height": 12, "img_width": 16}
    about |= {"language": "english", "skills": ["arithmetic"], "source": "s", "split": "testmini", "task": "figure qa"}
    return {
        **{"pid": f"{number}", "question": question(number), "image": f"images/{number}.jpg"},
        **{"decoded_image": image(number), "choices": None, "unit": None, "precision": 1.0, "answer": answer(number)},
        **{"question_type": "free_form", "answer_type": "text", "metadata": about},
        "query": f"Hint: Answer shortly.\nQuestion: {question(number)}",
    }


SETS: Mapping[str, Any] = {
    "FineVision": finevision,
    "MathVista": mathvista,
    "ScienceQA": lambda number: {
        **{"image": image(number), "question": question(number), "choices": ["no colour", answer(number)], "answer": 1},
        **{"hint": "", "task": "closed choice", "grade": "grade2", "subject": "natural science", "topic": "biology"},
        **{"category": "Plants", "skill": "Name the colour", "lecture": "Light is seen.", "solution": "It is seen."},
    },
    "Flickr30k": lambda number: {
        **{"image": image(number), "caption": [answer(number), f"another {number}"], "sentids": ["0", "1"]},
        **{"split": "train", "img_id": f"{number}", "filename": f"{number}.jpg"},
    },
    "DocVQA": lambda number: {
        **{"questionId": f"{number}", "question": question(number), "question_types": ["form"], "image": image(number)},
        **{"docId": 4, "ucsf_document_id": "fxwl0018", "ucsf_document_page_no": "1"},
        **{"answers": [answer(number), answer(number).upper()], "data_split": "val"},
    },
    "ChartQA": lambda number: {
        **{"image": image(number), "query": question(number), "label": [answer(number)], "human_or_machine": 0}
    },
    "RLAIF-V": lambda number: {
        **{"ds_name": "RLAIF-V", "image": image(number), "question": question(number)},
        **{"chosen": answer(number), "rejected": "grey", **origin(number)},
    },
    "RLHF-V": lambda number: {
        "ds_name": "RLHF-V",
        "image": image(number),
        "text": json.dumps({"question": question(number), "chosen": answer(number), "rejected": "grey"}),
        **origin(number),
    },
    "Winoground": lambda number: {
        **{"id": number, "image_0": image(number), "image_1": image(number + 20), "caption_0": answer(number)},
        **{"caption_1": f"{number} colour", "tag": "Noun", "secondary_tag": "", "num_main_preds": 1},
        "collapsed_tag": "Object",
    },
    "VQAv2": lambda number: {
        **{"question_type": "what is", "multiple_choice_answer": answer(number)},
        "answers": [{"answer": "grey", "answer_confidence": "yes", "answer_id": number} for number in (1, 2, 3)],
        **{"image_id": number, "answer_type": "other", "question_id": number, "question": question(number)},
        "image": image(number),
    },
}
"""Makes a row of each set in Parquet."""
OPTIONS: Mapping[str, str] = {
    "FineVision": "--ignore "
    "relevance_ratings,visual_dependency_ratings,image_correspondence_ratings,formatting_ratings",
    "MathVista": "--columns decoded_image=image --ignore metadata,query",
    "ScienceQA": "--ignore lecture,solution",
    "Flickr30k": "--ignore sentids",
    "DocVQA": "--ignore question_types",
    "ChartQA": "--ignore human_or_machine",
    "RLHF-V": "--columns text.question=question,text.chosen=chosen,text.rejected=rejected",
    "Winoground": "--columns image_0=image,caption_0=caption --ignore image_1,caption_1",
}
"""The options that `init` prints for those that need any."""
CAPTIONS = ("Flickr30k", "Winoground", "COCO captions")


def coco(folder: Path, entries: list[dict[str, Any]]) -> Path:
    """Writes COCO's file of annotations beside its pictures."""
    images = [
        {"license": 4, "file_name": f"{number}.png", "height": 12, "width": 16, "id": number} for number in range(ROWS)
    ]
    for number in range(ROWS):
        (folder / f"{number}.png").write_bytes(picture(number))
    file = {"info": {"year": 2017}, "licenses": [{"id": 4, "name": "CC"}], "images": images, "annotations": entries}
    path = folder / "captions_train2017.json"
    path.write_text(json.dumps(file), encoding="utf-8")
    return path


def run(module: Any, *words: object) -> list[str]:
    parser, arguments = argparse.ArgumentParser(), [str(word) for word in words]
    module.add_arguments(parser)
    return list(module.run(parser.parse_args(arguments, argparse.Namespace(words=arguments))))


@pytest.mark.parametrize("name", [*SETS, "COCO captions"])
def test_a_public_set_is_read_with_what_is_printed(tmp_path, base, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / ".cache"))
    folder = Path("my")
    folder.mkdir()
    if name in SETS:
        path = folder / "train-00000-of-00001.parquet"
        rows = Dataset(pa.Table.from_pylist([SETS[name](number) for number in range(ROWS)]))
        if name == "ChartQA":
            rows = rows.cast_column("human_or_machine", ClassLabel(names=["human", "machine"]))
        rows.to_parquet(path)
    else:
        entries = [{"image_id": number, "id": 40 + number, "caption": answer(number)} for number in range(ROWS)]
        path = coco(folder, entries)
    options = shlex.split(OPTIONS.get(name, ""))
    words = ("my", "--model", base, "--to", "out")
    if options:
        with pytest.raises(UserError) as caught:
            run(init, *words)
        assert OPTIONS[name] in str(caught.value)
    run(init, *words, *options)
    assert run(check, path, "--media", "my", *options)[-1].endswith(": nothing found")
    texts = [Path(f"out/{file}.jsonl").read_text(encoding="utf-8") for file in ("train", "test")]
    written = [json.loads(line) for text in texts for line in text.splitlines()]
    assert len(written) == ROWS
    samples = [read_row(row) for row in written]
    sample = next(sample for sample in samples if "0" in f"{sample.turns[0].text}{sample.turns[-1].text}".split("?")[0])
    pictures = [Image.open((Path("out") if name in SETS else folder) / path) for path in sample.images]
    assert len(pictures) == 1
    encoder = open_encoder(str(base), template="vicuna_v1", max_tokens=512)
    encoded = encoder.encode(sample, pictures)
    trained = encoded.labels[encoded.labels != IGNORED_LABEL]
    expected = "B" if name == "ScienceQA" else ANSWER
    decoded = encoder.processor.tokenizer.decode(trained, skip_special_tokens=True)  # it has pieces, no decoder
    assert decoded.replace(" ", "").replace("Ġ", " ").strip() == expected
    if name not in CAPTIONS:
        assert QUESTION in sample.turns[0].text
    assert sample.rejected == (("grey",) if name.startswith("RL") else ())


def test_files_of_coco_and_vqa_that_are_no_rows_say_the_next_step(tmp_path: Path) -> None:
    boxes = [{"id": 1, "image_id": 0, "category_id": 18, "bbox": [1, 2, 3, 4], "segmentation": [[1, 2]], "iscrowd": 0}]
    with pytest.raises(UserError) as caught:
        list(find_files(coco(tmp_path, boxes)).rows())
    assert "bbox" in str(caught.value)
    for path in (FIXTURES / "vqav2").glob("*train2014*.json"):
        with pytest.raises(UserError) as caught:
            list(find_files(path).rows())
        _, _, source, *words = shlex.split(str(caught.value).split("`")[1])
        words[words.index("--to") + 1] = str(tmp_path / "records")
        assert source == "vqav2"
        run(prepare, source, *words)
        assert manifest(tmp_path / "records" / "vqav2", "train")["written"] > 0
