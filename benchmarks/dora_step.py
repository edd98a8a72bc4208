"""Times a training step and a one-token decode step: frozen model, PEFT LoRA, PEFT DoRA and this project.

    python benchmarks/dora_step.py --rank 16 128 --dropout 0 0.05 --json benchmarks/results.jsonl

The model is SmolLM2-135M's shapes with all seven projections adapted, unless `--model FOLDER` names another. A step
is forward, backward and AdamW, logits only at the labelled places. The allocator keeps a step's memory for the next,
for all contenders, as training here does. Contenders take turns in one process; quoted are medians over rounds of the
ratios inside one round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.contenders import CLOCKS, DEVICE, contender, take_turns, train_step
from benchmarks.report import write_json
from dora_vl.backbones.loading import load_pretrained
from dora_vl.run.launch import keep_freed_memory

TRAINED = ("frozen", "peft_lora", "peft_dora", "peft_dora_accelerated", "ours")
DECODED = ("frozen", "peft_lora", "peft_dora", "ours", "ours_merged")
SMOLLM2_135M = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
"""Times and bytes depend only on shapes, so random weights of these shapes do where no folder is given."""


def main() -> None:
    """Times every setting, prints the tables and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--rounds", type=int, default=5, help="how often each contender takes a turn")
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn; its time is their median")
    parser.add_argument(
        "--clock",
        default="wall",
        choices=CLOCKS,
        help="processor: for a machine that others use; set OMP_NUM_THREADS=1",
    )
    options = parser.parse_args()
    keep_freed_memory()
    figures = [time_setting(rank, dropout, options) for rank, dropout in product(options.rank, options.dropout)]
    shown = {name: value for name, value in vars(options).items() if name != "json"}
    write_json(options.json, {"options": shown, "settings": figures})


def time_setting(rank: int, dropout: float, options: argparse.Namespace) -> dict[str, Any]:
    """Times one setting: ratios of training and decoding, with the milliseconds that they come from."""
    base = base_model(options)
    loss = partial(loss_of, tokens=Tokens.random(base.config.vocab_size, options))
    adapt = partial(contender, base=base, rank=rank, dropout=dropout)
    turns = {"rounds": options.rounds, "repeats": options.steps, "clock": options.clock}
    training = take_turns({name: train_step(adapt(name), loss) for name in TRAINED}, **turns)
    ratios = {
        "train_vs_frozen": training.ratio("ours", "frozen"),
        "train_vs_peft_lora": training.ratio("ours", "peft_lora"),
        "train_vs_peft_dora": training.ratio("ours", "peft_dora"),
        "accelerated_vs_peft_dora": training.ratio("peft_dora_accelerated", "peft_dora"),
    }
    row = {"rank": rank, "dropout": dropout, "train_ms": training.milliseconds, **ratios}
    print(f"\nrank {rank}, dropout {dropout}, training step, {options.dtype}")
    print(training.shown("peft_lora"))
    if dropout == options.dropout[0]:
        decoding = take_turns({name: decode_step(adapt(name)) for name in DECODED}, **turns)
        row |= {
            "decode_ms": decoding.milliseconds,
            "decode_vs_peft_lora": decoding.ratio("ours", "peft_lora"),
            "decode_vs_peft_dora": decoding.ratio("ours", "peft_dora"),
            "merged_decode_vs_frozen": decoding.ratio("ours_merged", "frozen"),
        }
        print(f"\nrank {rank}, one-token decode")
        print(decoding.shown("peft_lora"))
    return row


def decode_step(model: Any) -> Callable[[], None]:
    """Makes a step that decodes one token after 96 others, with their keys and values kept."""
    model.eval()
    ids = torch.arange(96, device=DEVICE).unsqueeze(0)
    cache = DynamicCache(config=model.config)

    @torch.no_grad()
    def step() -> None:
        model(ids[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    return step


@dataclass(frozen=True)
class Tokens:
    """The batch: token ids, the positions that carry a label, and the labels."""

    ids: Tensor
    positions: Tensor
    targets: Tensor

    @classmethod
    def random(cls, vocabulary: int, options: argparse.Namespace) -> Tokens:
        """Draws a batch of which the last `labels` tokens of each row are predicted."""
        shape, generator = (options.batch, options.tokens), torch.Generator().manual_seed(0)
        ids = torch.randint(vocabulary, shape, generator=generator).to(DEVICE)
        positions = torch.arange(options.tokens - options.labels - 1, options.tokens - 1, device=DEVICE)
        return cls(ids, positions, ids[:, positions + 1].reshape(-1))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of model, settings and batch, for `dora_memory.py` too."""
    parser.add_argument("--model", help="folder of a causal language model; default: shapes of SmolLM2-135M")
    parser.add_argument("--rank", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.05])
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--batch", type=int, default=8, help="rows")
    parser.add_argument("--tokens", type=int, default=96, help="tokens per row")
    parser.add_argument("--labels", type=int, default=6, help="labelled tokens per row")
    parser.add_argument("--json", type=Path, help="file for the figures")


def base_model(options: argparse.Namespace) -> Any:
    """Returns a causal language model from a folder, or SmolLM2-135M's shapes with random weights."""
    torch.manual_seed(0)
    folder = options.model
    model: Any = LlamaForCausalLM(SMOLLM2_135M) if folder is None else load_pretrained(AutoModelForCausalLM, folder)
    return model.to(DEVICE, getattr(torch, options.dtype))


def loss_of(model: Any, tokens: Tokens) -> Tensor:
    """Returns the cross-entropy at the labelled places; logits exist only there, for all contenders."""
    embeds = model.get_input_embeddings()(tokens.ids).detach().requires_grad_()
    hidden = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    chosen = hidden[:, tokens.positions].flatten(0, 1)
    return F.cross_entropy(model.lm_head(chosen).float(), tokens.targets)


if __name__ == "__main__":
    main()
