"""Trains the settings it is given and writes which samples each step took, a file a rank; no pickle may be opened.

As a program: RECORDS=FOLDER python tests/training/recorded_run.py --config FILE
"""

import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.training.launched import launch


def recorded(
    config: Path, folder: Path, *overrides: str, ranks: int, stage: str | None
) -> subprocess.CompletedProcess[str]:
    """Trains into a folder, without DeepSpeed where `stage` is None; the samples stand in `records/` below it."""
    engine = [] if stage is None else [f"--training.deepspeed={stage}"]
    return launch(
        config,
        f"--training.output_dir={folder}",
        *engine,
        *overrides,
        ranks=ranks,
        program=("tests/training/recorded_run.py",),
        launcher="deepspeed" if ranks > 1 or engine else "",
        RECORDS=str(folder.with_name(f"{folder.name}-records")),
    )


def samples_by_step(folder: Path) -> dict[int, Counter[str]]:
    """The samples of all ranks in each step that a run took, by the step's number."""
    steps: dict[int, Counter[str]] = {}
    for file in folder.with_name(f"{folder.name}-records").glob("*.jsonl"):
        for line in map(json.loads, file.read_text().splitlines()):
            steps.setdefault(line["step"], Counter()).update(line["samples"])
    return steps


def record_samples(folder: Path) -> None:
    """Writes every step's samples, beside the watching of its losses."""
    from dora_vl.training.trainer import AdapterTrainer

    folder.mkdir(parents=True, exist_ok=True)
    take = AdapterTrainer.get_batch_samples

    def noted(self: AdapterTrainer, *options: Any) -> Any:
        batches = take(self, *options)
        line = {"step": self.state.global_step + 1, "samples": [name for ids in self.faults._ids for name in ids]}
        with (folder / f"{self.args.process_index}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return batches

    setattr(AdapterTrainer, "get_batch_samples", noted)  # noqa: B010


def forbid_pickles() -> None:
    """Lets every way to a pickle in a file raise."""
    import torch

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("a pickle is opened")

    class Unpickler(pickle.Unpickler):
        __init__ = opened

    torch.load = opened
    pickle.load = opened
    pickle.Unpickler = Unpickler  # what sends objects between ranks has taken its own before


def main() -> None:
    import torch.distributed.distributed_c10d  # noqa: F401

    from tasks import llava_instruct

    record_samples(Path(os.environ["RECORDS"]))
    forbid_pickles()
    llava_instruct.main()


if __name__ == "__main__":
    main()
