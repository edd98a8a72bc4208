"""A LLaVA adapter's logits here and in PEFT, on the same questions in float32, and merged against unmerged.

    python benchmarks/peft_agreement.py --adapter runs/demo/adapter --questions runs/demo/data/test.json \\
        --images runs/demo/assets/easy_vqa --json benchmarks/results/peft_agreement.json

Differences are the greatest over all places of all questions; relative ones are divided by the greatest logit.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from report import table, write_json
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from dora_vl.backbones.llava import load_llava
from dora_vl.core import load_adapter, merge_dora
from dora_vl.core.adapter_file import RECIPE_FILE, read_json
from dora_vl.data.media import open_image
from dora_vl.errors import exit_on_user_error
from dora_vl.evaluation.assistant import Assistant, open_assistants
from dora_vl.evaluation.questions import Question, read_questions

Inputs = tuple[Tensor, Tensor]
"""Ids and pixels of one question, each with a batch of one in front."""


@exit_on_user_error
def main() -> None:
    """Compares, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True, help="adapter folder of a LLaVA run")
    parser.add_argument("--questions", type=Path, required=True, help="questions in LLaVA's format")
    parser.add_argument("--images", type=Path, required=True, help="root of their pictures")
    parser.add_argument("--limit", type=int, default=16, help="the first so many questions")
    parser.add_argument("--json", default=None, help="file for the figures")
    options = parser.parse_args()
    figures = compare(options.adapter, read_questions(options.questions, options.limit)[0], options.images)
    print(table(("", "greatest difference", "relative"), [(name, *pair.values()) for name, pair in figures.items()]))
    if options.json is not None:
        write_json(options.json, {"questions": options.limit, **figures})


def compare(adapter: Path, questions: Sequence[Question], images: Path) -> dict[str, dict[str, float]]:
    """Both comparisons, each absolute and relative."""
    assistant, place = open_assistants(adapter).adapted, read_json(adapter / RECIPE_FILE)["base"]
    inputs = [inputs_of(assistant, question, images) for question in questions]
    ours = load_llava(place, dtype=torch.float32).model  # the assistant's is of the recipe's dtype
    load_adapter(ours, adapter)
    base = LlavaForConditionalGeneration.from_pretrained(place, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, str(adapter)).eval()
    here, there = logits_of(ours, inputs), logits_of(theirs, inputs)
    merge_dora(ours)
    return {"PEFT": greatest(here, there), "merged": greatest(here, logits_of(ours, inputs))}


def inputs_of(assistant: Assistant, question: Question, images: Path) -> Inputs:
    """One question as the model reads it."""
    pixels = torch.stack([assistant.preparation.prepare(open_image(images, path)) for path in question.images])
    return assistant.encoder.encode_prompt(question.turns)[None], pixels


@torch.inference_mode()
def logits_of(model: nn.Module, inputs: Sequence[Inputs]) -> list[Tensor]:
    """Logits at every place of every question."""
    return [model(input_ids=ids, pixel_values=pixels).logits for ids, pixels in inputs]


def greatest(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> dict[str, float]:
    """The greatest difference, absolute and as a share of the greatest logit."""
    difference = max(float((one - other).abs().max()) for one, other in zip(ours, theirs, strict=True))
    return {"absolute": difference, "relative": difference / max(float(one.abs().max()) for one in theirs)}


if __name__ == "__main__":
    main()
