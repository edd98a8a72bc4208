"""What an engine does when too much comes, when it takes too long, when a row breaks and when nobody listens."""

import queue
import threading
import weakref
from typing import Any

import pytest
import torch

from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample
from dora_vl.serving.decoding import Sampling
from dora_vl.serving.engine import Engine
from dora_vl.serving.model import ServedModel
from dora_vl.serving.options import ServerSettings
from dora_vl.serving.scheduler import Failed, Finished, Stopped, TextPiece, TooManyRequests
from tests.serving.tiny_served import last

QUESTION = [Turn("user", "What colour is it?")]
pytestmark = pytest.mark.usefixtures("endless")


class Gate:
    """Lets requests to the model, together or into a batch at hand, when it is opened; a first one waits there."""

    def __init__(self, engine: Engine, monkeypatch: Any) -> None:
        self.opened, reached, self.sizes = threading.Event(), threading.Event(), list[int]()
        begin = engine._decoder.begin

        def gated(batch: Any) -> Any:
            self.sizes.append(len(batch))
            reached.set()
            assert self.opened.wait(60)
            return begin(batch)

        monkeypatch.setattr(engine._decoder, "begin", gated)
        self.first = handed_in(engine)
        assert reached.wait(60)


def handed_in(engine: Engine, name: str = "one", *, tokens: int = 3) -> tuple[Any, queue.SimpleQueue[Any]]:
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    prepared = engine.prepare(name, QUESTION, Sampling(max_new_tokens=tokens))
    return engine.submit(prepared, events.put), events


def finished(*requests: tuple[Any, queue.SimpleQueue[Any]]) -> bool:
    return all(isinstance(last(events), Finished) for _, events in requests)


def test_more_than_may_wait_are_refused_and_later_ones_join_together(model: ServedModel, monkeypatch: Any) -> None:
    with Engine(model, ServerSettings(batch=4, waiting=3, answer_seconds=60.0)) as engine:
        gate = Gate(engine, monkeypatch)
        later = [handed_in(engine) for _ in range(3)]
        with pytest.raises(TooManyRequests):
            handed_in(engine)
        later[0][0].cancel()
        later.append(handed_in(engine))  # in the place of the one that nobody waits for
        gate.opened.set()
        assert isinstance(last(later[0][1]), Failed)
        assert finished(gate.first, *later[1:])
        assert gate.sizes == [1, 3]


@pytest.mark.parametrize("joining", [True, False])  # those that come to a batch, and a batch of its own
@pytest.mark.parametrize("alone_too", [False, True])  # whether a row fails alone as well
def test_what_a_failed_batch_held_is_gone_before_its_rows_are_tried_alone_and_told(
    joining: bool, alone_too: bool, model: ServedModel, monkeypatch: Any
) -> None:
    """As where memory is short: a call that fails has a tensor in its hands, which an error must not keep."""
    references: list[weakref.ref[Any]] = []
    left: list[int] = []
    kind = type(model.assistant)
    new_ids = kind.new_ids

    def still_there() -> int:
        return sum(reference() is not None for reference in references)

    with Engine(model, ServerSettings(batch=4, joining=joining)) as engine:

        def out_of_memory(assistant: Any, batch: Any, **named: Any) -> Any:
            left.append(still_there())
            most = 0 if alone_too and len(gate.sizes) > 1 else 1  # once the first has begun
            if len(batch["input_ids"]) > most:
                cache = torch.zeros(8)
                references.append(weakref.ref(cache))
                try:
                    raise RuntimeError("out of memory")
                except RuntimeError as error:
                    raise ValueError("the batch failed") from error
            return new_ids(assistant, batch, **named)

        monkeypatch.setattr(kind, "new_ids", out_of_memory)
        gate = Gate(engine, monkeypatch)
        rows = [handed_in(engine) for _ in range(3)]
        gate.opened.set()
        assert finished(gate.first)
        assert all(isinstance(last(events), Failed if alone_too else Finished) for _, events in rows)
    assert gate.sizes == [1, 3, 1, 1, 1]
    assert len(references) == (4 if alone_too else 1)
    assert still_there() == 0
    assert left == [0] * 5


def test_an_engine_that_ends_tells_everybody(model: ServedModel, monkeypatch: Any) -> None:
    engine = Engine(model, ServerSettings(batch=1))
    _, running = handed_in(engine, tokens=1500)
    _, waiting = handed_in(engine)
    assert isinstance(running.get(timeout=60), TextPiece)
    engine.close()
    for failed in map(last, (running, waiting)):
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, Stopped)
    with pytest.raises(Stopped):
        handed_in(engine)


def test_prompts_have_a_longest(model: ServedModel, monkeypatch: Any) -> None:
    with Engine(model, ServerSettings(max_prompt_tokens=20)) as engine:
        for turns, tokens in (([Turn("user", "Say it. " * 9)], 1), ([Turn("user", "a")], 2048)):
            with pytest.raises(BadSample) as refused:
                engine.prepare("one", turns, Sampling(max_new_tokens=tokens))
            assert refused.value.sample_id == "request"
        filled = engine.prepare("base", [Turn("user", "a")], Sampling(max_new_tokens=4000), fill=True)
        assert filled.tokens == 2048
        monkeypatch.setattr(
            type(model.entry("one").encoder), "encode_prompt", lambda *_: pytest.fail("it was rendered")
        )
        for name in ("one", "base"):  # an endless text, before it is tokenised
            with pytest.raises(BadSample):
                engine.prepare(name, [Turn("user", "a b " * 10**7)], Sampling(max_new_tokens=1), fill=True)
