"""How an encoder-decoder answers a batch: by search, by two logits, or by the likelihood of each choice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dora_vl.backbones.seq2seq_text import Seq2SeqEncoder
from dora_vl.backbones.vlbart import VlBartBackbone
from dora_vl.data.dataset import IGNORED_LABEL
from dora_vl.data.examples import Example
from dora_vl.heads.choice import likeliest, says_true
from dora_vl.tasks.subtask import Subtask

TRUE, FALSE = "true", "false"
LONGEST_LABEL = 20


def answers_of(
    backbone: VlBartBackbone,
    encoder: Seq2SeqEncoder,
    subtask: Subtask,
    examples: Sequence[Example],
    inputs: Sequence[Tensor],
) -> list[str]:
    """One batch's answers, in the way that the task has them."""
    ids, mask, features = inputs
    if subtask.answer_by == "pair":
        return _pairs(backbone, encoder, ids, mask, features)
    if subtask.answer_by == "choice":
        labels = padded_labels(encoder, [f"a{index}" for index in range(max(len(one.choices) for one in examples))])
        scores = backbone.likelihoods(ids, mask, features, labels)
        for row, example in enumerate(examples):
            scores[row, len(example.choices) :] = float("-inf")
        return [f"a{index}" for index in likeliest(scores).tolist()]
    if subtask.answer_by == "words":
        return [
            _likeliest_words(backbone, encoder, example, [part[row : row + 1] for part in inputs])
            for row, example in enumerate(examples)
        ]
    search = subtask.search
    new = backbone.generate(
        ids,
        mask,
        features,
        max_length=search.max_length,
        num_beams=search.beams,
        no_repeat_ngram_size=search.no_repeat_ngram,
    )
    return [encoder.decode(row) for row in new.cpu()]


def _likeliest_words(
    backbone: VlBartBackbone, encoder: Seq2SeqEncoder, example: Example, inputs: Sequence[Tensor]
) -> str:
    """The label of the choice whose own words are likeliest; each example has choices of its own."""
    ids, mask, features = inputs
    return f"a{int(likeliest(backbone.likelihoods(ids, mask, features, padded_labels(encoder, example.choices))))}"


def padded_labels(encoder: Seq2SeqEncoder, texts: Sequence[str]) -> Int[Tensor, "choices answer"]:
    """Labels as rows of ids, -100 behind the shorter ones."""
    labels = [encoder.labels(text, max_tokens=LONGEST_LABEL) for text in texts]
    return pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL)


def _pairs(backbone: VlBartBackbone, encoder: Seq2SeqEncoder, ids: Tensor, mask: Tensor, features: Tensor) -> list[str]:
    """After the start and `<s>`, the logits of "true" and "false" at the next place.

    Where a small vocabulary spells one of them in pieces, the likelier of the two whole labels.
    """
    true_token, false_token = encoder.first_token(TRUE), encoder.first_token(FALSE)
    if true_token is None or false_token is None:
        labels = padded_labels(encoder, (TRUE, FALSE))
        return [
            TRUE if one == 0 else FALSE for one in likeliest(backbone.likelihoods(ids, mask, features, labels)).tolist()
        ]
    encoded, joint = backbone.encode(ids, mask, features)
    config = backbone.config
    begun = torch.tensor([[config.decoder_start_token_id, config.bos_token_id]], device=ids.device)
    hidden = backbone.decode(begun.expand(len(ids), -1), encoded, joint)
    chosen = says_true(backbone.logits(hidden[:, 1]), true_token=true_token, false_token=false_token)
    return [TRUE if one else FALSE for one in chosen.tolist()]
