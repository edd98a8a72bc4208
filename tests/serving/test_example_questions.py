"""The page's example questions are the run's own: one of each kind first, none with the picture of another question."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from dora_vl.evaluation.predictions import Prediction, line_of
from dora_vl.serving.page_parts import example_questions


def test_examples_are_questions_of_the_runs_test(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    settings = {"data": {"image_folder": str(tmp_path)}, "training": {"output_dir": str(run)}}
    (run / "settings.json").write_text(json.dumps(settings))
    for colour in ("red", "blue"):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{colour}.png")
    questions = [("Colour?", "red", "a"), ("Colour?", "red", "a"), ("Size?", "red", "a"), ("Gone?", "gone", "b")]
    questions.append(("Shape?", "blue", "b"))
    rows = [
        Prediction(set=name, id=str(number), question=question, images=[f"{image}.png"], kind=kind)
        for name, exchange in (("test/exchanged_pictures", {"red": "blue", "blue": "red"}), ("test", {}))
        for number, (question, picture, kind) in enumerate(questions)
        for image in [exchange.get(picture, picture)]
    ]
    (run / "predictions.jsonl").write_text("".join(map(line_of, rows)))
    shown = [(example.question, example.picture.getpixel((0, 0))) for example in example_questions(run / "adapter")]
    assert shown == [("Colour?", (255, 0, 0)), ("Shape?", (0, 0, 255)), ("Size?", (255, 0, 0))]
    assert [example.question for example in example_questions(run / "adapter", 1)] == ["Colour?"]
