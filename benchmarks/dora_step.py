"""Times a training step and a one-token decode step: frozen model, PEFT LoRA, PEFT DoRA and this project.

    python benchmarks/dora_step.py --rank 16 128 --dropout 0 0.05 --json benchmarks/results.jsonl
    python benchmarks/dora_step.py --layer 4096x11008 --rank 64 --tokens 512      # one layer by itself

The model is SmolLM2-135M's shapes with all seven projections adapted, unless `--model FOLDER` names another. A step
is forward, backward and AdamW, logits at the labelled places alone. The allocator keeps a step's memory for the next,
for all contenders, as training here does. Contenders take turns in one process; quoted are
medians over rounds of the ratios inside one round. On a CUDA machine the table adds kernel times, the share of the
card's peak (`--peak-tflops`) and peak memory.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.contenders import (
    TRAINED,
    Setting,
    add_options,
    base_model,
    contender,
    layer_of_shape,
    loss_of,
    settings_of,
    single_layer_loss,
    tokens_of,
)
from benchmarks.report import median, table, write_json
from dora_vl.run.launch import keep_freed_memory

DECODED = ("frozen", "peft_lora", "peft_dora", "ours", "ours_merged")
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    """Times every setting, prints the tables and writes the JSON."""
    options = read_options()
    keep_freed_memory()
    figures = [time_setting(setting, options) for setting in settings_of(options)]
    if options.json is not None:
        shown = {name: value for name, value in vars(options).items() if name != "json"}
        write_json(options.json, {"options": shown, "settings": figures})


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--layer", default=None, help="INxOUT: one linear layer instead of a model")
    parser.add_argument("--rounds", type=int, default=5, help="how often each contender takes a turn")
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn; its time is their median")
    parser.add_argument(
        "--clock",
        default="wall",
        choices=CLOCKS,
        help="processor: for a machine that others use; set OMP_NUM_THREADS=1",
    )
    parser.add_argument("--peak-tflops", type=float, default=None, help="the card's dense peak, for the share used")
    return parser.parse_args()


def time_setting(setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the JSON: ratios of training and decoding, with the milliseconds they come from."""
    if options.layer is not None:
        base: Any = layer_of_shape(options.layer, setting.dtype, DEVICE)
        loss = partial(single_layer_loss, tokens=options.batch * options.tokens)
    else:
        base = base_model(options.model, setting.dtype, DEVICE)
        loss = partial(loss_of, tokens=tokens_of(options, base.config.vocab_size, DEVICE))
    training = take_turns({name: train_step(contender(name, base, setting), loss) for name in TRAINED}, options)
    row = {"rank": setting.rank, "dropout": setting.dropout, "train_ms": training.milliseconds, **ratios(training)}
    print(f"\nrank {setting.rank}, dropout {setting.dropout}, training step, {options.dtype}")
    print(training.shown("peft_lora"))
    if options.layer is None and setting.dropout == options.dropout[0]:
        decoding = take_turns({name: decode_step(contender(name, base, setting)) for name in DECODED}, options)
        row |= {"decode_ms": decoding.milliseconds} | decode_ratios(decoding)
        print(f"\nrank {setting.rank}, one-token decode")
        print(decoding.shown("peft_lora"))
    if DEVICE == "cuda":
        row |= cuda_figures(lambda name: train_step(contender(name, base, setting), loss), base, options)
    return row


class Turns:
    """Seconds of each contender in each round."""

    def __init__(self, rounds: Sequence[dict[str, float]]) -> None:
        self.rounds = rounds

    @property
    def milliseconds(self) -> dict[str, float]:
        """Median over rounds."""
        return {name: round(1e3 * median([one[name] for one in self.rounds]), 3) for name in self.rounds[0]}

    def ratio(self, name: str, to: str) -> float:
        """Median over rounds of the ratio inside one round."""
        return round(median([one[name] / one[to] for one in self.rounds]), 4)

    def shown(self, reference: str) -> str:
        """The table."""
        rows = [(name, ms, self.ratio(name, reference)) for name, ms in self.milliseconds.items()]
        return table(("contender", "ms (median)", f"x {reference}"), rows)


def ratios(training: Turns) -> dict[str, float]:
    """The JSON's keys for training."""
    return {
        "train_vs_frozen": training.ratio("ours", "frozen"),
        "train_vs_peft_lora": training.ratio("ours", "peft_lora"),
        "train_vs_peft_dora": training.ratio("ours", "peft_dora"),
        "accelerated_vs_peft_dora": training.ratio("peft_dora_accelerated", "peft_dora"),
    }


def decode_ratios(decoding: Turns) -> dict[str, float]:
    """The JSON's keys for decoding."""
    return {
        "decode_vs_peft_lora": decoding.ratio("ours", "peft_lora"),
        "decode_vs_peft_dora": decoding.ratio("ours", "peft_dora"),
        "merged_decode_vs_frozen": decoding.ratio("ours_merged", "frozen"),
    }


def take_turns(steps: dict[str, Callable[[], None]], options: argparse.Namespace) -> Turns:
    """Everybody warms up, then rounds of a few steps each."""
    for step in steps.values():
        step()
        step()
    rounds = []
    for _ in range(options.rounds):
        rounds.append(
            {name: median([seconds(step, options.clock) for _ in range(options.steps)]) for name, step in steps.items()}
        )
    return Turns(rounds)


def seconds(step: Callable[[], None], clock: str = "wall") -> float:
    """Time of one step, the card's work included."""
    now = CLOCKS[clock]
    started = now()
    step()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return now() - started


def train_step(model: Any, loss: Callable[[Any], torch.Tensor]) -> Callable[[], None]:
    """Forward, backward, AdamW."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True) if trained else None

    def step() -> None:
        loss(model).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def decode_step(model: Any, *, past: int = 96) -> Callable[[], None]:
    """One token after `past` others, with their keys and values kept."""
    model.eval()
    ids = torch.arange(past, device=DEVICE).unsqueeze(0)
    cache = DynamicCache(config=model.config)

    @torch.no_grad()
    def step() -> None:
        model(ids[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    return step


def cuda_figures(
    step_of: Callable[[str], Callable[[], None]], base: Any, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Kernel milliseconds, peak memory and, with the card's peak, the share of it that the step uses.

    One contender at a time is on the card, so that its peak is its own; the base they are copied from is in all.
    """
    kernels, peaks, shares = {}, {}, {}
    weights = sum(one.numel() for one in base.parameters())
    operations = 4 * weights * options.batch * options.tokens  # a frozen weight: forward, and the input's gradient
    for name in TRAINED:
        step = step_of(name)
        step()
        torch.cuda.reset_peak_memory_stats()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            took = seconds(step)
        kernels[name] = sum(event.device_time_total for event in profile.key_averages()) / 1e3
        peaks[name] = torch.cuda.max_memory_allocated() / 2**20
        if options.peak_tflops is not None:
            shares[name] = operations / took / (options.peak_tflops * 1e12)
        del step
        gc.collect()
    print(table(("contender", "kernels ms", "peak MiB"), [(name, kernels[name], peaks[name]) for name in TRAINED]))
    return {"kernel_ms": kernels, "peak_mib": peaks, "mfu": shares}


if __name__ == "__main__":
    main()
