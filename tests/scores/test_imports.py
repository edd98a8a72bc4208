"""A scorer needs no model: numpy and the standard library, never torch or transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCORERS = tuple(sorted(path.stem for path in (ROOT / "dora_vl" / "scores").glob("[a-z]*.py")))
MODULES = (*(f"scores.{name}" for name in SCORERS), "evaluation.answer_joins", "evaluation.benchmarks")
BLOCKED = ("torch", "transformers", "peft", "deepspeed", "accelerate", "datasets", "timm", "PIL")


def test_all_scorers_load_where_the_models_libraries_are_missing() -> None:
    blocks = "; ".join(f"sys.modules[{name!r}] = None" for name in BLOCKED)
    imports = "; ".join(f"import dora_vl.{name}" for name in MODULES)
    assert len(SCORERS) > 20
    subprocess.run([sys.executable, "-c", f"import sys; {blocks}; {imports}"], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_says_where_its_rules_come_from(name: str) -> None:
    text = (ROOT / "dora_vl" / "scores" / f"{name}.py").read_text(encoding="utf-8")
    assert text.startswith('"""')
