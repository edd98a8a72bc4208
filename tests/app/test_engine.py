"""Requests for several adapters and the base in one batch: each is answered as by its adapter alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dora_vl.data.turns import Turn
from dora_vl.evaluation.prompt_inputs import Shown
from dora_vl.serving.answering import EngineSettings, Finished, Piece
from dora_vl.serving.decoding import Sampling
from dora_vl.serving.engine import Engine
from tests.app.tiny_served import ADAPTERS, alone, answer_alone, served, spread, write_adapters
from tests.backbones.tiny_image_text import write_tiny

NEW_TOKENS = 8


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return spread(write_tiny("qwen2_5_vl", tmp_path_factory.mktemp("base") / "model"))


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_adapters(base, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def engine(base: Path, adapters: dict[str, Path]) -> Iterator[Engine]:
    with Engine(served(base, adapters), EngineSettings(batch_rows=32, window_seconds=0.3)) as engine:
        yield engine


def asked() -> list[tuple[list[Turn], Shown]]:
    red, wide = Image.new("RGB", (21, 15), "red"), Image.new("RGB", (60, 17), (20, 40, 220))
    return [
        ([Turn("user", "What colour is it?")], Shown()),
        ([Turn("user", "<image>\nSay the colour.")], Shown(pictures=(red,))),
        ([Turn("user", "<image>\n<image>\nWhich is red? Say it.")], Shown(pictures=(wide, red))),
        ([Turn("user", "Say " * 9), Turn("assistant", "red"), Turn("user", "And the shape?")], Shown()),
    ]


def answers(
    engine: Engine, questions: list[tuple[str, list[Turn], Shown]], *, strength: float = 1.0, **sampling: Any
) -> list[str]:
    """All handed in at once."""
    settings = Sampling(**{"max_new_tokens": NEW_TOKENS, **sampling})
    prepared = [
        engine.prepare(name, turns, settings, pictures=seen.pictures, videos=seen.videos, strength=strength)
        for name, turns, seen in questions
    ]
    import queue

    queues: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in prepared]
    for one, events in zip(prepared, queues, strict=True):
        engine.submit(one, events.put)
    said = []
    for events in queues:
        pieces = ""
        while isinstance(event := events.get(timeout=120), Piece):
            pieces += event.text
        assert isinstance(event, Finished), event
        assert event.text == pieces
        said.append(event.text)
    return said


def test_a_mixed_batch_answers_as_each_adapter_alone(
    engine: Engine, base: Path, adapters: dict[str, Path], monkeypatch: Any
) -> None:
    names = ["base", *ADAPTERS]
    questions = [(name, turns, seen) for name in names for turns, seen in asked()]
    questions = [questions[(7 * number) % len(questions)] for number in range(len(questions))]  # no order by name
    sizes = []
    begin = engine._rows.begin
    monkeypatch.setattr(engine._rows, "begin", lambda batch: (sizes.append(len(batch)), begin(batch))[1])
    found = answers(engine, questions)
    assert max(sizes) == len(questions)
    assistants = {name: alone(base, adapters.get(name)) for name in names}
    expected = [answer_alone(assistants[name], turns, seen, tokens=NEW_TOKENS) for name, turns, seen in questions]
    assert found == expected
    by_name = {name: [e for q, e in zip(questions, expected, strict=True) if q[0] == name] for name in names}
    assert len({tuple(sorted(said)) for said in by_name.values()}) == len(names)  # or nothing is shown


@torch.inference_mode()
def test_base_rows_of_a_mixed_batch_have_the_bases_bits(engine: Engine, base: Path) -> None:
    turns, seen = asked()[1]
    model = engine.model
    sample = model.assistant.prompts.sample(turns, seen)
    batch = model.assistant.prompts.collate([sample] * 3, "left")
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "samples", "padding_tokens")}
    inputs = {name: value for name, value in inputs.items() if name not in ("skipped", "cut")}
    plain = alone(base, None).backbone.model(**inputs).logits
    with model.rows([model.asked("base"), model.asked("one"), model.asked("four")], [1, 1, 1]):
        mixed = model.backbone.model(**inputs).logits
    assert torch.equal(mixed[0], plain[0])
    assert not torch.allclose(mixed[1], plain[1], atol=1e-2)
