"""Rows that are decoded together and come and go one by one: their keys and values, padded on the left to one length.

Nothing of a model is known here but transformers' own ways: how generate prepares a prompt and one more token. Rows
may come to others where all that the model remembers of them is in a plain cache of keys and values, and where it is
told each token's position.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache, DynamicLayer

MASK, POSITIONS = "attention_mask", "position_ids"
ALIGNED = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
"""What else has an entry for each token; that of an answer's is the same for all."""
OF_PROMPTS = frozenset({"input_ids", "inputs_embeds"})
NEVER = frozenset({"cross_attention_mask", "encoder_outputs"})
"""What a model asks for at every token and is not in its cache of keys and values."""


def may_join(arguments: Mapping[str, Any], media: Collection[str]) -> bool:
    """Whether rows may come to those of a generate call, by what it hands to its decoding method.

    Args:
        arguments: its keyword arguments for the model.
        media: names of the inputs that hold pictures and videos, which are read with the prompt alone.
    """
    cache, positions = _cache(arguments), arguments.get(POSITIONS)
    if cache is None or not isinstance(positions, Tensor):
        return False
    plain = type(cache[1]) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache[1].layers)
    known = {*ALIGNED, *OF_PROMPTS, *media, MASK, POSITIONS} - NEVER
    return plain and all(name in known for name, value in arguments.items() if isinstance(value, Tensor))


def _cache(arguments: Mapping[str, Any]) -> tuple[str, Any] | None:
    """The cache and its name, which transformers has changed."""
    found = (
        (name, arguments[name])
        for name in ("cache", "past_key_values")
        if isinstance(arguments.get(name), DynamicCache)
    )
    return next(found, None)


@dataclass
class JoinedRows:
    """What the next token of each row needs.

    Attributes:
        cache: of all tokens but the last of each row.
        mask: 0 where a row has padding; a column for each cached token, and the next one's.
        positions: of the next token.
        others: what else the model is called with.
    """

    cache_name: str
    cache: DynamicCache
    mask: Int[Tensor, "rows columns"]
    positions: Int[Tensor, "*kinds rows 1"]
    others: dict[str, Any]

    @classmethod
    def read(
        cls, model: Any, input_ids: Tensor, config: Any, arguments: dict[str, Any]
    ) -> tuple[JoinedRows, Float[Tensor, "rows vocab"]]:
        """Reads prompts, as transformers' decoding methods begin; the logits of each row's first token beside."""
        outputs = model._prefill(input_ids, config, arguments)
        found = _cache({**arguments, **outputs})
        assert found is not None
        name, cache = found
        given = arguments.get(MASK)
        rows, columns = len(outputs.logits), cache.get_seq_length()
        mask = given if given is not None else input_ids.new_ones(rows, columns)
        positions = arguments[POSITIONS][..., -1:] + 1
        if positions.shape[-2] != rows:  # without padding one row of positions stood for all
            positions = positions.expand(*positions.shape[:-2], rows, 1)
        others = {
            name: value for name, value in arguments.items() if not isinstance(value, Tensor | DynamicCache | None)
        }
        for aligned in ALIGNED:
            if isinstance(value := arguments.get(aligned), Tensor):
                others[aligned] = value[:, -1:] if aligned == ALIGNED[0] else torch.zeros_like(value[:, -1:])
        return cls(name, cache, F.pad(mask, (0, 1), value=1), positions, others), _last(outputs)

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def columns(self) -> int:
        """How many tokens the cache has places for."""
        return self.mask.shape[1] - 1

    def step(self, model: Any, tokens: Int[Tensor, " rows"]) -> Float[Tensor, "rows vocab"]:
        """Takes each row's next token; the logits of the one after it."""
        named = {self.cache_name: self.cache, MASK: self.mask, POSITIONS: self.positions, **self.others}
        inputs = model.prepare_inputs_for_generation(
            tokens[:, None], next_sequence_length=1, is_first_iteration=False, **named
        )
        outputs = model(**inputs, return_dict=True)
        self.mask = F.pad(self.mask, (0, 1), value=1)
        self.positions = self.positions + 1
        return _last(outputs)

    def keep(self, rows: Sequence[int]) -> None:
        """Lets go of all rows but these, in this order, and of columns that are padding in all of them."""
        index = torch.tensor(rows, device=self.mask.device)
        mask = self.mask[index]
        start = int(mask.any(0).to(torch.int8).argmax())
        self.mask, self.positions = mask[:, start:], self.positions.index_select(-2, index)
        for layer in self._layers:
            layer.keys = layer.keys[index, :, start:]
            layer.values = layer.values[index, :, start:]
        self._keep_aligned(lambda value: value[index])

    def join(self, new: JoinedRows) -> None:
        """Takes further rows in, behind its own; `new` is used up."""
        columns = max(self.columns, new.columns)
        self.mask = torch.cat([F.pad(one.mask, (columns - one.columns, 0)) for one in (self, new)])
        self.positions = torch.cat([self.positions, new.positions], dim=-2)
        for own, other in zip(self._layers, new._layers, strict=True):
            own.keys = _stacked(own.keys, other.keys, columns)
            own.values = _stacked(own.values, other.values, columns)
        self._keep_aligned(lambda value: torch.cat([value, value.new_zeros(len(new), 1)]))

    @property
    def _layers(self) -> list[Any]:
        return [*self.cache.layers]

    def _keep_aligned(self, change: Any) -> None:
        for aligned in ALIGNED:
            if aligned in self.others:
                self.others[aligned] = change(self.others[aligned])


def _stacked(own: Tensor, other: Tensor, columns: int) -> Tensor:
    return torch.cat([F.pad(one, (0, 0, columns - one.shape[-2], 0)) for one in (own, other)])


def _last(outputs: Any) -> Float[Tensor, "rows vocab"]:
    """As transformers' own decoding takes them."""
    return outputs.logits[:, -1].float()
