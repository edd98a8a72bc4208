"""Each form of chat data is the same conversation by every container, and what cannot be one is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dora_vl.data.columns import Columns, ColumnsError
from dora_vl.data.example import Example
from dora_vl.data.readers import read_row
from dora_vl.data.table import load_rows
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample, UserError
from dora_vl.evaluation.questions import read_questions
from dora_vl.start.init import UsableRow
from tests.data.readers.chat_forms import FORMS, ITEMS, TOOL, Item, Talk, assistant, call_of, tool, user
from tests.data.readers.test_rows import WRITERS, turn_parts


def turns_of(talk: Talk) -> list[list[Any]]:
    """What a reader makes of a conversation, written out: thoughts in front of the words, all else as fields."""
    turns = []
    for message in talk.messages:
        more = {key: message[key] for key in ("tool_calls", "name", "tool_call_id") if key in message}
        if not turns:
            more |= {"tools": [*talk.tools]} if talk.tools else {}
            more |= {"chat_template_kwargs": talk.kwargs} if talk.kwargs else {}
        thought = message.get("reasoning_content")
        text = f"<think>\n{thought}\n</think>\n\n{message['content']}" if thought else message["content"]
        trained = [] if message.get("trained", True) else [False]
        turns.append([message["role"], text, *([more] if more else []), *trained])
    return turns


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_each_form_are_the_conversation_that_they_are(tmp_path: Path, form: str) -> None:
    rows, talks = zip(*map(FORMS[form], ITEMS), strict=True)
    expected = [turns_of(talk) for talk in talks]
    for kind in ("jsonl", "csv", "parquet"):
        path = tmp_path / f"{form}.{kind}"
        WRITERS[kind](path, [*rows])
        table = load_rows(str(path))
        read = [example for example in table if isinstance(example, Example)]
        assert [[*map(turn_parts, example.turns)] for example in read] == expected
        tried = [UsableRow(conversation=example).record("a") for example in read]  # what `init` writes
        assert [read_row(row).turns for row in tried] == [example.turns for example in read]
    if form == "trl_prompt_completion":  # a call is nothing to score
        with pytest.raises(UserError):
            read_questions(tmp_path / f"{form}.jsonl")
        return
    questions, skipped = read_questions(tmp_path / f"{form}.jsonl")
    assert not skipped
    assert all(question.answers[0].text.endswith(item.said) for question, item in zip(questions, ITEMS, strict=True))


PARIS = ITEMS[0]
CALLING = [user("q"), assistant("", tool_calls=[call_of(PARIS)])]
BAD = {
    "a result without a call": [user("q"), tool("7"), assistant("a")],
    "no answer to a result": [*CALLING, tool("7")],
    "a question behind a result": [*CALLING, tool("7"), user("r"), assistant("a")],
    "arguments that are no object": [
        user("q"),
        assistant("", tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}]),
    ],
    "a call with more": [user("q"), assistant("", tool_calls=[{**call_of(PARIS), "cache": {"a": 1}}])],
    "thoughts that differ": [user("q"), assistant("a", reasoning_content="so", thinking="not so")],
    "marks that differ": [user("q"), assistant("a", weight=1, train=False)],
    "a call that is trained otherwise": [
        *(user("q"), {**assistant("a"), "loss": False}),
        {"role": "tool_call", "content": '{"name": "f", "arguments": {}}', "loss": True},
    ],
}


@pytest.mark.parametrize("messages", BAD.values(), ids=BAD)
def test_a_conversation_that_cannot_be_one_is_a_bad_sample(messages: list[dict[str, Any]]) -> None:
    with pytest.raises(BadSample):
        read_row({"messages": messages, "tools": [TOOL]})


@pytest.mark.parametrize(
    "beside",
    [{"tools": "look, point"}, {"tools": [{"type": "web_search"}]}, {"chat_template_kwargs": "fast"}],
    ids=lambda beside: str(beside)[:20],
)
def test_columns_beside_messages_that_are_none_are_a_bad_sample(beside: dict[str, Any]) -> None:
    with pytest.raises(BadSample):
        read_row({"messages": [user("q"), assistant("a")], **beside})


def test_what_is_ignored_is_not_there() -> None:
    row, _ = FORMS["openai_tools"](PARIS)
    plain = read_row(row, columns=Columns(ignored=("tools", "messages.tool_call_id")))
    assert [sorted(turn.fields) for turn in plain.turns] == [[], ["tool_calls"], [], []]


def test_a_preference_keeps_its_tools_and_compares_texts_alone() -> None:
    prompt = [*CALLING, tool("7")]
    row = {"prompt": prompt, "chosen": [assistant("7")], "rejected": [assistant("9")], "tools": [TOOL]}
    example = read_row(row)
    assert (example.rejected, example.turns[0].fields["tools"]) == (("9",), [TOOL])
    assert [turn.role for turn in example.turns] == ["user", "assistant", "tool", "assistant"]
    with_thought = read_row({**row, "rejected": [assistant("7", reasoning_content="no")]})
    assert with_thought.rejected == ("<think>\nno\n</think>\n\n7",)
    for chosen, rejected in (
        (CALLING[1], assistant("9")),
        (assistant("7"), CALLING[1]),
        (assistant("7", weight=0), assistant("9")),
    ):
        with pytest.raises(BadSample):
            read_row({**row, "chosen": [chosen], "rejected": [rejected]})


def test_a_solution_answers_messages_that_end_with_a_question_and_no_others() -> None:
    item = Item("Bonn", 5, "five", "")
    for key in ("solution", "answer"):
        pictured = {"messages": [user("<image>How many?")], "images": ["a.png"], key: item.said}
        example = read_row(pictured)
        assert (example.images, example.turns[-1]) == (("a.png",), Turn("assistant", "five"))
        with pytest.raises(ColumnsError):
            read_row({**pictured, "messages": [*pictured["messages"], assistant("six")]})
    assert read_row({"prompt": "How many?", "solution": "five", "image": "a.png"}).turns[-1].text == "five"
    with pytest.raises(BadSample):
        read_row({"messages": [user("How many?")], "solution": ""})


def test_nulls_of_a_table_are_no_arguments_and_those_of_text_are(tmp_path: Path) -> None:
    """Arrow fills every struct up with the names of all others."""
    calls = [
        {"function": {"name": "f", "arguments": {"a": 1}}},
        {"function": {"name": "g", "arguments": {"b": None, "c": 2}}},
    ]
    row = {"messages": [user("q"), assistant("", tool_calls=calls)], "tools": [TOOL, {"name": "g"}]}
    WRITERS["parquet"](tmp_path / "a.parquet", [row])
    example = load_rows(str(tmp_path / "a.parquet"))[0]
    assert isinstance(example, Example)
    assert [call["function"]["arguments"] for call in example.turns[1].fields["tool_calls"]] == [{"a": 1}, {"c": 2}]
    assert example.turns[0].fields["tools"] == [TOOL, {"type": "function", "function": {"name": "g"}}]
    calls[1]["function"]["arguments"] = json.dumps({"b": None, "c": 2})
    text = read_row({**row, "messages": [user("q"), assistant("", tool_calls=calls)]})
    assert text.turns[1].fields["tool_calls"][1]["function"]["arguments"] == {"b": None, "c": 2}
