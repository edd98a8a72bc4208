"""Rows with tools, thoughts and marks of turns as the owners of each form write them, seven of each.

Beside each row stands the conversation that it is, in the messages that transformers' chat templates take; an answer
that is not trained has `trained: False`. Sources: TRL dataset_formats.md (tool calling, harmony, prompt-completion),
transformers' chat_extras, OpenAI's fine-tuning guide (tools), ms-swift Agent-support.md and
Custom-dataset.md, Axolotl conversation.qmd, the card of
NousResearch/hermes-function-calling-v1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

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
