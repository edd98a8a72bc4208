"""Requests that join others at the next token, each answered as alone; and a row's text as its tokens come."""

import queue
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dora_vl.core.adapter_slots import SlotLayer
from dora_vl.data.turns import Turn
from dora_vl.errors import UserError
from dora_vl.evaluation.predictor import PromptMedia
from dora_vl.serving.decoding import KVCacheBatch, Sampling, SequenceSampling, SequenceText
from dora_vl.serving.engine import Engine
from dora_vl.serving.model import ServedModel
from dora_vl.serving.options import ServerSettings
from dora_vl.serving.scheduler import Event, Failed, Finished, TextPiece
from tests.backbones.tiny_image_text import write_tiny, write_tiny_language
from tests.serving.tiny_served import RED, WIDE, alone, answer_alone, last, served, spread, write_adapters
from tests.training.tiny_run import write_tiny_llava

TALKS = [
    ([Turn("user", "<image>\nSay the colour.")], PromptMedia(pictures=(RED,))),
    ([Turn("user", "What colour is it?")], PromptMedia()),
    ([Turn("user", "<image>\n<image>\nSay it. Say it. Say it.")], PromptMedia(pictures=(WIDE, RED))),
    ([Turn("user", "Say " * 9), Turn("assistant", "red"), Turn("user", "And the shape?")], PromptMedia()),
]
WORDS = [
    ([Turn("user", text)], PromptMedia()) for text in ("Say " * 12, "a", "What colour is it?", "the correct answer")
]
SELDOM = [pytest.param(family, marks=pytest.mark.slow) for family in ("internvl", "smolvlm")]
LONG, SHORT = 40, 5
PACE = 4
"""Steps of the model for each request handed in, until all are: a long answer is not over before others came."""
Asked = tuple[str, list[Turn], PromptMedia, int]


class Told:
    """Events of all requests, in the order in which they came; the engine goes on as `PACE` says."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._steps = threading.Semaphore(0)
        self._holding = engine._decoder._holding
        engine._decoder._holding = self._paced  # type: ignore[method-assign]
        self._events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        self._handed_in = 0
        self.order: list[int] = []
        self.texts: dict[int, str] = {}

    def hand_in(self, name: str, turns: list[Turn], seen: PromptMedia, tokens: int, **sampling: Any) -> int:
        number, self._handed_in = self._handed_in, self._handed_in + 1
        settings = Sampling(**{"max_new_tokens": tokens, **sampling})
        prepared = self._engine.prepare(name, turns, settings, seen)
        self._engine.submit(prepared, lambda event: self._events.put((number, event)))
        self._steps.release(PACE)
        return number

    def _paced(self, members: Any, *more: Any) -> Any:
        assert self._steps.acquire(timeout=120)
        return self._holding(members, *more)

    def piece_of(self, number: int) -> None:
        """Waits for a request's first piece."""
        while self._next() != (number, False):
            pass

    def _event(self) -> tuple[int, Event]:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            try:
                return self._events.get(timeout=0.05)
            except queue.Empty:  # no piece of text yet: a token more
                self._steps.release()
        raise TimeoutError("no event in two minutes")

    def all_over(self) -> dict[int, str]:
        self._steps.release(100_000)
        while len(self.order) < self._handed_in:
            self._next()
        return self.texts

    def _next(self) -> tuple[int, bool]:
        number, event = self._event()
        assert isinstance(event, TextPiece | Finished), event
        if isinstance(event, Finished):
            self.order.append(number)
            assert event.text == self.texts.get(number, "")
        else:
            self.texts[number] = self.texts.get(number, "") + event.text
        return number, isinstance(event, Finished)


def batches_of(engine: Engine, monkeypatch: Any) -> list[int]:
    seen: list[int] = []
    answer = engine._decoder.answer
    monkeypatch.setattr(engine._decoder, "answer", lambda batch, new: (seen.append(len(batch)), answer(batch, new))[1])
    return seen


def check(base: Path, targets: Sequence[str], conversations: Any, tmp_path: Path, monkeypatch: Any) -> list[int]:
    """A long answer, and others that come while it is made; returns the batches that there were."""
    settings = {
        "one": {"targets": tuple(targets), "rank": 2, "alpha": 5.0},
        "two": {"targets": tuple(targets), "rank": 3, "alpha": 3.0, "method": "lora"},
    }
    adapters = write_adapters(base, tmp_path / "adapters", settings)
    names = ("two", "base", "one", "two")
    with Engine(endless(base, adapters), ServerSettings(batch=8, window_ms=0.0)) as engine:
        batches = batches_of(engine, monkeypatch)
        client = Told(engine)
        requests: list[Asked] = [("one", *conversations[0], LONG)]
        client.piece_of(client.hand_in(*requests[0]))
        for position, (name, conversation) in enumerate(zip(names, conversations, strict=True)):
            requests.append((name, *conversation, SHORT + 3 * position))
            number = client.hand_in(*requests[-1])
            if position < 2:  # one after another, then two together
                client.piece_of(number)
        texts = client.all_over()
        order = client.order
    for number, (name, turns, seen, tokens) in enumerate(requests):
        assert texts[number] == by_itself(base, adapters.get(name), (turns, seen), tokens), (number, name)
    assert len(set(texts.values())) > 3
    if len(batches) == 1:
        assert order[-1] == 0  # the long one, which began first, ends last
    return batches


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language") / "base"
    write_tiny_language("llama", folder)
    return spread(folder)


def endless(base: Path, adapters: Mapping[str, Path] | None = None) -> ServedModel:
    model = served(base, adapters or {})
    model.backbone.model.generation_config.eos_token_id = None
    return model


def by_itself(base: Path, adapter: Path | None, conversation: Any, tokens: int, **generation: Any) -> str:
    assistant = alone(base, adapter)
    for name, value in {"eos_token_id": None, **generation}.items():
        setattr(assistant.backbone.model.generation_config, name, value)
    return answer_alone(assistant, *conversation, tokens=tokens)


@pytest.mark.parametrize("family", ["qwen2_5_vl", pytest.param("llava", marks=pytest.mark.slow), *SELDOM])
def test_pictures_and_words_join_a_running_answer(family: str, tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "base"
    base = spread(write_tiny_llava(folder) if family == "llava" else write_tiny(family, folder))
    prefix = "*text_model*" if family == "smolvlm" else "*language_model*"
    targets = (f"{prefix}.q_proj", f"{prefix}.down_proj")
    assert check(base, targets, TALKS, tmp_path, monkeypatch) == [1]


def test_words_join_a_language_model(language: Path, tmp_path: Path, monkeypatch: Any) -> None:
    assert check(language, ("*.q_proj", "*.down_proj"), WORDS, tmp_path, monkeypatch) == [1]


def test_a_model_that_looks_at_what_it_said_answers_batch_by_batch(language: Path, monkeypatch: Any) -> None:
    """A penalty for what was text before is transformers' own, over the whole row."""
    model = endless(language)
    model.backbone.model.generation_config.repetition_penalty = 1.3
    with Engine(model, ServerSettings(window_ms=0.0)) as engine:
        batches = batches_of(engine, monkeypatch)
        client = Told(engine)
        client.piece_of(client.hand_in("base", *WORDS[0], LONG))
        client.hand_in("base", *WORDS[2], SHORT)
        texts = client.all_over()
        assert client.order == [0, 1]
    assert batches == [1, 1]
    assert texts[0] == by_itself(language, None, WORDS[0], LONG, repetition_penalty=1.3)
    assert texts[0] != by_itself(language, None, WORDS[0], LONG)


def test_a_row_that_samples_draws_the_same_whoever_is_beside_it(language: Path) -> None:
    drawn: Any = {"temperature": 1.5, "top_p": 0.9, "seed": 7}
    with Engine(endless(language), ServerSettings(window_ms=0.0)) as engine:
        single = Told(engine)
        single.hand_in("base", *WORDS[2], 12, **drawn)
        expected = single.all_over()[0]
        client = Told(engine)
        client.piece_of(client.hand_in("base", *WORDS[0], LONG))
        number = client.hand_in("base", *WORDS[2], 12, **drawn)
        assert client.all_over()[number] == expected


@pytest.mark.parametrize(
    ("joins", "drawn"), [(True, {"temperature": 1.5, "seed": 7}), (False, {"temperature": 1.5, "seed": 7}), (False, {})]
)  # in a batch that others may join, and in one of generate's own
def test_a_row_whose_scores_are_no_numbers_fails_alone(joins, drawn, language, tmp_path, monkeypatch) -> None:
    adapter = {"huge": {"targets": ("*.down_proj",), "rank": 2, "alpha": 5.0}}
    model = endless(language, write_adapters(language, tmp_path, adapter))
    if not joins:
        monkeypatch.setattr("dora_vl.serving.engine.can_join", lambda *_: False)
    for layer in model.backbone.model.modules():
        if isinstance(layer, SlotLayer):
            layer._changes["huge"].scaled_B.fill_(float("nan"))
    with Engine(model, ServerSettings(window_ms=300)) as engine:

        def ends(*names: str) -> list[Finished | Failed]:
            events: list[queue.SimpleQueue[Event]] = [queue.SimpleQueue() for _ in names]
            for name, row_events in zip(names, events, strict=True):
                engine.submit(engine.prepare(name, WORDS[2][0], Sampling(max_new_tokens=12, **drawn)), row_events.put)
            return list(map(last, events))

        batches = batches_of(engine, monkeypatch)
        good, bad = ends("base", "huge")
        assert batches == [2]
        assert ends("base") == [good]
    assert isinstance(good, Finished)
    assert isinstance(bad, Failed)
    assert isinstance(bad.error, UserError)


def test_no_more_rows_and_tokens_than_a_batch_may_have(language: Path, monkeypatch: Any) -> None:
    most = 240
    steps: list[tuple[int, int]] = []
    step = KVCacheBatch.step

    def noted(rows: KVCacheBatch, *args: Any) -> Any:
        logits = step(rows, *args)
        steps.append((len(rows), len(rows) * (rows.columns + 1)))
        return logits

    monkeypatch.setattr(KVCacheBatch, "step", noted)
    with Engine(endless(language), ServerSettings(batch=3, batch_tokens=most, window_ms=0.0)) as engine:
        client = Told(engine)
        client.piece_of(client.hand_in("base", *WORDS[0], 60))
        for _ in range(4):
            client.hand_in("base", *WORDS[2], 30)
        client.all_over()
    rows, positions = zip(*steps, strict=True)
    assert max(rows) <= 3
    assert max(positions) <= most
    assert rows[50] == 2  # a third would have places for more at the first one's end


# A row's text: stop texts across pieces, half characters, its own draws and end.


END = 0


def spoken(tokens: list[int], decode: Any = None, **sampling: Any) -> tuple[SequenceText, list[str]]:
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
