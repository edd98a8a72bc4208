"""The tokens that a decoder of transformers adds to left-padded prompts; what every backbone's `generate` is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from dora_vl.backbones.base import pad_token_id


class WithoutPrompt(BaseStreamer):
    """Hands on what is generated: generate's first call brings the prompt."""

    def __init__(self, streamer: BaseStreamer) -> None:
        self._streamer = streamer
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Takes the prompt, then one token after another."""
        if self._prompt_seen:
            self._streamer.put(value)
        self._prompt_seen = True

    def end(self) -> None:
        """Hands on the end."""
        self._streamer.end()


def new_tokens(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "batch seq"],
    attention_mask: Int[Tensor, "batch seq"],
    *,
    max_new_tokens: int,
    streamer: BaseStreamer | None = None,
    options: Mapping[str, Any] | None = None,
    **inputs: Any,
) -> Int[Tensor, "batch new"]:
    """New token ids of left-padded prompts, greedy unless `options` (of transformers' generate) say otherwise.

    Args:
        streamer: receives the new tokens alone.
        inputs: what else the model's forward takes of the prompts, such as pixels.
    """
    chosen = {"do_sample": False, "pad_token_id": pad_token_id(model), **(options or {})}
    generating: Any = model  # generate is typed for a protocol that pyright cannot match to the class
    with torch.no_grad():
        whole = generating.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            streamer=None if streamer is None else WithoutPrompt(streamer),
            **inputs,
            **chosen,
        )
    return whole[:, input_ids.shape[1] :]
