"""The picture of docs/report.md: python -m tests.training.view_screenshot --to docs/images/terminal.svg.

A real run of a tiny random LLaVA that learns colours; the view stands below the lines that went above it.
"""

from __future__ import annotations

import argparse
import io
import re
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from dora_vl.run.reading import read_run_file
from dora_vl.training import build_trainer as building
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.live_view import LiveView, drawn
from dora_vl.training.run import train
from tests.training.tiny_run import write_run, write_tiny_data, write_tiny_llava

WIDTH, AT_STEP, STEPS = 100, 340, 480
FONTS = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)
"""Of another host, which a picture in the docs asks for nothing."""


class AtAStep(LiveView):
    """Keeps a picture of itself at one step."""

    picture = ""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """As it is then."""
        super().on_log(args, state, control, **more)
        if state.global_step == AT_STEP and "loss" in more["logs"]:
            console = Console(file=io.StringIO(), record=True, width=WIDTH, force_terminal=True)
            for step, loss in self.run.validation.items():
                console.print(f"step {step}: validation loss {loss:.4f}, skipped 0", highlight=False)
            console.print(drawn(self.run, self._clock(), columns=WIDTH))
            AtAStep.picture = console.export_svg(title="deepspeed tasks/llava_instruct.py --config my_run.yaml")


def main() -> None:
    """Trains and writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=Path("docs/images/terminal.svg"))
    options = parser.parse_args()

    def shown(console: Console, title: str, **options: Any) -> AtAStep:
        return AtAStep(Console(file=io.StringIO(), force_terminal=True, width=WIDTH), "runs/my", **options)

    building.LiveView, building.can_show = shown, lambda stream: True
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base, records = write_tiny_llava(folder / "base"), write_tiny_data(folder / "data", samples=192)
        training = {
            "use_cpu": True,
            "max_steps": STEPS,
            "disable_tqdm": False,
            "logging_steps": 10,
            "eval_strategy": "steps",
        }
        path = write_run(
            folder / "run.yaml",
            base,
            records,
            training={**training, "eval_steps": 120, "learning_rate": 0.01},
            data={"validation": str(records)},
            evaluation={"max_new_tokens": 4},
        )
        train(DecoderPipeline(read_run_file(path)))
    options.to.write_text(FONTS.sub("", AtAStep.picture), encoding="utf-8")


if __name__ == "__main__":
    main()
