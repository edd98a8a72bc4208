"""VL-BART on pictures: VQAv2, GQA, NLVR2 and COCO captions, one of them or mixed; NLVR; your own short answers.

deepspeed tasks/vlbart_image.py --config configs/vlbart/image.yaml --variant dora [--section.key value ...]

It also runs under torchrun and plain python. Which tasks are trained is what `data.train` names. Writes `adapter/`,
`log.jsonl`, `metrics.json`, `predictions/` and checkpoints to training.output_dir; `--resume last` goes on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dora_vl.tasks.vlbart_image import subtasks

if TYPE_CHECKING:
    from dora_vl.run.vlbart_recipe import VlBartRunConfig
    from dora_vl.training.pipeline import Pipeline


def pipeline_of(config: VlBartRunConfig) -> Pipeline:
    """The run's task; imports what takes seconds."""
    from dora_vl.pipelines.vlbart import VlBartPipeline

    return VlBartPipeline(config, subtasks(task_prompt=config.data.task_prompt), name="vlbart_image")


def main() -> None:
    """Reads the settings, trains, tests."""
    from dora_vl.run.vlbart_recipe import VlBartRunConfig
    from dora_vl.training.start import start

    start("vlbart_image.py", __doc__ or "", VlBartRunConfig, pipeline_of)


if __name__ == "__main__":
    main()
