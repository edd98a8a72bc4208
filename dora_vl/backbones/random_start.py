"""Random starts: a small language model with its own vocabulary, and the layer that reads features."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float
from tokenizers import ByteLevelBPETokenizer, Tokenizer, processors
from torch import Tensor, nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

from dora_vl.backbones.loading import LanguageModel
from dora_vl.backbones.specs import SmallLanguageModel
from dora_vl.backbones.vision_store import open_features
from dora_vl.data.check import FileCheck
from dora_vl.data.containers import find_files
from dora_vl.data.turns import IMAGE_PLACEHOLDER
from dora_vl.errors import BadSample, UserError

MOST_FILES = 2000
LEAST_SPREAD = 0.1
"""Lower bound of a number's spread, as a share of all numbers' spread, so that noise is not blown up."""


def measured(folder: Path) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]:
    """Measures mean and spread of each number of a token, over the tokens of the folder's first files."""
    source = open_features(folder)
    tokens = torch.cat([source.read(name).double() for name in islice(source.rows, MOST_FILES)])
    spread = tokens.std(dim=0, correction=0)
    least = LEAST_SPREAD * float(tokens.std(correction=0))
    return tokens.mean(dim=0).float(), spread.clamp_min(least).float()


@torch.no_grad()
def standardise(linear: nn.Linear, mean: Float[Tensor, " channels"], spread: Float[Tensor, " channels"]) -> None:
    """Changes a layer so that it does with raw numbers what it did with standardised ones."""
    linear.weight.div_(spread)
    linear.bias.sub_(linear.weight @ mean)


def small_llama(spec: SmallLanguageModel, *, seed: int, dtype: torch.dtype) -> LanguageModel:
    """Makes a Llama with random weights; its texts begin with `<s>` as Llama's do."""
    tokenizer = small_tokenizer(texts_of(spec), vocabulary=spec.vocabulary, form="<s> $A")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=spec.width,
        intermediate_size=spec.feedforward,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        max_position_embeddings=spec.max_positions,
        initializer_range=spec.init_std,
        tie_word_embeddings=True,
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = LlamaForCausalLM(config).state_dict()
    weights = {name: value.to(dtype) for name, value in drawn.items() if name != "lm_head.weight"}  # the embedding's
    return LanguageModel(config=config, weights=weights, generation=None, tokenizer=tokenizer)


def small_tokenizer(
    texts: Iterator[str], *, vocabulary: int, leading_space: bool = False, form: str = "<s> $A </s>"
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE on texts, with BART's special tokens at BART's ids; no text is unknown to it.

    Args:
        leading_space: a text begins with a space, so that an answer's first word is the token that it is inside a
            question; BART's own does not.
        form: a text and the special tokens around it.
    """
    named = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"}
    special = list(named.values())
    bpe = ByteLevelBPETokenizer(add_prefix_space=leading_space)
    bpe.train_from_iterator(texts, vocabulary, min_frequency=0, show_progress=False, special_tokens=special)
    whole = Tokenizer.from_str(bpe.to_str())
    ends = [(token, special.index(token)) for token in ("<s>", "</s>")]
    whole.post_processor = processors.TemplateProcessing(single=form, special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=whole, **{f"{name}_token": token for name, token in named.items()})


def texts_of(spec: SmallLanguageModel) -> Iterator[str]:
    """Yields all words of the files a vocabulary is made from, and its further texts."""
    for path in map(Path, spec.texts):
        check = FileCheck(path, answers_needed=False)
        for example in map(check.read, find_files(path).rows()):
            if isinstance(example, BadSample):
                raise UserError(f"{path}: {example}")
            turns = (turn.text.replace(IMAGE_PLACEHOLDER, "").strip() for turn in example.turns)
            yield from filter(None, (example.question, *turns, *example.choices))
            yield from (part.text for part in (*example.answers, *example.subtitles))
    yield from spec.words
