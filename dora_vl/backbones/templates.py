"""A prompt format by its name: a row of the table, or the language model's own."""

from __future__ import annotations

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dora_vl.backbones.chat_template import ChatTemplate
from dora_vl.backbones.rendered import Template
from dora_vl.backbones.template_table import TEMPLATES
from dora_vl.errors import UserError


def get_template(name: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """A template by its name; `tokenizer` is the language model's own.

    Raises: UserError if there is none of that name.
    """
    if name == "tokenizer":
        return ChatTemplate(tokenizer)
    if name not in TEMPLATES:
        raise UserError(f"model.template {name!r}: there are {', '.join(TEMPLATES)} and tokenizer (the model's own)")
    return TEMPLATES[name]
