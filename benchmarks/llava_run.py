"""Times a training run of this project against transformers + PEFT + the plain Trainer, samples a second.

    python benchmarks/llava_run.py --config configs/llava/easyvqa_smollm2_dora.yaml --adapter.dropout 0.05 \
        --model.compose.grid_pool null --model.base runs/demo/base_49_tokens --training.per_device_train_batch_size 32 \
        --model.attn_implementation eager --json benchmarks/results.jsonl

Same composed LLaVA, conversations, tokens, batch, number types and attention kernel for all contenders. The peers are
`LlavaForConditionalGeneration` with PEFT's DoRA and LoRA (`autocast_adapter_dtype=False`, PEFT's faster setting):
they run the vision tower at every step and compute logits at every position, because that is what those parts do.
`ours` deals batches as the peers do. `ours_trees` is the same run with `data.rows: trees`, which runs a picture
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
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from report import median, table, write_json
from torch import nn
from transformers import LlavaForConditionalGeneration, Trainer, TrainingArguments

from dora_vl.data.batches import Collator
from dora_vl.data.columns import train_files
from dora_vl.data.samples import ConversationDataset, Sample
from dora_vl.data.table import load_training_rows
from dora_vl.errors import UserError, exit_on_user_error
from dora_vl.run.base import VideoReading, image_folder, video_folder, video_sampling
from dora_vl.run.reading import read_run
from dora_vl.run.settings import RunConfig
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.run_samples import RowEncoder

PEERS = ("peft_dora", "peft_lora")
OURS = {"ours": "plain", "ours_trees": "trees"}
"""Contender -> `data.rows`."""
TARGETS = r".*language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
MODEL_INPUTS = ("input_ids", "attention_mask", "labels", "pixel_values")


@exit_on_user_error
def main() -> None:
    """Runs the rounds, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the run to time; its base is composed if it is not there")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of each contender in each round")
    parser.add_argument("--rounds", type=int, default=3, help="how often each contender takes a turn")
    parser.add_argument("--json", default=None, help="file for the figures")
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)  # a peer in a process of its own
    options, settings = parser.parse_known_args()
    timed = TimedRun(options.config, options.steps, tuple(settings))
    if options.peer is not None:
        print(json.dumps(time_peer(options.peer, timed)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run_ours("ours", replace(timed, steps=1), folder)  # composes the base, stores the features: no clock runs yet
        rounds = [one_round(timed, folder) for _ in range(options.rounds)]
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
    def run(self) -> RunConfig:
        """Its settings."""
        return read_run(["--config", self.config, *self.settings])


def one_round(timed: TimedRun, scratch: Path) -> dict[str, dict[str, float]]:
    """Every contender once: samples a second, and what else it measured."""
    results = {name: run_ours(name, timed, scratch) for name in OURS}
    for peer in PEERS:
        command = [sys.executable, __file__, "--peer", peer, "--config", timed.config, "--steps", str(timed.steps)]
        results[peer] = json.loads(run([*command, *timed.settings]).splitlines()[-1])
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
        "data.rows": OURS[name],
        "evaluation.file": "null",
        "watch": "0",  # the peers answer no questions while they train
        "overwrite": "true",
    }
    flags = [part for key, value in overrides.items() for part in (f"--{key}", value)]
    run([sys.executable, "tasks/llava_instruct.py", "--config", timed.config, *timed.settings, *flags])
    metrics: dict[str, float] = json.loads((run_folder / "metrics.json").read_text(encoding="utf-8"))
    return metrics


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


# The peers: transformers' LLaVA, PEFT, and the plain Trainer, as their guides put them. Only tokens and pictures come
# from this project, so that all train on the same ones.


def time_peer(peer: str, timed: TimedRun) -> dict[str, float]:
    """Trains a few steps."""
    config = timed.run
    dtype = getattr(torch, config.model.dtype)
    model = LlavaForConditionalGeneration.from_pretrained(
        config.model.base, dtype=dtype, attn_implementation=config.model.attn_implementation
    )
    pipeline, seen = DecoderPipeline(config), timed.steps * batch_size(config)
    rows = load_training_rows(train_files(config.data.train), limit=seen)[0]
    videos = VideoReading(folder=video_folder(config.data), sampling=video_sampling(config.data))
    encoder = RowEncoder(encoder=pipeline.encoder, folder=image_folder(config.data), videos=videos)
    samples = encoder.dataset(rows, rows.stored)
    tower_seconds = time_tower(model, samples, count=min(16, len(samples)))
    peft_config = LoraConfig(
        r=config.adapter.rank,
        lora_alpha=int(config.adapter.alpha),
        lora_dropout=config.adapter.dropout,
        target_modules=TARGETS,
        use_dora=peer == "peft_dora",
        modules_to_save=["multi_modal_projector"],
    )
    adapted = get_peft_model(model, peft_config, autocast_adapter_dtype=False)
    seconds = train(adapted, samples, config, timed.steps, pad=pipeline.encoder.pad_token_id)
    return {
        "samples_per_second": seen / seconds,
        "tower_seconds_per_picture": tower_seconds,
        "pictures_a_sample_of_recipe": pictures_a_sample(config),
    }


def batch_size(config: RunConfig) -> int:
    """Samples of one optimizer step."""
    training = config.training
    return int(training["per_device_train_batch_size"]) * int(training.get("gradient_accumulation_steps", 1))


def pictures_a_sample(config: RunConfig) -> float:
    """Different pictures of the training file for each sample that the whole recipe reads: each is computed once."""
    rows = load_training_rows(train_files(config.data.train), limit=config.data.limit)[0].rows
    pictures = {picture for one in rows["images"] for picture in one}
    steps = int(config.training.get("max_steps", -1))
    epochs = float(config.training.get("num_train_epochs", 3))
    return len(pictures) / (steps * batch_size(config) if steps > 0 else epochs * len(rows))


@torch.no_grad()
def time_tower(model: LlavaForConditionalGeneration, samples: ConversationDataset, *, count: int) -> float:
    """Seconds that reading and the vision tower take for one picture."""
    model.eval()
    started = time.perf_counter()
    read = [samples[index] for index in range(count)]
    pictures = torch.cat([one.inputs["pixel_values"] for one in read if isinstance(one, Sample) and one.images])
    model.get_image_features(pixel_values=pictures.to(model.dtype))
    return (time.perf_counter() - started) / max(1, len(pictures))


def train(model: nn.Module, samples: ConversationDataset, config: RunConfig, steps: int, *, pad: int) -> float:
    """Seconds of `Trainer.train` for so many steps."""
    collate = Collator(pad)

    def batch(items: list[Any]) -> dict[str, Any]:
        inputs: dict[str, Any] = {name: value for name, value in collate(items).items() if name in MODEL_INPUTS}
        inputs["pixel_values"] = inputs["pixel_values"].to(getattr(torch, config.model.dtype))
        return inputs

    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=int(config.training["per_device_train_batch_size"]),
            gradient_accumulation_steps=int(config.training.get("gradient_accumulation_steps", 1)),
            learning_rate=float(config.training.get("learning_rate", 5e-5)),
            max_steps=steps,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=samples, data_collator=batch)
        return float(trainer.train().metrics["train_runtime"])


if __name__ == "__main__":
    main()
