"""Rows with tools, thoughts and marks, as each form's owners write them: one conversation by every container."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dora_vl.data.columns import Columns, ColumnsError
from dora_vl.data.example import Example
from dora_vl.data.readers import read_row
from dora_vl.data.table import load_rows
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample, UserError
from dora_vl.evaluation.questions import read_questions
from dora_vl.start.init import UsableRow
from tests.data.readers.test_rows import WRITERS, turn_parts

Row = dict[str, Any]


class Talk(NamedTuple):
    messages: list[Row]
    tools: Sequence[Row] = ()
    kwargs: Mapping[str, Any] = {}


class Item(NamedTuple):
    city: str
    degrees: float
    said: str
    thought: str


ITEMS = [
    Item("Paris", 22, "It is 22 °C in Paris.", "I need the weather."),
    Item("San José", -1.5, "Cold: -1.5.", "Call it,\n\nthen say it."),
    Item('the "Hague"', 0, 'In the "Hague" it is <b>0</b>.', "Quotes?"),
    Item("東京", 31, "東京は31度です。", "日本語で"),
    Item("Sault\\Ste", 7, "Seven \\o/", "A \\ is in it"),
    Item("Oslo {north}", 3, "{3}", "{{ none }}"),
    Item("Bern", 9.25, "9.25 degrees:\n- mild", "So:"),
]

FUNCTION: Row = {
    "name": "get_weather",
    "description": "Gets the weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "The city."}, "exact": {"type": "boolean"}},
        "required": ["city"],
    },
}
TOOL: Row = {"type": "function", "function": FUNCTION}


def call_of(item: Item, *, exact: bool = True, call_id: str = "") -> Row:
    about = {"id": call_id} if call_id else {}
    return {"type": "function", **about, "function": {"name": "get_weather", "arguments": arguments_of(item, exact)}}


def arguments_of(item: Item, exact: bool = True) -> Row:
    return {"city": item.city, "exact": exact}


def asked(item: Item) -> str:
    return f"How warm is {item.city}?"


def result_of(item: Item) -> str:
    return json.dumps({"city": item.city, "degrees": item.degrees}, ensure_ascii=False)


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> Row:
    return {"role": "assistant", "content": text, **more}


def tool(text: str, **more: Any) -> Row:
    return {"role": "tool", "content": text, **more}


def trl_tools(item: Item) -> tuple[Row, Talk]:
    call, answer = call_of(item), assistant(item.said)
    result = {"role": "tool", "name": "get_weather", "content": result_of(item)}
    row = {
        "messages": [user(asked(item)), {"role": "assistant", "tool_calls": [call]}, result, answer],
        "tools": [TOOL],
    }
    return row, Talk([user(asked(item)), assistant("", tool_calls=[call]), result, answer], [TOOL])


def trl_prompt_completion(item: Item) -> tuple[Row, Talk]:
    """The tools as JSON, as TRL's guide advises for Arrow; the call is what is completed."""
    call = call_of(item)
    completion = [{"role": "assistant", "tool_calls": [call]}]
    row = {"prompt": [user(asked(item))], "completion": completion, "tools": json.dumps([TOOL])}
    return row, Talk([user(asked(item)), assistant("", tool_calls=[call])], [TOOL])


def trl_template_arguments(item: Item) -> tuple[Row, Talk]:
    row = {"messages": [user(asked(item)), assistant(item.said)], "chat_template_kwargs": {"enable_thinking": False}}
    return row, Talk([user(asked(item)), assistant(item.said)], (), {"enable_thinking": False})


def reasoning(item: Item) -> tuple[Row, Talk]:
    """As servers of reasoning models answer: thoughts before the call and before the answer."""
    messages = [
        user(asked(item)),
        assistant("", reasoning_content=item.thought, tool_calls=[call_of(item)]),
        tool(result_of(item)),
        assistant(item.said, reasoning_content=f"It says so: {item.thought}"),
    ]
    return {"messages": messages, "tools": [TOOL]}, Talk(messages, [TOOL])


def openai_tools(item: Item) -> tuple[Row, Talk]:
    """Arguments are text, calls have ids."""
    call = call_of(item, call_id="call_0001")
    text = {**call, "function": {"name": "get_weather", "arguments": json.dumps(arguments_of(item))}}
    result = tool(result_of(item), tool_call_id="call_0001")
    calling = {"role": "assistant", "content": None, "tool_calls": [text]}
    row = {"messages": [user(asked(item)), calling, result, assistant(item.said)]}
    row |= {"parallel_tool_calls": False, "tools": [TOOL]}
    return row, Talk([user(asked(item)), assistant("", tool_calls=[call]), result, assistant(item.said)], [TOOL])


def swift_agent(item: Item) -> tuple[Row, Talk]:
    """Two calls, each a turn; the tools are JSON."""
    calls = [call_of(item), call_of(item, exact=False)]
    results = [result_of(item), json.dumps({"degrees": round(item.degrees)})]
    row = {
        "tools": json.dumps([TOOL]),
        "messages": [
            user(asked(item)),
            *({"role": "tool_call", "content": json.dumps(call["function"])} for call in calls),
            *({"role": "tool_response", "content": result} for result in results),
            assistant(item.said),
        ],
    }
    return row, Talk(
        [user(asked(item)), assistant("", tool_calls=calls), *map(tool, results), assistant(item.said)], [TOOL]
    )


def swift_loss(item: Item) -> tuple[Row, Talk]:
    """Words before a call, which is not learned, and an answer that is."""
    row = {
        "tools": json.dumps([TOOL]),
        "messages": [
            user(asked(item)),
            {**assistant("Let me look."), "loss": False},
            {"role": "tool_call", "content": json.dumps(call_of(item)["function"]), "loss": False},
            {"role": "tool_response", "content": result_of(item)},
            {**assistant(item.said), "loss": True},
        ],
    }
    calling = assistant("Let me look.", tool_calls=[call_of(item)], trained=False)
    return row, Talk([user(asked(item)), calling, tool(result_of(item)), assistant(item.said)], [TOOL])


def axolotl(item: Item) -> tuple[Row, Talk]:
    row = {
        "conversations": [
            {"from": "system", "value": "You are an AI assistant.", "train": False},
            {"from": "human", "value": "Hello", "train": False},
            {"from": "assistant", "value": "Hello", "train": True},
            {"from": "human", "value": asked(item), "train": False},
            {"from": "assistant", "value": "I forgot.", "train": False},
            {"from": "human", "value": "Try.", "train": False},
            {"from": "assistant", "value": item.said, "train": True},
        ]
    }
    system = {"role": "system", "content": "You are an AI assistant."}
    messages = [system, user("Hello"), assistant("Hello"), user(asked(item)), assistant("I forgot.", trained=False)]
    return row, Talk([*messages, user("Try."), assistant(item.said)])


def hermes(item: Item) -> tuple[Row, Talk]:
    """The system turn says the tools, which stand beside it once more; calls and results are text in tags."""
    system = (
        "You are a function calling AI model. You are provided with function signatures within <tools></tools> XML "
        f"tags.\n<tools>\n{json.dumps([TOOL])}\n</tools>\nFor each function call return a json object within "
        "<tool_call></tool_call> XML tags."
    )
    call = f"<tool_call>\n{json.dumps({'arguments': arguments_of(item), 'name': 'get_weather'})}\n</tool_call>"
    row = {
        "id": f"85f1c39{ITEMS.index(item)}",
        "conversations": [
            {"from": "system", "value": system},
            {"from": "human", "value": asked(item)},
            {"from": "gpt", "value": call},
            {"from": "tool", "value": f"<tool_response>\n{result_of(item)}\n</tool_response>"},
            {"from": "gpt", "value": item.said},
        ],
        "tools": json.dumps([TOOL]),
        "category": "Weather",
        "task": "Current weather",
    }
    messages = [{"role": "system", "content": system}, user(asked(item)), assistant(call), tool(result_of(item))]
    return row, Talk([*messages, assistant(item.said)])


FORMS: Mapping[str, Callable[[Item], tuple[Row, Talk]]] = {
    form.__name__: form
    for form in (
        *(trl_tools, trl_prompt_completion, trl_template_arguments, reasoning, openai_tools),
        *(swift_agent, swift_loss, axolotl, hermes),
    )
}


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
