"""Template `tokenizer`: the language model's own chat template, its answers found and labelled."""

from __future__ import annotations

import pickle

import pytest
from transformers import PreTrainedTokenizerFast

from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample, UserError
from tests.backbones.encoded_talk import MakeEncoder, talk


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
