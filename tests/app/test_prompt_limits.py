"""What is too long by its characters alone: never a prompt that the model could take."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample
from dora_vl.serving.model import MOST_TURNS, longest_token, refuse_endless
from tests.backbones.tiny_image_text import tiny_tokenizer


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(["what colour is it"], trainers.WordLevelTrainer(special_tokens=["<unk>"]))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def test_no_text_of_a_byte_level_tokenizer_has_more_characters_than_its_tokens_can_hold() -> None:
    tokenizer = tiny_tokenizer({})
    longest = longest_token(tokenizer)
    assert longest == max(map(len, tokenizer.get_vocab()))
    entry = max(tokenizer.get_vocab(), key=len)
    for text in (entry * 50, "What colour is it? " * 50, " " * 500, "\u20ac\u4f60" * 99):
        turns = [Turn("user", text)]
        refuse_endless(turns, len(tokenizer.encode(text, add_special_tokens=False)), longest)
    with pytest.raises(BadSample, match="451 characters are more than a prompt of 50 tokens"):
        refuse_endless([Turn("user", "a" * 450), Turn("assistant", "b")], 50, 9)
    refuse_endless([Turn("user", "a" * 449), Turn("assistant", "b")], 50, 9)


@pytest.mark.parametrize("tokenizer", [word_tokenizer(), PreTrainedTokenizerBase()])
def test_where_a_token_may_have_any_length_none_is_too_long(tokenizer: PreTrainedTokenizerBase) -> None:
    assert longest_token(tokenizer) is None
    refuse_endless([Turn("user", "a" * 10**6)] * MOST_TURNS, 1, None)
    refuse_endless([Turn("user", "a" * 10**6)], None, 9)
