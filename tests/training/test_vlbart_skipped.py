"""A sample that cannot be used changes no loss of the others: a run with it equals a run on records without it.

Each task's items are one step here, and all but one task have items without features.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dora_vl.data.example import iterate_examples, write_examples
from dora_vl.run.reading import read_settings
from dora_vl.run.settings import VlBartRunConfig
from dora_vl.training.callbacks import read_log
from dora_vl.training.run import run
from dora_vl.training.vlbart_pipeline import VlBartPipeline
from tests.training.test_two_ranks import losses
from tests.training.test_vlbart_ranks import launch
from tests.training.tiny_vlbart_run import all_subtasks, write_vlbart_data, write_vlbart_run

TASKS = ("vqav2", "nlvr2", "tvqa", "coco_caption")
MISSING = (1, 4)  # of six pictures
WEIGHTS = Path("adapter") / "adapter_model.safetensors"


def without_missing(data: Path, folder: Path) -> dict[str, str]:
    """Each task's records but those that need one of the missing pictures."""
    files = {}
    for task in TASKS:
        found = iterate_examples(data / "records" / f"{task}.jsonl")
        usable = [
            one
            for one in found
            if not any(
                Path(path).stem == f"p{number}"
                for number in MISSING
                for path in (*one.images, *([one.video.path] if one.video else []))
            )
        ]
        files[task] = str(folder / f"{task}.jsonl")
        write_examples(Path(files[task]), usable)
    return files


@pytest.fixture(scope="module")
def run_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The run with missing features, and the run on what is left."""
    folder = tmp_path_factory.mktemp("skipped")
    data = write_vlbart_data(folder / "data")
    for number in MISSING:
        (data / "features" / f"p{number}.npz").unlink()
    left = without_missing(data, folder / "left")
    whole = {task: str(data / "records" / f"{task}.jsonl") for task in TASKS}
    made = []
    for name, records in (("whole", whole), ("left", left)):
        settings = {"train": records, "validation_files": records, "batch_size": 60, "max_bad_share": 0.9}
        made.append(write_vlbart_run(folder / f"{name}.yaml", data, TASKS, data=settings))
    return made[0], made[1]


def in_this_process(config: Path, *overrides: str) -> None:
    settings = read_settings([f"--config={config}", "--training.use_cpu=true", *overrides], VlBartRunConfig)
    assert run(VlBartPipeline(settings, all_subtasks(), name="tiny")) is None


def with_two_ranks(config: Path, *overrides: str) -> None:
    launch(config, *overrides, ranks=2, port=29651)


@pytest.fixture(scope="module")
def expected(run_files: tuple[Path, Path]) -> Path:
    folder = run_files[1].parent / "expected"
    in_this_process(run_files[1], f"--training.output_dir={folder}", "--training.eval_strategy=epoch")
    return folder


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("train", "accumulation"),
    [(in_this_process, 1), (in_this_process, 5), pytest.param(with_two_ranks, 3, marks=pytest.mark.slow)],
    ids=["at once", "accumulated", "two ranks"],
)
def test_losses_and_weights_are_those_of_the_usable_samples(
    run_files: tuple[Path, Path], expected: Path, train: Callable[..., None], accumulation: int
) -> None:
    folder = run_files[0].parent / f"{train.__name__}-{accumulation}"
    options = ["--training.eval_strategy=epoch", f"--training.gradient_accumulation_steps={accumulation}"]
    train(run_files[0], f"--training.output_dir={folder}", *options)
    assert len(losses(folder)) == len(TASKS)
    torch.testing.assert_close(losses(folder), losses(expected), atol=2e-5, rtol=1e-5)
    found, wanted = (load_file(one / WEIGHTS) for one in (folder, expected))
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], atol=2e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
    (validated,), (other,) = (
        [line for line in read_log(one / "log.jsonl") if "eval_loss" in line] for one in (folder, expected)
    )
    assert validated["eval_loss"] == pytest.approx(other["eval_loss"], abs=2e-5)
    assert validated["eval_samples"] == other["eval_samples"]
    assert validated["eval_skipped"] > other["eval_skipped"] == 0
