"""Conversations of several rounds under templates of today: each answer trains once, as inference writes it.

The templates are written after the published ones: where thoughts go, what a prompt opens, what ends an answer, what is
rewritten once later turns follow.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
from transformers import PreTrainedTokenizerFast

from dora_vl.backbones.encoder import Encoder
from dora_vl.backbones.generation import growing_text
from dora_vl.backbones.output_store import StoredPictures
from dora_vl.backbones.pieces import PieceProcessor
from dora_vl.backbones.prompts import prompts_of
from dora_vl.data.example import Example
from dora_vl.data.packing import build_trees
from dora_vl.data.pictures import MediaFolder
from dora_vl.data.samples import IGNORED_LABEL, Encoded, Labelled, Sample, check_labels
from dora_vl.data.turns import Turn
from dora_vl.data.video import Uniform
from dora_vl.errors import BadSample
from dora_vl.run.base import VideoReading
from dora_vl.training.opened import SampleEncoder
from tests.backbones.conversations import BLUE, RED, messages_of
from tests.backbones.test_chat_templates import CHAT
from tests.backbones.tiny_families.table import FAMILIES
from tests.backbones.tiny_image_text import CHATML, tiny_tokenizer

MARKS = (
    *("<|start|>", "<|end|>", "<|return|>", "<|channel|>", "<|message|>", "<|im_sep|>", "<|endoftext|>"),
    *("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|user|>", "<|assistant|>"),
    *("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[THINK]", "[/THINK]"),
    *("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<|call|>", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]"),
    *("[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    *(
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
        "<｜tool▁output▁begin｜>",
        "<｜tool▁output▁end｜>",
    ),
    *("<|turn>", "<turn|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"),
)
"""Special tokens of the language models."""


class Writes(NamedTuple):
    """What a model writes of an answer `{A}`: without a thought where no answer has one, with `{T}`, and without where
    others have; and how many rows a conversation of three rounds becomes, without thoughts and with them."""

    plain: str
    with_thought: str
    rows: tuple[int, int] = (1, 1)
    switch: str = ""
    among_thoughts: str = ""


THOUGHT, CLOSED = "<think>\n{T}\n</think>\n\n{A}", "\n</think>\n\n{A}"
OPENED = f"{{T}}{CLOSED}"
R1, SAYS = "<｜end▁of▁sentence｜>", "<|start|>assistant<|channel|>final<|message|>"
LANGUAGE: Mapping[str, Writes] = {
    "qwen3": Writes("{A}<|im_end|>", f"{THOUGHT}<|im_end|>", (3, 3), "enable_thinking", f"<think>\n{CLOSED}<|im_end|>"),
    "qwq": Writes(f"{CLOSED}<|im_end|>", f"{OPENED}<|im_end|>", (3, 3)),
    "deepseek_r1": Writes(CLOSED + R1, OPENED + R1, (3, 3)),
    "deepseek_v3_1": Writes(f"{{A}}{R1}", OPENED + R1, (1, 3), "thinking", f"</think>{{A}}{R1}"),
    "gpt_oss": Writes(
        SAYS.removeprefix("<|start|>assistant") + "{A}<|return|>",
        f"<|channel|>analysis<|message|>{{T}}<|end|>{SAYS}{{A}}<|return|>",
        (3, 3),
    ),
    "smollm3": Writes("{A}<|im_end|>", f"{THOUGHT}<|im_end|>", (1, 1), "enable_thinking"),
    "granite": Writes("{A}<|end_of_text|>", f"{THOUGHT}<|end_of_text|>", (1, 1), "thinking"),
    "phi4": Writes("{A}<|im_end|>", f"{THOUGHT}<|im_end|>"),
    "phi4_mini": Writes("{A}<|end|><|im_end|>", f"{THOUGHT}<|end|><|im_end|>", (3, 3)),
    "magistral": Writes("{A}<|im_end|>", "[THINK]{T}[/THINK]{A}<|im_end|>"),
    "chatml": Writes("{A}<|im_end|>", f"{THOUGHT}<|im_end|>"),
}
PICTURED: Mapping[str, Writes] = {
    "qwen3_vl_thinking": Writes(f"{CLOSED}<|im_end|>", f"{OPENED}<|im_end|>", (3, 3)),
    "glm_4_5v": Writes(
        "\n{A}<|im_end|>",
        "\n<think>{T}</think>\n{A}<|im_end|>",
        (3, 3),
        "enable_thinking",
        "\n<think></think>\n{A}<|im_end|>",
    ),
    "kimi_vl": Writes("{A}<|im_end|>", f"{THOUGHT}<|im_end|>"),
    "smolvlm": Writes(" {A}<end_of_utterance>", f" {THOUGHT}<end_of_utterance>"),
    "llava_onevision": Writes("{A}<|im_end|>", f"{THOUGHT}<|im_end|>", (3, 3)),
}
WRITTEN = {**LANGUAGE, **PICTURED}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    words = tiny_tokenizer({})
    words.add_tokens([*MARKS], special_tokens=True)
    words.add_tokens(["<think>", "</think>"])
    return words


@cache
def encoder_with(name: str, thinking: bool | None) -> Encoder:
    template = {**CHAT, "chatml": CHATML}[name]
    if name in PICTURED:
        words = tiny_tokenizer(FAMILIES["qwen2_5_vl"].names)
        words.add_tokens(["<think>", "</think>"])
        processor = FAMILIES["qwen2_5_vl"].processor(words)
        processor.chat_template = template
    else:
        words = deepcopy(tokenizer())  # each keeps its template
        words.chat_template = template
        processor = PieceProcessor(words)
    prompts = prompts_of(
        processor, name, "tokenizer" if name in LANGUAGE else None, pictures=name in PICTURED, thinking=thinking
    )
    words.chat_template = template
    return Encoder(processor, prompts, max_tokens=4096)


ASKED = ("Which colour is it?", "And the <b>edge</b>?", "Is it </ good?", "Why?")
SAID = ("It is red.", "n", "A </b> blue one: final.", "So it is")
THOUGHTS = ("I see\n\nred.", "An edge, then", "Sure?", "Red")


def said(number: int, with_thought: bool) -> str:
    return f"<think>\n{THOUGHTS[number]}\n</think>\n\n{SAID[number]}" if with_thought else SAID[number]


def talk_of(rounds: int, thoughts: Sequence[bool], pictures_in: Sequence[int] = ()) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    for number in range(rounds):
        front = "<image>\n" * pictures_in.count(number)
        turns += [Turn("user", front + ASKED[number]), Turn("assistant", said(number, thoughts[number]))]
    return tuple(turns)


def rows_of(encoded: Encoded) -> list[Encoded]:
    return [encoded, *encoded.others]


def prompt_of(encoder: Encoder, name: str, turns: Sequence[Turn], pictures: Sequence[Any], thinking: bool) -> list[int]:
    """What transformers itself asks with; earlier answers as a server has them."""
    messages = messages_of((turns, pictures))
    for message, turn in zip(messages, turns, strict=True):
        if name in LANGUAGE or (turn.role == "assistant" and name == "glm_4_5v"):
            message["content"] = turn.text
        if turn.role == "assistant" and turn.text.startswith("<think>") and name in ("gpt_oss", "magistral"):
            _, _, rest = turn.text.partition("</think>\n\n")
            message["content"] = rest
            thought = turn.text.partition("<think>\n")[2].partition("\n</think>")[0]
            if name == "magistral":
                message["content"] = [{"type": "thinking", "thinking": thought}, {"type": "text", "text": rest}]
            else:
                message["reasoning_content"] = thought
    switch = {WRITTEN[name].switch: thinking} if WRITTEN[name].switch else {}
    source: Any = encoder.tokenizer if name in LANGUAGE else encoder.processor
    inputs = source.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True, **switch)
    ids = inputs["input_ids"]
    return ids if name in LANGUAGE else ids[0]


MIXES = {
    "no thoughts": (False,) * 4,
    "thoughts": (True,) * 4,
    "some thoughts": (True, False, True, False),
    "the last thinks": (False, False, False, True),
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("name", WRITTEN)
def test_each_answer_is_trained_once_as_inference_writes_it(name: str, mix: str) -> None:
    for rounds in range(1, 5):
        thoughts = MIXES[mix][-rounds:] if mix == "the last thinks" else MIXES[mix][:rounds]
        thinking, writes = any(thoughts), WRITTEN[name]
        encoder = encoder_with(name, thinking)
        for shown in ((), (0,), (0, 1, 1), (2, 3)) if name in PICTURED else ((),):
            shown = tuple(number for number in shown if number < rounds)
            pictures = [RED, BLUE, RED][: len(shown)]
            turns = talk_of(rounds, thoughts, shown)
            names = tuple(f"{number}.png" for number in range(len(pictures)))
            example = Example("conversation", names, turns)
            rows, meant = rows_of(encoder.encode(example, pictures)), encoder.answers(example)
            assert sorted(number for row in rows for number in row.answers) == list(range(rounds))
            if rounds == 3 and len(set(thoughts)) == 1:
                assert len(rows) == writes.rows[thinking]
            for row in rows:
                check_labels([labelled(encoder, row, [meant[number] for number in row.answers])])
                for number, places in zip(row.answers, trained_stretches(row), strict=True):
                    before = turns[: 2 * number + 1]
                    seen = sum(turn.text.count("<image>") for turn in before)
                    prompt = prompt_of(encoder, name, before, pictures[:seen], thinking)
                    assert row.input_ids[: places[0]].tolist() == prompt
                    asked = encoder.encode_prompt(before, pictures[:seen]).input_ids
                    assert asked.tolist() == prompt
                    among = writes.among_thoughts if thinking and writes.among_thoughts else writes.plain
                    form = writes.with_thought if thoughts[number] else among
                    written = encoder.tokenizer.decode(row.input_ids[places])
                    assert written == form.format(A=SAID[number], T=THOUGHTS[number])
                shown_here = sum(turn.text.count("<image>") for turn in turns[: 2 * row.answers[-1] + 1])
                assert row.media == names[:shown_here]


def trained_stretches(row: Encoded) -> list[list[int]]:
    """The places of each answer that has labels."""
    places = groupby(enumerate(row.labels.tolist()), lambda pair: pair[1] != IGNORED_LABEL)
    return [[place for place, _ in group] for is_trained, group in places if is_trained]


def labelled(encoder: Encoder, row: Encoded, answers: Any) -> Labelled:
    return Labelled(id="conversation", labels=row.labels, answers=answers, tokenizer=encoder.tokenizer)


def test_a_model_is_asked_as_it_was_trained_and_its_answer_is_what_it_says() -> None:
    """What it writes before an answer without thoughts is no part of the answer."""
    for name, writes in WRITTEN.items():
        for thinking in (False, True):
            encoder = encoder_with(name, thinking)
            form = writes.among_thoughts if thinking and writes.among_thoughts else writes.plain
            ids = encoder.tokenizer(form.format(A="It is red."), add_special_tokens=False)["input_ids"]
            assert encoder.decode(ids) == "It is red."
            assert encoder.prompts.thinking is (thinking if writes.switch else None)
            grow_text = growing_text(encoder.tokenizer, encoder.prompts.answer_in)
            texts = [grow_text(ids[: count + 1]) for count in range(len(ids))]
            assert all("It is red.".startswith(text) for text in texts)


def test_thoughts_where_no_sample_looked_at_has_any_are_refused_by_name() -> None:
    turns = talk_of(1, (True,))
    with pytest.raises(BadSample) as refused:
        encoder_with("qwen3", False).encode(Example("7", (), turns))
    assert refused.value.sample_id == "7"
    assert encoder_with("qwen3", None).prompts.thinking is None


def test_an_empty_thought_is_none_to_a_template_that_knows_them_and_text_to_others() -> None:
    turns = (Turn("user", "Why?"), Turn("assistant", "<think>\n\n</think>\n\nSo."))
    for name, expected in (
        ("qwen3", "So.<|im_end|>"),
        ("qwq", "\n</think>\n\nSo.<|im_end|>"),
        ("chatml", "<think>\n\n</think>\n\nSo.<|im_end|>"),
    ):
        encoder, example = encoder_with(name, False), Example("conversation", (), turns)
        row = encoder.encode(example)
        assert encoder.tokenizer.decode(row.labels[row.labels != IGNORED_LABEL]) == expected
        check_labels([labelled(encoder, row, encoder.answers(example))])


def test_rounds_of_one_talk_share_what_they_begin_with_and_train_each_token_once() -> None:
    """With the same pictures; a round that shows fewer of them stands by itself."""
    for name, shown in (("qwen3", ()), ("qwen3_vl_thinking", (0,)), ("qwen3_vl_thinking", (0, 2))):
        encoder, pictures = encoder_with(name, True), [RED, BLUE][: len(shown)]
        names = tuple(f"{number}.png" for number in range(len(pictures)))
        encoded = encoder.encode(Example("conversation", names, talk_of(3, (True,) * 3, shown)), pictures)
        sample = Sample(**vars(encoded), index=5, id="conversation")
        assert [(row.id, row.index) for row in sample.texts()] == [("conversation", 5)] * 3
        plain, trees = (replace(encoder.collate, packing=kind)([sample]) for kind in ("plain", "trees"))
        assert plain["samples"] == trees["samples"] == 1
        trained = [int((batch["labels"] != IGNORED_LABEL).sum()) for batch in (plain, trees)]
        assert trained[0] == trained[1] == sum(int((row.labels != IGNORED_LABEL).sum()) for row in sample.texts())
        whole = sum(len(row.input_ids) for row in sample.texts())
        assert int((trees["layout"]["segment"] >= 0).sum()) < whole
        trees = build_trees(sample.texts(), budget=10**6)
        assert {len(tree) > 1 for tree in trees} == ({True} if len(shown) < 2 else {True, False})


def test_what_the_length_limit_takes_of_later_rounds_is_counted() -> None:
    whole = encoder_with("qwen3", True)
    example = Example("conversation", (), talk_of(3, (True,) * 3))
    last, middle, first = rows_of(whole.encode(example))
    short = Encoder(whole.processor, whole.prompts, max_tokens=len(middle.input_ids) - 3)
    kept = rows_of(short.encode(example))
    assert [row.answers for row in kept] == [(1,), (0,)]
    assert kept[0].cut_tokens == len(last.input_ids) - short.max_tokens
    assert kept[1].input_ids.tolist() == first.input_ids.tolist()
    with pytest.raises(BadSample):
        Encoder(whole.processor, whole.prompts, max_tokens=8).encode(example)


def test_a_text_that_no_sample_can_hold_is_never_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encoder_with("qwen3", True)
    short = Encoder(whole.processor, whole.prompts, max_tokens=64)
    monkeypatch.setattr(Encoder, "_processed", lambda *_: pytest.fail("it was tokenised"))
    for turns in (
        (Turn("user", "x" * 2**24), Turn("assistant", "a")),
        (Turn("user", "q"), Turn("assistant", "a " * 2**23)),
    ):
        with pytest.raises(BadSample) as caught:
            short.encode(Example("long", (), turns))
        assert caught.value.sample_id == "long"


def test_stored_outputs_serve_every_round_that_shows_all_pictures(tmp_path: Path) -> None:
    class Store:
        """Stands for stored outputs of any pictures."""

        def read(self, _: object, names: Sequence[str]) -> StoredPictures:
            return StoredPictures([picture.size for picture in (RED, BLUE)[: len(names)]], {})

    for number, picture in enumerate((RED, BLUE)):
        picture.save(tmp_path / f"{number}.png")
    encoder = encoder_with("qwen3_vl_thinking", True)
    videos = VideoReading(folder=tmp_path, sampling=Uniform(1))
    rows = SampleEncoder(encoder=encoder, folder=MediaFolder(tmp_path), videos=videos, outputs=cast(Any, Store()))
    turns = talk_of(3, (True,) * 3, (0,))
    encoded = rows.encode(Example("conversation", ("0.png",), turns), {})
    assert [(row.media, len(row.stored)) for row in rows_of(encoded)] == [(("0.png",), 1)] * 3
    later = Example("conversation", ("0.png", "1.png"), talk_of(3, (True,) * 3, (0, 1)))
    with pytest.raises(BadSample) as refused:
        rows.encode(later, {})
    assert refused.value.sample_id == "conversation"
    words_first = rows.encode(Example("conversation", ("0.png",), talk_of(2, (True,) * 2, (1,))), {})
    assert [len(row.stored) for row in rows_of(words_first)] == [1, 0]
