"""The page over what `make demo` leaves: right answers to questions of its test, the base beside them, the dial."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dora_vl.evaluation.scores.exact import final_answer
from dora_vl.serving.engine import Engine
from dora_vl.serving.model import open_served
from dora_vl.serving.options import Settings
from dora_vl.serving.page_parts import ExampleQuestion, example_questions
from tests.serving.browser import Visitor, browser, find_chromium, page_of

DEMO = Path(__file__).parents[2] / "runs" / "demo" / "adapter"
QUESTIONS, TOKENS, AFTER = 20, 12, ", so "
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def examples() -> tuple[ExampleQuestion, ...]:
    find_chromium()
    questions = example_questions(DEMO, QUESTIONS)
    if len(questions) < QUESTIONS:
        pytest.skip("there is no runs/demo with its test: make demo")
    return questions


@pytest.fixture(scope="module")
def opened(
    examples: tuple[ExampleQuestion, ...], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Engine]]:
    model = open_served(None, {"demo": DEMO}, base_name="the base")
    with page_of(model, tmp_path_factory.mktemp("uploads"), Settings(max_new_tokens=TOKENS), examples) as page:
        yield page


@pytest.fixture(scope="module")
def visitor(opened: tuple[str, Engine]) -> Iterator[Visitor]:
    with browser() as chromium:
        yield Visitor(chromium.new_context(), opened[0])


def test_questions_of_the_test_are_answered_right(
    visitor: Visitor, examples: tuple[ExampleQuestion, ...], tmp_path: Path
) -> None:
    right, of_base = 0, 0
    for number, example in enumerate(examples):
        file = tmp_path / f"{number}.png"
        example.picture.save(file)
        visitor.show(file)
        visitor.page.locator("#dv-conversation-left", has_text="will answer here").wait_for()
        answer, base = visitor.ask(example.question)
        truth = final_answer(example.truth, AFTER)
        right += final_answer(answer, AFTER) == truth
        of_base += final_answer(base, AFTER) == truth
    assert right >= QUESTIONS - 1
    assert of_base < right / 2


def test_the_dial_ends_at_the_base(visitor: Visitor) -> None:
    visitor.turn_dial("left", 0)
    visitor.page.locator("#dv-conversation-left .dv-tally", has_text="demo at 0 ·").wait_for()
    left, right = visitor.both(1)
    assert left == right
