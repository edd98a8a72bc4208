"""What a linear map reads of a frozen tower's stored outputs: where a projector starts, and what training can learn."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dora_vl.backbones.frozen_outputs import OutputStore, PictureReader
from dora_vl.data.example import Example, turns_of
from dora_vl.data.turns import IMAGE_PLACEHOLDER
from dora_vl.errors import BadSample
from dora_vl.evaluation.baselines import LEAST_ASKED
from dora_vl.run.folder import PROJECTOR_START
from dora_vl.run.launch import gathered, on_first_rank
from dora_vl.run.sharding import gather_to_read, gather_to_write

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dora_vl.backbones.model import DecoderBackbone

logger = logging.getLogger(__name__)

MOST_PICTURES = 2_000
"""A map is fitted to so many samples at most, at even distances: seconds on one core."""
CELLS = 16
"""Cells of a picture that are kept, at even distances."""
HIDDEN_SPREAD = 0.25
"""Spread of a hidden unit before GELU where two of them carry one number; small, so that neither is ever at rest."""
Round = tuple[tuple[str, ...], str, str]
"""Holds a sample's pictures, a question about them, and its answer."""


def rounds_of(examples: Iterable[Example]) -> Iterator[Round]:
    """Yields questions about pictures with the answers that are learned."""
    for example in examples:
        question = ""
        for turn in turns_of(example) if example.images and example.is_good is not False else ():
            text = turn.text.replace(IMAGE_PLACEHOLDER, "").strip()
            if turn.role == "assistant" and turn.is_trained:
                yield example.images, question, text
            question = text


@dataclass(frozen=True)
class Ridge:
    """A linear map of standardised numbers, `(x - mean) / spread @ weights + offset`.

    Attributes:
        unexplained: the share of the targets' variance that is left where each row is left out of the fit.
    """

    mean: Float[Tensor, " inputs"]
    spread: Float[Tensor, " inputs"]
    weights: Float[Tensor, "inputs targets"]
    offset: Float[Tensor, " targets"]
    unexplained: float

    @classmethod
    def fit(cls, inputs: Float[Tensor, "rows inputs"], targets: Float[Tensor, "rows targets"]) -> Ridge:
        """Fits by least squares with the penalty that predicts left-out rows best, in closed form for each."""
        rows, width = inputs.shape
        mean, offset = inputs.mean(0), targets.mean(0)
        spread = inputs.std(0, correction=0)
        spread = spread.clamp_min(0.1 * float(spread.square().mean().sqrt())).clamp_min(1e-12)  # no blown-up noise
        standard, wanted = (inputs - mean) / spread, targets - offset
        values, vectors = torch.linalg.eigh(standard @ standard.T if rows <= width else standard.T @ standard)
        kept = values > 1e-9 * values[-1]
        values, vectors = values[kept], vectors[:, kept]
        left = vectors if rows <= width else standard @ vectors / values.sqrt()
        turned, best = left.T @ wanted, (float("inf"), 1.0)
        for exponent in range(-4, 5):
            penalty = float(values.sum()) / rows * 10 ** (exponent / 2)
            share = values / (values + penalty)
            leverage = left.square() @ share + 1 / rows
            error = (wanted - left @ (share[:, None] * turned)) / (1 - leverage).clamp_min(1e-3)[:, None]
            best = min(best, (float(error.square().sum() / wanted.square().sum().clamp_min(1e-12)), penalty))
        weights = standard.T @ (left @ (turned / (values + best[1])[:, None]))
        return cls(mean, spread, weights, offset, best[0])

    def __call__(self, inputs: Float[Tensor, "rows inputs"]) -> Float[Tensor, "rows targets"]:
        """Computes the map."""
        return (inputs - self.mean) / self.spread @ self.weights + self.offset


class _ProjectorReached(Exception):
    """Ends a pass where the projector gets its input."""


@torch.no_grad()
def projector_inputs(
    backbone: DecoderBackbone, store: OutputStore, reader: PictureReader, pictures: Iterable[tuple[str, ...]]
) -> dict[tuple[str, ...], Float[Tensor, "cells width"]]:
    """Returns by a sample's pictures what a LLaVA's projector gets of them: their mean, then at most `CELLS` cells.

    Pictures that cannot be read are left out.
    """
    model, parts = backbone.model, backbone.frozen_parts
    assert parts is not None, "the outputs are stored"
    llava: Any = model.base_model
    reached: list[Tensor] = []

    def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        reached.append(inputs[0].flatten(0, 1).double().cpu())
        raise _ProjectorReached

    seen: dict[tuple[str, ...], Tensor] = {}
    hook = llava.multi_modal_projector.register_forward_pre_hook(stop)
    try:
        for names in dict.fromkeys(pictures):
            try:
                outputs = store.read(reader, names).outputs
            except BadSample:
                continue
            with parts.replaying(model, [outputs]), contextlib.suppress(_ProjectorReached):
                llava.get_image_features(torch.zeros(1, device=model.device))
            cells = reached.pop()
            seen[names] = torch.cat([cells.mean(0, keepdim=True), cells[:: -(-len(cells) // CELLS)]])
    finally:
        hook.remove()
    return seen


# -- where a projector starts


def trains_whole(projector: nn.Module) -> bool:
    """Tells whether all weights of a projector train and are stored, which an adapter on them does not do."""
    return all(weight.requires_grad for weight in projector.parameters()) and {*dict(projector.named_parameters())} == {
        f"linear_{number}.{leaf}" for number in (1, 2) for leaf in ("weight", "bias")
    }


def start_projector(
    backbone: DecoderBackbone,
    tokenizer: PreTrainedTokenizerBase,
    rounds: Sequence[Round],
    store: OutputStore,
    reader: PictureReader,
    form: Literal["scaled", "answers"],
    run_folder: Path,
) -> None:
    """Gives a LLaVA's projector its start; every rank must call it, the first one computes it.

    A resumed run takes that of the run that it goes on: what comes after is compared with the model as it began.
    """
    file = run_folder / PROJECTOR_START
    projector: Any = backbone.model.base_model.multi_modal_projector
    weights = dict(projector.named_parameters())
    started: dict[str, Tensor] = {}

    def compute() -> None:
        if file.is_file():
            started.update(load_file(file))
            return
        seen = projector_inputs(backbone, store, reader, (names for names, _, _ in rounds))
        embedding = table.detach().double().cpu()

        def embedded(text: str) -> Tensor | None:
            ids = tokenizer(text, add_special_tokens=False).input_ids
            return embedding[ids].mean(0) if ids else None

        texts = {text: vector for _, _, text in rounds if (vector := embedded(text)) is not None}
        usable = [each for each in rounds if each[0] in seen and each[2] in texts]
        before = {name: tensor.detach().double().cpu() for name, tensor in zip(weights, values, strict=True)}
        made = projector_start(usable, seen, texts, before, form)
        started.update({name: tensor.float().contiguous() for name, tensor in made.items()})
        save_file(started, file)

    embeddings: Any = backbone.model.get_input_embeddings()
    with gather_to_read([embeddings.weight, *weights.values()]) as (table, *values):
        on_first_rank(compute)
    started = gathered(started)[0]
    with torch.no_grad(), gather_to_write(weights.values()) as whole:
        for name, weight in zip(weights, whole, strict=True):
            weight.copy_(started[name])


def projector_start(
    rounds: Sequence[Round],
    seen: Mapping[tuple[str, ...], Float[Tensor, "cells width"]],
    embedded: Mapping[str, Float[Tensor, " hidden"]],
    weights: Mapping[str, Tensor],
    form: Literal["scaled", "answers"],
) -> dict[str, Tensor]:
    """Returns a two-layer projector whose outputs have the mean and spread of the answers' mean embeddings.

    `answers` maps standardised cells to them by ridge; `scaled` keeps the random map `weights`. What an answer says is
    counted from the mean over its question, since a picture does not tell what is asked.
    """
    everything = torch.stack([embedded[text] for _, _, text in rounds]).mean(0)
    by_question: defaultdict[str, list[Tensor]] = defaultdict(list)
    for _, question, text in rounds:
        by_question[question].append(embedded[text])
    usual = {name: torch.stack(several).mean(0) for name, several in by_question.items() if len(several) >= LEAST_ASKED}
    said: defaultdict[tuple[str, ...], list[Tensor]] = defaultdict(list)
    for names, question, text in rounds:
        said[names].append(embedded[text] - usual.get(question, everything))
    targets = torch.stack([torch.stack(several).mean(0) for several in said.values()])
    ridge = Ridge.fit(torch.stack([seen[names][0] for names in said]), targets)
    cells = torch.cat([seen[names][1:] for names in said])
    size = _size(targets)
    first = weights["linear_1.weight"] / ridge.spread
    bias, second = weights["linear_1.bias"] - first @ ridge.mean, weights["linear_2.weight"]
    readable = f"{max(0.0, 1 - ridge.unexplained):.0%} of what answers say of {len(said):,} samples' pictures"
    if form == "scaled" or ridge.unexplained >= 1 or size == 0:
        made = F.gelu(cells @ first.T + bias) @ second.T
        factor = size / _size(made - made.mean(0)) if size else 1.0
        logger.info("the projector starts scaled to the pictures and the answers (%s is read linearly)", readable)
        return {
            **{"linear_1.weight": first, "linear_1.bias": bias},
            **{"linear_2.weight": second * factor, "linear_2.bias": everything - made.mean(0) * factor},
        }
    mapped = (cells - ridge.mean) / ridge.spread @ ridge.weights
    scale = size / _size(mapped)
    variances, directions = torch.linalg.eigh(mapped.T @ mapped)
    rank = min(len(first) // 2, int((variances > 1e-12 * variances[-1]).sum()))
    directions = directions[:, -rank:]
    spread = scale * (mapped @ directions).square().mean(0).sqrt() / HIDDEN_SPREAD
    rows = (scale * ridge.weights @ directions / spread / ridge.spread[:, None]).T
    second = torch.zeros_like(second)  # GELU(x) - GELU(-x) = x: two hidden units carry a number as it is
    first[: 2 * rank], bias[: 2 * rank] = torch.cat([rows, -rows]), torch.cat([-rows @ ridge.mean, rows @ ridge.mean])
    second[:, : 2 * rank] = torch.cat([directions * spread, -directions * spread], 1)
    logger.info("the projector starts at the answers' words: a linear map reads %s", readable)
    return {
        **{"linear_1.weight": first, "linear_1.bias": bias},
        **{"linear_2.weight": second, "linear_2.bias": everything},
    }


def _size(vectors: Float[Tensor, "rows width"]) -> float:
    """Returns the root mean square of the vectors' lengths."""
    return float(vectors.square().sum(1).mean().sqrt())


# -- what can be read


def probe(
    train: Sequence[Round], test: Sequence[Round], seen: Mapping[tuple[str, ...], Float[Tensor, "cells width"]]
) -> list[str | None]:
    """Returns the answer that a linear map reads of each test question's pictures; None where it cannot be asked.

    A question that is asked `LEAST_ASKED` times has a map of its own, all others share one, which does not know what is
    asked.
    """
    times = Counter(question for _, question, _ in train)
    kinds: defaultdict[Hashable, tuple[list[Round], list[int]]] = defaultdict(lambda: ([], []))
    for each in train:
        if each[0] in seen:
            kinds[each[1] if times[each[1]] >= LEAST_ASKED else None][0].append(each)
    for number, each in enumerate(test):
        if each[0] in seen:
            kinds[each[1] if times[each[1]] >= LEAST_ASKED else None][1].append(number)
    read: list[str | None] = [None] * len(test)
    for known, numbers in kinds.values():
        answers = list(dict.fromkeys(text for _, _, text in known))
        if not numbers or not 1 < len(answers) <= len(known) / 2:
            continue
        targets = F.one_hot(torch.tensor([answers.index(text) for _, _, text in known])).double()
        guesses = []
        for cells in (slice(0, 1), slice(1, None)):
            inputs, asked = (
                torch.stack([seen[names][cells].flatten() for names in several])
                for several in ([each[0] for each in known], [test[number][0] for number in numbers])
            )
            ridge = Ridge.fit(inputs, targets)
            guesses.append((ridge.unexplained, ridge(asked).argmax(1).tolist()))
        for number, index in zip(numbers, min(guesses)[1], strict=True):
            read[number] = answers[index]
    return read
