"""Times a DPO step of a LLaVA with pictures: trees, a row for each answer, kept references, and TRL's DPOTrainer.

    PYTHONPATH=. python benchmarks/preference_step.py --base runs/demo/base --data runs/demo/data/train.json \\
        --pictures runs/demo/assets/easy_vqa --layers 8 --json benchmarks/results.jsonl

A step is the reference's pass, the model's, backward and AdamW, over one to four pairs of answers to a question about
each picture; `stored` has the tower's outputs, `kept` is a step of a later epoch, whose reference is known. TRL, which
has to be importable, runs with PEFT's DoRA (`autocast_adapter_dtype=False`, its faster setting) on the same base,
number type and tokens. Contenders take turns; times are the processor's, so set OMP_NUM_THREADS=1. Quoted are medians
over rounds of the ratios inside one, and the bytes that a step takes at its fullest beyond what stays.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoProcessor, PreTrainedModel

from benchmarks.contenders import take_turns, train_step
from benchmarks.dora_memory import LiveBytes
from benchmarks.report import table, write_json
from dora_vl.backbones.encoder import Encoder, open_encoder
from dora_vl.backbones.families.targets import language_targets, projector_patterns
from dora_vl.backbones.frozen_outputs import find_verified_parts, inputs_of, with_stored_outputs
from dora_vl.backbones.model import DecoderBackbone, open_backbone
from dora_vl.core import DoRAConfig, apply_dora
from dora_vl.data.batches import Collator
from dora_vl.data.columns import Packing
from dora_vl.data.example import Example
from dora_vl.data.pictures import MediaFolder, open_image
from dora_vl.data.samples import BOOKKEEPING, Sample
from dora_vl.data.turns import Turn
from dora_vl.heads.preferences import Hyperparameters
from dora_vl.training.ways.preferences import PreferenceLoss
from dora_vl.training.ways.way import Reference

RANK, BETA, PICTURES, PAIRS = 16, 0.1, 2, (1, 2, 4)
PROJECTIONS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
FIGURES = ("milliseconds", "times_as_fast", "mib")
Step = Callable[[], Any]


def main() -> None:
    """Times every setting, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder of a LLaVA")
    parser.add_argument("--data", type=Path, required=True, help="its training data, LLaVA's JSON")
    parser.add_argument("--pictures", type=Path, required=True, help="root of the data's pictures")
    parser.add_argument("--layers", type=int, help="number of the decoder's first layers (default: all)")
    parser.add_argument("--words", type=int, nargs="+", default=[0, 250], help="that are added to a question")
    parser.add_argument("--rounds", type=int, default=3, help="how often each contender takes a turn")
    parser.add_argument("--json", type=Path, help="also writes the figures there")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    encoder, figures = open_encoder(str(options.base), max_tokens=8_192), list[dict[str, Any]]()
    ours, theirs = adapted(options), None
    for words, pairs in product(options.words, PAIRS):
        examples = examples_of(options, words=words, pairs=pairs)
        shown = [open_image(MediaFolder(options.pictures), row.images[0], {}) for row in examples]
        encoded = [encoder.encode_answers(row, [picture]) for row, picture in zip(examples, shown, strict=True)]
        samples = [Sample(**vars(each), index=number, id=str(number)) for number, each in enumerate(encoded)]
        rows = rows_of(encoder, examples, samples, shown)
        theirs = trainer(options, rows) if theirs is None else theirs
        steps = {
            "trees": our_step(ours, samples),
            "stored": our_step(ours, stored(ours, encoder, samples)),
            "kept": our_step(ours, samples, keeps=True),
            "rows": our_step(ours, samples, packing="plain"),
            "trl": their_step(theirs, rows),
        }
        turns = take_turns(steps, rounds=options.rounds, repeats=1, clock="processor", warm_up=1)
        figures.append(
            {
                "prompt_tokens": int((samples[0].labels < 0).sum()),
                "pairs": pairs,
                "milliseconds": turns.milliseconds,
                "times_as_fast": {name: round(turns.ratio("trl", name), 2) for name in steps},
                "mib": {name: round(bytes_of(step) / 2**20, 1) for name, step in steps.items()},
            }
        )
        lines = [[name, *(figures[-1][key][name] for key in FIGURES)] for name in steps]
        print(f"\n{PICTURES} pictures, {pairs} pairs, prompt of {figures[-1]['prompt_tokens']} tokens")
        print(table(("contender", "ms (median)", "x TRL", "MiB"), lines), flush=True)
    settings = {"layers": options.layers, "pictures": PICTURES, "rounds": options.rounds}
    write_json(options.json, {**settings, "settings": figures})


def adapted(options: argparse.Namespace) -> DecoderBackbone:
    """Opens the base with DoRA on every linear layer of the decoder; the projector trains beside it."""
    backbone = open_backbone(str(options.base), dtype=torch.bfloat16)
    cut(backbone.model, options.layers)
    parts = {"projector": projector_patterns(backbone.model)}
    targets = language_targets(backbone.model)
    config = DoRAConfig(targets=targets, rank=RANK, alpha=2.0 * RANK, dropout=0.0, also_train=parts)
    apply_dora(backbone.model, config)
    return backbone.train()


def cut(model: PreTrainedModel, layers: int | None) -> None:
    """Leaves the first layers of the decoder."""
    decoder: Any = model.get_decoder()
    decoder.layers = decoder.layers[:layers]
    decoder.config.num_hidden_layers = len(decoder.layers)


def examples_of(options: argparse.Namespace, *, words: int, pairs: int) -> list[Example]:
    """Returns pairs of answers to one question about each of some pictures; no answer occurs twice."""
    records = json.loads(options.data.read_text(encoding="utf-8"))
    by_picture = {record["image"]: record for record in reversed(records)}
    pictures = list(islice(reversed(by_picture), PICTURES))
    shapes = product(("circle", "rectangle", "triangle"), ("blue", "red", "green", "teal"))
    answers = [f"{colour} {shape}, so {shape}" for shape, colour in shapes]
    examples = list[Example]()
    for picture, pair in product(pictures, range(pairs)):
        question = by_picture[picture]["conversations"][0]["value"] + " and" * words
        turns = (Turn("user", question), Turn("assistant", answers[2 * pair]))
        examples.append(Example(picture, (picture,), turns, rejected=(answers[2 * pair + 1],)))
    return examples


def rows_of(
    encoder: Encoder, examples: Sequence[Example], samples: Sequence[Sample], pictures: Sequence[Image.Image]
) -> list[dict[str, Any]]:
    """Returns the same as TRL takes it: the prompt's text, both answers with what closes them, and the pictures."""
    rows = list[dict[str, Any]]()
    for row, sample, picture in zip(examples, samples, pictures, strict=True):
        prompt = encoder.prompts.render(row.turns[:-1], generation_prompt=True).text
        chosen, rejected = (encoder.tokenizer.decode(part.input_ids[part.labels >= 0]) for part in sample.texts())
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "images": [picture]})
    return rows


def our_step(backbone: DecoderBackbone, samples: Sequence[Sample], *, packing: Packing = "trees", **how: bool) -> Step:
    """Makes a step of this project."""
    batch: Any = Collator(0, packing=packing, compares=True)(samples)
    batch = {name: value for name, value in batch.items() if name not in BOOKKEEPING}
    reference = Reference(backbone.model)
    loss = PreferenceLoss(
        backbone, losses={"dpo": 1.0}, hyperparameters=Hyperparameters(beta=BETA), reference=reference, **how
    )
    return train_step(backbone.model, lambda _: loss(**batch)["loss"])


def stored(backbone: DecoderBackbone, encoder: Encoder, samples: Sequence[Sample]) -> list[Sample]:
    """Puts the outputs of the frozen tower in place of the pixels, as `data.cache_features` does."""
    parts = backbone.frozen_parts = backbone.frozen_parts or find_verified_parts(backbone.model, encoder)

    def without_pixels(part: Any) -> Any:
        return with_stored_outputs(part, parts.outputs_of(backbone.model, inputs_of(backbone.model, part)))

    each = (replace(sample, others=tuple(map(without_pixels, sample.others))) for sample in samples)
    return [without_pixels(sample) for sample in each]


def trainer(options: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> Any:
    """Makes TRL's trainer of the same base with PEFT's DoRA."""
    trl, datasets = importlib.import_module("trl"), importlib.import_module("datasets")
    model: Any = open_backbone(str(options.base), dtype=torch.bfloat16).model
    cut(model, options.layers)
    places: dict[str, Any] = {"target_modules": PROJECTIONS, "modules_to_save": ["multi_modal_projector"]}
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, use_dora=True, **places)
    usual = {"report_to": [], "use_cpu": True, "bf16": False, "remove_unused_columns": False, "max_length": None}
    arguments = trl.DPOConfig(output_dir=tempfile.mkdtemp(), beta=BETA, gradient_checkpointing=False, **usual)
    return trl.DPOTrainer(
        get_peft_model(model, config, autocast_adapter_dtype=False),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(list(rows)),
        processing_class=AutoProcessor.from_pretrained(options.base),
    )


def their_step(held: Any, rows: Sequence[dict[str, Any]]) -> Step:
    """Makes a step of TRL's."""
    batch = held.data_collator([dict(row) for row in rows])
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)  # the tower takes no float32 without autocast
    return train_step(held.model, lambda model: held.compute_loss(model, dict(batch)))


def bytes_of(step: Step) -> int:
    """Counts what a step takes at its fullest, beyond what is there before."""
    with LiveBytes() as live:
        step()
        before = live.restart_peak()
        step()
    return live.peak - before


if __name__ == "__main__":
    main()
