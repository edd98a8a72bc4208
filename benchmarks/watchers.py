"""What watching costs: a run's step with everything that looks at it, and without.

    python -m benchmarks.watchers --json benchmarks/results.jsonl

One run of a small random LLaVA with DoRA, on whose steps the watchers take turns: for as many steps as there are
between two lines of the log they are on, then off, and so on. On are the faults of losses and gradients with the
detector of spikes, the counts of what batches held, signals, the log's line with rates and memory, and TensorBoard
where it is installed. Each stretch is compared with its neighbour, so that a machine that slows down slows both; the
interval is a bootstrap's over those pairs. `processor` counts this process's own time, which others on the machine
disturb less than `clock`, what passes meanwhile; without a GPU both are the same on a machine that is left alone.
`milliseconds` is what they take of a step whatever the model's size. `share_inside` adds up the time inside their
methods instead, over the steps with them: no noise of the steps is in it, nor what they might slow down elsewhere.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.report import median, table, write_json

STRETCH = 10
"""Steps between two lines of the log, and of a stretch; stretches begin between two lines, so that each holds one."""
LIMIT = 1.01
CLOCKS: Mapping[str, Callable[[], float]] = {"processor": time.process_time, "clock": time.perf_counter}
RESAMPLES = 10_000


def main() -> None:
    """Trains, prints the ratio with its interval, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30, help="of stretches of ten steps")
    parser.add_argument("--width", type=int, default=256, help="of the model's hidden states")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--json", default=None, help="file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        turns = timed(Path(scratch), pairs=options.pairs, width=options.width, batch=options.batch)
    found = {name: compared(seconds) for name, seconds in turns.seconds.items()}
    rows = [
        (name, *(f"{part:.4f}" for part in (one["ratio"], *one["interval"])), one["milliseconds"], one["step_seconds"])
        for name, one in found.items()
    ]
    print(table(("time", "on / off", "from", "to (95 %)", "ms of a step", "a step, s"), rows))
    with_them = STRETCH * options.pairs + STRETCH + STRETCH // 2
    share = turns.inside / with_them / found["clock"]["step_seconds"]
    print(
        f"inside their methods: {1000 * turns.inside / with_them:.3f} ms, {share:.3%} of a step; the limit is {LIMIT}"
    )
    if options.json is not None:
        write_json(
            options.json, {**vars(options), "limit": LIMIT, "share_inside": share, **found, "seconds": turns.seconds}
        )


def compared(seconds: list[tuple[bool, float]]) -> dict[str, Any]:
    """The geometric mean of the ratios of neighbours, its interval, and the difference in a step."""
    pairs = list(zip(seconds[::2], seconds[1::2], strict=True))
    both = [{one[0]: one[1], other[0]: other[1]} for one, other in pairs]
    logs = np.array([np.log(pair[True] / pair[False]) for pair in both])
    draws = np.random.default_rng(0).integers(len(logs), size=(RESAMPLES, len(logs)))
    low, high = np.quantile(logs[draws].mean(axis=1), (0.025, 0.975))
    return {
        "ratio": float(np.exp(logs.mean())),
        "interval": [float(np.exp(low)), float(np.exp(high))],
        "milliseconds": 1000 * median([pair[True] - pair[False] for pair in both]) / STRETCH,
        "step_seconds": median([pair[False] for pair in both]) / STRETCH,
    }


class Turns(TrainerCallback):
    """Switches the watchers and keeps the time of each stretch.

    Args:
        pairs: of stretches; which of a pair comes first changes from one to the next.
    """

    def __init__(self, pairs: int) -> None:
        order = [(True, False) if number % 2 else (False, True) for number in range(pairs)]
        self._order = [on for pair in order for on in pair]
        self.on = True
        self.seconds: dict[str, list[tuple[bool, float]]] = {name: [] for name in CLOCKS}
        self._since = dict.fromkeys(CLOCKS, 0.0)
        self.inside = 0.0
        """Seconds spent in watchers, those of the steps to warm up too."""

    @property
    def steps(self) -> int:
        """Of the run: a stretch to warm up, and a half one before the first."""
        return STRETCH * (len(self._order) + 1) + STRETCH // 2

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The last of all callbacks."""
        stretch, within = divmod(state.global_step - STRETCH - STRETCH // 2, STRETCH)
        if within or stretch < 0:
            return
        for name, now in CLOCKS.items():
            if stretch:
                self.seconds[name].append((self.on, now() - self._since[name]))
        if stretch < len(self._order):
            self.on = self._order[stretch]
        self._since = {name: now() for name, now in CLOCKS.items()}

    def switch(self, owner: object, name: str, otherwise: Callable[..., Any] = lambda *_, **__: None) -> None:
        """Has a method do something else while the watchers are off."""
        original = getattr(owner, name)

        def either(*options: Any, **named: Any) -> Any:
            if not self.on:
                return otherwise(*options, **named)
            begun = time.perf_counter()
            found = original(*options, **named)
            self.inside += time.perf_counter() - begun
            return found

        setattr(owner, name, either)


def timed(scratch: Path, *, pairs: int, width: int, batch: int) -> Turns:
    """The run."""
    from dora_vl.run.reading import read_run_file
    from dora_vl.training import run as training
    from dora_vl.training.decoder_pipeline import DecoderPipeline
    from tests.training.tiny_run import write_run, write_tiny_data, write_tiny_llava

    turns = Turns(pairs)
    settings = write_run(
        scratch / "run.yaml",
        write_tiny_llava(scratch / "llava", width=width),
        write_tiny_data(scratch / "data", samples=512),
        training={
            "max_steps": turns.steps,
            "logging_steps": STRETCH,
            "per_device_train_batch_size": batch,
            "report_to": "tensorboard" if find_spec("tensorboard") else "none",
        },
    )
    build = training.build_trainer

    def with_turns(*options: Any) -> Any:
        trainer = build(*options)
        put_switches(turns, trainer)
        trainer.callback_handler.callbacks.append(turns)
        return trainer

    training.build_trainer = with_turns
    try:
        training.train(DecoderPipeline(read_run_file(settings)))
    finally:
        training.build_trainer = build
    return turns


def put_switches(turns: Turns, trainer: Any) -> None:
    """Every watcher of a Trainer can be switched off."""
    from dora_vl.data.samples import BOOKKEEPING
    from dora_vl.training.callbacks import Epochs

    def taken(batch: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in batch.items() if name not in BOOKKEEPING}

    for name in ("begin_step", "note_loss", "note_norm", "drop_gradients"):
        turns.switch(trainer.faults, name)
    turns.switch(trainer.statistics, "take", taken)
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__module__.startswith("transformers.trainer_callback") or isinstance(callback, Epochs):
            continue  # the Trainer's own flow, and the data's
        for name in ("on_step_begin", "on_optimizer_step", "on_step_end", "on_log"):
            turns.switch(callback, name)


if __name__ == "__main__":
    main()
