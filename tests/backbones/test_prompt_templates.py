"""Each format of strings: its text, tokens and labels written out, equal to the published algorithm on any text.

Tokens and labels of the vicuna_v1, llama_2 and plain kinds are what LLaVA c121f04 gave on this tokenizer (transformers
4.37.2, slow). Of chatml_direct the tokens are; the labels are by hand, since the original's are wrong there.
"""

from __future__ import annotations

import json
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
from dora_vl.backbones.templates import TEMPLATES
from dora_vl.data.samples import Labelled, check_labels
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample, UserError
from tests.backbones.encoded_talk import NASTY, answers_of, conversation, encode_talk, piece_encoder, prompt_ids
from tests.backbones.tiny_sentencepiece import write_tokenizer_model

ROUNDS = ("<image>\nIs it red?", "Yes, it is.", "What is in the picture?", "A red circle")
WRITTEN = json.loads((Path(__file__).parent / "prompt_texts.json").read_text(encoding="utf-8"))
"""Of each format two rounds with a picture as text, what is between « and » labelled; its end as tokens of Vicuna's
kind (`legacy` false), the labelled ones with a star; and what a sample's own system turn becomes."""
NAMED = sorted(name for name, written in WRITTEN.items() if "text" in written)


def encoder(tokenizer: PreTrainedTokenizerBase, name: str) -> Encoder:
    return piece_encoder(tokenizer, name, each=1)


def starred(tokenizer: PreTrainedTokenizerBase, name: str, *texts: str) -> str:
    """The tokens of a conversation, those with a label starred."""
    encoded = encode_talk(encoder(tokenizer, name), conversation(*texts, images=texts[0].count("<image>")))
    tokens = tokenizer.convert_ids_to_tokens(encoded.input_ids.tolist())
    labels = encoded.labels.tolist()
    return " ".join(("" if label == -100 else "*") + token for token, label in zip(tokens, labels, strict=True))


def test_every_row_is_a_setting_and_is_written_out_here() -> None:
    assert {*TEMPLATES, "tokenizer"} == set(get_args(TemplateName))
    assert all(row.name == name for name, row in TEMPLATES.items())
    assert set(TEMPLATES) == set(WRITTEN)
    assert set(TEMPLATES) - set(NAMED) == {"plain", "chatml"}


@pytest.mark.parametrize("name", NAMED)
def test_text_and_what_is_labelled(name: str) -> None:
    rendered = TEMPLATES[name].render(conversation(*ROUNDS).turns)
    marked = rendered.text
    for start, end in reversed(rendered.answer_spans):
        marked = f"{marked[:start]}«{marked[start:end]}»{marked[end:]}"
    assert marked == WRITTEN[name]["text"]


@pytest.mark.parametrize("name", NAMED)
def test_tokens_and_labels(new_tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    written = starred(new_tokenizer, name, *ROUNDS)
    end = WRITTEN[name]["tokens"]
    assert written.endswith(end)
    assert "*" not in written[: -len(end)]
    assert written.startswith("<s> ")
    assert written.count("<s>") == (2 if name == "llama_2" else 1)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_samples_own_system_turn_stands_in_the_place_of_the_templates(name: str) -> None:
    turns = (Turn("system", "Say «so» </s>."), Turn("user", "Hi"), Turn("assistant", "Ho"))
    if (before := WRITTEN[name].get("after_system")) is None:
        with pytest.raises(ValueError, match=f"template {name} "):
            TEMPLATES[name].render(turns)
        return
    assert TEMPLATES[name].render(turns[:2], generation_prompt=True).text == before
    rendered = TEMPLATES[name].render(turns)
    assert rendered.text.startswith(before)
    assert rendered.answer_spans[0][0] == len(before)
    assert not [span for span in rendered.controls if rendered.text[slice(*span)] == "</s>" and span[0] < 20]


def test_captions(new_tokenizer: PreTrainedTokenizerBase) -> None:
    written = starred(new_tokenizer, "plain", "<image>\nDescribe it.", "A red circle")
    assert written == "<s> <image> *▁A *▁red *▁c *ir *cle *<0x0A>"


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"plain"}))
def test_a_prompt_is_what_stands_before_the_answer(new_tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    turns = conversation(*ROUNDS).turns[:3]
    text = TEMPLATES[name].render(turns, generation_prompt=True).text
    rendered = TEMPLATES[name].render(conversation(*ROUNDS).turns)
    assert text == rendered.text[: rendered.answer_spans[1][0]]
    encoded = encode_talk(encoder(new_tokenizer, name), conversation(*ROUNDS, images=1))
    prompt = prompt_ids(encoder(new_tokenizer, name), *turns)
    assert prompt == encoded.input_ids[: len(prompt)].tolist()
    assert encoded.labels[len(prompt)] == encoded.input_ids[len(prompt)]


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"plain"}))
def test_the_labelled_tokens_of_an_answer_are_read_back_as_the_answer(
    new_tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    """Special tokens and braces in what is said are text, and an answer ends where the template closes it."""
    answer = "It {} is <s> a </s> <|im_end|> ['circle']"
    coder = encoder(new_tokenizer, name)
    encoded = encode_talk(coder, conversation("Is {} </s> <|im_start|> it?", "Yes", "Why <s>?", answer))
    last = encoded.labels[
        len(prompt_ids(coder, *conversation("Is {} </s> <|im_start|> it?", "Yes", "Why <s>?").turns)) :
    ]
    assert coder.decode(last[last != -100]) == answer
    controls = [new_tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "</s>", "<|im_start|>", "<|im_end|>")]
    plain = encode_talk(coder, conversation("Is it?", "Yes", "Why?", "It is"))
    for token in controls:
        assert (encoded.input_ids == token).sum() == (plain.input_ids == token).sum()


def test_a_template_whose_tokens_the_model_lacks_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_tokenizer_model(tmp_path)))
    add_image_token(tokenizer)
    with pytest.raises(UserError):
        prompt_ids(encoder(tokenizer, "chatml"), Turn("user", "Is it?"))
    with pytest.raises(UserError):
        piece_encoder(tokenizer, "vicuna")


any_text = st.one_of(st.sampled_from(NASTY), st.text(max_size=20))


@pytest.mark.parametrize(
    ("template", "before", "after", "close"),
    [  # the spaces around an answer that are for the model to write
        ("vicuna_v1", " ", "", "</s>"),
        ("llama_2", " ", " ", "</s>"),
        ("mistral_instruct", " ", " ", "</s>"),
        ("chatml", "", "", "<|im_end|>"),
        ("chatml_direct", "", "", "<|im_end|>"),
    ],
)
@settings(max_examples=15, deadline=None)
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
    encoded = encode_talk(encoder, conversation(*texts))
    meant = encoder.answers(conversation(*texts))
    check_labels([Labelled(id="7", labels=encoded.labels, answers=meant, tokenizer=tokenizer)])
    assert answers_of(encoder, encoded.labels, close) == [before + answer + after for answer in texts[1::2]]


def test_the_ids_are_those_of_the_plain_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    sample, coder = conversation("Is it red?\n\n 7", "Yes, it is.", " a <b> c", "No"), piece_encoder(tokenizer)
    text = coder.prompts.render(sample.turns).text
    assert encode_talk(coder, sample).input_ids.tolist() == tokenizer(text).input_ids
    marks = conversation("a </s> b", "c </s> d")  # which the tokenizer keeps as text by a setting that pickling loses
    again = encode_talk(pickle.loads(pickle.dumps(coder)), marks)
    assert again.input_ids.tolist() == encode_talk(coder, marks).input_ids.tolist()


def test_a_cut_loses_text_at_the_end_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    sample = conversation(*ROUNDS, images=1)
    whole = encode_talk(piece_encoder(tokenizer), sample)
    labels, ids = whole.labels.tolist(), whole.input_ids.tolist()
    first = next(position for position, label in enumerate(labels) if label != -100)
    for most in (len(ids) - 2, first + 1):
        cut = encode_talk(piece_encoder(tokenizer, max_tokens=most), sample)
        assert (cut.cut_tokens, whole.cut_tokens) == (len(ids) - most, 0)
        assert (cut.input_ids.tolist(), cut.labels.tolist()) == (ids[:most], labels[:most])
    after_pictures = len(ids) - ids[::-1].index(tokenizer.convert_tokens_to_ids("<image>"))
    for most in (first, after_pictures - 1, after_pictures - 3):
        with pytest.raises(BadSample):
            encode_talk(piece_encoder(tokenizer, max_tokens=most), sample)


@pytest.mark.parametrize("texts", [("Is it?", ""), ("Is it?", " \n"), ("Is it?",), ("a", "b\ufdd1c")])
def test_answers_must_be_there_and_hold_no_mark(tokenizer: PreTrainedTokenizerFast, texts: tuple[str, ...]) -> None:
    with pytest.raises(BadSample):
        encode_talk(piece_encoder(tokenizer), conversation(*texts))
