"""Training speed of a VL-BART of bart-base's shape: full, LoRA and DoRA, on random inputs of the published lengths.

    python benchmarks/vlbart_step.py --batch 16 --steps 5 --json benchmarks/results.jsonl

A step is forward, backward and AdamW; the methods take turns, so that what else the machine does falls on all alike.
Medians of the steps are printed as samples/s, and times relative to full fine-tuning.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, Literal

import torch

from benchmarks.contenders import DEVICE, take_turns, train_step
from benchmarks.report import table, write_json
from dora_vl.backbones.vlbart import DORA_TARGETS, VlBartBackbone, also_trained
from dora_vl.backbones.vlbart_model import VlBartConfig, VlBartForConditionalGeneration
from dora_vl.core import DoRAConfig, apply_dora
from dora_vl.training.seq2seq_tasks import Seq2SeqLoss

Method = Literal["full", "lora", "dora"]
METHODS: tuple[Method, ...] = ("full", "lora", "dora")
QUESTION_TOKENS, ANSWER_TOKENS, GRID_TOKENS, WIDTH = 20, 5, 49, 2048


def bart_base(layers: int) -> VlBartConfig:
    """Configures bart-base's shape with CLIP's grid; fewer layers give a quick look."""
    side = {"layers": layers, "attention_heads": 12, "ffn_dim": 3072}
    sides: dict[str, Any] = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in side.items()}
    return VlBartConfig(vocab_size=50465, d_model=768, feature_width=WIDTH, pooled_side=6, **sides)


def inputs(batch: int) -> dict[str, Any]:
    """Draws random questions, answers and features of VQAv2's lengths."""
    labels = torch.randint(4, 50000, (batch, ANSWER_TOKENS))
    ids = torch.randint(4, 50000, (batch, QUESTION_TOKENS))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "features": torch.rand(batch, 1, GRID_TOKENS, WIDTH),
        "sample_weights": torch.full((batch,), 1.0 / batch),
    }


def stepper(method: Method, *, layers: int, batch: dict[str, Any], device: str) -> Callable[[], None]:
    """Makes the training step of a method, with the published recipe's rank and extras."""
    torch.manual_seed(0)
    model: Any = VlBartForConditionalGeneration(bart_base(layers))
    model.to(device)
    extras = also_trained(model.settings, biases=True, norm_weights=method == "dora")
    config = DoRAConfig(method=method, rank=128, alpha=128.0, dropout=0.0, targets=DORA_TARGETS, also_train=extras)
    apply_dora(model, DoRAConfig(method="full", targets=("*",)) if method == "full" else config)
    task = Seq2SeqLoss(VlBartBackbone(model))
    return train_step(task, lambda task: task(**batch)["loss"])


def main() -> None:
    """Times the three methods in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--layers", type=int, default=6, help="of the encoder, and of the decoder")
    parser.add_argument("--json", help="also writes the figures there")
    options = parser.parse_args()
    batch = {name: tensor.to(DEVICE) for name, tensor in inputs(options.batch).items()}
    steps: dict[str, Callable[[], None]] = {
        method: stepper(method, layers=options.layers, batch=batch, device=DEVICE) for method in METHODS
    }
    turns = take_turns(steps, rounds=options.steps, repeats=1, warm_up=1)
    medians = {method: ms / 1000 for method, ms in turns.milliseconds.items()}
    rows = [(name, options.batch / taken, taken, taken / medians["full"]) for name, taken in medians.items()]
    print(table(("method", "samples/s", "seconds a step", "of full"), rows))
    if options.json:
        names = ("method", "samples_per_second", "seconds", "of_full")
        figures = [dict(zip(names, row, strict=True)) for row in rows]
        write_json(options.json, {"batch": options.batch, "layers": options.layers, "figures": figures})


if __name__ == "__main__":
    main()
