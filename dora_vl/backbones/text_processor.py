"""A language model's tokenizer in the place of a processor, so that one encoder serves models with and without eyes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase


class TextProcessor:
    """Takes what a processor takes, without pictures; its methods and attributes have a processor's names."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's own."""
        found: Any = self.tokenizer.chat_template
        return found

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any:
        """As a processor's."""
        return self.tokenizer.apply_chat_template(conversation, **options)

    def __call__(self, *, text: Sequence[str], images: None = None, **options: Any) -> BatchEncoding:
        """As a processor's; pictures must have been refused before."""
        del images
        options.pop("return_text_replacement_offsets", None)
        return self.tokenizer(list(text), **options)
