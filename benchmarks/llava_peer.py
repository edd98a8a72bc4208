"""The peer that `llava_run.py` times: transformers' LLaVA, PEFT, and the plain Trainer, as their guides put them.

Only tokens and pictures come from this project, so that all train on the same ones.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlavaForConditionalGeneration, Trainer, TrainingArguments

from dora_vl.backbones.towers import register_towers
from dora_vl.data.batches import Collator
from dora_vl.data.order import train_files
from dora_vl.data.samples import ConversationDataset, Sample
from dora_vl.data.table import load_training_rows
from dora_vl.errors import positive
from dora_vl.training.command_line import read_run
from dora_vl.training.decoder_pipeline import DecoderPipeline, encode_from_folder
from dora_vl.training.recipe import RunConfig
from dora_vl.training.run_media import VideoReading, image_folder, video_folder, video_sampling

TARGETS = r".*language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
MODEL_INPUTS = ("input_ids", "attention_mask", "labels", "pixel_values")


def main() -> None:
    """Trains a few steps and prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", choices=("peft_dora", "peft_lora"), required=True)
    parser.add_argument("--config", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--limit", type=positive, required=True)
    options, settings = parser.parse_known_args()
    config = read_run(["--config", options.config, *settings])
    register_towers()
    model = LlavaForConditionalGeneration.from_pretrained(
        config.model.base,
        dtype=getattr(torch, config.model.dtype),
        attn_implementation=config.model.attn_implementation,
    )
    pipeline = DecoderPipeline(config)
    found = load_training_rows(train_files(config.data.train), limit=options.limit)[0]
    encode = partial(
        encode_from_folder,
        encoder=pipeline.encoder,
        folder=image_folder(config.data),
        stored=found.stored,
        videos=VideoReading(folder=video_folder(config.data), sampling=video_sampling(config.data)),
    )
    samples = ConversationDataset(found, encode=encode)
    tower_seconds = time_tower(model, samples, count=min(16, len(samples)))
    adapted = get_peft_model(model, peft_config(config, options.peer), autocast_adapter_dtype=False)
    seconds = train(adapted, samples, config, options.steps, pad=pipeline.encoder.pad_token_id)
    seen = options.steps * batch_size(config)
    print(
        json.dumps(
            {
                "samples_per_second": seen / seconds,
                "tower_seconds_per_picture": tower_seconds,
                "pictures_a_sample_of_recipe": pictures_a_sample(config),
            }
        )
    )


def peft_config(config: RunConfig, peer: str) -> LoraConfig:
    """The run's adapter in PEFT's words; the projector trains as well."""
    return LoraConfig(
        r=config.adapter.rank,
        lora_alpha=int(config.adapter.alpha),
        lora_dropout=config.adapter.dropout,
        target_modules=TARGETS,
        use_dora=peer == "peft_dora",
        modules_to_save=["multi_modal_projector"],
    )


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
    model.model.vision_tower(pictures)
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
