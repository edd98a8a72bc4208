"""VL-BART on videos: TVQA, How2QA, TVC and YC2C of VALUE, one of them or mixed; your own clips.

deepspeed tasks/vlbart_video.py --config configs/vlbart/video.yaml --variant dora [--section.key value ...]

It also runs under torchrun and plain python. Which tasks are trained is what `data.train` names. Writes `adapter/`,
`log.jsonl`, `metrics.json`, `predictions/` and checkpoints to training.output_dir; `--resume last` goes on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dora_vl.tasks.vlbart_video import subtasks

if TYPE_CHECKING:
    from dora_vl.run.vlbart_recipe import VlBartRunConfig
    from dora_vl.training.pipeline import Pipeline


def pipeline_of(config: VlBartRunConfig) -> Pipeline:
    """The run's task; imports what takes seconds."""
    from dora_vl.pipelines.vlbart import VlBartPipeline

    known = subtasks(task_prompt=config.data.task_prompt)
    return VlBartPipeline(config, known, name="vlbart_video", is_video=True)


def main() -> None:
    """Reads the settings, trains, tests."""
    from dora_vl.run.vlbart_recipe import VlBartRunConfig
    from dora_vl.training.start import start

    start("vlbart_video.py", __doc__ or "", VlBartRunConfig, pipeline_of)


if __name__ == "__main__":
    main()
