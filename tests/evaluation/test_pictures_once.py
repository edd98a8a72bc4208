"""Questions about one picture share the run of its tower, and get the answers that they would get alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from dora_vl.backbones.encoder import open_encoder
from dora_vl.backbones.model import open_backbone
from dora_vl.data.example import Example
from dora_vl.data.turns import Turn
from dora_vl.evaluation import ask
from dora_vl.evaluation.ask import Assistant, Decoding, EncoderPrompts, by_picture, media_reader
from tests.training.tiny_run import write_tiny_llava

WORDS = ("What colour is it?", "Say the colour.", "What is it? Say it.")


def example(number: int, *images: str) -> Example:
    text = "<image>\n" * len(images) + WORDS[number % 3] + " red" * (number % 5)
    return Example(id=str(number), images=images, turns=(Turn("user", text),))


def test_examples_of_one_picture_stand_together_the_longest_first() -> None:
    examples = [example(0, "a.png"), example(1, "b.png"), example(2), example(4, "a.png"), example(5)]
    order = [item.id for item in by_picture(examples)]
    assert sorted(order) == ["0", "1", "2", "4", "5"]
    assert abs(order.index("0") - order.index("4")) == 1
    assert order.index("4") < order.index("0") < order.index("5")


@pytest.mark.parametrize("batch_size", [4, 7])
def test_a_picture_goes_through_the_tower_once(
    tmp_path: Path, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_tiny_llava(tmp_path / "base")
    random = torch.Generator().manual_seed(3)
    names = [f"{number}.png" for number in range(5)]
    for name in names:
        pixels = torch.randint(0, 255, (8, 8, 3), generator=random, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / name)
    examples = [example(number, names[number * 3 % 5]) for number in range(24)]
    examples += [example(24), example(25, names[0], names[1]), example(26, names[0], names[1])]
    backbone = open_backbone(str(base))
    assistant = Assistant(backbone, EncoderPrompts(open_encoder(str(base), max_tokens=512)))
    media, decoding = media_reader(tmp_path, frames=1), Decoding(batch_size=batch_size, max_new_tokens=4)
    pictures: list[int] = []
    tower = next(module for name, module in backbone.model.named_modules() if name.endswith("vision_tower"))

    def answers() -> dict[str, str]:
        pictures.clear()
        count = tower.register_forward_pre_hook(
            lambda _, inputs, named: pictures.append(len(named["pixel_values"] if not inputs else inputs[0])),
            with_kwargs=True,
        )
        rows = [row for several in assistant.predict(examples, media, decoding) for row in several]
        count.remove()
        assert not any(row.error for row in rows)
        return {row.id: row.prediction for row in rows}

    shared, of_tower = answers(), sum(pictures)
    monkeypatch.setattr(ask, "LEAST_REPEATED", 1000)
    alone = answers()
    assert shared == alone
    assert len(set(alone.values())) > 2
    assert sum(pictures) == 24 + 2 * 2
    proof = 40  # passes by which the tower is proven to run apart, at most
    assert of_tower - proof < 5 + 2 + -(-27 // batch_size) * 2 < sum(pictures)
