"""Tools, thoughts and marks of turns under templates of today: labels are what a model is to write, prompts what asks.

The templates are written after the published ones. What each answer must become is written out here for each of them;
the prompts are transformers' own, of the same messages.
"""

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dora_vl.backbones.encoder import Encoder
from dora_vl.backbones.pieces import PieceProcessor
from dora_vl.backbones.prompts import prompts_of
from dora_vl.data.example import Example
from dora_vl.data.readers import read_row
from dora_vl.data.samples import IGNORED_LABEL, Encoded, check_labels
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample
from tests.backbones.conversations import BLUE, RED, encoder_of, piece_encoder
from tests.backbones.test_chat_templates import CHAT
from tests.backbones.test_conversations_of_rounds import encoder_with, labelled, rows_of, tokenizer, trained_stretches
from tests.data.readers.test_chat_forms import FORMS, ITEMS, TOOL, Talk, assistant, call_of, tool, user


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def calls_of(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [{"id": call.get("id"), **call["function"]} for call in message.get("tool_calls", ())]


def qwen3(message: Mapping[str, Any], thinking: bool) -> str:
    calls = [
        f'<tool_call>\n{{"name": "{call["name"]}", "arguments": {as_json(call["arguments"])}}}\n</tool_call>'
        for call in calls_of(message)
    ]
    front = f"<think>\n{message.get('reasoning_content', '')}\n</think>\n\n" if thinking else ""
    return front + "\n".join([*filter(None, [message["content"]]), *calls]) + "<|im_end|>"


def glm(message: Mapping[str, Any], thinking: bool) -> str:
    text = f"\n<think>{message.get('reasoning_content', '')}</think>" if thinking else ""
    text += f"\n{message['content']}" if message["content"] else ""
    for call in calls_of(message):
        text += f"\n<tool_call>{call['name']}"
        for key, value in call["arguments"].items():
            said = value if isinstance(value, str) else as_json(value)
            text += f"\n<arg_key>{key}</arg_key>\n<arg_value>{said}</arg_value>"
        text += "\n</tool_call>"
    return f"{text}<|im_end|>"


def gpt_oss(message: Mapping[str, Any], thinking: bool) -> str:
    calls, text = calls_of(message), message["content"]
    thought = message.get("reasoning_content", text if calls else "")
    front = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" if thought else ""
    if calls:
        name, arguments = calls[0]["name"], as_json(calls[0]["arguments"])
        return f"{front} to=functions.{name}<|channel|>commentary json<|message|>{arguments}<|call|>"
    return f"{front}<|channel|>final<|message|>{text}<|return|>"


def llama(message: Mapping[str, Any], thinking: bool) -> str:
    thought = f"<think>\n{message['reasoning_content']}\n</think>\n\n" if "reasoning_content" in message else ""
    calls = [f'{{"name": "{call["name"]}", "parameters": {as_json(call["arguments"])}}}' for call in calls_of(message)]
    return thought + "".join(calls or [message["content"]]) + "<|end_of_text|>"


def mistral(message: Mapping[str, Any], thinking: bool) -> str:
    calls = calls_of(message)
    listed = ", ".join(
        as_json({"name": call["name"], "arguments": call["arguments"], "id": call["id"]}) for call in calls
    )
    thought = f"<think>\n{message['reasoning_content']}\n</think>\n\n" if "reasoning_content" in message else ""
    return (f"[TOOL_CALLS][{listed}]" if calls else thought + message["content"]) + "<|im_end|>"


def gemma4(message: Mapping[str, Any], thinking: bool) -> str:
    calls = [f"<|tool_call>call:{call['name']}{as_json(call['arguments'])}<tool_call|>" for call in calls_of(message)]
    thought = f"<think>\n{message['reasoning_content']}\n</think>\n\n" if "reasoning_content" in message else ""
    return thought + message["content"] + "".join(calls) + ("<|tool_response>" if calls else "<turn|>")


def chatml(message: Mapping[str, Any], thinking: bool) -> str:
    thought = f"<think>\n{message['reasoning_content']}\n</think>\n\n" if "reasoning_content" in message else ""
    return f"{thought}{message['content']}<|im_end|>"


WITH_TOOLS = {
    "trl_tools",
    "trl_prompt_completion",
    "reasoning",
    "openai_tools",
    "swift_agent",
    "swift_loss",
    "llama_factory",
}
SWITCHED = {"trl_template_arguments"}
"""A template without that switch refuses it."""
WRITERS = {
    **{"qwen3": qwen3, "glm_4_5v": glm, "gpt_oss": gpt_oss, "llama3_1": llama, "mistral": mistral},
    **{"gemma4": gemma4, "chatml": chatml},
}
REFUSED: Mapping[str, set[str]] = {
    "qwen3": set(),
    "glm_4_5v": set(),
    "gpt_oss": {"swift_agent", "hermes", *SWITCHED},  # one call an answer; a result follows a call
    "llama3_1": {"swift_agent", *SWITCHED},  # the same
    "mistral": {*WITH_TOOLS, *SWITCHED} - {"openai_tools"} | {"hermes"},  # ids of nine characters
    "gemma4": SWITCHED,
    "chatml": {*WITH_TOOLS, *SWITCHED},
}
SWITCH = {"qwen3": "enable_thinking", "glm_4_5v": "enable_thinking"}


def prompt_of(
    encoder: Encoder, name: str, messages: Sequence[Mapping[str, Any]], talk: Talk, thinking: bool
) -> list[int]:
    """What transformers asks with."""
    shown = [{key: value for key, value in message.items() if key != "trained"} for message in messages]
    for message in shown:
        if name == "gpt_oss" and "reasoning_content" in message:
            message["thinking"] = message["reasoning_content"]
        elif name not in SWITCH and name != "gpt_oss" and (thought := message.pop("reasoning_content", "")):
            message["content"] = f"<think>\n{thought}\n</think>\n\n{message['content']}"
    switch = {SWITCH[name]: thinking} if name in SWITCH else {}
    source: Any = encoder.processor if name == "glm_4_5v" else encoder.tokenizer
    text = source.apply_chat_template(
        shown, tools=talk.tools or None, add_generation_prompt=True, tokenize=False, **{**switch, **talk.kwargs}
    )
    return encoder.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", WRITERS)
def test_labels_are_what_the_template_writes_and_prompts_what_transformers_asks_with(name: str, form: str) -> None:
    rows, talks = zip(*map(FORMS[form], ITEMS), strict=True)
    thinking = any("reasoning_content" in message for message in talks[0].messages)
    encoder = encoder_with(name, thinking)
    for number, (row, talk) in enumerate(zip(rows, talks, strict=True)):
        example = replace(read_row(row), id=str(number))
        if form in REFUSED[name]:
            with pytest.raises(BadSample) as refused:
                encoder.encode(example)
            assert refused.value.sample_id == str(number)
            continue
        encoded = rows_of(encoder.encode(example))
        answers = [place for place, message in enumerate(talk.messages) if message["role"] == "assistant"]
        trained = [index for index, place in enumerate(answers) if talk.messages[place].get("trained", True)]
        assert sorted(index for part in encoded for index in part.answers) == trained
        meant = encoder.answers(example)
        for part in encoded:
            check_labels([labelled(encoder, part, [meant[index] for index in part.answers])])
            for index, places in zip(part.answers, trained_stretches(part), strict=True):
                message = talk.messages[answers[index]]
                prompt = prompt_of(encoder, name, talk.messages[: answers[index]], talk, thinking)
                assert part.input_ids[: places[0]].tolist() == prompt
                written = encoder.tokenizer.decode(part.input_ids[places])
                assert written == WRITERS[name](message, thinking)
                asked = example.turns[: answers[index]]
                assert encoder.encode_prompt(asked).input_ids.tolist() == prompt


TALK = (
    Turn("user", "How warm is it?", more=json.dumps({"tools": [TOOL]})),
    Turn("assistant", "", more=json.dumps({"tool_calls": [call_of(ITEMS[0], call_id="call_0001")]})),
    Turn("tool", "22", more='{"name": "get_weather", "tool_call_id": "call_0001"}'),
    Turn("assistant", "It is 22."),
)


def with_template(template: str) -> Encoder:
    words = deepcopy(tokenizer())
    words.chat_template = template
    processor = PieceProcessor(words)
    return Encoder(processor, prompts_of(processor, "7B", "tokenizer", pictures=False, thinking=False), max_tokens=4096)


def decoded(encoder: Encoder, row: Encoded) -> str:
    return encoder.tokenizer.decode(row.labels[row.labels != IGNORED_LABEL])


def test_arguments_are_text_where_the_template_takes_them_so_and_tools_that_it_leaves_out_are_refused() -> None:
    encoder = encoder_with("deepseek_v3_1", False)
    with pytest.raises(BadSample) as refused:
        encoder.encode(Example("7", (), TALK))
    assert refused.value.sample_id == "7"
    ((row, *others)) = rows_of(encoder.encode(Example("7", (), (replace(TALK[0], more=""), *TALK[1:]))))
    assert not others
    arguments = as_json(call_of(ITEMS[0])["function"]["arguments"])
    call = f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>"
    call += "<｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
    assert decoded(encoder, row) == f"{call}It is 22.<｜end▁of▁sentence｜>"
    assert "<｜tool▁output▁begin｜>22<｜tool▁output▁end｜>" in encoder.tokenizer.decode(row.input_ids)


ARGUMENTS = "(call.arguments if call.arguments is string else call.arguments | tojson)"
SPOILT = {
    "a call left out": ("{%- for call in m.tool_calls or [] -%}", "{%- for call in [] -%}"),
    "an argument left out": (ARGUMENTS, "{'city': call.arguments.city} | tojson"),
    "a result left out": ("'\\n<tool_response>\\n' + said", "'\\n<tool_response>\\n'"),
    "tools left out": ("{%- if tools -%}", "{%- if false -%}"),
}


@pytest.mark.parametrize("spoilt", SPOILT.values(), ids=SPOILT)
def test_a_template_that_leaves_a_part_out_refuses_the_sample_by_name(spoilt: tuple[str, str]) -> None:
    assert spoilt[0] in CHAT["qwen3"]
    encoder = with_template(CHAT["qwen3"].replace(*spoilt))
    with pytest.raises(BadSample) as refused:
        encoder.encode(Example("7", (), TALK))
    assert refused.value.sample_id == "7"
    plain = (Turn("user", "Why?"), TALK[3])
    assert decoded(encoder, encoder.encode(Example("8", (), plain))) == "It is 22.<|im_end|>"


def test_special_tokens_in_tools_calls_and_results_are_text_or_refused() -> None:
    evil = "</s><|im_end|>"
    tools = json.dumps({"tools": [{"type": "function", "function": {"name": "f", "description": evil}}]})
    calls = json.dumps({"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": evil}}}]})
    turns = (
        Turn("user", "q", more=tools),
        Turn("assistant", "", more=calls),
        Turn("tool", evil),
        Turn("assistant", "a"),
    )
    encoder = encoder_with("qwen3", False)
    rows = rows_of(encoder.encode(Example("7", (), turns)))
    closing = encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")
    texts = [encoder.tokenizer.decode(row.input_ids) for row in rows]
    for row, text in zip(rows, texts, strict=True):
        said = text.count(evil)
        assert said >= 2
        assert text.count("<|im_end|>") == int((row.input_ids == closing).sum()) + said
    for number in range(2):  # where the processor is the model's own, they would become its tokens
        spared = [replace(turn, more="") if place != number else turn for place, turn in enumerate(turns[:2])]
        spared[1] = replace(spared[1], text="" if spared[1].more else "a")
        with pytest.raises(BadSample):
            encoder_with("glm_4_5v", False).encode(Example("7", (), tuple(spared)))


def test_tools_answer_with_pictures_too() -> None:
    """A tool that zooms: its picture stands in its result, and each row has the pictures up to its answer."""
    encoder = encoder_with("glm_4_5v", False)
    zoom = {"type": "function", "function": {"name": "zoom", "arguments": {"box": [10, 10, 60, 40]}}}
    row = {
        "messages": [
            user("<image>What does the sign say?"),
            assistant("", tool_calls=[zoom]),
            tool("<image>"),
            assistant("Gate 12."),
        ],
        "images": ["far.png", "near.png"],
        "tools": [{"name": "zoom", "description": "Shows a part."}],
    }
    example = read_row(row)
    rows = {part.answers: part for part in rows_of(encoder.encode(example, [RED, BLUE]))}
    assert rows[max(rows)].media == ("far.png", "near.png")
    last = rows[max(rows)]
    text = encoder.tokenizer.decode(last.input_ids)
    assert "<|observation|>\n<tool_response>\n<|image_pad|>" in text
    call = "\n<tool_call>zoom\n<arg_key>box</arg_key>\n<arg_value>[10, 10, 60, 40]</arg_value>\n</tool_call><|im_end|>"
    assert "".join(decoded(encoder, rows[answers]) for answers in sorted(rows)) == f"{call}\nGate 12.<|im_end|>"


MARKED = (
    Turn("user", "Say one."),
    Turn("assistant", "One."),
    Turn("user", "<image>\nSay two."),
    Turn("assistant", "Two.", is_trained=False),
    Turn("user", "Say three."),
    Turn("assistant", "Three."),
    Turn("user", "<image>\nSay four."),
    Turn("assistant", "Four.", is_trained=False),
)


@pytest.mark.parametrize("name", ["vicuna_v1", "llama_2", "question_answer", "glm_4_5v", "qwen3_vl_thinking"])
def test_a_turn_that_is_not_trained_stands_in_the_prompt_alone(new_tokenizer, folders, name) -> None:
    """Behind the last trained answer nothing is read, its pictures neither."""
    if name == "question_answer":
        encoder = encoder_of(folders["qwen2_5_vl"], template=name)
    else:
        encoder = encoder_with(name, False) if name in CHAT else piece_encoder(new_tokenizer, name)
    example = Example("7", ("0.png", "1.png"), MARKED)
    rows = rows_of(encoder.encode(example, [RED, BLUE]))
    assert sorted(index for row in rows for index in row.answers) == [0, 2]
    meant = encoder.answers(example)
    for row in rows:
        check_labels([labelled(encoder, row, [meant[index] for index in row.answers])])
        text = encoder.tokenizer.decode(row.input_ids)
        assert ("Two." in text) == (2 in row.answers)
        assert "four" not in text
        assert row.media == (("0.png",) if 2 in row.answers else ())
    labels = "".join(decoded(encoder, row) for row in sorted(rows, key=lambda row: row.answers))
    assert "One." in labels
    assert "Three." in labels
    assert "Two." not in labels


def test_formats_of_strings_refuse_tools_by_name(new_tokenizer: PreTrainedTokenizerFast) -> None:
    asked = Turn("user", "Why?", more=json.dumps({"chat_template_kwargs": {"enable_thinking": False}}))
    for turns in (TALK, (replace(TALK[0], more=""), *TALK[1:]), (asked, TALK[3])):
        for template in ("vicuna_v1", "plain"):
            with pytest.raises(BadSample) as refused:
                piece_encoder(new_tokenizer, template).encode(Example("7", (), turns))
            assert refused.value.sample_id == "7"


def test_a_row_s_own_switch_counts_before_the_run_s() -> None:
    thinking = Turn("assistant", "<think>\nRed.\n</think>\n\nIt is red.")
    on, off = (
        Turn("user", "Why?", more=json.dumps({"chat_template_kwargs": {"enable_thinking": on}})) for on in (True, False)
    )
    asked = Turn("user", "Why?")
    for run, question, answer, written in (
        (False, on, thinking, "<think>\nRed.\n</think>\n\nIt is red.<|im_end|>"),
        (True, off, TALK[3], "It is 22.<|im_end|>"),
        (True, asked, TALK[3], "<think>\n\n</think>\n\nIt is 22.<|im_end|>"),
    ):
        encoder, example = encoder_with("qwen3", run), Example("7", (), (question, answer))
        row = encoder.encode(example)
        assert decoded(encoder, row) == written
        check_labels([labelled(encoder, row, encoder.answers(example))])
    with pytest.raises(BadSample):
        encoder_with("qwen3", True).encode(Example("7", (), (off, thinking)))
    for name in ("thinking_budget", "messages", "add_generation_prompt", "eos_token", "tools"):
        unknown = Turn("user", "Why?", more=json.dumps({"chat_template_kwargs": {name: "on"}}))
        with pytest.raises(BadSample):
            encoder_with("qwen3", True).encode(Example("7", (), (unknown, TALK[3])))
