"""Questions about one picture share the run of its tower, and get the answers that they would get alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dora_vl.backbones.encoder import open_encoder
from dora_vl.backbones.model import DecoderBackbone, open_backbone
from dora_vl.data.example import Example
from dora_vl.data.turns import Turn
from dora_vl.evaluation import assistant as assistant_module
from dora_vl.evaluation.assistant import Assistant, EncoderPrompts
from dora_vl.evaluation.predictor import Decoding, media_reader
from tests.training.tiny_run import write_tiny_llava

WORDS = ("What colour is it?", "Say the colour.", "What is it? Say it.")


def example(number: int, *images: str) -> Example:
    text = "<image>\n" * len(images) + WORDS[number % 3] + " red" * (number % 5)
    return Example(id=str(number), images=images, turns=(Turn("user", text),))


def examples_in(folder: Path) -> list[Example]:
    random = torch.Generator().manual_seed(3)
    names = [f"{number}.png" for number in range(5)]
    for name in names:
        pixels = torch.randint(0, 255, (8, 8, 3), generator=random, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / name)
    about_one = [example(number, names[number * 3 % 5]) for number in range(24)]
    return [*about_one, example(24), example(25, names[0], names[1]), example(26, names[0], names[1])]


class Counted:
    """Counts the pictures that a tower sees and the tokens that a decoder reads."""

    def __init__(self, assistant: Assistant) -> None:
        self.pictures = self.tokens = 0
        model = assistant.backbone.model
        tower = next(module for name, module in model.named_modules() if name.endswith("vision_tower"))
        self._hooks = [
            tower.register_forward_pre_hook(self._tower, with_kwargs=True),
            model.model.language_model.register_forward_pre_hook(self._decoder, with_kwargs=True),
        ]

    def _tower(self, _: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        self.pictures += len(named["pixel_values"] if not inputs else inputs[0])

    def _decoder(self, _: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        self.tokens += named["inputs_embeds"].shape[:2].numel()

    def close(self) -> Counted:
        for hook in self._hooks:
            hook.remove()
        return self


PROOF = 40
"""Passes by which a tower is proven to run apart, at most."""


@pytest.mark.parametrize("batch_size", [4, 7])
def test_a_picture_is_read_once(tmp_path: Path, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, examples = tmp_path, examples_in(tmp_path)
    base = write_tiny_llava(folder / "base")
    assistant = Assistant(open_backbone(str(base)), EncoderPrompts(open_encoder(str(base), max_tokens=512)))
    media, decoding = media_reader(folder, frames=1), Decoding(batch_size=batch_size, max_new_tokens=4)

    def answers() -> tuple[dict[str, str], Counted]:
        counted = Counted(assistant)
        rows = [row for several in assistant.predict(examples, media, decoding) for row in several]
        assert not any(row.error for row in rows)
        return {row.id: row.prediction for row in rows}, counted.close()

    shared, few = answers()
    monkeypatch.setattr(DecoderBackbone, "continues_prompts", False)
    towers, more = answers()
    monkeypatch.setattr(assistant_module, "LEAST_REPEATED", 1000)
    alone, most = answers()
    assert shared == towers == alone
    assert len(set(alone.values())) > 2
    assert most.pictures == 24 + 2 * 2
    assert few.pictures - PROOF < 5 + 2 + -(-27 // batch_size) * 2 < most.pictures
    assert few.tokens < 0.75 * more.tokens
