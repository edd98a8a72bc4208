"""Records, features and settings of a VL-BART run with every task, small enough for a second a step.

Run as a program it trains those settings: python tests/training/tiny_vlbart_run.py --config FILE
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from dora_vl.data.example import Answer, Clip, Example, Subtitle, write_examples

if TYPE_CHECKING:
    from dora_vl.training.vlbart_pipeline import VlBartPipeline

sys.path.insert(0, str(Path(__file__).parents[2]))
FEATURE_WIDTH, FEATURE_TOKENS, FEATURES = 8, 4, 6
ITEMS = 7  # odd, so that two ranks get parts of different sizes
WORDS = ("red", "green", "blue", "a longer answer", "circle", "yes", "no")


def image_examples(task: str) -> list[Example]:
    examples = []
    for index in range(ITEMS):
        answers: tuple[Answer, ...] = (Answer(text=WORDS[index], weight=(0.3, 0.6, 1.0)[index % 3]),)
        if task in ("nlvr2", "nlvr"):
            answers = (Answer(text=("true", "false")[index % 2]),)
        if task == "coco_caption":
            answers = tuple(Answer(text=" ".join(WORDS[: index + 1 + extra])) for extra in range(1 + index % 2))
        images = tuple(f"images/p{(index + shift) % FEATURES}.png" for shift in range(2 if task == "nlvr2" else 1))
        question = "" if task == "coco_caption" else f"what is it {' very' * index}?"
        name = f"dev-{index}-0-0" if task == "nlvr2" else f"{task}-{index}"  # NLVR2's ids name their sentence
        extra = {"human_answers": [answers[0].text] * 10} if task == "vqav2" else {}
        examples.append(Example(id=name, images=images, question=question, answers=answers, extra=extra))
    return examples


def video_examples(task: str) -> list[Example]:
    examples = []
    for index in range(ITEMS):
        clips = (Clip(path=f"p{index % FEATURES}.mp4"),)
        shared: dict[str, Any] = {"id": f"{task}-{index}", "videos": clips}
        shared["subtitles"] = tuple(Subtitle(f"line {number}") for number in range(index))
        if task in ("tvqa", "how2qa", "video_choice"):
            choices = tuple(f"{word} " for word in WORDS[: 5 if task == "tvqa" else 4])
            extra = {"correct": index % len(choices), "ts": "1.5-2.5"}
            examples.append(Example(**shared, question="what is said?", choices=choices, extra=extra))
        else:
            answers = tuple(Answer(text=f"they say {word}") for word in WORDS[: 1 + index % 2])
            examples.append(Example(**shared, answers=answers, extra={"clip_id": index, "ts": [1.5, 2.5]}))
    return examples


def write_vlbart_data(folder: Path) -> Path:
    """Every task's records, and features of six pictures."""
    images = ("vqav2", "gqa", "nlvr2", "coco_caption")
    for task in (*images, "tvqa", "how2qa", "tvc", "yc2c"):
        examples = image_examples(task) if task in images else video_examples(task)
        write_examples(folder / "records" / f"{task}.jsonl", examples)
    (folder / "features").mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for number in range(FEATURES):
        values = random.normal(size=(FEATURE_TOKENS, FEATURE_WIDTH)).astype(np.float16)
        np.savez(folder / "features" / f"p{number}.npz", features=values)
    return folder


def write_vlbart_run(path: Path, data: Path, tasks: tuple[str, ...], /, **changes: dict[str, Any]) -> Path:
    """A run's YAML over the tiny data; `changes` are merged into its sections."""
    records = {task: str(data / "records" / f"{task}.jsonl") for task in tasks}
    texts = [str(file) for file in sorted((data / "records").glob("*.jsonl"))]
    small = {"texts": texts, "vocabulary": 300, "width": 16, "layers": 1, "heads": 2, "feedforward": 32}
    sections: dict[str, dict[str, Any]] = {
        "model": {
            "base": str(data / "base"),
            "compose": {"small": small, "feature_width": FEATURE_WIDTH, "pooled_side": None, "dropout": 0.0},
        },
        "adapter": {"rank": 2, "alpha": 3.0, "dropout": 0.0, "train_norm_weights": True},
        "data": {
            "train": records,
            "features": dict.fromkeys(tasks, str(data / "features")),
            "feature_tokens": FEATURE_TOKENS,
            "batch_size": 21,
            "workers": 0,
        },
        "training": {
            "output_dir": str(path.parent / path.stem),
            "learning_rate": 0.05,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "num_train_epochs": 1,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "seed": 3,
        },
    }
    for section, values in changes.items():
        sections.setdefault(section, {}).update(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"task": "vlbart", **sections}))
    return path


def vlbart_run(run_file: Path, *overrides: str) -> "VlBartPipeline":
    """The run of these settings in this process."""
    from dora_vl.run.settings_parser import read_run
    from dora_vl.training.vlbart_pipeline import VlBartPipeline

    config = read_run([f"--config={run_file}", "--training.use_cpu=true", *overrides])
    return VlBartPipeline(config)


def main() -> None:
    from dora_vl.training.train_command import train_script

    train_script("vlbart", "")


if __name__ == "__main__":
    main()
