"""A LLaVA adapter's logits here and in PEFT, on the same questions in float32, and merged against unmerged.

    python benchmarks/peft_agreement.py --adapter runs/demo/adapter --questions runs/demo/data/test.json \\
        --images runs/demo/assets/easy_vqa --json benchmarks/results.jsonl

Differences are the greatest over the questions; relative ones are divided by the greatest logit. At the first places,
which a language model uses as a sink of attention, float32 itself resolves no more than what PEFT, ours and merged
differ by there: both are compared with float64 as well.
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

from dora_vl.adapters.files import RECIPE_FILE
from dora_vl.adapters.folder import load_adapter
from dora_vl.backbones.model import open_backbone
from dora_vl.core import merge_dora
from dora_vl.data.example import Example
from dora_vl.data.pictures import open_image
from dora_vl.errors import UserError, exit_on_user_error, positive
from dora_vl.evaluation.assistant import Assistant
from dora_vl.evaluation.open_model import ModelRequest, open_model
from dora_vl.evaluation.predictor import Shown
from dora_vl.evaluation.questions import read_questions
from dora_vl.files import read_json

Inputs = tuple[Tensor, Tensor]
"""Ids and pixels of one question, each with a batch of one in front."""


@exit_on_user_error
def main() -> None:
    """Compares, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True, help="adapter folder of a LLaVA run")
    parser.add_argument("--questions", type=Path, required=True, help="questions in LLaVA's format")
    parser.add_argument("--images", type=Path, required=True, help="root of their pictures")
    parser.add_argument("--limit", type=positive, default=16, help="the first so many questions")
    parser.add_argument("--json", default=None, help="file for the figures")
    options = parser.parse_args()
    figures = compare(options.adapter, read_questions(options.questions, options.limit)[0], options.images)
    print(table(("", "greatest difference", "relative"), [(name, *pair.values()) for name, pair in figures.items()]))
    if options.json is not None:
        write_json(options.json, {"questions": options.limit, **figures})


def compare(adapter: Path, questions: Sequence[Example], images: Path) -> dict[str, dict[str, float]]:
    """Compares the logits in every way, each absolute and relative."""
    assistant, base = open_model(ModelRequest(adapter=adapter)).adapted, read_json(adapter / RECIPE_FILE)["base"]
    if not isinstance(assistant, Assistant):
        raise UserError(f"{adapter} is no LLaVA's adapter")
    inputs: list[Inputs] = []
    for question in questions:
        shown = Shown(pictures=tuple(open_image(images, path) for path in question.images))
        sample = assistant.prompts.sample(question.turns, shown)
        inputs.append((sample.input_ids[None], sample.inputs["pixel_values"]))
    ours, merged = unmerged_and_merged(base, adapter, inputs, torch.float32)
    plain = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    peft = logits_of(PeftModel.from_pretrained(plain, str(adapter)).eval(), inputs)
    exact, exact_merged = unmerged_and_merged(base, adapter, inputs, torch.float64)
    return {
        "PEFT, where the answer begins": greatest(ours, peft, position=-1),
        "PEFT, all places": greatest(ours, peft),
        "merged, where the answer begins": greatest(ours, merged, position=-1),
        "merged, all places": greatest(ours, merged),
        "merged, all places, float64": greatest(exact, exact_merged),
        "float32 against float64, ours, all places": greatest(ours, exact),
        "float32 against float64, PEFT, all places": greatest(peft, exact),
    }


def unmerged_and_merged(
    base: str, adapter: Path, inputs: Sequence[Inputs], dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the adapted model's logits before and after `merge_dora`."""
    model = open_backbone(base, dtype=dtype).model
    load_adapter(model, adapter)
    cast = [(ids, pixels.to(dtype)) for ids, pixels in inputs]
    unmerged = logits_of(model, cast)
    merge_dora(model)
    return unmerged, logits_of(model, cast)


@torch.inference_mode()
def logits_of(model: nn.Module, inputs: Sequence[Inputs]) -> list[Tensor]:
    """Logits at every place of every question."""
    return [model(input_ids=ids, pixel_values=pixels).logits for ids, pixels in inputs]


def greatest(ours: Sequence[Tensor], theirs: Sequence[Tensor], position: int | None = None) -> dict[str, float]:
    """Returns the greatest difference, absolute and as a share of the greatest logit, at one place or at all."""
    positions = slice(None) if position is None else [position]
    pairs = [(logits[:, positions].double(), other[:, positions]) for logits, other in zip(ours, theirs, strict=True)]
    difference = max(float((logits - other).abs().max()) for logits, other in pairs)
    return {"absolute": difference, "relative": difference / max(float(other.abs().max()) for _, other in pairs)}


if __name__ == "__main__":
    main()
