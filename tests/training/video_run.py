"""Generated clips, pictures and words as a training file, mixed in every way."""

import json
from pathlib import Path

import numpy as np

from tests.data.video_files import write_video
from tests.training.tiny_run import COLOURS


def write_video_data(folder: Path, *, samples: int = 16) -> Path:
    """Samples of four kinds in turn: words, a picture, a video (every second one a part of it), picture and video."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    names = list(COLOURS)
    for number, name in enumerate(names):
        Image.new("RGB", (18 + number, 14), COLOURS[name]).save(folder / f"{name}.png")
        write_video(folder / f"{name}.mp4", np.arange(0, 1 + number * 0.4, 0.04).tolist())
    records = []
    for index in range(samples):
        name, kind = names[index // 4 % 4], index % 4
        question = "Say the colour." + " Say" * (index % 5)
        record: dict[str, object] = {"id": f"sample-{index}"}
        if kind in (1, 3):
            record["image"] = f"{name}.png"
        if kind in (2, 3):
            part = {"path": f"{name}.mp4", "start_seconds": 0.2}
            record["video"] = part if index // 4 % 2 else f"{name}.mp4"
        marks = {0: "", 1: "<image>\n", 2: "<video>\n", 3: "<video> and <image>\n"}[kind]
        conversation = [
            {"from": "human", "value": marks + question},
            {"from": "gpt", "value": name + " it" * (index % 3)},
        ]
        records.append({**record, "conversations": conversation})
    path = folder / "train.json"
    path.write_text(json.dumps(records))
    return path
