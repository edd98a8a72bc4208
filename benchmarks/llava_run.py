"""Times a training run of this project against transformers + PEFT + the plain Trainer, samples a second.

    python benchmarks/llava_run.py --config configs/llava/easyvqa_smollm2_dora.yaml --adapter.dropout 0.05 \
        --model.compose.grid_pool null --model.base runs/demo/base_49_tokens --training.per_device_train_batch_size 32 \
        --model.attn_implementation eager --json benchmarks/results.jsonl

Same composed LLaVA, conversations, tokens, batch, number types and attention kernel for all contenders. The peers are
`LlavaForConditionalGeneration` with PEFT's DoRA and LoRA (`autocast_adapter_dtype=False`, PEFT's faster setting):
they run the vision tower at every step and compute logits at every position, because that is what those parts do.
`ours` deals batches as the peers do. `ours_shared` is the same run with `data.share_pictures`, which runs a picture
once for all questions about it in a batch; its batches hold fewer different pictures, so it learns less a sample.
Contenders take turns, each in its own process, a few steps at a time; quoted are medians of the ratios inside one
round. The one-off feature pass of this project is timed too and counted in `with_feature_pass`. Any further
`--section.key value` changes the run for all contenders.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from report import median, table, write_json

from dora_vl.errors import UserError, exit_on_user_error
from dora_vl.run.reading import read_run

PEERS = ("peft_dora", "peft_lora")
OURS = {"ours": "false", "ours_shared": "true"}
"""Contender -> `data.share_pictures`."""


@exit_on_user_error
def main() -> None:
    """Runs the rounds, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the run to time; its base is composed if it is not there")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of each contender in each round")
    parser.add_argument("--rounds", type=int, default=3, help="how often each contender takes a turn")
    parser.add_argument("--json", default=None, help="file for the figures")
    options, settings = parser.parse_known_args()
    timed = TimedRun(options.config, options.steps, tuple(settings))
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        run_ours(
            "ours", replace(timed, steps=1), place
        )  # composes the base and stores the features, before the clock runs
        rounds = [one_round(timed, place) for _ in range(options.rounds)]
    figures = summarise(rounds)
    heads = ("contender", "samples/s (median)", "with the feature pass", *(f"x {peer}" for peer in PEERS))
    rate, whole = figures["samples_per_second"], figures["with_feature_pass"]
    rows = [
        (name, rate[name], whole.get(name, rate[name]), *(figures["times_as_fast_as"][peer][name] for peer in PEERS))
        for name in rate
    ]
    print(table(heads, rows))
    if options.json is not None:
        write_json(options.json, {**asdict(timed), **figures})


@dataclass(frozen=True)
class TimedRun:
    """What all contenders train."""

    config: str
    steps: int
    settings: tuple[str, ...]

    @property
    def samples(self) -> int:
        """Training samples that the steps read, so that all see the same ones."""
        training = read_run(["--config", self.config, *self.settings]).training
        micro_batch = int(training["per_device_train_batch_size"])
        return self.steps * micro_batch * int(training.get("gradient_accumulation_steps", 1))


def one_round(timed: TimedRun, scratch: Path) -> dict[str, dict[str, float]]:
    """Every contender once: samples a second, and what else it measured."""
    results = {name: run_ours(name, timed, scratch) for name in OURS}
    for peer in PEERS:
        results[peer] = run_peer(peer, timed)
    for name, result in results.items():
        print(f"{name}: {result['samples_per_second']:.2f} samples/s", flush=True)
    return results


def run_ours(name: str, timed: TimedRun, scratch: Path) -> dict[str, float]:
    """The shipped task, started as a user starts it; its own metrics are read back."""
    run_folder = scratch / name
    overrides = {
        "training.output_dir": str(run_folder),
        "training.max_steps": str(timed.steps),
        "training.save_strategy": "no",
        "training.eval_strategy": "no",
        "data.feature_cache": str(scratch / "features"),
        "data.share_pictures": OURS[name],
        "evaluation.file": "null",
        "watch": "0",  # the peers answer no questions while they train
        "overwrite": "true",
    }
    flags = [part for key, value in overrides.items() for part in (f"--{key}", value)]
    run([sys.executable, "tasks/llava_instruct.py", "--config", timed.config, *timed.settings, *flags])
    metrics: dict[str, float] = json.loads((run_folder / "metrics.json").read_text(encoding="utf-8"))
    return metrics


def run_peer(name: str, timed: TimedRun) -> dict[str, float]:
    """One peer in its own process; its last line is JSON."""
    script = Path(__file__).with_name("llava_peer.py")
    options = {"peer": name, "config": timed.config, "steps": str(timed.steps), "limit": str(timed.samples)}
    flags = [part for key, value in options.items() for part in (f"--{key}", value)]
    figures: dict[str, float] = json.loads(run([sys.executable, str(script), *flags, *timed.settings]).splitlines()[-1])
    return figures


def run(command: list[str]) -> str:
    """Runs a contender; its output, or one line about how it failed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command[:3])} ended with {done.returncode}: {done.stderr.strip()[-600:]}")
    return done.stdout


def summarise(rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Medians over rounds, of rates and of ratios inside a round."""
    rate = "samples_per_second"
    names = list(rounds[0])
    tower = median([one[peer]["tower_seconds_per_picture"] for one in rounds for peer in PEERS])
    pictures = median([one[peer]["pictures_a_sample_of_recipe"] for one in rounds for peer in PEERS])
    middle = {name: median([one[name][rate] for one in rounds]) for name in names}
    return {
        rate: middle,
        "times_as_fast_as": {
            peer: {name: median([one[name][rate] / one[peer][rate] for one in rounds]) for name in names}
            for peer in PEERS
        },
        "tower_seconds_per_picture": tower,
        "with_feature_pass": {name: 1 / (1 / middle[name] + tower * pictures) for name in OURS},
        "rounds": rounds,
    }


if __name__ == "__main__":
    main()
