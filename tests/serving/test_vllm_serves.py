"""The plugin in vLLM itself: tokens equal to PEFT's, and gains on two ranks.

vLLM wants an environment of its own: `VLLM_PYTHON` names its interpreter, where dora_vl is installed too.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.vllm_dora import PARTS, agrees, language_figures, llava_figures
from benchmarks.vllm_models import ENVIRONMENT

PYTHON = os.environ.get("VLLM_PYTHON") or (sys.executable if importlib.util.find_spec("vllm") else None)
NO_VLLM = "no vLLM here; VLLM_PYTHON=PATH names an interpreter that has it and dora_vl (docs/export.md)"
HERE = Path(__file__).parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500), pytest.mark.skipif(PYTHON is None, reason=NO_VLLM)]


def options() -> argparse.Namespace:
    return argparse.Namespace(vllm_python=Path(str(PYTHON)), tokens=24, parts=list(PARTS))


def test_a_mixed_batch_answers_as_peft(tmp_path: Path) -> None:
    figures = language_figures(tmp_path, options())
    assert all(map(agrees, figures.values())), figures
    for case in figures.values():
        assert all(answer["largest_logprob_difference"] < 1e-4 for answer in case["answers"].values())
    assert [title for title, case in figures.items() if not case["gains"]] == ["biased, gains left at 1"]


def test_a_trained_llava_answers_as_unmerged(tmp_path: Path) -> None:
    figures = llava_figures(tmp_path, options())
    assert list(figures) == ["base and adapter", "merged", "server"]
    assert all(map(agrees, figures.values())), figures


@pytest.mark.parametrize("fully_sharded", ["0", "1"])
def test_two_ranks_compute_the_gains_of_their_parts(fully_sharded: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [str(PYTHON), HERE / "vllm_rank_checks.py", fully_sharded],
            env={
                **os.environ,
                **ENVIRONMENT,
                **{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
                **{"MASTER_PORT": port, "VLLM_DIST_IDENT": f"dora_vl_{port}", "PYTHONPATH": str(HERE.parents[1])},
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    text = [process.communicate(timeout=900)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], text
