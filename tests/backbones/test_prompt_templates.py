"""Each format of strings: its text, tokens and labels written out, equal to the published algorithm on any text.

Tokens and labels of the vicuna_v1, llama_2 and plain kinds are what LLaVA c121f04 gave on this tokenizer (transformers
4.37.2, slow). Of mpt's and v0's kinds the tokens are; the labels are by hand, since the original's are wrong there.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dora_vl.backbones.encoder import Encoder
from dora_vl.backbones.loading import add_image_token, load_tokenizer
from dora_vl.backbones.specs import TemplateName
from dora_vl.backbones.templates import TEMPLATES, VICUNA_SYSTEM
from dora_vl.data.samples import Labelled, check_labels
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample, UserError
from tests.backbones.encoded_talk import NASTY, answers_of, encode_talk, piece_encoder, prompt_ids, talk
from tests.backbones.tiny_sentencepiece import write_tokenizer_model

ROUNDS = ("<image>\nIs it red?", "Yes, it is.", "What is in the picture?", "A red circle")
USER_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
HUMAN_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions."
)
MMTAG_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to understand the "
    "visual content that the user provides, and assist the user with a variety of tasks using natural language.The "
    "visual content will be provided with the following format: <Image>visual content</Image>."
)
LLAMA_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\nIf a question does not make "
    "any sense, or is not factually coherent, explain why instead of answering something not correct. If you don't "
    "know the answer to a question, please don't share false information."
)
LLAVA_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
MPT_SYSTEM = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
)
V1 = "USER: {}\nIs it red? ASSISTANT:« Yes, it is.</s>»USER: What is in the picture? ASSISTANT:« A red circle</s>»"
LLAMA_2 = (
    "{}<image>\nIs it red? [/INST]« Yes, it is. </s>»<s>[INST] What is in the picture? [/INST]« A red circle </s>»"
)
MPT = (
    "<|im_start|>system\n{}<|im_end|><|im_start|>user\n<image>\nIs it red?<|im_end|><|im_start|>assistant\n"
    "«Yes, it is.<|im_end|>»<|im_start|>user\nWhat is in the picture?<|im_end|><|im_start|>assistant\n"
    "«A red circle<|im_end|>»"
)
V0 = (
    "### Human: {}\nIs it red?\n### Assistant:« Yes, it is.\n###» Human: What is in the picture?\n### Assistant:"
    "« A red circle\n###» "
)
TAGGED = "<Image><image></Image>"
TEXTS = {
    "vicuna_v1": f"{USER_SYSTEM} {V1.format('<image>')}",
    "llava_v1": f"{HUMAN_SYSTEM} {V1.format('<image>')}",
    "v1_mmtag": f"{MMTAG_SYSTEM} {V1.format(TAGGED)}",
    "llama_2": LLAMA_2.format(f"[INST] <<SYS>>\n{LLAMA_SYSTEM}\n<</SYS>>\n\n"),
    "llava_llama_2": LLAMA_2.format(f"[INST] <<SYS>>\n{LLAVA_SYSTEM}\n<</SYS>>\n\n"),
    "mistral_instruct": LLAMA_2.replace("<s>", "").format("[INST] "),
    "mpt": MPT.format(MPT_SYSTEM),
    "chatml_direct": MPT.format("Answer the questions."),
    "v0": f"{HUMAN_SYSTEM}\n\n{V0.format('<image>')}",
    "v0_mmtag": f"{MMTAG_SYSTEM}\n\n{V0.format(TAGGED)}",
}
"""Two rounds with a picture; what is between « and » is labelled."""

V1_TOKENS = (
    "▁ <0x0A> Is ▁it ▁red ? ▁ASSISTANT : *▁Y *es *, *▁it *▁is *. *</s> USER : ▁What ▁is ▁in ▁the ▁p ic tu re ? "
    "▁ASSISTANT : *▁A *▁red *▁c *ir *cle *</s>"
)
LLAMA_2_TOKENS = (
    "<image> ▁ <0x0A> Is ▁it ▁red ? ▁[/ INST ] *▁Y *es *, *▁it *▁is *. *▁ *</s> <s> [ INST ] ▁What ▁is ▁in ▁the ▁p ic "
    "tu re ? ▁[/ INST ] *▁A *▁red *▁c *ir *cle *▁ *</s>"
)
MPT_TOKENS = (
    "<|im_start|> us er <0x0A> <image> ▁ <0x0A> Is ▁it ▁red ? <|im_end|> <|im_start|> a ssistant <0x0A> *Y *es *, *▁it "
    "*▁is *. *<|im_end|> <|im_start|> us er <0x0A> W hat ▁is ▁in ▁the ▁p ic tu re ? <|im_end|> <|im_start|> a ssistant "
    "<0x0A> *A *▁red *▁c *ir *cle *<|im_end|>"
)
V0_TOKENS = (
    "Is ▁it ▁red ? <0x0A> ### ▁A ssistant : *▁Y *es *, *▁it *▁is *. *<0x0A> *### ▁ Hum an : ▁What ▁is ▁in ▁the ▁p ic "
    "tu re ? <0x0A> ### ▁A ssistant : *▁A *▁red *▁c *ir *cle *<0x0A> *### ▁"
)
TAG = "▁ < I m a g e > <image> ▁ < / I m a g e >"
TOKENS = {
    "vicuna_v1": f"s ▁qu est io ns . ▁ USER : ▁ <image> {V1_TOKENS}",
    "llava_v1": f"s ▁qu est io ns . ▁ USER : ▁ <image> {V1_TOKENS}",
    "v1_mmtag": f"▁ USER : {TAG} {V1_TOKENS.removeprefix('▁ ')}",
    "llama_2": f"<< / SYS >> <0x0A> <0x0A> {LLAMA_2_TOKENS}",
    "llava_llama_2": f"<< / SYS >> <0x0A> <0x0A> {LLAMA_2_TOKENS}",
    "mistral_instruct": f"<s> ▁[ INST ] ▁ {LLAMA_2_TOKENS.replace(' <s>', '')}",
    "mpt": MPT_TOKENS,
    "chatml_direct": f"<s> <|im_start|> s yst em <0x0A> A ns w er ▁the ▁qu est io ns . <|im_end|> {MPT_TOKENS}",
    "v0": f". <0x0A> <0x0A> ### ▁ Hum an : ▁ <image> ▁ <0x0A> {V0_TOKENS}",
    "v0_mmtag": f". <0x0A> <0x0A> ### ▁ Hum an : {TAG} <0x0A> {V0_TOKENS}",
}
"""The end of it as tokens of Vicuna's kind (`legacy` false), the labelled ones with a star."""
NAMED = sorted(TEXTS)


def encoder(tokenizer: PreTrainedTokenizerBase, name: str) -> Encoder:
    return piece_encoder(tokenizer, name, each=1)


def starred(tokenizer: PreTrainedTokenizerBase, name: str, *texts: str) -> str:
    """The tokens of a conversation, those with a label starred."""
    encoded = encode_talk(encoder(tokenizer, name), talk(*texts, images=texts[0].count("<image>")))
    tokens = tokenizer.convert_ids_to_tokens(encoded.input_ids.tolist())
    labels = encoded.labels.tolist()
    return " ".join(("" if label == -100 else "*") + token for token, label in zip(tokens, labels, strict=True))


def test_every_row_is_a_setting_and_is_written_out_here() -> None:
    assert {*TEMPLATES, "tokenizer"} == set(get_args(TemplateName))
    assert all(row.name == name for name, row in TEMPLATES.items())
    assert set(TEMPLATES) - set(TEXTS) == {"plain", "chatml"}
    assert set(TOKENS) == set(TEXTS)


@pytest.mark.parametrize("name", NAMED)
def test_text_and_what_is_labelled(name: str) -> None:
    rendered = TEMPLATES[name].render(talk(*ROUNDS).turns)
    marked = rendered.text
    for start, end in reversed(rendered.answer_spans):
        marked = f"{marked[:start]}«{marked[start:end]}»{marked[end:]}"
    assert marked == TEXTS[name]


@pytest.mark.parametrize("name", NAMED)
def test_tokens_and_labels(new_tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    written = starred(new_tokenizer, name, *ROUNDS)
    assert written.endswith(TOKENS[name])
    assert "*" not in written[: -len(TOKENS[name])]
    assert written.startswith("<s> ")
    assert written.count("<s>") == (2 if name.endswith("llama_2") else 1)


SYSTEM_TURN = {
    **dict.fromkeys(("vicuna_v1", "llava_v1", "v1_mmtag"), "Say «so» </s>. USER: Hi ASSISTANT:"),
    **dict.fromkeys(("llama_2", "llava_llama_2"), "[INST] <<SYS>>\nSay «so» </s>.\n<</SYS>>\n\nHi [/INST]"),
    **dict.fromkeys(
        ("mpt", "chatml_direct"),
        "<|im_start|>system\nSay «so» </s>.<|im_end|><|im_start|>user\nHi<|im_end|><|im_start|>assistant\n",
    ),
    "chatml": "<|im_start|>system\nSay «so» </s>.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    **dict.fromkeys(("v0", "v0_mmtag"), "Say «so» </s>.\n\n### Human: Hi\n### Assistant:"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_samples_own_system_turn_stands_in_the_place_of_the_templates(name: str) -> None:
    turns = (Turn("system", "Say «so» </s>."), Turn("user", "Hi"), Turn("assistant", "Ho"))
    if name not in SYSTEM_TURN:
        with pytest.raises(ValueError, match=f"template {name} "):
            TEMPLATES[name].render(turns)
        return
    assert TEMPLATES[name].render(turns[:2], generation_prompt=True).text == SYSTEM_TURN[name]
    found = TEMPLATES[name].render(turns)
    assert found.text.startswith(SYSTEM_TURN[name])
    assert found.answer_spans[0][0] == len(SYSTEM_TURN[name])
    assert not [span for span in found.controls if found.text[slice(*span)] == "</s>" and span[0] < 20]


def test_captions(new_tokenizer: PreTrainedTokenizerBase) -> None:
    written = starred(new_tokenizer, "plain", "<image>\nDescribe it.", "A red circle")
    assert written == "<s> <image> *▁A *▁red *▁c *ir *cle *<0x0A>"


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"plain"}))
def test_a_prompt_is_what_stands_before_the_answer(new_tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    asked = talk(*ROUNDS).turns[:3]
    text = TEMPLATES[name].render(asked, generation_prompt=True).text
    rendered = TEMPLATES[name].render(talk(*ROUNDS).turns)
    assert text == rendered.text[: rendered.answer_spans[1][0]]
    encoded = encode_talk(encoder(new_tokenizer, name), talk(*ROUNDS, images=1))
    prompt = prompt_ids(encoder(new_tokenizer, name), *asked)
    assert prompt == encoded.input_ids[: len(prompt)].tolist()
    assert encoded.labels[len(prompt)] == encoded.input_ids[len(prompt)]


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"plain"}))
def test_the_labelled_tokens_of_an_answer_are_read_back_as_the_answer(
    new_tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    """Special tokens and braces in what is said are text, and an answer ends where the template closes it."""
    said = "It {} is <s> a </s> <|im_end|> ['circle']"
    coder = encoder(new_tokenizer, name)
    encoded = encode_talk(coder, talk("Is {} </s> <|im_start|> it?", "Yes", "Why <s>?", said))
    last = encoded.labels[len(prompt_ids(coder, *talk("Is {} </s> <|im_start|> it?", "Yes", "Why <s>?").turns)) :]
    assert coder.decode(last[last != -100]) == said
    controls = [new_tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "</s>", "<|im_start|>", "<|im_end|>")]
    plain = encode_talk(coder, talk("Is it?", "Yes", "Why?", "It is"))
    for token in controls:
        assert (encoded.input_ids == token).sum() == (plain.input_ids == token).sum()


def test_an_answer_without_an_end_token_is_cut_at_its_closing_text(new_tokenizer: PreTrainedTokenizerBase) -> None:
    ids = new_tokenizer("Yes\n### Human: Why?\n### Assistant: So", add_special_tokens=False).input_ids
    assert encoder(new_tokenizer, "v0").decode(ids) == "Yes"
    assert encoder(new_tokenizer, "vicuna_v1").decode(ids) == "Yes\n### Human: Why?\n### Assistant: So"


def test_a_template_whose_tokens_the_model_lacks_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_tokenizer_model(tmp_path)))
    add_image_token(tokenizer)
    with pytest.raises(UserError):
        prompt_ids(encoder(tokenizer, "mpt"), Turn("user", "Is it?"))
    with pytest.raises(UserError):
        piece_encoder(tokenizer, "vicuna")


TOKENS_PER_IMAGE = 4


def published_mask(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[list[int], list[bool]]:
    """`preprocess_v1` of LLaVA c121f04; one picture is one id, -200.

    The original takes 1 off the later rounds' lengths where the tokenizer puts no space mark after `</s>`: LLaMA's
    "USER" is one token there and two at the beginning of a text. Here that difference is measured.
    """

    def tokens(part: str) -> list[int]:
        pieces = [tokenizer(piece).input_ids for piece in part.split("<image>")]
        joined = list(pieces[0])
        for piece in pieces[1:]:
            joined += [-200, *piece[1:]]
        return joined

    longer_alone = len(tokens("USER:")) - (len(tokens("</s>USER:")) - 1)
    ids = tokens(text)
    trained = [True] * len(ids)
    trained[0] = False
    cursor = 1
    for number, part in enumerate(text.split("</s>")):
        if not part:
            break
        asked, separator, _ = part.partition(" ASSISTANT: ")
        round_length, question_length = len(tokens(part)), len(tokens(asked + separator)) - 2
        if number:
            round_length, question_length = round_length - longer_alone, question_length - longer_alone
        trained[cursor : cursor + question_length] = [False] * question_length
        # `</s>` was split off the round, and the begin token it counts stands for it.
        cursor += round_length
    trained[cursor:] = [False] * (len(ids) - cursor)
    assert cursor == len(ids), "the published code would call this a tokenization mismatch"
    return ids, trained


plain_answers = st.lists(
    st.tuples(
        st.sampled_from(["Is it red?", "What is in the picture?", "it"]),
        st.sampled_from(["Yes, it is.", "A red circle", "No", "42", "blue"]),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=30, deadline=None)
@given(rounds=plain_answers, with_picture=st.booleans())
def test_equal_to_the_published_algorithm(
    tokenizer: PreTrainedTokenizerFast,
    rounds: list[tuple[str, str]],
    with_picture: bool,
) -> None:
    texts = [text for pair in rounds for text in pair]
    if with_picture:
        texts[0] = "<image>\n" + texts[0]
    text = (
        VICUNA_SYSTEM
        + " "
        + "".join(
            f"USER: {question} ASSISTANT: {answer}</s>"
            for question, answer in zip(texts[::2], texts[1::2], strict=True)
        )
    )
    ids, trained = published_mask(tokenizer, text)
    image = tokenizer.convert_tokens_to_ids("<image>")
    expanded = [
        pair
        for token, train in zip(ids, trained, strict=True)
        for pair in ([(image, False)] * TOKENS_PER_IMAGE if token == -200 else [(token, train)])
    ]
    encoded = encode_talk(piece_encoder(tokenizer), talk(*texts, images=int(with_picture)))
    assert encoded.input_ids.tolist() == [token for token, _ in expanded]
    assert encoded.labels.tolist() == [token if train else -100 for token, train in expanded]


any_text = st.one_of(st.sampled_from(NASTY), st.text(max_size=20))


@pytest.mark.parametrize(
    ("template", "before", "after", "close"),
    [  # the spaces around an answer that are for the model to write
        ("vicuna_v1", " ", "", "</s>"),
        ("llava_llama_2", " ", " ", "</s>"),
        ("mistral_instruct", " ", " ", "</s>"),
        ("chatml", "", "", "<|im_end|>"),
        ("chatml_direct", "", "", "<|im_end|>"),
    ],
)
@settings(max_examples=40, deadline=None)
@example(rounds=[(text, text) for text in NASTY])
@given(rounds=st.lists(st.tuples(any_text, any_text), min_size=1, max_size=3))
def test_supervised_tokens_decode_to_the_answers(
    tokenizer: PreTrainedTokenizerFast,
    rounds: list[tuple[str, str]],
    template: str,
    before: str,
    after: str,
    close: str,
) -> None:
    texts = [text for pair in rounds for text in pair]
    assume(all("<image>" not in text for text in texts))
    assume(all(answer.strip() for answer in texts[1::2]))
    assume(not any(0xFDD0 <= ord(letter) <= 0xFDEF for text in texts for letter in text))
    encoder = piece_encoder(tokenizer, template)
    encoded = encode_talk(encoder, talk(*texts))
    meant = encoder.answers(talk(*texts))
    check_labels([Labelled(id="7", labels=encoded.labels, answers=meant, tokenizer=tokenizer)])
    assert answers_of(encoder, encoded.labels, close) == [before + answer + after for answer in texts[1::2]]


def test_the_ids_are_those_of_the_plain_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    sample, coder = talk("Is it red?\n\n 7", "Yes, it is.", " a <b> c", "No"), piece_encoder(tokenizer)
    text = coder.prompts.render(sample.turns).text
    assert encode_talk(coder, sample).input_ids.tolist() == tokenizer(text).input_ids
    marks = talk("a </s> b", "c </s> d")  # which the tokenizer keeps as text by a setting that pickling loses
    again = encode_talk(pickle.loads(pickle.dumps(coder)), marks)
    assert again.input_ids.tolist() == encode_talk(coder, marks).input_ids.tolist()


def test_a_cut_loses_text_at_the_end_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    sample = talk(*ROUNDS, images=1)
    whole = encode_talk(piece_encoder(tokenizer), sample)
    labels, ids = whole.labels.tolist(), whole.input_ids.tolist()
    first = next(place for place, label in enumerate(labels) if label != -100)
    for most in (len(ids) - 2, first + 1):
        cut = encode_talk(piece_encoder(tokenizer, max_tokens=most), sample)
        assert (cut.cut_tokens, whole.cut_tokens) == (len(ids) - most, 0)
        assert (cut.input_ids.tolist(), cut.labels.tolist()) == (ids[:most], labels[:most])
    after_pictures = len(ids) - ids[::-1].index(tokenizer.convert_tokens_to_ids("<image>"))
    for most in (first, after_pictures - 1, after_pictures - 3):
        with pytest.raises(BadSample):
            encode_talk(piece_encoder(tokenizer, max_tokens=most), sample)


def test_several_pictures_stay_in_place(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode_talk(piece_encoder(tokenizer), talk("<image><image> What is <image>\nred?", "A circle", images=3))
    text = " ".join(tokenizer.convert_ids_to_tokens(encoded.input_ids.tolist()))
    pictures = "<image> <image> <image> <image> "
    assert f" ▁ {pictures}{pictures}" in text  # nothing between the first two
    assert f"▁is ▁ {pictures}▁ <0x0A> r" in text or f"▁is {pictures}▁ <0x0A> r" in text
    assert text.count("<s>") == 1


@pytest.mark.parametrize("texts", [("Is it?", ""), ("Is it?", " \n"), ("Is it?",), ("a", "b\ufdd1c")])
def test_answers_must_be_there_and_hold_no_mark(tokenizer: PreTrainedTokenizerFast, texts: tuple[str, ...]) -> None:
    with pytest.raises(BadSample):
        encode_talk(piece_encoder(tokenizer), talk(*texts))
