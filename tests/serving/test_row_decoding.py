"""A row's text as its tokens come: stop texts across pieces, half characters, its own ends and draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dora_vl.errors import UserError
from dora_vl.serving.decoding import Sampling, SequenceSampling, SequenceStops, SequenceText

END = 0


def spoken(tokens: list[int], decode: Any = None, **sampling: Any) -> tuple[SequenceText, list[str]]:
    """What a row wrote of these tokens, by default the letters of their numbers."""
    pieces: list[str] = []
    letters = decode or (lambda ids: "".join(chr(number) for number in ids if number != END))
    row = SequenceText(Sampling(**{"max_new_tokens": 99, **sampling}), letters, pieces.append)
    for token in tokens:
        row.take(token, {END})
    return row, pieces


def ids(text: str) -> list[int]:
    return [ord(letter) for letter in text]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("xy", "e t"), "on"),
        ("aaab", ("aab",), "a"),
        ("no stop", ("stopped",), "no stop"),
        ("both", ("th", "ot"), "b"),
    ],
)
def test_a_stop_text_is_never_written_not_even_in_part(text: str, stop: tuple[str, ...], expected: str) -> None:
    row, pieces = spoken([*ids(text), END], stop=stop)
    assert "".join(pieces) == row.text == expected
    assert row.reason == "stop"


def test_what_may_become_a_stop_text_is_kept_back_and_comes_later() -> None:
    _, pieces = spoken(ids("a#b"), stop=("##",))
    assert pieces == ["a", "#b"]
    row, pieces = spoken([*ids("a#"), END], stop=("##",))
    assert pieces == ["a", "#"]
    assert row.reason == "stop"


def test_it_ends_at_its_own_length_and_takes_nothing_more() -> None:
    row, pieces = spoken(ids("abcdef"), max_new_tokens=3)
    assert ("".join(pieces), row.reason, len(row.ids)) == ("abc", "length", 3)


def test_half_a_character_waits_for_its_other_half() -> None:
    content = "aé€".encode()
    decode = lambda taken: bytes(taken).decode("utf-8", errors="replace")  # noqa: E731
    _, pieces = spoken(list(content), decode)
    assert pieces == ["a", "é", "€"]


def silent(**sampling: Any) -> SequenceText:
    return SequenceText(Sampling(**{"max_new_tokens": 1, **sampling}), lambda ids: "", lambda text: None)


def drawn(scores: torch.Tensor, **sampling: Any) -> list[int]:
    rows = [silent(**sampling)] * len(scores)
    return SequenceSampling(rows)(torch.zeros(1), scores).argmax(-1).tolist()


def test_draws_follow_temperature_and_top_p() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    scores = probabilities.log().repeat(4000, 1)
    for temperature in (1.0, 2.0):
        frequencies = torch.bincount(torch.tensor(drawn(scores, temperature=temperature)), minlength=4) / len(scores)
        flattened = probabilities ** (1 / temperature)
        torch.testing.assert_close(frequencies, flattened / flattened.sum(), atol=0.03, rtol=0.0)
    kept = torch.bincount(torch.tensor(drawn(scores, temperature=1.0, top_p=0.7)), minlength=4) / len(scores)
    torch.testing.assert_close(kept, torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.03, rtol=0.0)


def test_a_greedy_row_beside_one_that_samples_takes_its_likeliest_token() -> None:
    scores = torch.randn(2, 9)
    rows = [silent(), silent(temperature=1.0, seed=3)]
    processed = SequenceSampling(rows)(torch.zeros(1), scores)
    assert processed[0].argmax() == scores[0].argmax()
    assert (processed > float("-inf")).sum(1).tolist() == [1, 1]


@pytest.mark.parametrize("way", [{"temperature": 1.0, "top_p": 0.9}, {}])
def test_a_row_with_a_score_of_infinity_ends_alone(way: dict[str, float]) -> None:
    rows = [silent(max_new_tokens=9, seed=seed, **way) for seed in (3, 4)]
    sampling, stops = SequenceSampling(rows), SequenceStops(rows, {END})
    scores = torch.zeros(2, 9)
    scores[0, 5], scores[1, 7] = float("inf"), 50.0
    token = sampling(torch.zeros(1), scores).argmax(-1)
    assert stops(token[:, None], None).tolist() == [True, False]
    assert isinstance(rows[0].error, UserError)
    assert (rows[0].ids, rows[1].ids) == ([], [7])
