"""One task of an encoder-decoder as data: what it asks, what it is taught to say, how it decodes and is scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

from dora_vl.backbones.seq2seq_prompt import Prompt
from dora_vl.data.examples import Example
from dora_vl.scores.scored import Scored

AnswerBy = Literal["text", "pair", "choice", "words", "closed"]
NormaliseBy = Literal["samples", "tokens"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """What the decoder is to say, and how much the sample counts; or the soft score of each right answer of a list."""

    text: str
    weight: float = 1.0
    soft_scores: Mapping[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Search:
    """How an answer is decoded: greedy with one beam. `max_length` counts the start token."""

    beams: int = 1
    max_length: int = 20
    no_repeat_ngram: int = 0


@dataclass(frozen=True, kw_only=True)
class Subtask:
    """One task as data: everything that differs between tasks of one model.

    Attributes:
        batch_share: its batch as a multiple of the run's base batch, rounded down.
        prompt: the encoder's text of an example.
        target: what is trained on, given which answer the item is about (None: any of them may be drawn).
        each_answer: every answer is an item of its own.
        input_tokens: longest encoder text; None does not cut.
        target_tokens: longest label.
        normalise_by: `samples`: mean over a sample's tokens, then over the batch; `tokens`: mean over all tokens.
        answer_by: `text`: what is generated; `pair`: true or false by two logits; `choice`: the likeliest label;
            `words`: the likeliest of the example's choices, in their own words; `closed`: the best of a list.
        score: the benchmark's scorer.
        check_scoring: tells before training what `score` would miss; None tries `score` itself without answers.
        images: pictures of one input.
        reads_question: the prompt holds the example's question; not so where pictures are described.
        chooses: every example has choices, and which of them is right is what is scored.
        state_span: where the prompt states which part of the video it is about (and the features are of the whole),
            `extra["ts"]` for a part from so many seconds to so many; None where it states none.
    """

    name: str
    batch_share: float = 1.0
    prompt: Callable[[Example], Prompt]
    target: Callable[[Example, int | None, Random], Target]
    each_answer: bool = False
    input_tokens: int | None = None
    target_tokens: int = 20
    normalise_by: NormaliseBy = "samples"
    answer_by: AnswerBy = "text"
    search: Search = Search()
    score: Callable[[Sequence[Example], Mapping[str, str]], Scored]
    check_scoring: Callable[[Sequence[Example]], None] | None = None
    images: int = 1
    reads_question: bool = True
    chooses: bool = False
    state_span: Callable[[float, float], object] | None = None


def with_input_tokens(subtask: Subtask, tokens: int | None) -> Subtask:
    """The task with another longest encoder text; None keeps its own."""
    return subtask if tokens is None else replace(subtask, input_tokens=tokens)
