"""The likeliest of given outputs: the prompt runs once, each output is a branch behind it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from dora_vl.backbones.base import Features
from dora_vl.data.samples import IGNORED_LABEL
from dora_vl.errors import BadSample, UserError, shown, shown_text
from dora_vl.evaluation.predict import refuse_without_numbers
from dora_vl.evaluation.predictions import Prediction, PredictionsFile
from dora_vl.evaluation.questions import Question

FORMAT = re.compile(r"Answer format:\s*(\S.*?)\s*$")

EncodeChoice = Callable[[Question, str], tuple[Tensor, int]]
"""Ids of a question's prompt with an output (and its end) behind it, and the place where the output begins."""


@dataclass(frozen=True)
class Branches:
    """One question as a row: what its outputs have in common once, then the rest of each (`data.collate`)."""

    input_ids: Int[Tensor, " seq"]
    labels: Int[Tensor, " seq"]
    layout: Int[Tensor, "3 seq"]


def outputs_of(question: Question) -> list[str]:
    """The outputs that the question's last line, `Answer format: a/b/...`, admits, in its order.

    What stands before the answer in the true output stands before each: "the correct answer is ".

    Raises:
        BadSample: no such line, or the true answer is not among them or does not end the true output.
    """
    found = FORMAT.search(question.turns[-1].instruction)
    if found is None:
        raise BadSample(question.id, "its last line names no choices (`Answer format: a/b/...`)")
    choices = [choice.strip() for choice in found[1].split("/")]
    if question.answer not in choices or not question.truth.endswith(question.answer):
        allowed = shown_text("/".join(choices))
        raise BadSample(
            question.id, f"its answer {shown(question.answer)} is not one of {allowed}, or not its output's end"
        )
    before = question.truth.removesuffix(question.answer)
    return [before + choice for choice in choices]


def branches(outputs: Sequence[tuple[Int[Tensor, " _"], int]]) -> Branches:
    """Outputs of one prompt, each as ids with the place where the output begins.

    The last common token is the first of every branch, so that what follows it is predicted inside the branch. What
    the outputs have in common adds the same to each likelihood and is left out.
    """
    shortest = min(len(ids) for ids, _ in outputs)
    first = outputs[0][0]
    same = torch.stack([ids[:shortest] == first[:shortest] for ids, _ in outputs]).all(0)
    shared = (shortest if bool(same.all()) else int((~same).int().argmax())) - 1
    prefix = torch.arange(shared)
    layout = [torch.stack([prefix, torch.ones_like(prefix), torch.zeros_like(prefix)])]
    ids, labels = [first[:shared]], [torch.full((shared,), IGNORED_LABEL)]
    for number, (tokens, start) in enumerate(outputs, start=1):
        places = torch.arange(shared, len(tokens))
        layout.append(torch.stack([places, torch.ones_like(places), torch.full_like(places, number)]))
        ids.append(tokens[shared:])
        trained = (places >= start) & (places > shared)
        labels.append(torch.where(trained, tokens[shared:], torch.full_like(places, IGNORED_LABEL)))
    return Branches(torch.cat(ids), torch.cat(labels), torch.cat(layout, dim=1))


@torch.inference_mode()
def log_likelihoods(
    backbone: nn.Module, questions: Sequence[Branches], *, device: torch.device
) -> list[Float[Tensor, " outputs"]]:
    """For each question, the log-likelihood of each output behind the prompt, up to what they have in common."""
    ids, labels, layout = (
        pad_sequence([getattr(one, name).movedim(-1, 0) for one in questions], batch_first=True, padding_value=fill).to(
            device
        )
        for name, fill in (("input_ids", 0), ("labels", IGNORED_LABEL), ("layout", 0))
    )
    layout = layout.transpose(1, 2)
    features: Features = backbone(
        input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, layout=layout.contiguous()
    )
    likelihood = features.logits.float().log_softmax(-1).gather(1, features.targets.unsqueeze(1)).squeeze(1)
    branch = layout[:, 2, 1:][labels[:, 1:] != IGNORED_LABEL]
    most = int(layout[:, 2].max())
    sums = torch.zeros(len(questions), most, device=device).index_put_(
        (features.rows, branch - 1), likelihood, accumulate=True
    )
    return [sums[row, : int(one.layout[2].max())].cpu() for row, one in enumerate(questions)]


def choose(
    backbone: nn.Module,
    encode: EncodeChoice,
    questions: Sequence[Question],
    *,
    file: PredictionsFile,
    batch_size: int,
) -> dict[str, str]:
    """Writes the likeliest output of every question that `file` has no prediction for; of equals the first.

    Returns:
        The reason for each question that could not be asked, by id.

    Raises:
        UserError: no question can be asked, or likelihoods were no numbers; the other questions are answered first.
    """
    device = next(iter(backbone.parameters())).device
    failed: dict[str, str] = {}
    broken: list[str] = []
    todo: list[tuple[Question, list[str], Branches]] = []
    for question in questions:
        if question.id in file.done:
            continue
        try:
            outputs = outputs_of(question)
            todo.append((question, outputs, branches([encode(question, one) for one in outputs])))
        except BadSample as error:
            failed[question.id] = error.reason
    if failed and len(failed) == len(questions):
        name, reason = next(iter(failed.items()))
        raise UserError(f"no question can be scored by likelihood; {name}: {reason}")
    todo.sort(key=lambda one: len(one[2].input_ids), reverse=True)
    rest = iter(todo)
    with tqdm(total=len(todo), desc="choosing", unit="question", disable=not todo) as progress:
        while batch := list(islice(rest, batch_size)):
            found = log_likelihoods(backbone, [rows for _, _, rows in batch], device=device)
            for (question, outputs, _), scores in zip(batch, found, strict=True):
                if scores.isnan().any():
                    broken.append(question.id)
                else:
                    file.add(_prediction(question, outputs[int(scores.argmax())]))
            file.flush()
            progress.update(len(batch))
    refuse_without_numbers(broken)
    return failed


def _prediction(question: Question, output: str) -> Prediction:
    return Prediction(
        id=question.id,
        images=[],
        question=question.text,
        truth=question.truth,
        prediction=output,
        kind=question.kind,
    )
