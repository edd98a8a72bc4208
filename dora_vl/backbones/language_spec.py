"""What a language model's run says of its base and prompt, as settings; imports nothing that takes time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PromptName = Literal["nvlabs", "llm_adapters", "alpaca"]
TrainOn = Literal["all", "answer"]


@dataclass(frozen=True, kw_only=True)
class LanguageSource:
    """A causal language model that is written once as a plain Hugging Face folder: a GGUF file, or another dtype."""

    folder: str
    """Folder or hub id of the model; with `gguf_file`, the folder that file lies in."""
    gguf_file: str | None = None
    """A GGUF file in `folder`; it is dequantised."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the written weights; None keeps the folder's own (float32 for GGUF)."""
