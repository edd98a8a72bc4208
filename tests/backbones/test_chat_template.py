"""Template `tokenizer`: the language model's own chat template, its answers found and labelled."""

from __future__ import annotations

import pickle

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dora_vl.backbones.prompts import get_template
from dora_vl.data.example import Example
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample, UserError
from tests.backbones.encoded_talk import MakeEncoder, talk
from tests.backbones.tiny_image_text import CHATML


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

    @staticmethod
    def write_content(own: PreTrainedTokenizerFast, content: str) -> None:
        """Another way for the template to write what a message says."""
        own.chat_template = str(own.chat_template).replace("{{ m.content }}", content)

    @pytest.mark.parametrize(
        ("template", "said"),
        [
            (
                "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
                "does not end within 2 s",
            ),
            ("{{ 9 ** (9 ** 9) }}", "does not end within 2 s"),
            ("{{ 'a' * 10 ** 10 }}", "or takes more than 1 GiB"),
            ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "leaves out what is said"),
            ("{{ 1 / 0 }}", "leaves out what is said"),
        ],
    )
    def test_one_that_does_not_end_is_refused(self, own: PreTrainedTokenizerFast, template: str, said: str) -> None:
        own.chat_template = template
        with pytest.raises(UserError, match=said):
            get_template("tokenizer", own)

    @pytest.mark.parametrize(
        ("special", "chosen"),
        [
            (("<s>", "</s>", "<|im_start|>", "<|im_end|>"), "vicuna_v1"),
            (("<|im_start|>", "<|im_end|>"), "chatml"),
            (("<|end|>",), "tokenizer"),
        ],
    )
    def test_without_a_name_it_is_the_first_whose_tokens_are_there(self, special: tuple[str, ...], chosen: str) -> None:
        words = Tokenizer(models.BPE(unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokens = ["<unk>", *special]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        words.train_from_iterator([""], trainers.BpeTrainer(special_tokens=tokens, initial_alphabet=alphabet))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token=special[-1])
        tokenizer.add_special_tokens({"additional_special_tokens": [*special]})
        tokenizer.chat_template = CHATML.replace("<|im_end|>", "<|end|>")
        assert get_template(None, tokenizer).name == chosen

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

    def test_a_template_of_parts_says_the_same(self, own: PreTrainedTokenizerFast, make_encoder: MakeEncoder) -> None:
        """Templates of models with pictures pick the parts of type text; a string has none, and all was lost."""
        sample = talk("<image>\nIs it </s> red?", "Yes <|im_end|> no", "Why?", "It is", images=1)
        expected = make_encoder(own, "tokenizer").encode(sample)
        self.write_content(
            own, "{% for c in m.content | selectattr('type', 'equalto', 'text') %}{{ c.text }}{% endfor %}"
        )
        found = make_encoder(own, "tokenizer").encode(sample)
        assert found.input_ids.tolist() == expected.input_ids.tolist()
        assert found.labels.tolist() == expected.labels.tolist()

    @pytest.mark.parametrize("content", ["", "{{ m.content | reverse }}", "{{ raise_exception('not so') }}"])
    def test_refuses_a_template_that_says_something_else(
        self, own: PreTrainedTokenizerFast, make_encoder: MakeEncoder, content: str
    ) -> None:
        self.write_content(own, content)
        with pytest.raises(UserError, match=r"leaves out what is said.*set model\.template to one of vicuna_v1"):
            make_encoder(own, "tokenizer")

    def test_refuses_a_sample_whose_text_the_template_changes(
        self, own: PreTrainedTokenizerFast, make_encoder: MakeEncoder
    ) -> None:
        self.write_content(own, "{{ m.content.split('</think>')[-1] }}")
        encoder = make_encoder(own, "tokenizer")
        encoder.encode(talk("Why?", " It is "))
        with pytest.raises(BadSample, match="leaves out or changes the text of turn 1"):
            encoder.encode(talk("Why?", "so</think>It is"))

    def test_a_system_turn_reaches_it_or_the_sample_is_refused(
        self, own: PreTrainedTokenizerFast, make_encoder: MakeEncoder
    ) -> None:
        turns = (Turn("system", "Be brief."), *talk("Why?", "It is", "How?", "So").turns)
        encoder = make_encoder(own, "tokenizer")
        found = encoder.encode(Example("a", (), turns))
        labelled = [int(token) for token in found.labels if token != -100]
        plain = [int(token) for token in encoder.encode(talk("Why?", "It is", "How?", "So")).labels if token != -100]
        assert labelled == plain
        assert "Be brief." in str(own.decode(found.input_ids.tolist()))
        own.chat_template = (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
            + str(own.chat_template)
        )
        with pytest.raises(BadSample, match="refuses it: no system here"):
            make_encoder(own, "tokenizer").encode(Example("a", (), turns))
        self.write_content(own, "{{ m.content if m.role != 'system' else '' }}")
        own.chat_template = str(own.chat_template).partition("{% endif %}")[2]
        with pytest.raises(BadSample, match="leaves out or changes the text of turn 0"):
            make_encoder(own, "tokenizer").encode(Example("a", (), turns))

    def test_needs_one(self, new_tokenizer: PreTrainedTokenizerFast, make_encoder: MakeEncoder) -> None:
        with pytest.raises(UserError, match=r"no chat template; set model\.template"):
            make_encoder(new_tokenizer, "tokenizer")
