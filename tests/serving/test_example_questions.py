"""The page's example questions are the run's own: none has the picture of another question."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from dora_vl.evaluation.predictions import Prediction, line_of
from dora_vl.serving.page_parts import example_questions


def test_questions_about_exchanged_pictures_are_no_examples(tmp_path: Path) -> None:
    colours, run = ("red", "blue"), tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    settings = {"data": {"image_folder": str(tmp_path)}, "training": {"output_dir": str(run)}}
    (run / "settings.json").write_text(json.dumps(settings))
    rows = []
    for colour, other in zip(colours, reversed(colours), strict=True):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{colour}.png")
        about = {"id": colour, "question": f"is it {colour}?", "truth": "yes", "prediction": "yes"}
        rows.insert(0, Prediction(set="test/exchanged_pictures", images=[f"{other}.png"], **about))
        rows.append(Prediction(set="test", images=[f"{colour}.png"], **about))
    (run / "predictions.jsonl").write_text("".join(map(line_of, rows)))
    shown = {example.question: example.picture.getpixel((0, 0)) for example in example_questions(run / "adapter")}
    assert shown == {"is it red?": (255, 0, 0), "is it blue?": (0, 0, 255)}
