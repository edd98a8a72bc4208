"""The first micro-batch as people read it: its tokens in the order of the model, each with what training does to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dora_vl.data.dataset import IGNORED_LABEL

Kind = Literal["trained", "context", "picture-place", "padding"]
NAMES: Mapping[Kind, str] = {
    "trained": "trained on",
    "context": "read, not trained on",
    "picture-place": "place of a picture",
    "padding": "padding",
}
JOINED: frozenset[Kind] = frozenset({"picture-place", "padding"})
"""Of these a stretch is one piece with its length."""
UNFINISHED = "\ufffd"
STAND_IN = "no sample: it takes the batch through the vision part, as other ranks' batches are taken"
Opens = Callable[[], Image.Image] | None


@dataclass(frozen=True)
class Piece:
    """One token, or a stretch of places or padding of so many."""

    text: str
    kind: Kind
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class BatchRow:
    """One row: of a decoder one line of pieces, of an encoder-decoder the input and the answer."""

    title: str
    lines: tuple[tuple[Piece, ...], ...]


@dataclass(frozen=True, kw_only=True)
class BatchView:
    """All rows, the samples' pictures, and counts.

    Attributes:
        facts: name and value.
        skipped: (id, reason) of samples that cannot be used.
        pictures: (sample's id, what opens its picture).
    """

    rows: tuple[BatchRow, ...]
    facts: tuple[tuple[str, str], ...]
    skipped: tuple[tuple[str, str], ...] = ()
    pictures: tuple[tuple[str, Opens], ...] = ()


class TokenText:
    """The text of single tokens.

    Args:
        tokenizer: of the batch.
        places: ids that stand for a piece of a picture or a video.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, places: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._places = places
        self._known: dict[int, str] = {}

    def of(self, token: int) -> str:
        """A token's text, with the space before it; half a character as the tokenizer spells it."""
        if token not in self._known:
            self._known[token] = self._text(token)
        return self._known[token]

    def _text(self, token: int) -> str:
        options: dict[str, Any] = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        text, spelled = str(self._tokenizer.decode([token], **options)), self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(spelled, str):
            return text
        if UNFINISHED in text:
            return spelled
        return f" {text}" if spelled.startswith("\u2581") and not text.startswith(" ") else text

    def pieces(self, ids: Sequence[int], trained: Sequence[bool], real: Sequence[bool]) -> tuple[Piece, ...]:
        """A row's tokens; stretches of picture places and of padding are joined."""
        return tuple(_joined(self._single(*one) for one in zip(ids, trained, real, strict=True)))

    def _single(self, token: int, trained: bool, real: bool) -> Piece:
        if not real:
            return Piece("padding", "padding")
        if token in self._places:
            return Piece(self.of(token), "picture-place")
        return Piece(self.of(token), "trained" if trained else "context")


def _joined(pieces: Iterator[Piece]) -> Iterator[Piece]:
    waiting: Piece | None = None
    for piece in pieces:
        same = waiting is not None and (waiting.text, waiting.kind) == (piece.text, piece.kind)
        if waiting is not None and same and piece.kind in JOINED:
            waiting = Piece(piece.text, piece.kind, waiting.count + 1)
            continue
        if waiting is not None:
            yield waiting
        waiting = piece
    if waiting is not None:
        yield waiting


def batch_view(
    batch: Mapping[str, Any], names: Sequence[str], text: TokenText, pictures: Sequence[Opens], *, shifted: bool
) -> BatchView:
    """A collated micro-batch.

    Args:
        batch: as the loss takes it, with its bookkeeping.
        names: the usable samples' ids, in the batch's order.
        pictures: what opens each one's picture.
        shifted: labels are of the input itself (a decoder); else they are an answer of their own.
    """
    rows = _decoder_rows if shifted else _encoder_decoder_rows
    titles = _titles(names, len(batch["input_ids"]), shared="layout" in batch)
    return BatchView(
        rows=tuple(rows(batch, titles, text)),
        facts=tuple(_facts(batch)),
        skipped=tuple(batch.get("skipped", ())),
        pictures=tuple(zip(names, pictures, strict=True)),
    )


def _titles(names: Sequence[str], rows: int, *, shared: bool) -> list[str]:
    """A row is a sample, and what is behind them stands in for media; a shared row is its number."""
    if not shared and len(names) <= rows:
        return [*names, *[STAND_IN] * (rows - len(names))]
    return [f"row {number + 1} of {rows}, {len(names)} samples in all" for number in range(rows)]


def _decoder_rows(batch: Mapping[str, Any], titles: Sequence[str], text: TokenText) -> Iterator[BatchRow]:
    for title, ids, mask, labels in zip(titles, *_parts(batch), strict=True):
        pieces = text.pieces(ids.tolist(), (labels != IGNORED_LABEL).tolist(), mask.bool().tolist())
        yield BatchRow(title=title, lines=(pieces,))


def _encoder_decoder_rows(batch: Mapping[str, Any], titles: Sequence[str], text: TokenText) -> Iterator[BatchRow]:
    for title, ids, mask, labels in zip(titles, *_parts(batch), strict=True):
        asked = text.pieces(ids.tolist(), [False] * len(ids), mask.bool().tolist())
        real = (labels != IGNORED_LABEL).tolist()
        yield BatchRow(title=title, lines=(asked, text.pieces(labels.clamp_min(0).tolist(), real, real)))


def _parts(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    return batch["input_ids"], batch["attention_mask"], batch["labels"]


def _facts(batch: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    ids, padding = batch["input_ids"], int(batch.get("padding_tokens", 0))
    trained = int((batch["labels"] != IGNORED_LABEL).sum())
    yield "samples", str(batch.get("samples", len(ids)))
    yield "positions", f"{ids.shape[0]} rows of {ids.shape[1]}"
    yield "padding", f"{padding} ({padding / max(1, ids.numel()):.1%})"
    yield "trained on", f"{trained} tokens"
    for name, tokens in batch.get("cut", ()):
        yield f"cut: {name}", f"{tokens} tokens"
    for name, value in batch.items():
        if isinstance(value, Tensor) and name not in ("input_ids", "attention_mask", "labels"):
            yield name, f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
