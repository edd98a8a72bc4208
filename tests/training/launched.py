"""Runs as a person starts them on several ranks: under a launcher, in processes of their own, without a GPU."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(
    config: Path,
    *overrides: str,
    ranks: int,
    program: tuple[str, ...] = ("tasks/llava_instruct.py",),
    launcher: str = "deepspeed",
    succeeds: bool = True,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """The documented command, or the program alone where `launcher` is empty."""
    command = {
        "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)],
        "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)],
        "": [],
    }[launcher]
    port = ["--master_port", str(free_port())] if launcher else []
    result = subprocess.run(
        [sys.executable, *command, *port, *program, "--config", str(config), *overrides],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=280,
    )
    assert (result.returncode == 0) is succeeds, result.stderr[-3000:]
    return result
