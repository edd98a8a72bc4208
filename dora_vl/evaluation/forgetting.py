"""What a model loses while it learns: perplexity of plain text, and its answers to questions about other things.

Both are measured on the base and with the adapter, on a few passages and questions that this project wrote
(`forgetting.json`), or on texts of one's own: so a base has seen none of them, and no data set is needed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dora_vl.data.example import Example
from dora_vl.data.samples import IGNORED_LABEL, Sample
from dora_vl.data.text_file import text_lines
from dora_vl.errors import BadSample, UserError, one_line
from dora_vl.evaluation.assistant import Assistant
from dora_vl.evaluation.predictor import Decoding, media_reader

PASSAGES: Mapping[str, list[str]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
NEW_TOKENS, BATCH = 24, 8
MOST_TOKENS = 512  # of a text; the rest of a longer one does not count


@dataclass(frozen=True)
class Abilities:
    """What one model makes of the passages and questions.

    Attributes:
        nats: mean cross-entropy of a token of the texts.
        answers: by question; None where the model takes no words without a picture.
    """

    nats: float
    tokens: int
    answers: Mapping[str, str] | None


def abilities(assistant: Assistant, texts: Path | None = None) -> Abilities:
    """Measures a model; `texts` holds a passage a line."""
    passages = PASSAGES["texts"]
    if texts is not None:
        passages = [line.strip() for _, line in text_lines(texts, "a passage a line") if line.strip()]
        if not passages:
            raise UserError(f"{texts}: holds no text")
    tokenizer = assistant.prompts.encoder.tokenizer
    samples: list[Sample] = []
    for passage in passages:
        ids = torch.tensor(tokenizer(passage)["input_ids"][:MOST_TOKENS])
        labels = ids.clone()
        labels[:1] = IGNORED_LABEL
        samples.append(Sample(ids, labels, id=str(len(samples))))
    groups = [samples[start : start + BATCH] for start in range(0, len(samples), BATCH)]
    nats = -sum(float(assistant.log_likelihoods(group).sum()) for group in groups)
    tokens = sum(len(sample.labels) - 1 for sample in samples)
    questions = [Example(id=text, question=text) for text in PASSAGES["questions"]]
    decoding = Decoding(batch_size=BATCH, max_new_tokens=NEW_TOKENS)
    rows = [row for rows in assistant.predict(questions, media_reader(Path(), frames=1), decoding) for row in rows]
    answers = {row.id: row.prediction for row in rows if not row.error}
    return Abilities(nats / tokens, tokens, answers or None)


def forgetting(before: Abilities, after: Abilities) -> dict[str, Any]:
    """Returns what `metrics.json` holds: perplexity of both, and the share of answers that stayed word for word."""
    entry: dict[str, Any] = {
        "perplexity": {"base": math.exp(before.nats), "adapted": math.exp(after.nats), "tokens": before.tokens}
    }
    if before.answers is not None and after.answers is not None:
        pairs = {question: [answer, after.answers.get(question, "")] for question, answer in before.answers.items()}
        kept = sum(first == second for first, second in pairs.values())
        entry["answers"] = {"kept": kept, "n": len(pairs), "base_and_adapted": pairs}
    return entry


def measured(assistant: Assistant, texts: Path | None) -> Abilities | str:
    """Measures a model, or says why it cannot be: some families take no words without a picture."""
    try:
        return abilities(assistant, texts)
    except (BadSample, RuntimeError, ValueError, IndexError, TypeError) as error:
        return one_line(f"{type(error).__name__}: {error}", 200)
