"""Trains a plain language model on instructions with DoRA, LoRA, magnitudes alone, or its full weights.

deepspeed tasks/commonsense.py --config configs/commonsense/<run>.yaml [--variant NAME] [--section.key value ...]

The paper's commonsense reasoning runs are in configs/commonsense; data of one's own is one question and its output a
sample, in any format of docs/data.md. It also runs under torchrun and plain python. Writes `adapter/`, `log.jsonl`,
`metrics.json` and checkpoints to training.output_dir; `--resume last` resumes from the last checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dora_vl.run.commonsense_recipe import CommonsenseRunConfig
from dora_vl.training.start import start

if TYPE_CHECKING:
    from dora_vl.pipelines.commonsense import CommonsensePipeline


def pipeline_of(config: CommonsenseRunConfig) -> CommonsensePipeline:
    """The task of these settings; its imports take seconds, so they wait until the settings are right."""
    from dora_vl.pipelines.commonsense import CommonsensePipeline

    return CommonsensePipeline(config)


if __name__ == "__main__":
    start("commonsense.py", __doc__ or "", CommonsenseRunConfig, pipeline_of)
