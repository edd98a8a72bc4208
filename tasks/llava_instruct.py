"""Trains a LLaVA, or any vision-language model of transformers, on visual instructions with DoRA, LoRA, magnitudes
alone, or its full weights.

deepspeed tasks/llava_instruct.py --config configs/llava/<run>.yaml [--variant NAME] [--section.key value ...]

It also runs under torchrun and plain python. Writes `adapter/`, `log.jsonl`, `metrics.json` and checkpoints to
training.output_dir; `--resume last` resumes from the last checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dora_vl.run.recipe import RunConfig
from dora_vl.training.start import start

if TYPE_CHECKING:
    from dora_vl.training.pipeline import Pipeline


def instruct(config: RunConfig) -> Pipeline:
    """The base's task; its imports take seconds, so they come after mistakes in the settings were reported."""
    from dora_vl.pipelines.image_text import instruct_pipeline

    return instruct_pipeline(config)


def main() -> None:
    """Reads the settings, trains, tests."""
    start("llava_instruct.py", __doc__ or "", RunConfig, instruct)


if __name__ == "__main__":
    main()
