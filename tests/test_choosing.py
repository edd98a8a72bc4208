"""docs/choosing.md: two estimates are those of `dora-vl estimate`; tests/benchmarks/test_tables.py makes all again."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_vl.run.settings_parser import read_run
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.estimate import plan_run, with_shape
from dora_vl.training.memory import GIB

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "choosing.md").read_text(encoding="utf-8")
ESTIMATED = ["--config=image_text/qwen2_5_vl", "--variant=7b_dora", "--data.train=my.json", "--data.max_tokens=2048"]


def rows(text: str) -> dict[str, list[str]]:
    """The cells of a text's tables by the first of a row."""
    table = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| "))
    return {name: cells for name, *cells in table}


@pytest.mark.parametrize(("column", "gpus", "more"), [(0, 1, ()), (2, 8, ("--training.deepspeed=zero3",))])
def test_the_estimates_are_those_of_the_command(tmp_path: Path, column: int, gpus: int, more: tuple[str, ...]) -> None:
    shape = "llava-1.5-7b"
    config = with_shape(read_run([*ESTIMATED, *more]), shape, tmp_path)
    estimate = plan_run(DecoderPipeline(config)).on(gpus)
    assert rows(TEXT)[shape][column] == f"{estimate.total / GIB:.1f}"
