"""Files for servers and judges hold what each takes."""

from __future__ import annotations

import csv
import io
import json

import pytest

from dora_vl.data.example import Answer, Example
from dora_vl.errors import UserError
from dora_vl.evaluation.scores import caption, llava, video, vqa
from dora_vl.evaluation.scores import vqa as gqa
from dora_vl.evaluation.scores import vqa as vizwiz
from tests.shared_data import shared


def test_vqa_family() -> None:
    examples = [Example(id="7", images=("val/a.jpg",)), Example(id="8", images=("val/b.jpg",))]
    name, text = vqa.vqa_submission(examples, {"7": "A dog."})
    assert (name, json.loads(text)) == (
        "vqav2.json",
        [{"question_id": 7, "answer": "dog"}, {"question_id": 8, "answer": ""}],
    )
    _, text = vizwiz.vizwiz_submission(examples, {"8": "two's"})
    assert json.loads(text) == [{"image": "a.jpg", "answer": ""}, {"image": "b.jpg", "answer": "2 's"}]
    _, text = gqa.gqa_submission(examples, {"7": "Yes."})
    assert json.loads(text) == [{"questionId": "7", "prediction": "yes"}, {"questionId": "8", "prediction": ""}]


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("7", 7),
        ("9" * 18, int("9" * 18)),
        ("9" * 19, "9" * 19),
        ("9" * 5_000, "9" * 5_000),
        ("²", "²"),
        ("٣", "٣"),
        ("-1", "-1"),
    ],
)
def test_an_id_that_is_no_number_stays_text(name: str, written: object) -> None:
    example = Example(id=name, images=("a.jpg",), extra={"image_id": name})
    assert json.loads(vqa.vqa_submission([example], {})[1]) == [{"question_id": written, "answer": ""}]
    assert json.loads(caption.coco_caption([example], {})[1]) == [{"image_id": written, "caption": ""}]
    assert json.loads(caption.yc2c([example], {})[1])["clip_id"] == written
    assert list(llava.judge_file([example], {})) == [f"v1_{name}" if isinstance(written, int) else name]


def test_mmbench_columns() -> None:
    rows = [
        Example(
            id="1", question="which\tone?", choices=("x", "y"), extra={"index": 1, "hint": "a\nb", "category": "c"}
        ),
        Example(id="2", question="q", choices=("x", "y", "z"), extra={"index": 2}),
    ]
    _, text = llava.mmbench_submission(rows, {"1": "A", "2": "tab\there"})
    header, first, second = csv.reader(io.StringIO(text), delimiter="\t")
    assert header == ["index", "question", "A", "B", "C", "hint", "category", "prediction"]
    assert first == ["1", "which\tone?", "x", "y", "", "a\nb", "c", "A"]
    assert second == ["2", "q", "x", "y", "z", "", "", "tab\there"]


def test_value_files_have_the_published_form() -> None:
    qa = [Example(id=name, choices=("a", "b", "c", "d")) for name in ("11", "12", "13")]
    assert json.loads(video.how2qa(qa, {"11": "a3", "12": "nonsense"})[1]) == {"11": 3, "12": 0, "13": -1}
    assert video.tvqa(qa, {})[0] == "tvqa_test_predictions.json"
    with shared("value/yc2c_val_predictions_sample.jsonl").open() as file:
        published = [json.loads(line) for line in file]
    examples, answers = [], {}
    for row in published:
        name = str(row["clip_id"])
        extra = {"clip_id": row["clip_id"], "vid_name": row["video_id"]}
        examples.append(Example(id=name, answers=(Answer(text="x"),), extra=extra))
        answers[name] = row["descs"][0]["desc"]
    name, text = caption.yc2c(examples, answers)
    assert name == "yc2c_test_predictions.jsonl"
    assert [json.loads(line) for line in text.splitlines()] == published


def test_tvc_file_has_the_published_form() -> None:
    with shared("value/tvc_val_predictions_sample.jsonl").open() as file:
        published = [json.loads(line) for line in file]
    examples = [
        Example(id=str(row["clip_id"]), extra={name: row[name] for name in ("clip_id", "vid_name", "ts")})
        for row in published
    ]
    answers = {str(row["clip_id"]): row["descs"][0]["desc"] for row in published}
    assert [json.loads(line) for line in caption.tvc(examples, answers)[1].splitlines()] == published


def test_coco_captions_come_once_an_image() -> None:
    examples = [Example(id=f"{image}-{n}", extra={"image_id": image}) for image in (3, 4) for n in range(2)]
    rows = json.loads(caption.coco_caption(examples, {"3-0": "a", "3-1": "a", "4-1": "b"})[1])
    assert rows == [{"image_id": 3, "caption": "a"}, {"image_id": 4, "caption": "b"}]


def mmvet_ten() -> list[Example]:
    return [
        Example(id=f"v1_{n}", images=(f"{n}.png",), extra={"capability": ["rec"] if n < 5 else ["rec", "ocr"]})
        for n in range(10)
    ]


def test_mmvet() -> None:
    assert llava.judge_file(mmvet_ten(), {"v1_0": "x"})["v1_0"] == "x"
    scored = llava.score_grades(mmvet_ten(), {f"v1_{n}": n / 10 for n in range(9)})
    assert scored.metrics == pytest.approx({"total": 36.0, "capability/ocr": 52.0, "capability/rec": 36.0})
    assert scored.failed == ("v1_9",)
    with pytest.raises(UserError, match=r"grade of v1_0 is 7"):
        llava.score_grades(mmvet_ten(), {"v1_0": 7.0})


def llava_ten() -> list[Example]:
    kinds = ["conv"] * 4 + ["detail"] * 3 + ["complex"] * 3
    return [
        Example(
            id=str(n), question=f"q{n}", answers=(Answer(text="ref"),), extra={"category": kind, "context": "a cat"}
        )
        for n, kind in enumerate(kinds)
    ]


def test_llava_bench() -> None:
    reviews = {str(n): f"{8 if n < 4 else 10} {n}\nbecause, 3 things" for n in range(10)}
    scored = llava.score_reviews(llava_ten(), reviews)
    assert scored.metrics["relative score"] == pytest.approx(100 * 45 / 92)
    assert scored.metrics["category/conv"] == pytest.approx(100 * 6 / 32)
    assert scored.metrics["mean/model"] == pytest.approx(4.5)
    assert llava.scores_of("8.5, 7\nText") == (8.5, 7.0)
    with pytest.raises(UserError, match="must begin with two numbers, found 'Both are good'"):
        llava.scores_of("Both are good\n8 7")
    with pytest.raises(UserError, match="question 9 has no review"):
        llava.score_reviews(llava_ten(), {str(n): "1 1" for n in range(9)})


def test_a_judges_request_holds_all_it_needs() -> None:
    first, *_ = llava.judge_requests(llava_ten(), {"0": "mine"}, {"conv": "Rate them."})
    assert first["category"] == "conv"
    places = [first["text"].index(part) for part in ("a cat", "q0", "ref", "mine", "Rate them.")]
    assert places == sorted(places)
