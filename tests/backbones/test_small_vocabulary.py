"""What a small model's vocabulary is made from: any file that training reads."""

from __future__ import annotations

import json
from pathlib import Path

from dora_vl.backbones.specs import SmallLanguageModel
from dora_vl.backbones.tower_sources import texts_of


def test_texts_of_records_and_of_rows_are_a_vocabulary_s(tmp_path: Path) -> None:
    record = {"id": "1", "images": ["0.png"], "question": "Which?", "choices": ["red", "blue"]}
    record |= {"answers": [{"text": "red"}, {"text": "crimson", "weight": 0.3}]}
    (tmp_path / "records.jsonl").write_text(json.dumps(record))
    (tmp_path / "rows.csv").write_text("image,question,answer\n0.png,Why?,because\n")
    conversation = {
        "image": "0.png",
        "conversations": [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "me"}],
    }
    (tmp_path / "conversations.json").write_text(json.dumps([conversation]))
    files = tuple(str(tmp_path / name) for name in ("records.jsonl", "rows.csv", "conversations.json"))
    texts = list(texts_of(SmallLanguageModel(texts=files, words=("more",))))
    assert texts == ["Which?", "red", "blue", "red", "crimson", "Why?", "because", "Who?", "me", "more"]
