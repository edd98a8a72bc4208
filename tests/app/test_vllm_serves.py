"""The plugin in vLLM itself: tokens equal to PEFT's, and one line for what cannot be served.

vLLM wants an environment of its own: `VLLM_PYTHON` names its interpreter, where dora_vl is installed too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.vllm_dora import ENVIRONMENT, PARTS, agrees, in_vllm, language_figures
from benchmarks.vllm_models import write_adapter, write_language_model

PYTHON = os.environ.get("VLLM_PYTHON") or (sys.executable if importlib.util.find_spec("vllm") else None)
NO_VLLM = "no vLLM here; VLLM_PYTHON=PATH names an interpreter that has it and dora_vl (docs/export.md)"
HERE = Path(__file__).parent
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500), pytest.mark.skipif(PYTHON is None, reason=NO_VLLM)]


def options() -> argparse.Namespace:
    return argparse.Namespace(vllm_python=Path(str(PYTHON)), tokens=24, parts=list(PARTS))


def test_a_mixed_batch_answers_as_peft(tmp_path: Path) -> None:
    figures = language_figures(tmp_path, options())
    assert all(map(agrees, figures.values())), figures
    for case in figures.values():
        assert all(one["largest_logprob_difference"] < 1e-4 for one in case["answers"].values())
    assert [title for title, case in figures.items() if not case["gains"]] == ["biased, gains left at 1"]


def test_a_trained_llava_answers_as_unmerged(tmp_path: Path) -> None:
    from benchmarks.vllm_llava import llava_figures

    figures = llava_figures(tmp_path, options())
    assert list(figures) == ["base and adapter", "merged", "server"]
    assert all(map(agrees, figures.values())), figures


Tensors = dict[str, Tensor]


def without(tensors: Tensors, part: str, count: int | None = None) -> Tensors:
    """Without the tensors, or the first few, whose names have the part."""
    dropped = sorted(name for name in tensors if part in name)[:count]
    return {name: tensor for name, tensor in tensors.items() if name not in dropped}


def shorter(tensors: Tensors) -> Tensors:
    name = min(name for name in tensors if "magnitude" in name)
    return {**tensors, name: tensors[name][:-1].clone()}


def wider(tensors: Tensors) -> Tensors:
    """As of a base with another width."""
    return {
        name: torch.cat([tensor, tensor[:, :8]], dim=1) if "q_proj.lora_A" in name else tensor
        for name, tensor in tensors.items()
    }


BROKEN: Mapping[str, tuple[Callable[[Tensors], Tensors], dict[str, object], str]] = {
    "one lost": (lambda t: without(t, "magnitude", 1), {}, "1 layers without a magnitude"),
    "all lost": (lambda t: without(t, "magnitude"), {}, "use_dora: True, and the adapter holds 0 magnitudes"),
    "B lost": (lambda t: without(t, "lora_B", 1), {}, "1 magnitudes without A and B"),
    "not flagged": (lambda t: t, {"use_dora": False}, "use_dora: False, and the adapter holds 14 magnitudes"),
    "too short": (shorter, {}, "magnitudes for"),
    "another base": (wider, {}, "it was trained on another base"),
    "projector": (lambda t: t, {"modules_to_save": ["projector"]}, "dora-vl export --for vllm"),
    "rank": (lambda t: t, {"r": 64}, "LoRA rank 64 is greater than max_lora_rank 8"),
}
"""What is wrong in a file or a config, and what is said."""


def broken(good: Path, to: Path, change: Callable[[Tensors], Tensors], config: Mapping[str, object]) -> Path:
    to.mkdir()
    save_file(change(load_file(good / WEIGHTS)), to / WEIGHTS)
    (to / CONFIG).write_text(json.dumps({**json.loads((good / CONFIG).read_text()), **config}))
    return to


def test_what_cannot_be_served_is_refused_and_the_engine_goes_on(tmp_path: Path) -> None:
    base, dora = tmp_path / "base", {"r": 8, "lora_alpha": 16, "use_dora": True}
    write_language_model(base, biases=False)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    good = write_adapter(base, tmp_path / "good", 1, target_modules=targets, **dora)
    bad = [broken(good, tmp_path / name, change, config) for name, (change, config, _) in BROKEN.items()]
    for name in ("lm_head", "embed_tokens"):
        bad.append(write_adapter(base, tmp_path / name, 2, target_modules=["q_proj", name], **dora))
    in_vllm(Path(str(PYTHON)), [HERE / "vllm_refusals.py", base, tmp_path / "said.json", good, *bad])
    said = json.loads((tmp_path / "said.json").read_text())
    for name, (_, _, expected) in BROKEN.items():
        assert expected in said["lines"][name], name
    assert "applies no magnitudes to 1 of the adapter's layers: lm_head" in said["lines"]["lm_head"]
    assert "is an embedding's" in said["lines"]["embed_tokens"]
    assert said["before"] == said["after"]
    assert said["before"][0] != said["before"][1]


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
    said = [one.communicate(timeout=900)[0] for one in ranks]
    assert [one.returncode for one in ranks] == [0, 0], said
