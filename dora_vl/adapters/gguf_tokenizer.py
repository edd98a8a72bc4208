"""A tokenizer as GGUF holds it: tokens with their kinds, merges or scores, and how llama.cpp has to split text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from dora_vl.errors import UserError

SPACE_MARK = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""gguf's `TokenType`."""
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS: Mapping[str, str] = MappingProxyType(
    {_WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}
)
"""Regular expression that splits a text before its bytes are merged -> llama.cpp's name for it."""


@dataclass(frozen=True)
class Vocabulary:
    """What the fields `tokenizer.ggml.*` say of tokens."""

    model: str
    """`gpt2`: merges of bytes; `llama`: SentencePiece's, by scores."""
    pre: str
    """llama.cpp's name of how text is split first."""
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    scores: list[float]
    space_prefix: bool
    """Whether a text gets a space in front."""


def vocabulary_of(tokenizer: Any, rows: int, source: str) -> Vocabulary:
    """A fast tokenizer's vocabulary.

    Args:
        rows: of the embedding; ids that no token has are filled up.

    Raises:
        UserError: of a kind that llama.cpp has no name for, or with more tokens than rows.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    tokens, kinds = _tokens(state, rows, source)
    if model["type"] != "BPE":
        raise UserError(
            f"{source}: its tokenizer is of kind {model['type']}; as GGUF are written BPE and SentencePiece"
        )
    merges = [_merge(one) for one in model["merges"]]
    if not model.get("byte_fallback"):
        return Vocabulary(
            "gpt2", _split_name(state, source), tokens, kinds, [" ".join(one) for one in merges], [], False
        )
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    scores = [-float(ranks.get(token, len(merges))) for token in tokens]
    kinds = [BYTE if kind == NORMAL and _is_byte(token) else kind for token, kind in zip(tokens, kinds, strict=True)]
    return Vocabulary("llama", "default", tokens, kinds, [], scores, _has_space_prefix(state))


def _tokens(state: Mapping[str, Any], rows: int, source: str) -> tuple[list[str], list[int]]:
    vocabulary, added = state["model"]["vocab"], state["added_tokens"]
    highest = max([*vocabulary.values(), *(one["id"] for one in added)])
    if highest >= rows:
        raise UserError(f"{source}: its tokenizer has the id {highest}, and its embedding {rows} rows")
    tokens, kinds = [f"[PAD{number}]" for number in range(rows)], [UNUSED] * rows
    for token, number in vocabulary.items():
        tokens[number], kinds[number] = token, NORMAL
    for one in added:
        tokens[one["id"]], kinds[one["id"]] = one["content"], CONTROL if one["special"] else USER_DEFINED
    unknown = state["model"].get("unk_token")
    if unknown in vocabulary and state["model"].get("byte_fallback"):
        kinds[vocabulary[unknown]] = UNKNOWN
    return tokens, kinds


def _merge(pair: str | Sequence[str]) -> tuple[str, str]:
    left, right = pair.split(" ") if isinstance(pair, str) else pair
    return left, right


def _is_byte(token: str) -> bool:
    return len(token) == len("<0x00>") and token.startswith("<0x") and token.endswith(">")


def _steps(part: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    return list(part[inner]) if part["type"] == "Sequence" else [part]


def _split_name(state: Mapping[str, Any], source: str) -> str:
    """llama.cpp's name of how a byte-level tokenizer splits text."""
    steps = _steps(state.get("pre_tokenizer"), "pretokenizers")
    kinds = [step["type"] for step in steps]
    plain = bool(steps) and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space")
    if plain and kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if plain and kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1].get("use_regex", True):
        return "smollm"
    if plain and kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        found = SPLITS.get(str(steps[0]["pattern"].get("Regex")))
        if found is not None and steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]:
            return found
    raise UserError(
        f"{source}: its tokenizer splits text by {' and '.join(kinds) or 'nothing'} in a way that no name "
        f"of llama.cpp is known for here; known are gpt-2, smollm, {', '.join(SPLITS.values())}, and SentencePiece"
    )


def _has_space_prefix(state: Mapping[str, Any]) -> bool:
    for step in _steps(state.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend" and step["prepend"] == SPACE_MARK:
            return True
    steps = _steps(state.get("pre_tokenizer"), "pretokenizers")
    return any(step["type"] == "Metaspace" and step["prepend_scheme"] != "never" for step in steps)


def add_tokenizer(writer: Any, tokenizer: Any, found: Vocabulary) -> None:
    """Writes the fields: tokens, special ids, what is put around a text, and the chat template."""
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.kinds)
    if found.scores:
        writer.add_token_scores(found.scores)
        writer.add_add_space_prefix(found.space_prefix)
    if found.merges:
        writer.add_token_merges(found.merges)
    ids = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "unk", "pad")}
    for kind, number in ids.items():
        if number is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    text = tokenizer("a").input_ids
    writer.add_add_bos_token(bool(text) and text[0] == ids["bos"])
    writer.add_add_eos_token(bool(text) and text[-1] == ids["eos"])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
