"""What a model loses while it learns: perplexity of plain text, and its answers to questions about other things.

Both are measured on the base and with the adapter, on a few passages and questions that this project wrote
(`forgetting.json`), or on texts of one's own: so a base has seen none of them, and no data set is needed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from dora_vl.data.example import Example
from dora_vl.data.samples import IGNORED_LABEL, Sample
from dora_vl.data.text_file import text_lines
from dora_vl.data.turns import Turn
from dora_vl.errors import BadSample, UserError, one_line
from dora_vl.evaluation.assistant import Assistant, answered_sample
from dora_vl.evaluation.predictor import Decoding, PromptMedia, media_reader
from dora_vl.evaluation.questions import turns_asked

PASSAGES: Mapping[str, list[str]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
NEW_TOKENS, BATCH = 24, 8
MOST_TOKENS = 512  # of a text; the rest of a longer one does not count
MUCH_FORGOTTEN = 1.5
"""Much is forgotten where the base's own answers take this many times the base's nats."""


@dataclass(frozen=True)
class Abilities:
    """One model's results on the passages and questions; `nats` is the mean cross-entropy per token.

    `answers` are None if the model takes no text without a picture; `answer_nats` is of the base's answers.
    """

    nats: float
    tokens: int
    answers: Mapping[str, str] | None
    answer_nats: float | None = None


def measure_abilities(assistant: Assistant, texts: Path | None = None, base: Abilities | None = None) -> Abilities:
    """Measures a model; `texts` holds one passage per line; `base` has its base's results, if it is not the base."""
    passages = PASSAGES["texts"]
    if texts is not None:
        passages = [line.strip() for _, line in text_lines(texts, "a passage a line") if line.strip()]
        if not passages:
            raise UserError(f"{texts}: holds no text")
    tokenizer = assistant.encoder.tokenizer
    samples: list[Sample] = []
    for passage in passages:
        ids = torch.tensor(tokenizer(passage)["input_ids"][:MOST_TOKENS])
        labels = ids.clone()
        labels[:1] = IGNORED_LABEL
        samples.append(Sample(ids, labels, id=str(len(samples))))
    nats = _mean_nats(assistant, samples)
    questions = [Example(id=text, question=text) for text in PASSAGES["questions"]]
    decoding = Decoding(batch_size=BATCH, max_new_tokens=NEW_TOKENS)
    predictions = chain.from_iterable(assistant.predict(questions, media_reader(Path(), frames=1), decoding))
    answers = {prediction.id: prediction.prediction for prediction in predictions if not prediction.error}
    of_base = answers if base is None else base.answers
    base_answers = [
        _answer_sample(assistant, example, text) for example in questions if (text := (of_base or {}).get(example.id))
    ]
    tokens = sum(len(sample.labels) - 1 for sample in samples)
    return Abilities(nats, tokens, answers or None, _mean_nats(assistant, base_answers) if base_answers else None)


def _mean_nats(assistant: Assistant, samples: Sequence[Sample]) -> float:
    groups = [samples[start : start + BATCH] for start in range(0, len(samples), BATCH)]
    nats = -sum(float(assistant.log_likelihoods(group).sum()) for group in groups)
    return nats / sum(int((sample.labels != IGNORED_LABEL).sum()) for sample in samples)


def _answer_sample(assistant: Assistant, example: Example, text: str) -> Sample:
    """Makes a sample of an answer without what closes it: `NEW_TOKENS` may have cut it."""
    turns, encoder = turns_asked(example), assistant.encoder
    sample = answered_sample(encoder, turns, PromptMedia(), text)
    closing = encoder.answers(Example(example.id, turns=(*turns, Turn("assistant", text))))[-1].closing
    labelled = (sample.labels != IGNORED_LABEL).nonzero().flatten()
    length = len(encoder.tokenizer(closing, add_special_tokens=False)["input_ids"])
    if 0 < length < len(labelled):
        sample.labels[labelled[-length:]] = IGNORED_LABEL
    return sample


def compare_abilities(before: Abilities | str, after: Abilities | str) -> dict[str, Any]:
    """Returns what `metrics.json` holds: perplexity of both, and the share of answers that stayed word for word.

    Of a model that cannot be measured it holds the reason.
    """
    if isinstance(before, str) or isinstance(after, str):
        return {"reason": before if isinstance(before, str) else after}
    entry: dict[str, Any] = {
        "perplexity": {"base": math.exp(before.nats), "adapted": math.exp(after.nats), "tokens": before.tokens}
    }
    if before.answers is not None and after.answers is not None:
        pairs = {question: [answer, after.answers.get(question, "")] for question, answer in before.answers.items()}
        kept = sum(first == second for first, second in pairs.values())
        entry["answers"] = {"kept": kept, "n": len(pairs), "base_and_adapted": pairs}
        entry["answers"]["nats"] = {"base": before.answer_nats, "adapted": after.answer_nats}
    return entry


def forgetting_lines(entry: Mapping[str, Any] | None) -> dict[str, str]:
    """Tells how much a run's model forgot; nothing if that was not measured."""
    lines: dict[str, str] = {}
    if numbers := (entry or {}).get("perplexity"):
        before, after = numbers["base"], numbers["adapted"]
        lines["perplexity of other text"] = (
            f"{before:.1f} before, {after:.1f} after ({after / before:.2f} times; up to 1.3 is small)"
        )
    if answers := (entry or {}).get("answers"):
        nats = answers["nats"]
        lines["answers to other questions"] = (
            f"{answers['kept']} of {answers['n']} unchanged word for word; negative log-likelihood of the old answers "
            f"{nats['base']:.2f} nats per token before, {nats['adapted']:.2f} after"
        )
        if nats["adapted"] > MUCH_FORGOTTEN * nats["base"]:
            lines["answers to other questions"] += "; it forgets: train fewer epochs, or raise data.replay"
    return lines


def try_measure(assistant: Assistant, texts: Path | None, base: Abilities | str | None = None) -> Abilities | str:
    """Measures a model, or says why that is not possible: some families take no text without a picture."""
    try:
        return measure_abilities(assistant, texts, base if isinstance(base, Abilities) else None)
    except (BadSample, RuntimeError, ValueError, IndexError, TypeError) as error:
        return one_line(f"{type(error).__name__}: {error}", 200)
