"""Tokens and label masks: equal to a written-out expectation and to the published algorithm, on text of any kind."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dora_vl.backbones.encode import LlavaEncoder
from dora_vl.backbones.templates import VICUNA_SYSTEM
from dora_vl.data.turns import Conversation, Turn
from dora_vl.errors import BadSample, UserError

MakeEncoder = Callable[..., LlavaEncoder]
TOKENS_PER_IMAGE = 4
SYSTEM = (
    "<s> ▁A ▁chat ▁between ▁a ▁curious ▁user ▁and ▁an ▁artificial ▁intelligence ▁assistant. ▁The ▁assistant ▁gives "
    "▁helpful, ▁detailed, ▁and ▁polite ▁answers ▁to ▁the ▁user's ▁questions. ▁USER: "
)
FIRST_ROUND = "▁ <image> <image> <image> <image> ▁ <0x0A> Is ▁it ▁red? ▁ASSISTANT: *▁Yes, *▁it *▁is. *</s> "
SECOND_ROUND = "▁What ▁is ▁in ▁the ▁picture? ▁ASSISTANT: *▁A *▁red *▁circle *</s>"
NASTY = [
    " ASSISTANT: yes",
    "a</s>b",
    "USER: no",
    "\nnew line",
    "红色的圆",
    "  two spaces",
    "é ñ 🙂",
    "<s>",
    "<unk>",
    "42",
]


def talk(*texts: str, images: int = 0) -> Conversation:
    roles = ("user", "assistant")
    turns = tuple(Turn(roles[number % 2], text) for number, text in enumerate(texts))
    return Conversation("sample-7", tuple(f"{n}.png" for n in range(images)), turns)


def written(encoder: LlavaEncoder, conversation: Conversation) -> str:
    """Tokens, the supervised ones marked with a star."""
    encoded = encoder.encode(conversation)
    tokens = encoder.tokenizer.convert_ids_to_tokens(encoded.input_ids.tolist())
    return " ".join(
        token if label == -100 else f"*{token}" for token, label in zip(tokens, encoded.labels.tolist(), strict=True)
    )


def answers_of(encoder: LlavaEncoder, labels: torch.Tensor, close: str) -> list[str]:
    """The supervised stretches as text, each without its closing token."""
    closing = encoder.tokenizer.convert_tokens_to_ids(close)
    # The decoder takes a space off the beginning of a text, so each stretch is read behind a letter.
    anchor = encoder.tokenizer.convert_tokens_to_ids("a")
    groups: list[list[int]] = [[]]
    for label in labels[labels != -100].tolist():
        if label == closing:
            groups.append([])
        else:
            groups[-1].append(label)
    assert groups.pop() == [], "the last answer is not closed"
    return [encoder.tokenizer.decode([anchor, *group], skip_special_tokens=False)[1:] for group in groups]


class TestWrittenOut:
    """`vicuna_v1` by hand, for both kinds of LLaMA tokenizer."""

    def test_two_rounds_with_a_picture(
        self, tokenizer: PreTrainedTokenizerFast, make_encoder: MakeEncoder, between_rounds: str
    ) -> None:
        sample = talk("<image>\nIs it red?", "Yes, it is.", "What is in the picture?", "A red circle", images=1)
        expected = SYSTEM + FIRST_ROUND + between_rounds + SECOND_ROUND
        assert written(make_encoder(tokenizer), sample) == expected

    def test_one_round_without_a_picture(self, tokenizer: PreTrainedTokenizerFast, make_encoder: MakeEncoder) -> None:
        sample = talk("What is in the picture?", "A red circle")
        assert written(make_encoder(tokenizer), sample) == SYSTEM + SECOND_ROUND

    def test_plain_trains_caption_and_newline(
        self, tokenizer: PreTrainedTokenizerFast, make_encoder: MakeEncoder
    ) -> None:
        sample = talk("<image>\nDescribe it briefly.", "A red circle", images=1)
        expected = "<s> <image> <image> <image> <image> *▁A *▁red *▁circle *<0x0A>"
        assert written(make_encoder(tokenizer, "plain"), sample) == expected

    def test_chatml(self, new_tokenizer: PreTrainedTokenizerFast, make_encoder: MakeEncoder) -> None:
        sample = talk("Is it red?", "Yes", "What", "A circle")
        user, assistant = "u s e r <0x0A>", "as sis t ant <0x0A>"
        text = written(make_encoder(new_tokenizer, "chatml"), sample)
        assert text.startswith("<s> <|im_start|>")
        assert text.endswith("*<|im_end|>")
        assert text.count("*<|im_end|>") == 2
        assert text.count(" <|im_end|>") == 2, (user, assistant)


@pytest.fixture
def between_rounds(tokenizer: PreTrainedTokenizerFast) -> str:
    """After `</s>` the older tokenizers put a space mark before the next round, the newer ones do not."""
    return "▁USER: " if tokenizer.backend_tokenizer.normalizer is not None else "USER : "


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
    encoded = make_encoder(tokenizer).encode(talk(*texts, images=int(with_picture)))
    assert encoded.input_ids.tolist() == [token for token, _ in expanded]
    assert encoded.labels.tolist() == [token if train else -100 for token, train in expanded]


any_text = st.one_of(st.sampled_from(NASTY), st.text(max_size=20))


@pytest.mark.parametrize(("template", "close"), [("vicuna_v1", "</s>"), ("chatml", "<|im_end|>")])
@settings(max_examples=40, deadline=None)
@example(rounds=[(text, text) for text in NASTY])
@given(rounds=st.lists(st.tuples(any_text, any_text), min_size=1, max_size=3))
def test_supervised_tokens_decode_to_the_answers(
    tokenizer: PreTrainedTokenizerFast,
    make_encoder: MakeEncoder,
    rounds: list[tuple[str, str]],
    template: str,
    close: str,
) -> None:
    texts = [text for pair in rounds for text in pair]
    assume(all("<image>" not in text for text in texts))
    assume(all(answer.strip() for answer in texts[1::2]))
    assume(not any(0xFDD0 <= ord(letter) <= 0xFDEF for text in texts for letter in text))
    encoder = make_encoder(tokenizer, template)
    encoded = encoder.encode(talk(*texts))
    lead = " " if template == "vicuna_v1" else ""  # the space after "ASSISTANT:" is for the model to write
    assert answers_of(encoder, encoded.labels, close) == [lead + answer for answer in texts[1::2]]


class TestSpecialTextInsideTurns:
    """What a person writes is text, whatever it looks like; only the template writes special tokens."""

    @pytest.mark.parametrize("text", ["</s>", "<s>", "<unk>", "<|im_end|>", "<|im_start|>", "<image"])
    def test_it_stays_text(self, tokenizer: PreTrainedTokenizerFast, make_encoder: MakeEncoder, text: str) -> None:
        encoder = make_encoder(tokenizer)
        plain = encoder.encode(talk("Is it red?", "Yes")).input_ids.tolist()
        encoded = encoder.encode(talk(f"Is it {text} red?", f"Yes {text} it"))
        special = set(tokenizer.all_special_ids)
        assert [token for token in encoded.input_ids.tolist() if token in special] == [
            token for token in plain if token in special
        ]
        assert answers_of(encoder, encoded.labels, "</s>") == [f" Yes {text} it"]

    def test_a_noncharacter_is_a_bad_sample(
        self, tokenizer: PreTrainedTokenizerFast, make_encoder: MakeEncoder
    ) -> None:
        with pytest.raises(BadSample, match=r"sample-7.*noncharacter"):
            make_encoder(tokenizer).encode(talk("a", "b\ufdd1c"))

    def test_the_ids_are_those_of_the_plain_tokenizer(
        self, tokenizer: PreTrainedTokenizerFast, make_encoder: MakeEncoder
    ) -> None:
        encoder = make_encoder(tokenizer)
        sample = talk("Is it red?\n\n 7", "Yes, it is.", " a <b> c", "No")
        text = encoder.template.render(sample.turns).text
        assert encoder.encode(sample).input_ids.tolist() == tokenizer(text).input_ids


class TestChatTemplate:
    """The language model's own template, from its tokenizer."""

    @pytest.fixture
    def own(self, new_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
        own = pickle.loads(pickle.dumps(new_tokenizer))
        own.chat_template = (
            "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        return own

    def test_equals_chatml_but_for_the_last_newline(
        self, own: PreTrainedTokenizerFast, make_encoder: MakeEncoder
    ) -> None:
        sample = talk("<image>\nIs it </s> red?", "Yes <|im_end|> no", "Why?", "It is", images=1)
        ours, theirs = (make_encoder(own, name).encode(sample) for name in ("chatml", "tokenizer"))
        assert theirs.input_ids.tolist()[:-1] == ours.input_ids.tolist()
        assert theirs.labels.tolist() == [*ours.labels.tolist(), -100]
        assert own.convert_ids_to_tokens(theirs.input_ids.tolist()).count("<s>") == 1

    def test_prompt_is_what_precedes_the_answer(self, own: PreTrainedTokenizerFast, make_encoder: MakeEncoder) -> None:
        encoder = make_encoder(own, "tokenizer")
        prompt = encoder.encode_prompt((Turn("user", "Why?"),)).tolist()
        encoded = encoder.encode(talk("Why?", "It is"))
        assert encoded.input_ids.tolist()[: len(prompt)] == prompt
        assert encoded.labels.tolist()[: len(prompt) + 1] == [*[-100] * len(prompt), encoded.input_ids[len(prompt)]]

    def test_refuses_a_template_that_never_closes_an_answer(
        self, own: PreTrainedTokenizerFast, make_encoder: MakeEncoder
    ) -> None:
        own.chat_template = (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        )
        with pytest.raises(UserError, match="closes an answer with no special token"):
            make_encoder(own, "tokenizer").encode(talk("Why?", "It is"))

    def test_refuses_a_template_that_rewrites_earlier_turns(
        self, own: PreTrainedTokenizerFast, make_encoder: MakeEncoder
    ) -> None:
        own.chat_template = (
            "{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        )
        with pytest.raises(BadSample, match="writes earlier turns differently"):
            make_encoder(own, "tokenizer").encode(talk("Why?", "It is", "How?", "So"))

    def test_needs_one(self, new_tokenizer: PreTrainedTokenizerFast, make_encoder: MakeEncoder) -> None:
        with pytest.raises(UserError, match=r"no chat template; set model\.template"):
            make_encoder(new_tokenizer, "tokenizer")


class TestTruncation:
    """Only text at the end is ever cut."""

    sample = talk("<image>\nIs it red?", "Yes, it is.", "What is in the picture?", "A red circle", images=1)

    def test_cuts_the_tail_and_counts_it(self, tokenizer: PreTrainedTokenizerFast, make_encoder: MakeEncoder) -> None:
        whole = make_encoder(tokenizer).encode(self.sample)
        cut = make_encoder(tokenizer, max_tokens=len(whole.input_ids) - 2).encode(self.sample)
        assert cut.cut_tokens == 2
        assert whole.cut_tokens == 0
        assert cut.input_ids.tolist() == whole.input_ids.tolist()[:-2]
        assert cut.labels.tolist() == whole.labels.tolist()[:-2]

    @pytest.mark.parametrize("short_by", [1, 3])
    def test_never_inside_a_picture(
        self, tokenizer: PreTrainedTokenizerFast, make_encoder: MakeEncoder, short_by: int
    ) -> None:
        ids = make_encoder(tokenizer).encode(self.sample).input_ids.tolist()
        image = tokenizer.convert_tokens_to_ids("<image>")
        end = len(ids) - ids[::-1].index(image)
        with pytest.raises(BadSample, match=rf"its 1 pictures .* take {end} tokens of {end - short_by}"):
            make_encoder(tokenizer, max_tokens=end - short_by).encode(self.sample)

    def test_nothing_left_to_train_on(self, tokenizer: PreTrainedTokenizerFast, make_encoder: MakeEncoder) -> None:
        labels = make_encoder(tokenizer).encode(self.sample).labels.tolist()
        first = next(place for place, label in enumerate(labels) if label != -100)
        assert make_encoder(tokenizer, max_tokens=first + 1).encode(self.sample).cut_tokens == len(labels) - first - 1
        with pytest.raises(BadSample, match=f"no answer is left .* {len(labels) - first} of {len(labels)} tokens"):
            make_encoder(tokenizer, max_tokens=first).encode(self.sample)


def test_several_pictures_stay_in_place(tokenizer: PreTrainedTokenizerFast, make_encoder: MakeEncoder) -> None:
    text = written(make_encoder(tokenizer), talk("<image><image> What is <image>\nred?", "A circle", images=3))
    pictures = "<image> <image> <image> <image> "
    assert f" ▁ {pictures}{pictures}" in text  # nothing between the first two
    assert f"▁is ▁ {pictures}▁ <0x0A> r" in text or f"▁is {pictures}▁ <0x0A> r" in text
    assert text.count("<s>") == 1


def test_prompt_then_answer_is_the_training_text(tokenizer: PreTrainedTokenizerFast, make_encoder: MakeEncoder) -> None:
    encoder = make_encoder(tokenizer)
    question = Turn("user", "<image>\nIs it red?")
    for answer in ("Yes", "42", "红"):
        prompt = encoder.encode_prompt((question,)).tolist()
        encoded = encoder.encode(talk(question.text, answer, images=1))
        assert encoded.input_ids.tolist()[: len(prompt)] == prompt
        assert all(label == -100 for label in encoded.labels.tolist()[: len(prompt)])
        assert encoder.decode(encoded.input_ids[len(prompt) :]) == answer


def test_the_encoder_travels_to_worker_processes(tokenizer: PreTrainedTokenizerFast, make_encoder: MakeEncoder) -> None:
    encoder = make_encoder(tokenizer)
    sample = talk("a </s> b", "c </s> d")
    again = pickle.loads(pickle.dumps(encoder)).encode(sample)
    assert again.input_ids.tolist() == encoder.encode(sample).input_ids.tolist()


@pytest.mark.parametrize("texts", [("Is it?", ""), ("Is it?", " \n"), ("Is it?",)])
def test_answers_must_be_there(
    tokenizer: PreTrainedTokenizerFast, make_encoder: MakeEncoder, texts: tuple[str, ...]
) -> None:
    with pytest.raises(BadSample, match=r"sample-7: .*answer"):
        make_encoder(tokenizer).encode(talk(*texts))


def test_a_template_of_another_model_is_refused(
    new_tokenizer: PreTrainedTokenizerFast, make_encoder: MakeEncoder
) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=new_tokenizer.backend_tokenizer)
    bare.add_tokens(["<image>"])
    for token in ("<|im_start|>", "<|im_end|>"):
        assert token in bare.get_vocab()
    with pytest.raises(UserError, match="there are vicuna_v1, plain, chatml and tokenizer"):
        make_encoder(new_tokenizer, "vicuna")
