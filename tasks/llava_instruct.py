"""Trains a LLaVA on visual instructions with DoRA, LoRA, magnitudes alone, or its full weights.

deepspeed tasks/llava_instruct.py --config configs/llava/<run>.yaml [--variant NAME] [--section.key value ...]

It also runs under torchrun and plain python. Writes `adapter/`, `log.jsonl`, `metrics.json` and checkpoints to
training.output_dir; `--resume last` goes on from the last checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dora_vl.training.recipe import RunConfig
from dora_vl.training.start import start

if TYPE_CHECKING:
    from dora_vl.training.llava_task import LlavaTask


def llava(config: RunConfig) -> LlavaTask:
    """The task; its imports take seconds, so they come after mistakes in the settings were told."""
    from dora_vl.training.llava_task import LlavaTask

    return LlavaTask(config)


def main() -> None:
    """Reads the settings, trains, tests."""
    start("llava_instruct.py", __doc__ or "", RunConfig, llava)


if __name__ == "__main__":
    main()
