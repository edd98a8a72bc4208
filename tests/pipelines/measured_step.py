"""A run whose third step is measured: `python -m tests.pipelines.measured_step OUT --config ...`, on each rank.

Writes OUT.RANK: bytes of tensors alive before the step, the most within it, and what its micro-batch held.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor
from transformers import TrainerCallback

from dora_vl.heads import next_token
from dora_vl.training import run as training_run
from dora_vl.training.estimate import LiveBytes, storages_of
from dora_vl.training.trainer import AdapterTrainer
from tasks.llava_instruct import main

MEASURED = 2
"""Steps taken before: the optimizer's state is there, and ZeRO-3 knows the order of the layers."""


class MeasuredBytes(LiveBytes):
    """What is alive, that of before included."""

    def follow_existing(self) -> None:
        """Counts what is there already: every tensor that Python holds, those on the meta device aside."""
        gc.collect()
        tensors = [value for value in gc.get_objects() if issubclass(type(value), Tensor) and not value.is_meta]
        for storage in storages_of(tensors):
            if id(storage) not in self._alive:
                self._follow(storage)


class Measure(TrainerCallback):
    """Counts during one step."""

    def __init__(self, out: str, batch: dict[str, int]) -> None:
        self.out, self.batch = out, batch

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == MEASURED:
            self.live = MeasuredBytes()
            self.live.follow_existing()
            self.before = self.live.restart_peak()
            self.live.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == MEASURED + 1:
            self.live.__exit__(None, None, None)
            result = {"before": self.before, "peak": self.live.peak, **self.batch}
            Path(f"{self.out}.{args.process_index}").write_text(json.dumps(result))


def measured(out: str, words: list[str]) -> None:
    batch: dict[str, int] = {}
    build, compute = training_run.build_trainer, AdapterTrainer.compute_loss

    def with_measure(*parts: Any) -> Any:
        trainer = build(*parts)
        trainer.add_callback(Measure(out, batch))
        return trainer

    def seen(self: AdapterTrainer, model: Any, inputs: dict[str, Any], *options: Any, **named: Any) -> Any:
        rows, tokens = inputs["input_ids"].shape
        batch.update(rows=rows, tokens=tokens, labelled=int((inputs["labels"] != -100).sum()) // rows)
        return compute(self, model, inputs, *options, **named)

    with (
        mock.patch.object(next_token, "SMALL_VOCABULARY", 0),  # losses in chunks, as of a published one
        mock.patch.object(training_run, "build_trainer", with_measure),
        mock.patch.object(AdapterTrainer, "compute_loss", seen),
        mock.patch.object(sys, "argv", ["llava_instruct.py", *words]),
    ):
        main()


if __name__ == "__main__":
    measured(sys.argv[1], sys.argv[2:])
