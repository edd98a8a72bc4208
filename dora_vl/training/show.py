"""`dora-vl show batch`: the first micro-batch of a run, each token with what training does to it."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dora_vl.data.samples import IGNORED_LABEL, Skipped
from dora_vl.run.settings import RunConfig
from dora_vl.run.settings_parser import read_run
from dora_vl.training.pipeline import Pipeline
from dora_vl.training.train_command import pipeline_of
from dora_vl.training.trainer import OrderedTrainer

Kind = Literal["trained", "context", "picture-place", "padding"]


class TokenStyle(NamedTuple):
    """Says how a kind of token is shown; a stretch of a `joined` kind is one piece with its length."""

    name: str
    colours: tuple[int, int]
    signs: tuple[str, str]
    joined: bool = False


LOOKS: Mapping[Kind, TokenStyle] = {
    "trained": TokenStyle("trained on", (22, 28), ("[", "]")),
    "context": TokenStyle("read, not trained on", (236, 239), ("", "")),
    "picture-place": TokenStyle("place of a picture", (18, 18), ("<", ">"), joined=True),
    "padding": TokenStyle("padding", (94, 94), ("{", "}"), joined=True),
}
STAND_IN = "no sample: it takes the batch through the vision part, as other ranks' batches are taken"


@dataclass(frozen=True)
class TokenPiece:
    """Shows one token, or a stretch of `count` places or padding tokens."""

    text: str
    kind: Kind
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class ShownSequence:
    """One sequence: of a decoder one line of pieces, of an encoder-decoder the input and the answer."""

    title: str
    lines: tuple[tuple[TokenPiece, ...], ...]


@dataclass(frozen=True, kw_only=True)
class BatchView:
    """All sequences, counts, and samples that cannot be used (id, reason)."""

    sequences: tuple[ShownSequence, ...]
    facts: tuple[tuple[str, str], ...]
    skipped: tuple[tuple[str, str], ...] = ()


class TokenText:
    """The text of single tokens; `placeholder_ids` are placeholders of a piece of a picture or a video."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, placeholder_ids: frozenset[int]) -> None:
        self.placeholder_ids = placeholder_ids

        @cache
        def text_of(token: int) -> str:
            options: dict[str, Any] = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
            text, spelled = str(tokenizer.decode([token], **options)), tokenizer.convert_ids_to_tokens(token)
            if not isinstance(spelled, str):
                return text
            if "\ufffd" in text:  # half a character, as the tokenizer spells it
                return spelled
            return f" {text}" if spelled.startswith("\u2581") and not text.startswith(" ") else text

        self.of = text_of
        """Returns a token's text, with the space before it."""

    def pieces(self, ids: Sequence[int], trained: Sequence[bool], real: Sequence[bool]) -> tuple[TokenPiece, ...]:
        """Returns a sequence's tokens; joins stretches of picture places and of padding."""
        pieces: list[TokenPiece] = []
        for token, is_trained, is_real in zip(ids, trained, real, strict=True):
            if not is_real:
                piece = TokenPiece("padding", "padding")
            elif token in self.placeholder_ids:
                piece = TokenPiece(self.of(token), "picture-place")
            else:
                piece = TokenPiece(self.of(token), "trained" if is_trained else "context")
            last = pieces[-1] if pieces else None
            if last is not None and LOOKS[piece.kind].joined and (last.text, last.kind) == (piece.text, piece.kind):
                pieces[-1] = TokenPiece(piece.text, piece.kind, last.count + 1)
            else:
                pieces.append(piece)
        return tuple(pieces)


def batch_view(batch: Mapping[str, Any], names: Sequence[str], text: TokenText, *, shifted: bool) -> BatchView:
    """Makes the view of a collated micro-batch, its bookkeeping and its usable samples' ids.

    Where `shifted`, labels are of the input itself (a decoder); else they are an answer of their own.
    """
    lines: tuple[tuple[TokenPiece, ...], ...]
    count = len(batch["input_ids"])
    ids_of_samples = batch.get("sample_ids", names)
    if "layout" not in batch and len(ids_of_samples) <= count:  # what follows the samples stands in for media
        titles = [*ids_of_samples, *[STAND_IN] * (count - len(ids_of_samples))]
    else:
        titles = [f"sequence {number + 1} of {count}, {len(names)} samples in all" for number in range(count)]
    sequences: list[ShownSequence] = []
    segments = batch["layout"]["segment"] if "layout" in batch else batch["attention_mask"].new_zeros(count, 1)
    for title, ids, mask, labels, segment in zip(
        titles, batch["input_ids"], batch["attention_mask"], batch["labels"], segments, strict=True
    ):
        has_label, real = (labels != IGNORED_LABEL).tolist(), mask.bool().tolist()
        if shifted:  # a line for each segment of a sequence that holds several samples
            borders = [0, *((segment[1:] != segment[:-1]).nonzero()[:, 0] + 1).tolist(), len(ids)]
            lines = tuple(
                text.pieces(ids[start:stop].tolist(), has_label[start:stop], real[start:stop])
                for start, stop in pairwise(borders)
            )
        else:
            question = text.pieces(ids.tolist(), [False] * len(ids), real)
            lines = (question, text.pieces(labels.clamp_min(0).tolist(), has_label, has_label))
        sequences.append(ShownSequence(title=title, lines=lines))
    return BatchView(sequences=tuple(sequences), facts=tuple(_facts(batch)), skipped=tuple(batch.get("skipped", ())))


def _facts(batch: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    ids, padding = batch["input_ids"], int(batch.get("padding_tokens", 0))
    yield "samples", str(batch.get("samples", len(ids)))
    yield "positions", f"{ids.shape[0]} sequences of {ids.shape[1]}"
    yield "padding", f"{padding} ({padding / max(1, ids.numel()):.1%})"
    yield "trained on", f"{int((batch['labels'] != IGNORED_LABEL).sum())} tokens"
    for name, tokens in batch.get("cut", ()):
        yield f"cut: {name}", f"{tokens} tokens"
    for name, value in batch.items():
        if isinstance(value, Tensor) and name not in ("input_ids", "attention_mask", "labels"):
            yield name, f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def terminal_lines(view: BatchView, *, colours: bool) -> Iterator[str]:
    """Yields counts, the legend, and each sequence."""
    yield ", ".join(f"{name} {value}" for name, value in view.facts)
    yield "  ".join(_marked([TokenPiece(look.name, kind)], colours=colours) for kind, look in LOOKS.items())
    for sequence in view.sequences:
        yield ""
        yield sequence.title
        for pieces in sequence.lines:
            yield "  " + _marked(pieces, colours=colours)
    for name, reason in view.skipped:
        yield f"skipped {name}: {reason}"


def _marked(pieces: Sequence[TokenPiece], *, colours: bool) -> str:
    if colours:
        return "".join(
            f"\x1b[48;5;{LOOKS[item.kind].colours[number % 2]}m\x1b[38;5;255m{visible_text(item)}\x1b[0m"
            for number, item in enumerate(pieces)
        )
    marked: list[str] = []
    for number, piece in enumerate(pieces):
        begin, end = LOOKS[piece.kind].signs
        begins = number == 0 or pieces[number - 1].kind != piece.kind
        ends = number == len(pieces) - 1 or pieces[number + 1].kind != piece.kind
        marked.append(f"{begin if begins else ''}{visible_text(piece)}{end if ends else ''}")
    return "".join(marked)


def visible_text(piece: TokenPiece) -> str:
    """Returns a piece's text on one line; a joined one with its length."""
    text = piece.text.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍").replace("\x1b", "␛")
    return f"{text} × {piece.count}" if LOOKS[piece.kind].joined and piece.count > 1 else text


ELSEWHERE = ("deepspeed", "bf16", "fp16", "report_to", "load_best_model_at_end", "eval_strategy", "optim")
"""These fields of `training:` change no batch and ask for devices, packages or weights."""


def show(options: argparse.Namespace) -> Iterator[str]:
    """Makes the batch and shows it; yields the lines to print."""
    config = read_run([f"--config={options.config}", *options.settings], program="dora-vl show batch")
    with tempfile.TemporaryDirectory() as folder:
        view = first_batch(pipeline_of(shown_settings(config, Path(folder))))
        # https://force-color.org, https://no-color.org
        on_a_screen = sys.stdout.isatty() or "FORCE_COLOR" in os.environ
        yield from terminal_lines(view, colours=on_a_screen and "NO_COLOR" not in os.environ)


def shown_settings(config: RunConfig, folder: Path) -> RunConfig:
    """Returns a run's settings for looking at its data: nothing is cached, and files go to `folder`."""
    training = {name: value for name, value in config.training.items() if name not in ELSEWHERE}
    training |= {"output_dir": str(folder), "use_cpu": True, "eval_strategy": "no"}
    data = dataclasses.replace(config.data, workers=0, cache_features=False, replay=0.0)
    model = dataclasses.replace(config.model, dtype="float32", quantisation=None)
    adapter = dataclasses.replace(config.adapter, projector_start=None)
    return dataclasses.replace(config, adapter=adapter, training=training, data=data, model=model, resume=None)


class FirstBatch(NamedTuple):
    """The micro-batch that a process sees first, its samples' ids, an epoch's samples, and what reads its tokens."""

    batch: dict[str, Any]
    names: list[str]
    epoch_samples: int
    reading: TokenText


def first_batch(pipeline: Pipeline) -> BatchView:
    """Returns the batch that one process would see first."""
    first = read_first_batch(pipeline)
    return batch_view(first.batch, first.names, first.reading, shifted=pipeline.labels_shift)


def read_first_batch(pipeline: Pipeline) -> FirstBatch:
    """Makes the first micro-batch as training would."""
    arguments = pipeline.arguments()
    pipeline.prepare(arguments)
    backbone = pipeline.skeleton()
    data = pipeline.data(backbone, arguments)
    batches: list[tuple[list[Any], dict[str, Any]]] = []

    def collate_and_keep(items: list[Any]) -> dict[str, Any]:
        batch = dict(data.collate(items))
        batches.append((items, dict(batch)))
        return batch

    # A loader asks nothing of the model.
    trainer = OrderedTrainer(dataclasses.replace(data, collate=collate_and_keep), model=nn.Linear(1, 1), args=arguments)
    for set_epoch in data.set_epoch:
        set_epoch(0)
    next(iter(trainer.get_train_dataloader()))
    items, batch = batches[0]  # a loader reads a batch ahead
    samples = getattr(items[0], "items", items)  # a mixture's item is a whole micro-batch
    names = [sample.id for sample in samples if not isinstance(sample, Skipped)]
    return FirstBatch(batch, names, data.samples, TokenText(*pipeline.reading(backbone, arguments)))
