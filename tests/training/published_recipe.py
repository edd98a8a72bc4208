"""The published 7B recipes, both stages and the merge, on a stand-in of Vicuna v1.5 with `tokenizer.model` alone.

A test runs it all; as a program it writes the stand-ins alone, of which `make fresh-install` takes one step.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from tests.backbones.tiny_language import write_tiny_vicuna

ROOT = Path(__file__).parents[2]
SIDE, PATCH = 28, 14
COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (20, 40, 220)}


def write_tiny_clip(folder: Path) -> Path:
    """A random CLIP tower of 4 picture tokens, with its picture preparation."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=SIDE, patch_size=PATCH)).save_pretrained(folder)
    crop = {"height": SIDE, "width": SIDE}
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=crop).save_pretrained(folder)
    return folder


def write_samples(folder: Path) -> Path:
    """LLaVA JSON of 24 samples: rounds about coloured pictures of odd sizes, one in four without a picture."""
    folder.mkdir(parents=True)
    samples = []
    for number in range(24):
        colour = list(COLOURS)[number % 3]
        question = f"Is it {colour}?" if number % 4 == 0 else "<image>\nWhat is in the picture?"
        turns = [question, f"A {colour} circle", "Is it red?", "Yes, it is." if colour == "red" else "No, it is not."]
        conversation = [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(turns)]
        sample = {"id": f"sample-{number}", "conversations": conversation}
        if number % 4:
            sample["image"] = f"{number}.png"
            Image.new("RGB", (30 + number, 41), COLOURS[colour]).save(folder / f"{number}.png")
        samples.append(sample)
    (folder / "mix.json").write_text(json.dumps(samples), encoding="utf-8")
    captions = [{**sample, "conversations": sample["conversations"][:2]} for sample in samples if "image" in sample]
    (folder / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    return folder


def commands(folder: Path, *, python: Path) -> dict[str, list[str]]:
    """What a person types, by name, with the recipes' settings but for what a stand-in and a CPU change."""
    data, base, runs = folder / "data", folder / "runs" / "base", folder / "runs"
    small = {
        "model.base": base,
        "model.compose.vision_name": folder / "clip",
        "model.compose.language_model": folder / "vicuna",
        "data.image_folder": data,
        "data.workers": 0,
        "training.tf32": "false",  # needs a GPU
        "training.per_device_train_batch_size": 4,
        "training.gradient_accumulation_steps": 1,
        "training.logging_steps": 1,
    }

    def train(variant: str, **changes: object) -> list[str]:
        named = {**small, **{name.replace("__", "."): value for name, value in changes.items()}}
        options = [word for name, value in named.items() for word in (f"--{name}", str(value))]
        recipe = ["--config", "llava/llava15", "--variant", variant]
        return [str(python), str(ROOT / "tasks" / "llava_instruct.py"), *recipe, *options]

    return {
        "stage 1": train(
            "7b_pretrain",
            data__train=data / "captions.json",
            training__output_dir=runs / "pretrain",
            training__max_steps=4,
        ),
        "stage 2": train(
            "7b_dora",
            data__train=data / "mix.json",
            adapter__initial=runs / "pretrain" / "adapter",
            training__output_dir=runs / "dora",
            training__max_steps=6,
        ),
        "merge": [
            str(python.with_name("dora-vl")),
            "merge",
            *("--adapter", str(runs / "dora" / "adapter")),
            *("--to", str(runs / "merged")),
        ],
    }


def write_stand_ins(folder: Path) -> None:
    """Vicuna, CLIP and the data in little."""
    write_tiny_vicuna(folder / "vicuna")
    write_tiny_clip(folder / "clip")
    write_samples(folder / "data")


def run_all(folder: Path, *, python: Path) -> dict[str, float]:
    """Runs every command in `folder`; seconds by name.

    Raises: RuntimeError with the end of what a command said, if it fails.
    """
    write_stand_ins(folder)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    seconds = {}
    for name, words in commands(folder, python=python).items():
        start = time.perf_counter()
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{name} ended with {done.returncode}:\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
        seconds[name] = time.perf_counter() - start
    return seconds


if __name__ == "__main__":
    write_stand_ins(Path(sys.argv[1]))
