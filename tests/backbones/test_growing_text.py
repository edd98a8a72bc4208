"""Text as its tokens come is that of decoding them all, whatever the tokens are."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dora_vl.backbones.generation import GrowingText, decoded, growing_text

TEXTS = ["Größe naïve 東京 😀 words, and more words.", "It's here; don't. The end!", "  two spaces\n\nand lines\t"]


def byte_level() -> PreTrainedTokenizerFast:
    """Pieces of characters are tokens of their own, as in GPT-2's and Qwen's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def with_spaces_before_words() -> PreTrainedTokenizerFast:
    """A token says that a space is before it, and the first has none, as Llama's and Vicuna's; bytes where it must."""
    pieces = ["<unk>", "▁", *"abcdefghij", "▁ab", "▁cd", "cd", "▁.", ".", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(
        models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], byte_fallback=True)
    )
    replaced = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(replaced)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_pieces() -> PreTrainedTokenizerFast:
    """Takes a space back before a full stop."""
    pieces = ["[UNK]", "the", "end", "##s", ".", ",", "do", "n", "'", "t", "n't", "!"]
    backend = Tokenizer(models.WordPiece(vocab={piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=True)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", clean_up_tokenization_spaces=True)


@pytest.mark.parametrize("make", [byte_level, with_spaces_before_words, word_pieces], ids=lambda make: make.__name__)
def test_every_beginning_is_as_decoded_whole(make: Any) -> None:
    tokenizer, draw = make(), random.Random(0)
    rows = [tokenizer(text).input_ids for text in TEXTS] if make is byte_level else []
    rows += [[draw.randrange(len(tokenizer)) for _ in range(60)] for _ in range(40)]
    several = 0
    for row in rows:
        growing = growing_text(tokenizer, str.strip)
        for end in range(1, len(row) + 1):
            assert growing(row[:end]) == decoded(tokenizer, row[:end]).strip(), (row[:end], end)
        several += len(decoded(tokenizer, row)) > 20
    assert several > 20


def test_a_token_costs_the_last_few_however_long_the_answer(tmp_path: Path) -> None:
    tokenizer, longest = byte_level(), 0
    row = tokenizer(TEXTS[0] * 40).input_ids

    def noted(ids: Any) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decoded(tokenizer, ids)

    growing = GrowingText(noted, str.strip)
    for end in range(1, len(row) + 1):
        growing(row[:end])
    assert len(row) > 300
    assert longest < 12
