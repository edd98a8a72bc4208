"""VL-BART on features of pictures or videos: VQAv2, GQA, NLVR2, NLVR, COCO captions, TVQA, How2QA, TVC, YC2C, your own.

deepspeed tasks/vlbart.py --config configs/vlbart/image.yaml --variant dora [--section.key value ...]

It also runs under torchrun and plain python. Which tasks are trained, one or several mixed, is what `data.train` names.
Writes `adapter/`, `log.jsonl`, `metrics.json`, `predictions/` and checkpoints to training.output_dir; `--resume last`
resumes from the last checkpoint.
"""

from __future__ import annotations

from dora_vl.training.train_command import train_script


def main() -> None:
    """Reads the settings, trains, tests."""
    train_script("vlbart", __doc__)


if __name__ == "__main__":
    main()
