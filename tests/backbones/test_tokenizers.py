"""Tokenizers: a base with tokenizer.model alone has SentencePiece's own ids, and text as its tokens come is whole."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dora_vl.backbones.generation import decoded, growing_text
from dora_vl.backbones.loading import add_image_token, load_tokenizer
from dora_vl.errors import UserError
from tests.backbones.encoded_talk import conversation, encode_talk, piece_encoder
from tests.backbones.tiny_sentencepiece import sentencepiece_model, write_tokenizer_model

AROUND = [
    ("", "\n"),
    ("", " "),
    ("", ""),
    ("", " \n"),
    ("Is it\n", "\n\n"),
    ("a  ", " <image> "),
    ("a", "<image>\n<image> "),
]
"""What stands before and after a picture, in front of `red?`."""
# `LlamaTokenizer` of transformers 4.37.2 (the slow one, with which LLaVA-1.5 was trained) on this tokenizer.model.
SLOW = {
    False: {
        " Is it": "<s> ▁▁ Is ▁it",
        "\nIs it": "<s> ▁ <0x0A> Is ▁it",
        " \n Is": "<s> ▁▁ <0x0A> ▁Is",
        "a</s>USER: it": "<s> ▁a </s> USER : ▁it",
        "a</s> it": "<s> ▁a </s> ▁it",
        " <s> it": "<s> ▁▁ <s> ▁it",
    },
    True: {
        " Is it": "<s> ▁▁ Is ▁it",
        "\nIs it": "<s> ▁ <0x0A> Is ▁it",
        " \n Is": "<s> ▁▁ <0x0A> ▁Is",
        "a</s>USER: it": "<s> ▁a </s> ▁ USER : ▁it",
        "a</s> it": "<s> ▁a </s> ▁ ▁it",
        " <s> it": "<s> ▁▁ <s> ▁ ▁it",
    },
}


def slow_ids(model: sentencepiece.SentencePieceProcessor, text: str, *, legacy: bool) -> list[int]:
    """A text's ids by SentencePiece: each stretch between special tokens alone, or (not legacy) as a text goes on."""
    behind = len(model.encode("<unk>"))  # a stretch behind other text gets no space mark
    ids: list[int] = []
    for stretch in re.split("(</?s>)", text):
        if stretch in {"<s>", "</s>"}:
            ids.append(model.piece_to_id(stretch))
        elif stretch and (legacy or not ids):
            ids += model.encode(stretch)
        elif stretch:
            ids += model.encode(f"<unk>{stretch}")[behind:]
    return ids


@pytest.fixture(scope="module")
def model() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())


@pytest.fixture(params=[False, True, None], ids=["first", "legacy", "unsaid"])
def legacy(request: pytest.FixtureRequest) -> bool | None:
    """What `tokenizer_config.json` says; unsaid is legacy."""
    return request.param


@pytest.fixture
def loaded(tmp_path: Path, legacy: bool | None) -> PreTrainedTokenizerFast:
    tokenizer = load_tokenizer(str(write_tokenizer_model(tmp_path / "tokenizer", legacy=legacy)))
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


class TestIds:
    def test_those_of_the_slow_tokenizer(self, loaded: PreTrainedTokenizerFast, legacy: bool | None) -> None:
        for text, expected in SLOW[legacy is not False].items():
            assert " ".join(loaded.convert_ids_to_tokens(loaded(text).input_ids)) == expected

    @pytest.mark.parametrize(("before", "after"), AROUND)
    def test_around_a_picture(self, loaded, model, legacy, before, after) -> None:
        image = add_image_token(loaded)
        encoder = piece_encoder(loaded, each=1)
        texts = (f"{before}<image>{after}red?", " Yes", "Is it?", "No")
        expected = [1]
        for number, piece in enumerate(encoder.prompts.render(conversation(*texts).turns).text.split("<image>")):
            expected += [image] * bool(number) + slow_ids(model, piece, legacy=legacy is not False)
        assert (
            encode_talk(encoder, conversation(*texts, images=texts[0].count("<image>"))).input_ids.tolist() == expected
        )

    def test_saved_and_opened_again(self, loaded: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        loaded.save_pretrained(tmp_path / "again")
        again = load_tokenizer(str(tmp_path / "again"))
        for text in (*SLOW[False], "<unk> it", "é 红"):
            assert again(text).input_ids == loaded(text).input_ids
            assert again.decode(again(text).input_ids, skip_special_tokens=False) == loaded.decode(
                loaded(text).input_ids
            )
        assert (again.padding_side, again.model_max_length) == ("right", 4096)


@pytest.mark.parametrize("with_settings", [True, False])
def test_a_folder_without_a_vocabulary_is_refused(tmp_path: Path, with_settings: bool) -> None:
    """transformers makes one of three tokens up where there are only settings."""
    folder = write_tokenizer_model(tmp_path)
    (folder / "tokenizer.model").unlink()
    if not with_settings:
        (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError):
        load_tokenizer(str(folder))


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
