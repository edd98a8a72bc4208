"""Times a training run of this project against TRL's SFTTrainer with PEFT's DoRA and LoRA, in samples per second.

    python -m benchmarks.peers --config llava/easyvqa_smollm2_dora --adapter.dropout 0.05 \
        --model.compose.grid_pool null --model.base runs/demo/base_49_tokens --json benchmarks/results.jsonl
    python -m benchmarks.peers --config image_text/smolvlm --variant 256m_dora --smolvlm runs/demo/base_49_tokens \
        --json benchmarks/results.jsonl --name peers_smolvlm

The same model, samples, tokens, batch, number type, dropout and attention for all. The samples are made here: 1,000 of
one to five questions about each picture, their lengths mixed. Every contender trains in a process of its own, in turns,
a few steps at a time; quoted are medians of the ratios inside one round, and each one's peak of memory.

`ours` is the run as the settings say it, rows as trees, outputs of the frozen vision parts stored before the clock
runs; `ours_unstored` runs those parts in each step. TRL gets this project's tokens and pixels, so that all train the
same; its own way to batch them is one padded row per sample. TRL is installed into a folder of its own, beside the
packages that are here, and sets PEFT up as it does. Any further `--section.key value` changes the run for all.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import runpy
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from benchmarks.report import median, table, write_json
from dora_vl.errors import UserError, exit_on_user_error

TRL = "trl==1.16.0"
OURS = {"ours": "true", "ours_unstored": "false"}
"""Maps each of our contenders to its `data.cache_features`."""
PEERS = ("trl_dora", "trl_lora")
SAMPLES = 1_000
TARGETS = r".*\.(language_model|text_model)\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
PROJECTORS = ("multi_modal_projector", "connector")
SHAPES = ("circle", "square", "triangle")
COLOURS = ("red", "green", "blue", "yellow", "black", "white", "orange", "teal")
SMOLVLM_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role | capitalize }}:{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %} {{ part.text }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>Assistant:{% endif %}"
)


@dataclass(frozen=True)
class Options:
    """The run that all contenders train, and how often they take a turn."""

    config: tuple[str, ...]
    steps: int
    batch: int

    def settings(self, folder: Path) -> list[str]:
        """Returns the settings of one run."""
        values = {
            "data.train": str(folder / "train.json"),
            "data.validation": "null",
            "data.image_folder": str(folder),
            "data.feature_cache": str(folder / "stored"),
            "data.workers": "0",
            "training.output_dir": str(folder / "run"),
            "training.max_steps": str(self.steps),
            "training.per_device_train_batch_size": str(self.batch),
            "training.gradient_accumulation_steps": "1",
            "training.gradient_checkpointing": "false",
            "training.save_strategy": "no",
            "training.eval_strategy": "no",
            "evaluation.file": "null",
            "watch": "0",  # the peers answer no questions while they train
            "overwrite": "true",
        }
        return [*self.config, *(part for name, value in values.items() for part in (f"--{name}", value))]


@exit_on_user_error
def main() -> None:
    """Runs the rounds, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of each contender in each round")
    parser.add_argument("--batch", type=int, default=16, help="samples of a step")
    parser.add_argument("--rounds", type=int, default=2, help="how often each contender takes a turn")
    parser.add_argument("--smolvlm", metavar="TOKENIZER", help="train SmolVLM-256M's shape, random weights")
    parser.add_argument("--name", default="peers", help="of the figures in the file")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--contender", help=argparse.SUPPRESS)  # one of them, in a process of its own
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args, config = parser.parse_known_args()
    if args.contender is not None:
        options = Options(tuple(config), args.steps, args.batch)
        print(json.dumps(run_contender(args.contender, options, args.folder)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_samples(folder, SAMPLES)
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder / "trl", TRL],
            check=True,
        )
        if args.smolvlm is not None:
            config += ["--model.base", str(write_smolvlm(folder / "smolvlm", args.smolvlm))]
        options = Options(tuple(config), args.steps, args.batch)
        turn("ours", Options(options.config, 1, args.batch), folder)  # composes the base, stores outputs: no clock yet
        rounds = [{name: turn(name, options, folder) for name in (*OURS, *PEERS)} for _ in range(args.rounds)]
    rate = {name: [each[name]["samples_per_second"] for each in rounds] for name in rounds[0]}
    ratios = {
        peer: {name: median([a / b for a, b in zip(rate[name], rate[peer], strict=True)]) for name in rate}
        for peer in PEERS
    }
    memory = {name: max(each[name]["gib"] for each in rounds) for name in rate}
    heads = ("contender", "samples/s (median)", *(f"x {peer}" for peer in PEERS), "peak GiB")
    print(table(heads, [(n, median(rate[n]), *(ratios[peer][n] for peer in PEERS), memory[n]) for n in rate]))
    figures = {"settings": config, "steps": args.steps, "batch": args.batch, "trl": TRL}
    write_json(args.json, {**figures, "times_as_fast_as": ratios, "gib": memory, "rounds": rounds}, name=args.name)


def turn(name: str, options: Options, folder: Path) -> dict[str, float]:
    """Runs one contender in a process of its own."""
    own = ["--contender", name, "--folder", str(folder), "--steps", str(options.steps), "--batch", str(options.batch)]
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(folder / "trl")])
    command = [sys.executable, "-m", "benchmarks.peers", *own, *options.config]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        raise UserError(f"{name} ended with {done.returncode}: {done.stderr.strip()[-800:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: {result['samples_per_second']:.2f} samples/s, {result['gib']:.2f} GiB", flush=True)
    return result


def run_contender(name: str, options: Options, folder: Path) -> dict[str, float]:
    """Trains one contender and returns its samples per second and peak memory."""
    if name in OURS:
        sys.argv = ["llava_instruct.py", *options.settings(folder), "--data.cache_features", OURS[name]]
        runpy.run_path("tasks/llava_instruct.py", run_name="__main__")
        metrics = json.loads((folder / "run" / "metrics.json").read_text(encoding="utf-8"))
        rate = float(metrics["samples_per_second"])
    else:
        rate = options.steps * options.batch / train_with_trl(name, options, folder)
    return {"samples_per_second": rate, "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def write_samples(folder: Path, count: int) -> None:
    """Writes questions about coloured shapes, one to five per picture, long and short, in LLaVA's format."""
    rng = random.Random(11)
    samples: list[dict[str, Any]] = []
    while len(samples) < count:
        shape, colour, ground = rng.choice(SHAPES), *rng.sample(COLOURS, 2)
        picture = Image.new("RGB", (320, 240), ground)
        draw, corners = ImageDraw.Draw(picture), ((100, 60), (220, 60), (220, 180), (100, 180))
        if shape == "circle":
            draw.ellipse((*corners[0], *corners[2]), fill=colour)
        else:
            draw.polygon(corners if shape == "square" else corners[1:], fill=colour)
        name = f"{len(samples)}.png"
        picture.save(folder / name)
        for number in range(min(rng.randint(1, 5), count - len(samples))):
            words = int(rng.lognormvariate(2.7, 0.9)) + 1
            answer = " ".join(rng.choices([shape, colour, ground, "and", "is", "on"], k=words))
            question = " ".join(rng.choices(["which", "shape", "colour", "is", "there"], k=rng.randint(4, 24)))
            turns = [{"from": "human", "value": f"<image>\n{question}?"}, {"from": "gpt", "value": f"{answer}."}]
            samples.append({"id": f"{name}/{number}", "image": name, "conversations": turns})
    (folder / "train.json").write_text(json.dumps(samples), encoding="utf-8")


def write_smolvlm(folder: Path, tokenizer_folder: str) -> Path:
    """Writes a random SmolVLM-256M with one tile of 64 tokens per picture and a tokenizer that is here."""
    import transformers  # it takes seconds

    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    own = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokenizer.add_special_tokens({"additional_special_tokens": own, "eos_token": own[-1]})
    tokenizer.image_token, tokenizer.fake_image_token, tokenizer.global_image_token = own[:3]
    text = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    text |= {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": len(tokenizer)}
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    vision |= {"image_size": 512, "patch_size": 16}
    settings = {"text_config": text, "vision_config": vision, "scale_factor": 4}
    settings |= {"image_token_id": tokenizer.convert_tokens_to_ids("<image>"), "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    model = transformers.SmolVLMForConditionalGeneration(transformers.SmolVLMConfig(**settings))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.bfloat16().save_pretrained(folder)
    edge = {"longest_edge": 512}
    pictures = transformers.SmolVLMImageProcessor(size=edge, max_image_size=edge)
    videos, template = transformers.SmolVLMVideoProcessor(), SMOLVLM_TEMPLATE
    transformers.SmolVLMProcessor(pictures, tokenizer, videos, 64, template).save_pretrained(folder)
    return folder


# The peer, as its guide puts it. Only tokens and pixels come from this project, so that all train on the same ones.


def train_with_trl(name: str, options: Options, folder: Path) -> float:
    """Times `SFTTrainer.train` in seconds."""
    import datasets
    from peft import LoraConfig
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    from dora_vl.backbones.loading import load_pretrained
    from dora_vl.data.columns import train_files
    from dora_vl.data.samples import BOOKKEEPING
    from dora_vl.data.table import load_training_rows
    from dora_vl.run.base import VideoReading, image_folder, video_folder, video_sampling
    from dora_vl.run.settings_parser import read_run
    from dora_vl.training.opened import SampleEncoder, encoder_of

    config = read_run(options.settings(folder))
    encoder, dtype = encoder_of(config, thinking=None), getattr(torch, config.model.dtype)
    rows = load_training_rows(train_files(config.data.files))[0]
    videos = VideoReading(folder=video_folder(config.data), sampling=video_sampling(config.data))
    samples = SampleEncoder(encoder=encoder, folder=image_folder(config.data), videos=videos).dataset(rows, rows.stored)
    plain = encoder.collate

    def batch(items: list[dict[str, int]]) -> dict[str, Any]:
        joined = plain([samples[item["index"]] for item in items])
        inputs = {key: value for key, value in joined.items() if key not in BOOKKEEPING}
        return {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}

    model = load_pretrained(AutoModelForImageTextToText, config.model.base, dtype=dtype)
    projectors = [name for name, _ in model.base_model.named_children() if name in PROJECTORS]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder / name),
            per_device_train_batch_size=options.batch,
            learning_rate=float(config.training.get("learning_rate", 5e-5)),
            max_steps=options.steps,
            max_length=None,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=datasets.Dataset.from_dict({"index": list(range(len(samples))), "images": [[]] * len(samples)}),
        data_collator=batch,
        processing_class=AutoProcessor.from_pretrained(config.model.base),
        peft_config=LoraConfig(
            r=config.adapter.rank,
            lora_alpha=int(config.adapter.alpha),
            lora_dropout=config.adapter.dropout,
            target_modules=TARGETS,
            use_dora=name == "trl_dora",
            modules_to_save=projectors if config.adapter.train_projector else None,
        ),
    )
    return float(trainer.train().metrics["train_runtime"])


if __name__ == "__main__":
    main()
