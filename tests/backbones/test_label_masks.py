"""Label masks on text of any kind: the published algorithm's, and what they mark decodes to the answers."""

from __future__ import annotations

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dora_vl.backbones.templates import VICUNA_SYSTEM
from dora_vl.data.samples import Labelled, check_labels
from tests.backbones.encoded_talk import NASTY, MakeEncoder, answers_of, encode_talk, talk

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
    make_encoder: MakeEncoder,
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
    encoded = encode_talk(make_encoder(tokenizer), talk(*texts, images=int(with_picture)))
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
    make_encoder: MakeEncoder,
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
    encoder = make_encoder(tokenizer, template)
    encoded = encode_talk(encoder, talk(*texts))
    meant = encoder.answers(talk(*texts))
    check_labels([Labelled(id="7", labels=encoded.labels, answers=meant, tokenizer=tokenizer)])
    assert answers_of(encoder, encoded.labels, close) == [before + answer + after for answer in texts[1::2]]
