"""LLaMA tokenizers that are published as `tokenizer.model` alone, as fast tokenizers with the same ids.

Vicuna v1.5 and LLaMA 2 are published so. transformers 5 rebuilds them with a `Metaspace` pre-tokenizer, which puts no
space mark before a text that begins with a space; SentencePiece puts one before every text. The text after a picture
is a text of its own and may begin so. Measured on transformers 5.24: `" Is it"` became `▁Is ▁it` instead of
`▁▁ Is ▁it`, whatever `legacy` says.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers.models.llama.tokenization_llama import LlamaTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast
from transformers.utils.import_utils import (
    is_protobuf_available,
    is_sentencepiece_available,
    is_tiktoken_available,
)

from dora_vl.errors import UserError

SPACE_MARK = "▁"
NEEDED = {"sentencepiece": is_sentencepiece_available, "protobuf": is_protobuf_available}
"""What transformers reads a `tokenizer.model` with -> whether it is installed."""
_CARRIED = ("model_max_length", "padding_side", "truncation_side", "clean_up_tokenization_spaces", "chat_template")


def is_sentencepiece(file: Path) -> bool:
    """Whether a `tokenizer.model` is SentencePiece's; else it may be tiktoken's, where that is installed.

    transformers tries both in silence, and says at the end that tiktoken is missing, whatever was wrong.

    Raises:
        UserError: a package is not installed, or the file is no model; it names them.
    """
    if missing := [name for name, installed in NEEDED.items() if not installed()]:
        raise UserError(
            f"{file} is read with {' and '.join(NEEDED)}; not installed: {', '.join(missing)} "
            f"(pip install {' '.join(missing)})"
        )
    from sentencepiece import SentencePieceProcessor

    try:
        SentencePieceProcessor().LoadFromSerializedProto(file.read_bytes())
    except RuntimeError as error:
        if is_tiktoken_available():
            return False
        raise UserError(
            f"{file} ({file.stat().st_size} bytes) is no SentencePiece model; fetch it again (one that git-lfs has not "
            "pulled yet has about 130 bytes), or pip install tiktoken if it is tiktoken's"
        ) from error
    return True


def as_sentencepiece(tokenizer: PreTrainedTokenizerBase, settings_file: Path | None) -> PreTrainedTokenizerBase:
    """The tokenizer with SentencePiece's own space marks; one of another class comes back as it is.

    Args:
        tokenizer: as transformers built it from a SentencePiece model.
        settings_file: its `tokenizer_config.json`. `legacy` there says whether the text after a special token gets
            a space mark too; where it is not said it does, as in every transformers before 5.
    """
    if not isinstance(tokenizer, LlamaTokenizer):
        return tokenizer
    settings = {} if settings_file is None else json.loads(settings_file.read_text(encoding="utf-8"))
    legacy = settings.get("legacy")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in state["added_tokens"]:  # normalised as well, "</s>" in a text would have to read "▁</s>"
        token["normalized"] = token["normalized"] and not token["special"]
    backend = Tokenizer.from_str(json.dumps(state))
    mark_spaces(backend, legacy=legacy is None or legacy, prefix=settings.get("add_prefix_space") is not False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        **{name: getattr(tokenizer, name) for name in _CARRIED},
    )


def mark_spaces(tokenizer: Tokenizer, *, legacy: bool, prefix: bool) -> None:
    """Makes each space a `▁` and puts one in front, also where the text begins with a space.

    `legacy` puts it before every stretch between special tokens (as the published `tokenizer.json` files do), else
    only before a stretch that begins the text. Only a `Metaspace` can tell which stretch begins the text, and it puts
    its mark only where there is none yet: so the first one marks with a space, which the second makes a `▁`.
    """
    spaces = normalizers.Replace(" ", SPACE_MARK)
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([*([normalizers.Prepend(SPACE_MARK)] if prefix else []), spaces])
        tokenizer.pre_tokenizer = None
        return
    tokenizer.normalizer = spaces
    first = pre_tokenizers.Metaspace(" ", prepend_scheme="first" if prefix else "never", split=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [first, pre_tokenizers.Metaspace(SPACE_MARK, prepend_scheme="never", split=False)]
    )
