"""Template `tokenizer`: the language model's own chat template, its answers found and labelled."""

from __future__ import annotations

import pickle

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dora_vl.backbones.prompts import usual_template
from dora_vl.data.example import Example
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample, UserError
from tests.backbones.encoded_talk import MakeEncoder, encode_talk, piece_encoder, prompt_ids, talk
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
            ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "cannot be used"),
            ("{{ 1 / 0 }}", "cannot be used"),
        ],
    )
    def test_one_that_does_not_end_is_refused(self, own: PreTrainedTokenizerFast, template: str, said: str) -> None:
        own.chat_template = template
        with pytest.raises(UserError, match=said):
            piece_encoder(own, "tokenizer")

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
        assert usual_template(tokenizer) == chosen

    def test_equals_chatml_but_for_the_last_newline(
        self, own: PreTrainedTokenizerFast, make_encoder: MakeEncoder
    ) -> None:
        sample = talk("<image>\nIs it </s> red?", "Yes <|im_end|> no", "Why?", "It is", images=1)
        ours, theirs = (encode_talk(make_encoder(own, name), sample) for name in ("chatml", "tokenizer"))
        assert theirs.input_ids.tolist()[:-1] == ours.input_ids.tolist()
        assert theirs.labels.tolist() == [*ours.labels.tolist(), -100]
        assert own.convert_ids_to_tokens(theirs.input_ids.tolist()).count("<s>") == 1

    def test_prompt_is_what_precedes_the_answer(self, own: PreTrainedTokenizerFast, make_encoder: MakeEncoder) -> None:
        encoder = make_encoder(own, "tokenizer")
        prompt = prompt_ids(encoder, Turn("user", "Why?"))
        encoded = encode_talk(encoder, talk("Why?", "It is"))
        assert encoded.input_ids.tolist()[: len(prompt)] == prompt
        assert encoded.labels.tolist()[: len(prompt) + 1] == [*[-100] * len(prompt), encoded.input_ids[len(prompt)]]

    def test_one_that_never_closes_an_answer_gets_the_end_token(
        self, own: PreTrainedTokenizerFast, make_encoder: MakeEncoder
    ) -> None:
        own.chat_template = (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        )
        labels = encode_talk(make_encoder(own, "tokenizer"), talk("Why?", "It is")).labels
        assert int(labels[labels != -100][-1]) == own.eos_token_id

    def test_refuses_a_template_that_rewrites_earlier_turns(
        self, own: PreTrainedTokenizerFast, make_encoder: MakeEncoder
    ) -> None:
        own.chat_template = (
            "{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        )
        with pytest.raises(UserError):
            make_encoder(own, "tokenizer")

    def test_a_template_of_parts_says_the_same(self, own: PreTrainedTokenizerFast, make_encoder: MakeEncoder) -> None:
        """Templates of models with pictures pick the parts of type text; a string has none, and all was lost."""
        sample = talk("<image>\nIs it </s> red?", "Yes <|im_end|> no", "Why?", "It is", images=1)
        expected = encode_talk(make_encoder(own, "tokenizer"), sample)
        self.write_content(
            own, "{% for c in m.content | selectattr('type', 'equalto', 'text') %}{{ c.text }}{% endfor %}"
        )
        found = encode_talk(make_encoder(own, "tokenizer"), sample)
        assert found.input_ids.tolist() == expected.input_ids.tolist()
        assert found.labels.tolist() == expected.labels.tolist()

    @pytest.mark.parametrize("content", ["", "{{ m.content | reverse }}", "{{ raise_exception('not so') }}"])
    def test_refuses_a_template_that_says_something_else(
        self, own: PreTrainedTokenizerFast, make_encoder: MakeEncoder, content: str
    ) -> None:
        self.write_content(own, content)
        with pytest.raises(UserError):
            make_encoder(own, "tokenizer")

    def test_refuses_a_sample_whose_text_the_template_changes(
        self, own: PreTrainedTokenizerFast, make_encoder: MakeEncoder
    ) -> None:
        self.write_content(own, "{{ m.content.split('</think>')[-1] }}")
        encoder = make_encoder(own, "tokenizer")
        encode_talk(encoder, talk("Why?", " It is "))
        with pytest.raises(BadSample):
            encode_talk(encoder, talk("Why?", "so</think>It is"))

    def test_a_system_turn_reaches_it_or_the_sample_is_refused(
        self, own: PreTrainedTokenizerFast, make_encoder: MakeEncoder
    ) -> None:
        turns = (Turn("system", "Be brief."), *talk("Why?", "It is", "How?", "So").turns)
        encoder = make_encoder(own, "tokenizer")
        found = encode_talk(encoder, Example("a", (), turns))
        labelled = [int(token) for token in found.labels if token != -100]
        plain = encode_talk(encoder, talk("Why?", "It is", "How?", "So")).labels
        assert labelled == plain[plain != -100].tolist()
        assert "Be brief." in str(own.decode(found.input_ids.tolist()))
        own.chat_template = (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
            + str(own.chat_template)
        )
        with pytest.raises(BadSample):
            encode_talk(make_encoder(own, "tokenizer"), Example("a", (), turns))
        self.write_content(own, "{{ m.content if m.role != 'system' else '' }}")
        own.chat_template = str(own.chat_template).partition("{% endif %}")[2]
        with pytest.raises(BadSample):
            encode_talk(make_encoder(own, "tokenizer"), Example("a", (), turns))

    def test_needs_one(self, new_tokenizer: PreTrainedTokenizerFast, make_encoder: MakeEncoder) -> None:
        with pytest.raises(UserError):
            make_encoder(new_tokenizer, "tokenizer")
