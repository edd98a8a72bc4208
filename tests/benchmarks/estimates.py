"""Compares what `dora-vl estimate` says of a step with what the step takes: FLOP, activations, and the fullest moment.

    python -m tests.benchmarks.estimates --base runs/demo/base --data runs/demo/data/train.json \\
        --pictures runs/demo/assets/easy_vqa --json benchmarks/results.jsonl

Each run of `RUNS` trains three steps as its settings say, on the first decoder layers of the base, with stored outputs
of the vision part, which the estimate leaves out. The second step's bytes are followed, those of its activations and
those at the fullest moment (weights and optimizer included); the third one's products are counted by torch. The
estimate counts the run's first batch, as the command does on this machine.
"""

import argparse
import json
import logging
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import TrainerCallback

from benchmarks.dora_memory import LiveBytes
from benchmarks.report import table, write_json
from dora_vl.run.settings_parser import read_run
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.estimate import first_batch_tokens, plan_run
from dora_vl.training.parts import adapt
from dora_vl.training.trainer import build_trainer

SAMPLES, ROWS, STEPS = 32, 8, 3
WORDS = 80
"""So many are added to each question, so that activations outweigh gradients."""
CHECKPOINTED = ("--training.gradient_checkpointing=true",)
DRAWN = ("--objective.group=4", "--objective.max_new_tokens=24", "--training.per_device_train_batch_size=4")
RUNS: Mapping[str, tuple[str, ...]] = {
    "DoRA": (),
    "LoRA": ("--adapter.method=lora",),
    "DoRA, dropout of the whole change": ("--adapter.dropout=0.05", "--adapter.dropout_mode=whole_change"),
    "DoRA, recomputed": CHECKPOINTED,
    "DoRA, a row for each sample": ("--data.packing=plain",),
    "DPO": ("--objective.loss=dpo",),
    "DPO, recomputed": ("--objective.loss=dpo", *CHECKPOINTED),
    "DPO, a row for each answer": ("--objective.loss=dpo", "--data.packing=plain"),
    "SimPO": ("--objective.loss=simpo", "--objective.beta=2"),
    "GRPO": ("--objective.loss=grpo", "--objective.kl=0.05", *DRAWN),
    "GRPO, recomputed": ("--objective.loss=grpo", "--objective.kl=0.05", *DRAWN, *CHECKPOINTED),
}
HEADS = ("run", "TFLOP", "estimated", "step, MiB", "estimated", "fullest, MiB", "estimated")


def main() -> None:
    """Measures every run, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder of a LLaVA")
    parser.add_argument("--data", type=Path, required=True, help="its training data, LLaVA's JSON")
    parser.add_argument("--pictures", type=Path, required=True, help="root of the data's pictures")
    parser.add_argument("--layers", type=int, default=8, help="of the decoder that stay")
    parser.add_argument("--runs", nargs="+", choices=tuple(RUNS), default=tuple(RUNS), metavar="NAME")
    parser.add_argument("--json", type=Path, help="also writes the figures there")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    figures = list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as scratch:
        write_base(options.base, Path(scratch) / "base", options.layers)
        write_data(options, Path(scratch))
        for name in options.runs:
            figures.append({"run": name, **compared(settings_of(options, Path(scratch), RUNS[name]))})
            print(table(HEADS, [row_of(figures[-1])]), flush=True)
    print(table(HEADS, [row_of(row) for row in figures]))
    if options.json is not None:
        write_json(options.json, {"layers": options.layers, "rows": ROWS, "runs": figures})


def row_of(figures: Mapping[str, Any]) -> list[str]:
    """Returns a line of the table."""
    units, cells = {"flop": 1e12, "activations": 2**20, "fullest": 2**20}, [figures["run"]]
    for name, unit in units.items():
        counted, estimated = figures[name]["counted"] / unit, figures[name]["estimated"] / unit
        cells += [f"{counted:.2f}" if name == "flop" else f"{counted:,.0f}", f"{estimated / counted:.2f}"]
    return cells


def write_base(base: Path, folder: Path, layers: int) -> None:
    """Links a base's files, with a config of fewer layers; the others' weights are not read."""
    folder.mkdir()
    for file in base.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["num_hidden_layers"] = layers
    config["text_config"].pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def write_data(options: argparse.Namespace, folder: Path) -> None:
    """Writes samples of nearly one length, and the same with a rejected answer."""
    records = json.loads(options.data.read_text(encoding="utf-8"))
    samples = list({record["image"]: record for record in records}.values())[:SAMPLES]
    pairs = []
    for sample, other in zip(samples, (*samples[1:], samples[0]), strict=True):
        question, answer = sample["conversations"]
        question["value"] += " and" * WORDS
        rejected = f"{other['conversations'][1]['value']} or so"
        prompt = question["value"].removeprefix("<image>\n")
        pairs.append({"prompt": prompt, "chosen": answer["value"], "rejected": rejected, "image": sample["image"]})
    for name, rows in (("samples", samples), ("pairs", pairs)):
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")


def settings_of(options: argparse.Namespace, folder: Path, more: tuple[str, ...]) -> Any:
    """Returns a run's settings, those of the demo but for the data, three steps, and what it differs in."""
    compares = any(loss in word for word in more for loss in ("=dpo", "=simpo"))
    settings = {
        "model.base": folder / "base",
        "model.compose": "null",
        "data.train": folder / f"{'pairs' if compares else 'samples'}.json",
        "data.image_folder": options.pictures,
        "data.feature_cache": folder / "features",
        "data.validation": "null",
        "data.validation_limit": "null",
        "data.replay": 0,
        "evaluation.file": "null",
        "watch": 0,
        "overwrite": "true",
        "training.output_dir": folder / "run",
        "training.max_steps": STEPS,
        "training.per_device_train_batch_size": ROWS,
        "training.eval_strategy": "no",
        "training.save_strategy": "no",
        "training.disable_tqdm": "true",
    }
    words = (f"--{name}={value}" for name, value in settings.items())
    return read_run(["--config=llava/easyvqa_smollm2_dora", *words, *more])


class Watched(TrainerCallback):
    """Follows the second step's bytes and counts the third one's FLOP."""

    def __init__(self) -> None:
        self.live = LiveBytes()
        operations: Any = torch.ops.aten
        attention = operations._scaled_dot_product_flash_attention_for_cpu  # torch leaves it out
        attention_backward = operations._scaled_dot_product_flash_attention_for_cpu_backward
        formulas: dict[Any, Any] = {
            attention: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
            attention_backward: lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4]),
        }
        self.products = FlopCounterMode(display=False, custom_mapping=formulas)
        self.before = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begins and ends the two."""
        if state.global_step == 1:
            self.live.__enter__()
            self.before = self.live.restart_peak()
        elif state.global_step == 2:
            self.live.__exit__(None, None, None)
            self.products.__enter__()
        else:
            self.products.__exit__(None, None, None)


def compared(config: Any) -> dict[str, dict[str, int]]:
    """Trains, and returns what was counted and what is estimated."""
    tokens, labelled, _ = first_batch_tokens(config)
    planned = plan_run(DecoderPipeline(config), tokens=tokens, labelled=labelled, counted=True)
    pipeline, estimate, watched = DecoderPipeline(config), planned.on(1), Watched()
    arguments = pipeline.arguments()
    pipeline.prepare(arguments)
    Path(str(arguments.output_dir)).mkdir(exist_ok=True)
    backbone = pipeline.load()
    adapt(backbone.model, pipeline.dora_config(backbone))
    trainer = build_trainer(pipeline, arguments, backbone)
    trainer.add_callback(watched)
    trainer.train()
    held = sum(weight.nbytes for weight in (*backbone.model.parameters(), *backbone.model.buffers()))
    held += sum(value.nbytes for state in trainer.optimizer_layout.optimizer.state.values() for value in state.values())
    reference = getattr(trainer._loss, "reference", None)
    held += 0 if reference is None else sum(value.nbytes for value in reference._start)
    step = watched.live.peak - watched.before
    return {
        "flop": {"counted": watched.products.get_total_flops(), "estimated": planned.flop()},
        "activations": {"counted": step, "estimated": estimate.activations},
        "fullest": {"counted": held + step, "estimated": estimate.total},
    }


if __name__ == "__main__":
    main()
