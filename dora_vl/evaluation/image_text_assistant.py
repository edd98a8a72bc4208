"""A trained adapter on any vision-language model of transformers, ready to be asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dora_vl.backbones.base import max_positions
from dora_vl.backbones.image_text import ImageTextBackbone, load_image_text
from dora_vl.backbones.image_text_encode import ImageTextEncoder
from dora_vl.data.examples import Example
from dora_vl.data.turns import IMAGE_PLACEHOLDER, Turn
from dora_vl.errors import BadSample, UserError
from dora_vl.evaluation.assistant import Assistants, TextStreamer, base_of, read_recipe, with_adapter
from dora_vl.evaluation.predict import Decoding
from dora_vl.evaluation.prompts import about_video
from dora_vl.run.assembly import processor_encoder
from dora_vl.run.base_loading import load_base
from dora_vl.run.recipe import ModelConfig

ENTRIES = ("base", "revision", "base_sha256", "dtype", "max_tokens")


class AnswerStreamer(TextStreamer):
    """Leaves out the prompt's ids, which generate hands on first where it was given ids."""

    def __init__(self, decode: Callable[[list[int]], str], write: Callable[[str], object]) -> None:
        super().__init__(decode, write)
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Takes the next token."""
        if self._prompt_seen:
            super().put(value)
        self._prompt_seen = True


@dataclass(frozen=True)
class ImageTextAssistant:
    """A backbone with what turns words and pictures into its inputs."""

    backbone: ImageTextBackbone
    encoder: ImageTextEncoder

    def answer(
        self,
        turns: Sequence[Turn],
        pictures: Sequence[Image.Image],
        *,
        max_new_tokens: int = 64,
        write: Callable[[str], object] | None = None,
    ) -> str:
        """The answer to turns that end with a question; one `<image>` in them for each picture.

        Args:
            turns: the conversation so far, its last turn the question.
            pictures: RGB pictures in the order of their placeholders.
            max_new_tokens: longest answer.
            write: receives the answer piece by piece while it is made.

        Raises:
            UserError: the turns cannot be put to this model.
        """
        try:
            inputs = self.encoder.encode_prompt(turns, pictures)
            room = Decoding(max_new_tokens=max_new_tokens, max_positions=max_positions(self.backbone.config))
            room.check_room(inputs["input_ids"].shape[1], "question")
        except BadSample as error:
            raise UserError(f"the question cannot be put to this model: {error.reason}") from error
        device = self.backbone.model.device
        there: dict[str, Any] = {
            name: one.to(device) if isinstance(one, torch.Tensor) else one for name, one in inputs.items()
        }
        streamer = None if write is None else AnswerStreamer(self.encoder.decode, write)
        return self.encoder.decode(self.backbone.generate(**there, max_new_tokens=max_new_tokens, streamer=streamer)[0])

    def answer_example(
        self,
        example: Example,
        pictures: Sequence[Image.Image],
        *,
        max_new_tokens: int = 64,
        write: Callable[[str], object] | None = None,
    ) -> str:
        """The answer to an example's question about these pictures, such as a video's frames; see `answer`."""
        turns = [Turn("user", f"{IMAGE_PLACEHOLDER}\n" * len(pictures) + about_video(example))]
        return self.answer(turns, pictures, max_new_tokens=max_new_tokens, write=write)


def open_image_text_assistants(
    adapter: Path, *, base: str | None = None, with_base: bool = False, any_base: bool = False
) -> Assistants[ImageTextAssistant]:
    """Builds the model that an adapter folder's `recipe.json` describes, on the GPU where there is one.

    Args:
        adapter: the folder that training wrote.
        base: where the base model is now; None looks at the recipe's place.
        with_base: also gives the model without the adapter; it shares all weights that the adapter leaves alone.
        any_base: accepts a base with other content than the one trained on.

    Raises:
        UserError: the folder is incomplete, the base is not there, or is another one.
    """
    recipe = read_recipe(adapter, needed=ENTRIES)
    place = base_of(adapter, recipe, base=base, any_base=any_base)
    model = ModelConfig(
        base=place,
        revision=None if base else recipe["revision"],
        dtype=recipe["dtype"],
        template=recipe.get("template") or "tokenizer",  # the chat template, where no format is named
        quantisation=recipe.get("quantisation"),
    )
    encoder = processor_encoder(model, max_tokens=recipe["max_tokens"])
    adapted, plain = with_adapter(load_base(load_image_text, model), adapter, with_base=with_base)
    return Assistants(
        adapted=ImageTextAssistant(adapted, encoder),
        base=None if plain is None else ImageTextAssistant(plain, encoder),
    )
