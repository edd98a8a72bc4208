"""Chat templates of many forms, and formats where there is none: which answers they let train, and what is refused."""

import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dora_vl.backbones.encoder import Encoder
from dora_vl.data.samples import IGNORED_LABEL, Sample
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample, UserError, log_once
from tests.backbones.conversations import (
    ASKED,
    RED,
    TALKS,
    TWO_QUESTIONS,
    Conversation,
    conversation,
    encode_talk,
    encoder_of,
    messages_of,
    piece_encoder,
    sample_of,
)
from tests.backbones.tiny_image_text import CHATML, write_tiny

Folders = Mapping[str, Path]
CHAT = {
    path.stem: path.read_text(encoding="utf-8").removesuffix("\n")
    for path in (Path(__file__).parent / "chat_templates").iterdir()
}
"""Chat templates in the forms that published models use, over the tiny tokenizer's special tokens."""
SYSTEM = Turn("system", "Be brief. Look at its edges.")


def with_system(conversation: Conversation, system: Turn = SYSTEM) -> Conversation:
    turns, pictures = conversation
    return (system, *turns), pictures


def trained(encoder: Encoder, sample: Sample) -> str:
    """What of a sample has labels, as text, in the order of its rows' last answers."""
    rows = sorted(sample.texts(), key=lambda row: row.answers[-1])
    return "".join(encoder.tokenizer.decode(row.labels[row.labels != IGNORED_LABEL]) for row in rows)


class TestLanguageModels:
    """The language model's own template, of a processor of pieces: what people say is text, whatever it looks like."""

    SAMPLE = conversation("<image>\nIs it </s> red?", "Yes <|im_end|> no", "Why?", "It is", images=1)

    @pytest.fixture
    def own(self, new_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
        own = pickle.loads(pickle.dumps(new_tokenizer))
        own.chat_template = (
            "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        return own

    def test_a_template_of_parts_says_the_same(self, own: PreTrainedTokenizerFast) -> None:
        """Templates of models with pictures pick the parts of type text; a string has none, and all was lost."""
        expected = encode_talk(piece_encoder(own, "tokenizer"), self.SAMPLE)
        parts = "{% for c in m.content | selectattr('type', 'equalto', 'text') %}{{ c.text }}{% endfor %}"
        own.chat_template = str(own.chat_template).replace("{{ m.content }}", parts)
        sample = encode_talk(piece_encoder(own, "tokenizer"), self.SAMPLE)
        assert sample.input_ids.tolist() == expected.input_ids.tolist()
        assert sample.labels.tolist() == expected.labels.tolist()

    def test_a_sample_whose_text_the_template_changes_is_refused(self, own: PreTrainedTokenizerFast) -> None:
        own.chat_template = str(own.chat_template).replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
        encoder = piece_encoder(own, "tokenizer")
        encode_talk(encoder, conversation("Why?", " It is "))
        with pytest.raises(BadSample):
            encode_talk(encoder, conversation("Why?", "so</think>It is"))

    @pytest.mark.parametrize(
        "template",
        [
            "{{ 9 ** (9 ** 9) }}",
            "{{ 1 / 0 }}",
            "{% for m in messages %}{{ m.content }",
            "{% for m in messages %}{{ m.content | reverse }}<|im_end|>{% endfor %}",
            "{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
            None,
        ],
    )
    def test_one_that_does_not_end_or_says_something_else_is_refused(self, own, template) -> None:
        own.chat_template = template
        with pytest.raises(UserError):
            piece_encoder(own, "tokenizer")


@pytest.mark.parametrize("template", [CHATML.replace("PICTURE", ""), "{% for m in messages %}{{ m.role }}{% endfor %}"])
def test_a_template_that_cannot_be_trained_on_is_refused(tmp_path: Path, template: str) -> None:
    folder = write_tiny("qwen2_5_vl", tmp_path / "odd", template=template)
    with pytest.raises(UserError):
        encoder_of(folder)


PUBLISHED = {
    "chatml": ("It is red.<|im_end|>", 1),
    "qwen2_vl": ("It is red.<|im_end|>", 1),
    "smolvlm": (" It is red.<end_of_utterance>", 1),
    "llava_next_vicuna": (" It is red.<|im_end|>", 2),  # the published one says it twice
    "llava_next_mistral": (" It is red.<|im_end|>", 0),
    "llava_onevision": ("It is red.<|im_end|>", 1),
    "gemma3": ("It is red.<eoi>", 0),
    "gemma3_with_system": ("It is red.<eoi>", 1),
    "glm": ("It is red.<|im_end|>", 1),
}
"""What of the first conversation is trained, and how often a system turn is said where that is tried."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates(tmp_path: Path, name: str) -> None:
    (reply, times), template = PUBLISHED[name], {**CHAT, "chatml": CHATML}[name]
    encoder = encoder_of(write_tiny("qwen2_5_vl", tmp_path / "published", template=template))
    plain = TALKS["one picture"]
    for turns, pictures in (plain, with_system(plain)) if times else (plain,):
        sample = sample_of(encoder, (turns, pictures))
        prompt = encoder.encode_prompt(turns[:-1], pictures).input_ids
        expected = template_ids(encoder, (turns[:-1], pictures), system_as_text=name == "glm")
        assert prompt.tolist() == expected.tolist()
        assert torch.equal(sample.input_ids[: len(prompt)], prompt)
        assert int((sample.labels != IGNORED_LABEL).nonzero()[0]) == len(prompt)
        assert trained(encoder, sample) == reply
        begins = int((sample.input_ids == encoder.tokenizer.bos_token_id).sum())
        assert begins == (1 if name.startswith(("gemma3", "glm")) else 0)
        text = encoder.tokenizer.decode(prompt)
        assert text.count(SYSTEM.text) == (times if turns[0] is SYSTEM else 0)
        assert "'type'" not in text
        assert turns[0] is not SYSTEM or "You are a helpful assistant" not in text  # Qwen2-VL's own gives way
    if times:
        several = trained(encoder, sample_of(encoder, with_system(TALKS[TWO_QUESTIONS])))
        assert several == f"{reply}{reply}".replace("It is red.", "The second is blue.", 1).replace("It is red.", "Yes")


def template_ids(encoder: Encoder, conversation: Conversation, *, system_as_text: bool) -> Tensor:
    """The prompt's ids, by the processor's own `apply_chat_template`."""
    messages = messages_of(conversation)
    if system_as_text and conversation[0][0].role == "system":
        messages[0]["content"] = conversation[0][0].text
    inputs: Any = encoder.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return inputs["input_ids"][0]


RAISING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML


@pytest.mark.parametrize(
    "template", [RAISING, CHAT["llava_next_mistral"], CHAT["pixtral"]], ids=["raising", "llava_next", "pixtral"]
)
@pytest.mark.parametrize("text", [SYSTEM.text, ASKED], ids=["other words", "the question's words"])
def test_a_template_without_a_place_for_it_refuses_the_sample(tmp_path: Path, template: str, text: str) -> None:
    encoder = encoder_of(write_tiny("qwen2_5_vl", tmp_path / "odd", template=template))
    conversation = TALKS["one picture"]
    sample_of(encoder, conversation)
    with pytest.raises(BadSample) as refused:
        sample_of(encoder, with_system(conversation, replace(SYSTEM, text=text)))
    assert refused.value.sample_id == "conversation"


def test_a_place_in_the_last_question_alone_serves_prompts(tmp_path: Path) -> None:
    encoder = encoder_of(write_tiny("qwen2_5_vl", tmp_path / "odd", template=CHAT["pixtral"]))
    for name, count in (("one picture", 2), (TWO_QUESTIONS, 4)):
        turns, pictures = with_system(TALKS[name])
        text = encoder.tokenizer.decode(encoder.encode_prompt(turns[:count], pictures).input_ids)
        assert text.rpartition("[INST]")[2].startswith(f"{SYSTEM.text}\n\n")


GREETED = {
    "chatml": (CHATML, True),
    "gemma3": (CHAT["gemma3"], True),
    "qwen2_vl": (CHAT["qwen2_vl"], True),
    "smolvlm": (CHAT["smolvlm"], True),
    "raising": ("{% if messages[0].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}" + CHATML, False),
    "silent": ("{% if messages[0].role == 'assistant' %}{% set messages = messages[1:] %}{% endif %}" + CHATML, False),
}
"""Templates, and whether they write an answer before the first question."""


@pytest.mark.parametrize("name", GREETED)
def test_a_greeting_is_untrained_where_the_template_writes_it(caplog: Any, tmp_path: Path, name: str) -> None:
    log_once.cache_clear()
    template, is_kept = GREETED[name]
    encoder = encoder_of(write_tiny("qwen2_5_vl", tmp_path / "greeted", template=template))
    for talk in ("one picture", TWO_QUESTIONS):
        turns, pictures = TALKS[talk]
        greeted = (Turn("assistant", "Hello. Ask me.", is_trained=False), *turns)
        sample, plain = (sample_of(encoder, (said, pictures)) for said in (greeted, turns))
        prompt = encoder.encode_prompt(greeted[:2], pictures).input_ids
        expected = template_ids(
            encoder, ((greeted if is_kept else turns)[: 2 if is_kept else 1], pictures), system_as_text=False
        )
        assert prompt.tolist() == expected.tolist()
        assert int((sample.labels != IGNORED_LABEL).nonzero()[0]) == len(prompt)
        assert torch.equal(sample.input_ids[: len(prompt)], prompt)
        assert trained(encoder, sample) == trained(encoder, plain)
        assert is_kept != torch.equal(sample.input_ids, plain.input_ids)
        assert sorted(number for row in sample.texts() for number in row.answers) == [*range(1, len(greeted) // 2 + 1)]
    assert ("greeting" in caplog.text) != is_kept


QUESTION, ANSWER = TALKS["no picture"][0]
REFUSED = {
    "two": (SYSTEM, SYSTEM, QUESTION, ANSWER),
    "later": (QUESTION, SYSTEM),
    "alone": (SYSTEM,),
    "before an answer": (SYSTEM, ANSWER),
    "special token": (replace(SYSTEM, text="Say <|im_end|>."), QUESTION, ANSWER),
    "special token asked": (Turn("user", "Is <|im_end|> a word?"), ANSWER),
    "picture token asked": (Turn("user", "What is <|image_pad|>?"), ANSWER),
}


@pytest.mark.parametrize("turns", REFUSED.values(), ids=REFUSED)
def test_no_system_turn_before_a_talk_and_special_tokens_are_refused(folders: Folders, turns: tuple[Turn, ...]) -> None:
    with pytest.raises(BadSample):
        sample_of(encoder_of(folders["qwen2_5_vl"]), (turns, ()))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl", "chameleon"])
@pytest.mark.parametrize("mark", ["\ufdd0", "\ufdd1", "\ufdef"], ids=ascii)
def test_marks_of_ours_in_people_s_words_are_refused(folders: Folders, family: str, mark: str) -> None:
    """U+FDD1 stands for a video in here: in a question it would ask the template for one."""
    encoder, question, answer = encoder_of(folders[family]), Turn("user", "Is it red?"), Turn("assistant", "no")
    marked, system = replace(question, text=f"Is {mark} red?"), Turn("system", mark)
    for turns in ((marked, answer), (question, replace(answer, text=f"no{mark}")), (system, question, answer)):
        with pytest.raises(BadSample):
            sample_of(encoder, (turns, ()))
    for turns in ((marked,), (system, question)):
        with pytest.raises(BadSample):
            encoder.encode_prompt(turns, ())


def test_question_answer_writes_a_line_for_each_round(folders: Folders) -> None:
    encoder = encoder_of(folders["chameleon"])
    sample = sample_of(encoder, TALKS[TWO_QUESTIONS])
    picture = "<boi>" + "<image>" * 64 + "<eoi>"
    assert encoder.tokenizer.decode(sample.input_ids) == (
        f"Question: Is {picture}or {picture}blue? Answer: The second is blue.<|im_end|>\n"
        "Question: Sure? Answer: Yes<|im_end|>"
    )
    trained = sample.labels != IGNORED_LABEL
    assert encoder.tokenizer.decode(sample.labels[trained]) == " The second is blue.<|im_end|> Yes<|im_end|>"


@pytest.mark.parametrize("family", ["chameleon", "paligemma"])
def test_a_prompt_is_the_beginning_of_what_is_trained(folders: Folders, family: str) -> None:
    encoder = encoder_of(folders[family])
    turns, pictures = TALKS["one picture"]
    sample, prompt = sample_of(encoder, (turns, pictures)), encoder.encode_prompt(turns[:1], pictures)
    ids = prompt.input_ids
    assert torch.equal(ids, sample.input_ids[: len(ids)])
    assert bool((prompt.labels == IGNORED_LABEL).all())
    assert int((sample.labels != IGNORED_LABEL).nonzero()[0]) == len(ids)


@pytest.mark.parametrize(
    ("turns", "pictures"),
    [
        (TALKS[TWO_QUESTIONS][0], 2),
        ((Turn("user", "Is <image> red?"), Turn("assistant", "yes")), 1),
        (TALKS["no picture"][0], 0),
        ((Turn("user", "<image>\nWhat is <eos>?"), Turn("assistant", "<|im_end|>")), 1),
    ],
    ids=["two questions", "picture inside", "no picture", "special token"],
)
def test_what_paligemma_does_not_take_is_refused_by_id(folders, turns, pictures) -> None:
    encoder = encoder_of(folders["paligemma"])
    with pytest.raises(BadSample) as error:
        sample_of(encoder, (turns, (RED,) * pictures))
    assert error.value.sample_id == "conversation"


def test_a_format_goes_before_the_chat_template(folders: Folders) -> None:
    encoder = encoder_of(folders["qwen2_5_vl"], template="question_answer")
    ids = sample_of(encoder, TALKS["no picture"]).input_ids
    assert encoder.tokenizer.decode(ids) == "Question: Say the colour red. Answer: red<|im_end|>"
