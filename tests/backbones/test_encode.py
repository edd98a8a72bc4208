"""Tokens and label masks: equal to a written-out expectation, special text kept as text, cuts at the end alone."""

from __future__ import annotations

import pickle

import pytest
from transformers import PreTrainedTokenizerFast

from dora_vl.backbones.encoder import Encoder
from dora_vl.data.example import Example
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample, UserError
from tests.backbones.encoded_talk import MakeEncoder, answers_of, encode_talk, prompt_ids, talk

SYSTEM = (
    "<s> ▁A ▁chat ▁between ▁a ▁curious ▁user ▁and ▁an ▁artificial ▁intelligence ▁assistant. ▁The ▁assistant ▁gives "
    "▁helpful, ▁detailed, ▁and ▁polite ▁answers ▁to ▁the ▁user's ▁questions. ▁USER: "
)
FIRST_ROUND = "▁ <image> <image> <image> <image> ▁ <0x0A> Is ▁it ▁red? ▁ASSISTANT: *▁Yes, *▁it *▁is. *</s> "
SECOND_ROUND = "▁What ▁is ▁in ▁the ▁picture? ▁ASSISTANT: *▁A *▁red *▁circle *</s>"


def written(encoder: Encoder, conversation: Example) -> str:
    """Tokens, the supervised ones marked with a star."""
    encoded = encode_talk(encoder, conversation)
    tokens = encoder.tokenizer.convert_ids_to_tokens(encoded.input_ids.tolist())
    return " ".join(
        token if label == -100 else f"*{token}" for token, label in zip(tokens, encoded.labels.tolist(), strict=True)
    )


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


@pytest.fixture
def between_rounds(tokenizer: PreTrainedTokenizerFast) -> str:
    """After `</s>` the older tokenizers put a space mark before the next round, the newer ones do not."""
    return "▁USER: " if tokenizer.backend_tokenizer.normalizer is not None else "USER : "


class TestSpecialTextInsideTurns:
    """What a person writes is text, whatever it looks like; only the template writes special tokens."""

    @pytest.mark.parametrize("text", ["</s>", "<s>", "<unk>", "<|im_end|>", "<|im_start|>", "<image"])
    def test_it_stays_text(self, tokenizer: PreTrainedTokenizerFast, make_encoder: MakeEncoder, text: str) -> None:
        encoder = make_encoder(tokenizer)
        plain = encode_talk(encoder, talk("Is it red?", "Yes")).input_ids.tolist()
        encoded = encode_talk(encoder, talk(f"Is it {text} red?", f"Yes {text} it"))
        special = set(tokenizer.all_special_ids)
        assert [token for token in encoded.input_ids.tolist() if token in special] == [
            token for token in plain if token in special
        ]
        assert answers_of(encoder, encoded.labels, "</s>") == [f" Yes {text} it"]

    def test_a_noncharacter_is_a_bad_sample(
        self, tokenizer: PreTrainedTokenizerFast, make_encoder: MakeEncoder
    ) -> None:
        with pytest.raises(BadSample):
            encode_talk(make_encoder(tokenizer), talk("a", "b\ufdd1c"))

    def test_the_ids_are_those_of_the_plain_tokenizer(
        self, tokenizer: PreTrainedTokenizerFast, make_encoder: MakeEncoder
    ) -> None:
        encoder = make_encoder(tokenizer)
        sample = talk("Is it red?\n\n 7", "Yes, it is.", " a <b> c", "No")
        text = encoder.prompts.render(sample.turns).text
        assert encode_talk(encoder, sample).input_ids.tolist() == tokenizer(text).input_ids


class TestTruncation:
    """Only text at the end is ever cut."""

    sample = talk("<image>\nIs it red?", "Yes, it is.", "What is in the picture?", "A red circle", images=1)

    def test_cuts_the_tail_and_counts_it(self, tokenizer: PreTrainedTokenizerFast, make_encoder: MakeEncoder) -> None:
        whole = encode_talk(make_encoder(tokenizer), self.sample)
        cut = encode_talk(make_encoder(tokenizer, max_tokens=len(whole.input_ids) - 2), self.sample)
        assert cut.cut_tokens == 2
        assert whole.cut_tokens == 0
        assert cut.input_ids.tolist() == whole.input_ids.tolist()[:-2]
        assert cut.labels.tolist() == whole.labels.tolist()[:-2]

    @pytest.mark.parametrize("short_by", [1, 3])
    def test_never_inside_a_picture(
        self, tokenizer: PreTrainedTokenizerFast, make_encoder: MakeEncoder, short_by: int
    ) -> None:
        ids = encode_talk(make_encoder(tokenizer), self.sample).input_ids.tolist()
        image = tokenizer.convert_tokens_to_ids("<image>")
        end = len(ids) - ids[::-1].index(image)
        with pytest.raises(BadSample):
            encode_talk(make_encoder(tokenizer, max_tokens=end - short_by), self.sample)

    def test_nothing_left_to_train_on(self, tokenizer: PreTrainedTokenizerFast, make_encoder: MakeEncoder) -> None:
        labels = encode_talk(make_encoder(tokenizer), self.sample).labels.tolist()
        first = next(place for place, label in enumerate(labels) if label != -100)
        one_label = encode_talk(make_encoder(tokenizer, max_tokens=first + 1), self.sample)
        assert one_label.cut_tokens == len(labels) - first - 1
        with pytest.raises(BadSample):
            encode_talk(make_encoder(tokenizer, max_tokens=first), self.sample)


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
        prompt = prompt_ids(encoder, question)
        encoded = encode_talk(encoder, talk(question.text, answer, images=1))
        assert encoded.input_ids.tolist()[: len(prompt)] == prompt
        assert all(label == -100 for label in encoded.labels.tolist()[: len(prompt)])
        assert encoder.decode(encoded.input_ids[len(prompt) :]) == answer


def test_the_encoder_travels_to_worker_processes(tokenizer: PreTrainedTokenizerFast, make_encoder: MakeEncoder) -> None:
    encoder = make_encoder(tokenizer)
    sample = talk("a </s> b", "c </s> d")
    again = encode_talk(pickle.loads(pickle.dumps(encoder)), sample)
    assert again.input_ids.tolist() == encode_talk(encoder, sample).input_ids.tolist()


@pytest.mark.parametrize("texts", [("Is it?", ""), ("Is it?", " \n"), ("Is it?",)])
def test_answers_must_be_there(
    tokenizer: PreTrainedTokenizerFast, make_encoder: MakeEncoder, texts: tuple[str, ...]
) -> None:
    with pytest.raises(BadSample):
        encode_talk(make_encoder(tokenizer), talk(*texts))


def test_a_template_of_another_model_is_refused(
    new_tokenizer: PreTrainedTokenizerFast, make_encoder: MakeEncoder
) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=new_tokenizer.backend_tokenizer)
    bare.add_tokens(["<image>"])
    for token in ("<|im_start|>", "<|im_end|>"):
        assert token in bare.get_vocab()
    with pytest.raises(UserError):
        make_encoder(new_tokenizer, "vicuna")
