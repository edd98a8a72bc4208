"""Instructions name the outputs that they admit, of which the likeliest is taken."""

from __future__ import annotations

import pytest

from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample
from dora_vl.evaluation.questions import Question, outputs_of

TRUTH = "the correct answer is answer2"
TEXT = "Is it?\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2"


def question(text: str, answer: str = "answer2", added: str = "") -> Question:
    turn = Turn("user", f"{text}\n{added}" if added else text, len(added))
    return Question(id="q", turns=(turn,), truth=TRUTH, answer=answer)


@pytest.mark.parametrize("added", ["", "a text\nabout it"])
def test_the_choices_stand_in_the_instruction_s_last_line(added: str) -> None:
    assert outputs_of(question(TEXT, added=added)) == ["the correct answer is answer1", TRUTH]


@pytest.mark.parametrize(("text", "answer"), [("Is it?", "answer2"), (TEXT, "answer3"), (TEXT, "answer1")])
def test_without_choices_or_with_another_answer_it_cannot_be_asked(text: str, answer: str) -> None:
    with pytest.raises(BadSample) as refused:
        outputs_of(question(text, answer))
    assert refused.value.sample_id == "q"
