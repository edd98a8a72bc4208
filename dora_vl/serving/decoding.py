"""Sequences of one batch, each decoded in its own way: sampling, ends, text as it comes, keys and values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from dora_vl.backbones.generation import NOT_YET_A_CHARACTER, NotFiniteScores
from dora_vl.shapes import Bool, Float, Int

LEAST_TEMPERATURE = 1e-3
"""Below it the likeliest token is taken: scores divided by less may overflow."""

Reason = Literal["stop", "length", "ended"]
"""An answer ends because it was complete, as long as allowed, or because nobody waits for it any more."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Says how one answer is chosen.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: of the likeliest tokens, as few as have this probability together.
        stop: texts that end the answer, and are not part of it.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass
class SequenceText:
    """One sequence's answer while it is made.

    Attributes:
        decode: its tokens as text.
        over: returns True once nobody waits for the rest; asked at every token.
        done: is told once, when the answer is over.
        error: what broke this sequence, and no other.
    """

    sampling: Sampling
    decode: Callable[[list[int]], str]
    write: Callable[[str], object]
    over: Callable[[], bool] = lambda: False
    done: Callable[[SequenceText], object] = lambda answer: None
    ids: list[int] = field(default_factory=list)
    text: str = ""
    reason: Reason | None = None
    error: Exception | None = None
    _generator: torch.Generator | None = None

    def take(self, token: int, ends: Collection[int]) -> None:
        """Takes the next token, and writes what it adds to the text; an error ends only this sequence."""
        if self.reason is not None:
            return
        try:
            self._take(token, ends)
        except Exception as error:  # noqa: BLE001 - the other sequences go on
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """Ends only this sequence, unless it is over."""
        if self.reason is None:
            self.error, self.reason = error, "ended"
            self.done(self)

    def draw(self, scores: Float[Tensor, " vocab"]) -> int:
        """Returns a token drawn at the sequence's temperature from the likeliest that have `top_p` together."""
        if self._generator is None:
            self._generator = torch.Generator(scores.device)
            if self.sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self.sampling.seed)
        probabilities = (scores.float() / self.sampling.temperature).softmax(-1)
        if self.sampling.top_p < 1:
            ranked, order = probabilities.sort(descending=True)
            unlikely = order[ranked.cumsum(-1) - ranked >= self.sampling.top_p]
            probabilities = probabilities.index_fill(0, unlikely, 0.0)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))

    def _take(self, token: int, ends: Collection[int]) -> None:
        if self.over():
            self._finish("ended", self.text)
            return
        self.ids.append(token)
        text, stops = self.decode(self.ids), self.sampling.stop
        stopped = min((start for stop in stops if (start := text.find(stop)) >= 0), default=None)
        if stopped is not None:
            self._finish("stop", text[:stopped])
        elif token in ends:
            self._finish("stop", text)
        elif len(self.ids) >= self.sampling.max_new_tokens:
            self._finish("length", text)
        elif not text.endswith(NOT_YET_A_CHARACTER):
            # The last characters may be the beginning of a stopping text, and are kept back then.
            sizes = range(min(max(map(len, stops), default=1) - 1, len(text)), 0, -1)
            begun = next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in stops)), 0)
            self._write(text[: len(text) - begun])

    def _finish(self, reason: Reason, text: str) -> None:
        self._write(text)
        self.reason = reason
        self.done(self)

    def _write(self, text: str) -> None:
        if len(text) > len(self.text):
            self.write(text[len(self.text) :])
            self.text = text


class SequenceStops(StoppingCriteria):
    """Gives each sequence its next token, and says which are over."""

    def __init__(self, sequences: Sequence[SequenceText], ends: Collection[int]) -> None:
        self._sequences = sequences
        self._ends = ends

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Int[Tensor, "batch seq"], scores: Any, **named: Any
    ) -> Bool[Tensor, " batch"]:
        """Tells which sequences are over."""
        for sequence, token in zip(self._sequences, input_ids[:, -1].tolist(), strict=True):
            sequence.take(token, self._ends)
        return torch.tensor([sequence.reason is not None for sequence in self._sequences], device=input_ids.device)


def next_tokens(scores: Float[Tensor, "batch vocab"], sequences: Sequence[SequenceText]) -> list[int]:
    """Returns each sequence's next token, likeliest or drawn; ends one whose scores are not finite (any token).

    The largest score is NaN where any is, so that looking at it costs no more than choosing.
    """
    most, best = scores.max(-1)
    tokens = best.tolist()
    for index, (sequence, is_number) in enumerate(zip(sequences, most.isfinite().tolist(), strict=True)):
        if not is_number:  # on a GPU, to draw from these would break every later call too
            sequence.fail(NotFiniteScores())
        elif sequence.sampling.temperature >= LEAST_TEMPERATURE and sequence.reason is None:
            tokens[index] = sequence.draw(scores[index])
    return tokens


class SequenceSampling(LogitsProcessor):
    """Leaves each sequence only its next token, so that generate takes it as the likeliest of all."""

    def __init__(self, sequences: Sequence[SequenceText]) -> None:
        self._sequences = sequences

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: Tensor, scores: Float[Tensor, "batch vocab"]
    ) -> Float[Tensor, "batch vocab"]:
        """Returns zero for the token of each sequence, minus infinity for all others."""
        tokens = torch.tensor(next_tokens(scores, self._sequences), device=scores.device)
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens[:, None], 0.0)


def generate_options(sequences: Sequence[SequenceText], ends: Collection[int]) -> dict[str, Any]:
    """Returns the options with which transformers' generate decodes these sequences, each in its own way."""
    return {
        "stopping_criteria": StoppingCriteriaList([SequenceStops(sequences, ends)]),
        "logits_processor": LogitsProcessorList([SequenceSampling(sequences)]),
        "num_beams": 1,  # whatever the model's folder says
    }


# -- sequences that are decoded together and come and go one by one: keys and values, padded on the left ---------------

MASK, POSITIONS = "attention_mask", "position_ids"
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
"""These inputs have an entry a token; all tokens of an answer have the same."""


def may_join(arguments: Mapping[str, Any], media: Collection[str]) -> bool:
    """Tells whether sequences may join those of a generate call, by what it hands to its decoding method.

    They may where all that the model remembers of them is in a plain cache of keys and values, and where it is told
    each token's position. Inputs named in `media`, pictures and videos, are read with the prompt only.
    """
    caches = list(_caches(arguments).values())
    if not caches or not isinstance(arguments.get(POSITIONS), Tensor):
        return False
    plain = type(caches[0]) is DynamicCache and all(type(layer) is DynamicLayer for layer in caches[0].layers)
    expected = {*TOKEN_TYPES, *media, "input_ids", "inputs_embeds", MASK, POSITIONS}
    expected -= {"cross_attention_mask", "encoder_outputs"}  # asked for at every token, and not in the cache
    return plain and all(name in expected for name, value in arguments.items() if isinstance(value, Tensor))


def _caches(arguments: Mapping[str, Any]) -> dict[str, DynamicCache]:
    """Returns the cache by its name, which transformers has changed."""
    names = ("cache", "past_key_values")
    return {name: cache for name in names if isinstance(cache := arguments.get(name), DynamicCache)}


@dataclass
class KVCacheBatch:
    """The keys and values of a batch, and what else the next token of each sequence needs.

    Attributes:
        cache: holds all tokens but each sequence's last.
        mask: 0 where a sequence has padding; a column for each cached token, and the next one's.
        others: what else the model is called with.
    """

    cache_name: str
    cache: DynamicCache
    mask: Int[Tensor, "batch columns"]
    positions: Int[Tensor, "*kinds batch 1"]
    others: dict[str, Any]

    @classmethod
    def read(
        cls, model: Any, input_ids: Tensor, config: Any, arguments: dict[str, Any]
    ) -> tuple[KVCacheBatch, Float[Tensor, "batch vocab"]]:
        """Reads prompts, as transformers' decoding methods begin; gives the logits of their first tokens too."""
        outputs = model._prefill(input_ids, config, arguments)
        name, cache = next(iter(_caches({**arguments, **outputs}).items()))
        mask = arguments.get(MASK)
        count = len(outputs.logits)
        if mask is None:
            mask = input_ids.new_ones(count, cache.get_seq_length())
        positions = arguments[POSITIONS][..., -1:] + 1
        if positions.shape[-2] != count:  # without padding one sequence's positions stood for all
            positions = positions.expand(*positions.shape[:-2], count, 1)
        others = {key: value for key, value in arguments.items() if not isinstance(value, Tensor | DynamicCache | None)}
        for key in TOKEN_TYPES:
            if isinstance(value := arguments.get(key), Tensor):
                others[key] = value[:, -1:] if key == TOKEN_TYPES[0] else torch.zeros_like(value[:, -1:])
        return cls(name, cache, F.pad(mask, (0, 1), value=1), positions, others), outputs.logits[:, -1].float()

    def __len__(self) -> int:
        return len(self.mask)

    @property
    def columns(self) -> int:
        """Counts the tokens that the cache has room for."""
        return self.mask.shape[1] - 1

    def step(self, model: Any, tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocab"]:
        """Takes each sequence's next token; gives the logits of the one after it."""
        named = {self.cache_name: self.cache, MASK: self.mask, POSITIONS: self.positions, **self.others}
        inputs = model.prepare_inputs_for_generation(
            tokens[:, None], next_sequence_length=1, is_first_iteration=False, **named
        )
        outputs = model(**inputs, return_dict=True)
        self.mask = F.pad(self.mask, (0, 1), value=1)
        self.positions = self.positions + 1
        return outputs.logits[:, -1].float()

    def keep(self, sequences: Sequence[int]) -> None:
        """Keeps these sequences, in this order, without the columns that are padding in all of them."""
        index = torch.tensor(sequences, device=self.mask.device)
        mask = self.mask[index]
        start = int(mask.any(0).to(torch.int8).argmax())
        self.mask, self.positions = mask[:, start:], self.positions.index_select(-2, index)
        layers: list[Any] = [*self.cache.layers]
        for layer in layers:
            layer.keys = layer.keys[index, :, start:]
            layer.values = layer.values[index, :, start:]
        for key in self.others.keys() & TOKEN_TYPES:
            self.others[key] = self.others[key][index]

    def join(self, new: KVCacheBatch) -> None:
        """Takes further sequences in, after its own; `new` is used up."""
        columns = max(self.columns, new.columns)
        self.mask = torch.cat([F.pad(part.mask, (columns - part.columns, 0)) for part in (self, new)])
        self.positions = torch.cat([self.positions, new.positions], dim=-2)

        def stacked(*parts: Tensor) -> Tensor:
            return torch.cat([F.pad(part, (0, 0, columns - part.shape[-2], 0)) for part in parts])

        layers: list[tuple[Any, Any]] = [*zip(self.cache.layers, new.cache.layers, strict=True)]
        for layer, other in layers:
            layer.keys, layer.values = stacked(layer.keys, other.keys), stacked(layer.values, other.values)
        for key in self.others.keys() & TOKEN_TYPES:
            value = self.others[key]
            self.others[key] = torch.cat([value, value.new_zeros(len(new), 1)])
