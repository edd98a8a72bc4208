"""Tokenizers, and each format of strings: text, tokens and labels written out, as the published algorithm has them."""

import json
import pickle
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import sentencepiece
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dora_vl.backbones.encoder import Encoder
from dora_vl.backbones.families.formats import PROMPTS, TEMPLATES, RoundTemplate
from dora_vl.backbones.generation import decoded, growing_text
from dora_vl.backbones.loading import add_image_token, load_tokenizer
from dora_vl.backbones.pieces import PieceProcessor
from dora_vl.backbones.prompts import prompts_of
from dora_vl.backbones.specs import TemplateName
from dora_vl.data.example import Example
from dora_vl.data.samples import Labelled, check_labels
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample, UserError, log_once
from tests.backbones.conversations import NASTY, answers_of, conversation, encode_talk, piece_encoder, prompt_ids
from tests.backbones.tiny_language import byte_tokenizer, sentencepiece_model, write_tokenizer_model

ROUNDS = ("<image>\nIs it red?", "Yes, it is.", "What is in the picture?", "A red circle")
WRITTEN = json.loads((Path(__file__).parent / "prompt_texts.json").read_text(encoding="utf-8"))
"""Of each format two rounds with a picture as text, what is between « and » labelled; its end as tokens of Vicuna's
kind (`legacy` false), the labelled ones with a star; and what a sample's own system turn becomes."""
NAMED = sorted(name for name, written in WRITTEN.items() if "text" in written)


def plain_encoder(tokenizer: PreTrainedTokenizerBase, name: str) -> Encoder:
    return piece_encoder(tokenizer, name, each=1)


def starred(tokenizer: PreTrainedTokenizerBase, name: str, *texts: str) -> str:
    """The tokens of a conversation, those with a label starred."""
    encoded = encode_talk(plain_encoder(tokenizer, name), conversation(*texts, images=texts[0].count("<image>")))
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


def test_a_row_writes_its_text_around_each_picture() -> None:
    """LLaVA 1's checkpoints with mm_use_im_start_end; the same token in a person's words stays text."""
    around = "<im_start><image><im_end>\n"
    row = replace(TEMPLATES["vicuna_v1"], picture=around, special=("</s>", "<im_start>", "<im_end>"))
    said, answer = "<image>\nWhich <im_end>? <image>", "An <image>\n."
    chat = row.render([Turn("user", said), Turn("assistant", answer)])
    question = f"USER: {around}Which <im_end>? {around} ASSISTANT:"
    assert chat.text == f"{TEMPLATES['vicuna_v1'].system}{question} {answer}</s>"
    assert [chat.text[slice(*span)] for span in chat.answer_spans] == [f" {answer}</s>"]
    assert [chat.text[slice(*span)] for span in chat.controls] == ["<im_start>", "<im_end>"] * 2 + ["</s>"]
    assert chat.text.index("Which") > chat.controls[1][0]
    assert chat.controls[2][0] > chat.text.index("<im_end>?")


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


HELLO = Turn("assistant", "Hello!")
GREETED = {
    "vicuna_v1": "ASSISTANT: Hello!</s>USER: <image>\nHi ASSISTANT:« Ho</s>»",
    "llava_v1": "ASSISTANT: Hello!</s>USER: <image>\nHi ASSISTANT:« Ho</s>»",
    "chatml_direct": "<|im_start|>assistant\nHello!<|im_end|><|im_start|>user\n<image>\nHi<|im_end|>"
    "<|im_start|>assistant\n«Ho<|im_end|>»",
    "chatml": "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\n<image>\nHi<|im_end|>\n"
    "<|im_start|>assistant\n«Ho<|im_end|>»",
}
"""What stands behind the template's own system text; other formats show who speaks by the question alone."""


@pytest.mark.parametrize("name", [*TEMPLATES, "question_answer", "nvlabs"])
def test_a_greeting_is_context_or_left_out_and_named(caplog: Any, new_tokenizer: Any, name: str) -> None:
    log_once.cache_clear()
    coder = encoder() if name == "nvlabs" else piece_encoder(new_tokenizer, name)
    images = 0 if name == "nvlabs" else 1
    rounds = conversation("<image>\nHi" if images else "Hi", "Ho", images=images)
    greeted = replace(rounds, turns=(replace(HELLO, is_trained=False), *rounds.turns))
    chat, plain = (coder.prompts.render(example.turns) for example in (greeted, rounds))
    assert chat.answers == (1,)
    (start, end), prompt = chat.answer_spans[0], coder.prompts.render(greeted.turns[:-1], generation_prompt=True)
    if name in GREETED:
        text = f"{chat.text[:start]}«{chat.text[start:end]}»{chat.text[end:]}"
        assert isinstance(template := TEMPLATES[name], RoundTemplate)
        assert text == template.system + GREETED[name]
        assert prompt.text == chat.text[:start]
    else:
        assert (chat.text, chat.answer_spans) == (plain.text, plain.answer_spans)
        assert prompt.text == coder.prompts.render(rounds.turns[:-1], generation_prompt=True).text
    assert (name in caplog.text) == (name not in GREETED)
    ids, expected = encode_talk(coder, greeted), encode_talk(coder, rounds)
    assert ids.labels[ids.labels != -100].tolist() == expected.labels[expected.labels != -100].tolist()
    assert ids.media == expected.media == greeted.images
    check_labels([Labelled(id="7", labels=ids.labels, answers=coder.answers(greeted)[1:], tokenizer=coder.tokenizer)])


def test_captions(new_tokenizer: PreTrainedTokenizerBase) -> None:
    written = starred(new_tokenizer, "plain", "<image>\nDescribe it.", "A red circle")
    assert written == "<s> <image> *▁A *▁red *▁c *ir *cle *<0x0A>"


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"plain"}))
def test_a_prompt_is_what_stands_before_the_answer(new_tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    turns = conversation(*ROUNDS).turns[:3]
    text = TEMPLATES[name].render(turns, generation_prompt=True).text
    rendered = TEMPLATES[name].render(conversation(*ROUNDS).turns)
    assert text == rendered.text[: rendered.answer_spans[1][0]]
    encoded = encode_talk(plain_encoder(new_tokenizer, name), conversation(*ROUNDS, images=1))
    prompt = prompt_ids(plain_encoder(new_tokenizer, name), *turns)
    assert prompt == encoded.input_ids[: len(prompt)].tolist()
    assert encoded.labels[len(prompt)] == encoded.input_ids[len(prompt)]


def test_a_template_whose_tokens_the_model_lacks_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_tokenizer_model(tmp_path)))
    add_image_token(tokenizer)
    with pytest.raises(UserError):
        prompt_ids(plain_encoder(tokenizer, "chatml"), Turn("user", "Is it?"))
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
def test_supervised_tokens_decode_to_the_answers(tokenizer, rounds, template, before, after, close) -> None:
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


QUESTION = "Please answer: is {input} </s> a question?\n\nAnswer format: true/false"


def said(instruction: str, output: str, *, added: str = "") -> Example:
    question = Turn("user", f"{instruction}\n{added}" if added else instruction, len(added))
    return Example("0", (), (question, Turn("assistant", output)))


TASK = said(QUESTION, "the correct answer is true")


SPACES = " " * 16
PLAIN = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
PAIRED = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request."
)
ADDED = "hello {instruction}"


def laid_out(first: str, blank: str, added: str = "") -> str:
    """NVlabs/DoRA's and LLM-Adapters' `generate_prompt`."""
    middle = f"{SPACES}### Input:\n{SPACES}{added}\n{blank}\n" if added else ""
    return f"{first}\n\n{SPACES}### Instruction:\n{SPACES}{QUESTION}\n{blank}\n{middle}{SPACES}### Response:\n{SPACES}"


@pytest.mark.parametrize(
    ("prompt", "added", "test", "expected"),
    [
        ("nvlabs", "", False, laid_out(f"{PLAIN}  ", SPACES)),
        ("nvlabs", ADDED, False, laid_out(f"{PAIRED} ", SPACES, ADDED)),
        ("nvlabs", "", True, laid_out(f"{PLAIN} ", "")),
        ("nvlabs", ADDED, True, laid_out(PAIRED, "", ADDED)),
        ("llm_adapters", "", False, laid_out(f"{PLAIN}  # noqa: E501", SPACES)),
        ("llm_adapters", "", True, laid_out(f"{PLAIN} ", "")),
        ("alpaca", "", False, f"{PLAIN}\n\n### Instruction:\n{QUESTION}\n\n### Response:\n"),
        ("alpaca", "", True, f"{PLAIN}\n\n### Instruction:\n{QUESTION}\n\n### Response:\n"),
    ],
)
def test_the_prompts_as_published(prompt: str, added: str, test: bool, expected: str) -> None:
    assert PROMPTS[prompt].before_output(QUESTION, added, test=test) == expected


def encoder(prompt: str = "nvlabs", train_on: Any = "answer", max_tokens: int = 400) -> Encoder:
    processor = PieceProcessor(byte_tokenizer())
    prompts = prompts_of(processor, "test", prompt, pictures=False, train_on=train_on)
    return Encoder(processor, prompts, max_tokens=max_tokens)


@pytest.mark.parametrize("left", ["", "b"])
def test_a_tokenizer_that_drops_or_rewrites_letters_is_refused_or_read(left: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("a", left)
    if left:
        assert PieceProcessor(tokenizer).begin_text == tokenizer.bos_token
        return
    with pytest.raises(UserError):
        PieceProcessor(tokenizer)


def test_ids_are_the_tokenizers_own_and_the_answer_alone_is_labelled() -> None:
    tokenizer = byte_tokenizer()
    plain = said("Is it so?", "the correct answer is true")
    prompt = PROMPTS["nvlabs"].before_output("Is it so?", "", test=False)
    whole = tokenizer(prompt + "the correct answer is true", return_offsets_mapping=True)
    encoded = encoder().encode(plain)
    assert encoded.input_ids.tolist() == [*whole.input_ids, tokenizer.eos_token_id]
    assert encoded.input_ids[0] == tokenizer.bos_token_id
    labelled = encoded.labels != -100
    # A token that begins in the prompt's last space and ends in the output is the output's, as in the reference.
    assert labelled.tolist() == [*(end > len(prompt) for _, end in whole.offset_mapping), True]
    assert str(tokenizer.decode(encoded.labels[labelled])).strip() == "the correct answer is true</s>"
    assert torch.equal(encoded.labels[labelled], encoded.input_ids[labelled])
    everything = encoder(train_on="all").encode(plain)
    assert torch.equal(everything.labels, everything.input_ids)


def test_an_end_token_in_a_question_stays_text() -> None:
    ids = encoder().encode(TASK).input_ids.tolist()
    assert ids.count(byte_tokenizer().eos_token_id) == 1
    assert ids[-1] == byte_tokenizer().eos_token_id


@pytest.mark.parametrize("prompt", ["nvlabs", "alpaca"])
def test_a_choice_is_tokenised_with_its_prompt(prompt: str) -> None:
    coder = encoder(prompt=prompt)
    turns = [Turn("user", "Is it so?")]
    encoded = coder.encode_choice(turns, "the correct answer is true")
    ids, start = encoded.input_ids, int((encoded.labels != -100).int().argmax())
    text = PROMPTS[prompt].before_output("Is it so?", "", test=True)
    tokenizer = byte_tokenizer()
    assert ids.tolist() == [*tokenizer(text + "the correct answer is true").input_ids, tokenizer.eos_token_id]
    assert coder.decode(ids[start:]).strip() == "the correct answer is true"
    assert coder.encode_prompt(turns).input_ids.tolist() == byte_tokenizer()(text).input_ids


@pytest.mark.parametrize("added", ["", "hello {instruction}", " \n two lines "])
def test_an_input_has_its_own_place_in_training_and_test(added: str) -> None:
    conversation = said("Say it.", "hello", added=added)
    tokenizer = byte_tokenizer()
    train, test = (PROMPTS["nvlabs"].before_output("Say it.", added, test=test) for test in (False, True))
    ids = encoder(max_tokens=900).encode(conversation).input_ids
    assert ids.tolist() == [*tokenizer(f"{train}hello").input_ids, tokenizer.eos_token_id]
    assert encoder().encode_prompt(conversation.turns[:1]).input_ids.tolist() == tokenizer(test).input_ids


@pytest.mark.parametrize(
    "conversation",
    [
        Example("0", (), (Turn("system", "s"), *TASK.turns)),
        Example("0", (), (*TASK.turns, *TASK.turns)),
        said("  ", "hello"),
        said("", "hello", added="to this"),
    ],
)
def test_what_is_no_single_instruction_is_named(conversation: Example) -> None:
    with pytest.raises(BadSample) as error:
        encoder(train_on="all").encode(conversation)
    assert error.value.sample_id == conversation.id


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
