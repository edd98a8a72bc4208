"""Ridge regression from a frozen tower's stored outputs: where a projector starts, and what a linear probe can read."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from dora_vl.backbones.model import DecoderBackbone
from dora_vl.backbones.output_store import OutputStore, PictureReader
from dora_vl.backbones.tower_sources import has_new_projector
from dora_vl.data.example import Example, turns_of
from dora_vl.data.turns import IMAGE_PLACEHOLDER
from dora_vl.errors import BadSample, SettingError
from dora_vl.evaluation.baselines import LEAST_ASKED, right_text
from dora_vl.evaluation.questions import text_asked
from dora_vl.evaluation.test import check_test
from dora_vl.run.folder import PROJECTOR_START, run_folder_of
from dora_vl.run.launch import gather_from_ranks, gather_to_read, gather_to_write, on_first_rank
from dora_vl.run.settings import RunConfig
from dora_vl.shapes import Float
from dora_vl.training.opened import Opened, stored_outputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MOST_SAMPLES = 2_000
"""A regression is fitted to at most this many training samples, evenly spread over the data: seconds on one core."""
CELLS = 16
"""This many of a picture's cells are kept, evenly spread."""
HIDDEN_SPREAD = 0.25
"""A hidden unit spreads this far before GELU if two carry one number; small, so that neither ever saturates."""
Form = Literal["scaled", "answers"]
Round = tuple[tuple[str, ...], str, str]
"""Holds a sample's pictures, a question about them, and its answer."""
Seen = Mapping[tuple[str, ...], Float[Tensor, "cells width"]]
"""Maps a sample's pictures to what a projector gets of them: the mean of its cells, then at most `CELLS` of these."""


def rounds_of(examples: Iterable[Example]) -> Iterator[Round]:
    """Yields questions about pictures with the answers that are trained on."""
    for example in examples:
        question = ""
        for turn in turns_of(example) if example.images and example.is_good is not False else ():
            text = turn.text.replace(IMAGE_PLACEHOLDER, "").strip()
            if turn.role == "assistant" and turn.is_trained and text:
                yield example.images, question, text
            question = text


def projector_inputs(
    config: Any, store: OutputStore, reader: PictureReader, pictures: Iterable[tuple[str, ...]]
) -> Seen:
    """Reads the stored outputs of a LLaVA's tower for samples' pictures; leaves out unreadable ones."""
    skipped = int(config.vision_feature_select_strategy == "default")  # the class token in front
    seen: dict[tuple[str, ...], Tensor] = {}
    for names in dict.fromkeys(pictures):
        try:
            calls = [call for calls in store.read(reader, names).outputs.values() for call in calls]
        except BadSample:
            continue
        (tokens,) = (leaf for call in calls for leaf in call if isinstance(leaf, Tensor))  # the layer that is read
        cells = tokens[:, skipped:].flatten(0, 1).double().cpu()
        seen[names] = torch.cat([cells.mean(0, keepdim=True), cells[:: -(-len(cells) // CELLS)]])
    return seen


@dataclass(frozen=True)
class Ridge:
    """A linear map of standardised numbers, `(x - mean) / spread @ weights + offset`.

    `unexplained` is the share of the targets' variance that remains in leave-one-out predictions.
    """

    mean: Float[Tensor, " inputs"]
    spread: Float[Tensor, " inputs"]
    weights: Float[Tensor, "inputs targets"]
    offset: Float[Tensor, " targets"]
    unexplained: float

    @classmethod
    def fit(cls, inputs: Float[Tensor, "rows inputs"], targets: Float[Tensor, "rows targets"]) -> Ridge:
        """Fits by ridge regression with the penalty of the lowest leave-one-out error, which has a closed form."""
        rows, width = inputs.shape
        mean, offset, spread = inputs.mean(0), targets.mean(0), inputs.std(0, correction=0)
        # What hardly varies is not blown up into noise.
        spread = spread.clamp_min(0.1 * float(spread.square().mean().sqrt()) + 1e-12)
        standard, wanted = (inputs - mean) / spread, targets - offset
        values, vectors = torch.linalg.eigh(standard @ standard.T if rows <= width else standard.T @ standard)
        kept = values > 1e-9 * values[-1]
        values, vectors = values[kept], vectors[:, kept]
        left = vectors if rows <= width else standard @ vectors / values.sqrt()
        turned, best = left.T @ wanted, (float("inf"), 1.0)
        for exponent in range(-6, 5):
            penalty = float(values.sum()) / rows * 10 ** (exponent / 2)
            share = values / (values + penalty)
            leverage = left.square() @ share + 1 / rows
            error = (wanted - left @ (share[:, None] * turned)) / (1 - leverage).clamp_min(1e-9)[:, None]
            best = min(best, (float(error.square().sum() / wanted.square().sum().clamp_min(1e-12)), penalty))
        weights = standard.T @ (left @ (turned / (values + best[1])[:, None]))
        return cls(mean, spread, weights, offset, best[0])

    def __call__(self, inputs: Float[Tensor, "rows inputs"]) -> Float[Tensor, "rows targets"]:
        """Predicts the targets."""
        return (inputs - self.mean) / self.spread @ self.weights + self.offset


def start_projector(
    llava: Any, tokenizer: PreTrainedTokenizerBase, rounds: Sequence[Round], seen: Seen, form: Form, file: Path
) -> None:
    """Gives a LLaVA's projector its start, which `file` keeps; every rank must call it, the first one computes it.

    A resumed run reads the start from `file`, since losses may compare with the model as it was when training began.
    """
    weights, started = dict(llava.multi_modal_projector.named_parameters()), dict[str, Tensor]()

    def compute() -> None:
        if not file.is_file():
            ids = {text: tokenizer(text, add_special_tokens=False).input_ids for _, _, text in rounds}
            words = {text: table[of_text].detach().double().cpu().mean(0) for text, of_text in ids.items() if of_text}
            usable = [each for each in rounds if each[0] in seen and each[2] in words]
            drawn = {name: tensor.detach().double().cpu() for name, tensor in zip(weights, values, strict=True)}
            start = projector_start(usable, seen, words, drawn, form) if usable else drawn
            save_file({name: tensor.float().contiguous() for name, tensor in start.items()}, file)
        started.update(load_file(file))

    with gather_to_read([llava.get_input_embeddings().weight, *weights.values()]) as (table, *values):
        on_first_rank(compute)
    started = gather_from_ranks(started)[0]
    with torch.no_grad(), gather_to_write(weights.values()) as whole:
        for name, weight in zip(weights, whole, strict=True):
            weight.copy_(started[name])


def projector_start(
    rounds: Sequence[Round],
    seen: Seen,
    words: Mapping[str, Float[Tensor, " hidden"]],
    drawn: Mapping[str, Tensor],
    form: Form,
) -> dict[str, Tensor]:
    """Returns a two-layer projector whose outputs have the mean and spread of the answers' mean embeddings, `words`.

    `answers` maps standardised cells to them by ridge; `scaled` keeps the random map `drawn`, as does what says nothing
    of the answers. An answer counts from the mean of its question's, since a picture does not tell what is asked.
    """
    everything = torch.stack([words[text] for _, _, text in rounds]).mean(0)
    by_question = defaultdict[str, list[Tensor]](list)
    for _, question, text in rounds:
        by_question[question].append(words[text])
    usual = {name: torch.stack(several).mean(0) for name, several in by_question.items() if len(several) >= LEAST_ASKED}
    by_pictures = defaultdict[tuple[str, ...], list[Tensor]](list)
    for names, question, text in rounds:
        by_pictures[names].append(words[text] - usual.get(question, everything))
    targets = torch.stack([torch.stack(several).mean(0) for several in by_pictures.values()])
    ridge = Ridge.fit(torch.stack([seen[names][0] for names in by_pictures]), targets)
    cells = torch.cat([seen[names][1:] for names in by_pictures])
    first = drawn["linear_1.weight"] / ridge.spread
    first_bias, second, second_bias = drawn["linear_1.bias"] - first @ ridge.mean, drawn["linear_2.weight"], everything
    size, length = _size(targets), float(everything.norm())
    if size < 1e-6 * length:  # each question has one answer
        form, size = "scaled", length
    form = "scaled" if ridge.unexplained >= 1 else form
    if form == "scaled":
        made = F.gelu(cells @ first.T + first_bias) @ second.T
        second = second * (size / _size(made - made.mean(0)))
        second_bias = everything - (F.gelu(cells @ first.T + first_bias) @ second.T).mean(0)
    else:
        mapped = (cells - ridge.mean) / ridge.spread @ ridge.weights
        scale, (variances, directions) = size / _size(mapped), torch.linalg.eigh(mapped.T @ mapped)
        rank = min(len(first) // 2, int((variances > 1e-12 * variances[-1]).sum()))
        directions = directions[:, -rank:]
        spread = scale * (mapped @ directions).square().mean(0).sqrt() / HIDDEN_SPREAD
        rows = (scale * ridge.weights @ directions / spread / ridge.spread[:, None]).T
        pair = torch.cat([rows, -rows])  # GELU(x) - GELU(-x) = x: two hidden units carry a number as it is
        first[: 2 * rank], first_bias[: 2 * rank] = pair, -pair @ ridge.mean
        second = F.pad(torch.cat([directions * spread, -directions * spread], 1), (0, len(first) - 2 * rank))
    explained = f"{max(0.0, 1 - ridge.unexplained):.0%} of the variance of the answers' word vectors"
    logger.info(
        "adapter.projector_start: %s; %s follows from %s pictures (no share of right answers, which init counts)",
        *(form, explained, f"{len(by_pictures):,}"),
    )
    return {
        **{"linear_1.weight": first, "linear_1.bias": first_bias},
        **{"linear_2.weight": second, "linear_2.bias": second_bias},
    }


def _size(vectors: Float[Tensor, "rows width"]) -> float:
    """Returns the root mean square of the vectors' lengths."""
    return float(vectors.square().sum(1).mean().sqrt().clamp_min(1e-12))


def probe(train: Sequence[Round], test: Sequence[Round], seen: Seen) -> list[str | None]:
    """Returns the answer that a linear probe reads from each test question's pictures; None without a probe.

    A question asked `LEAST_ASKED` times gets its own probe; the others share one, which does not see the question.
    Answers that occur too rarely cannot be read.
    """
    times = Counter(question for _, question, _ in train)
    known, tested = defaultdict[str, list[Round]](list), defaultdict[str, list[int]](list)
    for number, (names, question, _) in enumerate((*train, *test)):
        kind = question if times[question] >= LEAST_ASKED else ""
        if names in seen and number < len(train):
            known[kind].append(train[number])
        elif names in seen:
            tested[kind].append(number - len(train))
    read: list[str | None] = [None] * len(test)
    for kind, numbers in tested.items():
        answers = list(dict.fromkeys(text for _, _, text in known[kind]))
        if 1 < len(answers) <= len(known[kind]) / 2:
            right = F.one_hot(torch.tensor([answers.index(text) for _, _, text in known[kind]])).double()
            ridge = Ridge.fit(torch.stack([seen[names].flatten() for names, _, _ in known[kind]]), right)
            picked = ridge(torch.stack([seen[test[number][0]].flatten() for number in numbers])).argmax(1)
            for number, index in zip(numbers, picked.tolist(), strict=True):
                read[number] = answers[index]
    return read


def form_of(config: RunConfig, backbone: DecoderBackbone | None = None) -> Form | None:
    """Returns the form that a run's projector starts in, None where it has no such start; one that is set is refused.

    Before the model is there, it tells by the settings and the base's folder alone.
    """
    trouble = None
    form, base = config.adapter.projector_start, Path(config.model.base)
    if form == "random" or config.task != "llava":
        return None
    if not config.data.cache_features:
        trouble = "is computed from stored outputs; set data.cache_features: true"
    elif config.adapter.initial is not None:
        trouble = "and adapter.initial both say where the projector begins; leave one out"
    elif not has_new_projector(base):
        trouble = f"is for a new projector, and {base} has one that was trained, or composed elsewhere; leave it out"
    elif backbone is not None:
        llava: Any = backbone.model.base_model
        whole = all(weight.requires_grad for weight in llava.multi_modal_projector.parameters())
        if not whole or any(weight.requires_grad for weight in llava.vision_tower.parameters()):
            trouble = "needs a projector that trains whole, and a tower that does not; leave it out"
    if trouble is not None and form is not None:
        raise SettingError("adapter.projector_start", f" {trouble}")
    return None if trouble is not None else form or "answers"


def start_in(form: Form | None, opened: Opened, backbone: DecoderBackbone, outputs: OutputStore) -> None:
    """Starts a run's projector in a form, from the stored outputs of its pictures; every rank must call it."""
    if form is None:
        return
    rounds = [*rounds_of(opened.samples.evenly_spread(MOST_SAMPLES))]
    seen = projector_inputs(backbone.config, outputs, opened.reader, [names for names, _, _ in rounds])
    file = run_folder_of(opened.config.training) / PROJECTOR_START
    start_projector(backbone.model.base_model, opened.encoder.tokenizer, rounds, seen, form, file)


def readable(opened: Opened, backbone: DecoderBackbone) -> dict[str, str]:
    """Returns by id the answers to the test's questions that a linear map of the base's pictures gives."""
    test = [example for example in check_test(opened.config) if example.images]
    questions = [(example.images, text_asked(example), right_text(example)) for example in test]
    rounds = [*rounds_of(opened.samples.evenly_spread(MOST_SAMPLES))]
    pictures = [names for names, _, _ in (*rounds, *questions)]
    outputs, _ = stored_outputs(opened, backbone, pictures)
    read = probe(rounds, questions, projector_inputs(backbone.config, outputs, opened.reader, pictures))
    return {example.id: answer for example, answer in zip(test, read, strict=True) if answer is not None}
