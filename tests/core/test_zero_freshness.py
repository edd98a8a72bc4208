"""Under DeepSpeed ZeRO a parameter changes without a trace in `_version`; the norm must follow all the same.

Run as a program it trains under each stage and prints what came of it as JSON.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[2]
STAGES = (1, 2, 3)


def test_norm_follows_every_step():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "MASTER_PORT": port, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    by_stage = json.loads(run.stdout.strip().splitlines()[-1])
    assert len(by_stage) == len(STAGES)
    for results in by_stage:
        assert results["error"] < 1e-5, results
        assert results["norms"] == 2 * 4, "two layers, four optimizer steps, two micro-batches each"
        assert abs(results["losses"][0] - results["losses"][-1]) > 1e-3, "nothing trained"


def trained_under(stage: int) -> dict[str, Any]:
    """What a training under this stage gave: the largest error, how often norms were computed, and the losses."""
    import deepspeed
    import torch
    from torch import nn

    from dora_vl.core import apply_dora, functional
    from tests.core.dense_dora import config, dense_dora

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.tanh(self.up(x))).square().mean()

    def dense_loss(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        for layer in (module.up, module.down):
            factors = layer.lora_A, layer.lora_B
            x = dense_dora(x, layer.weight, layer.bias, factors, layer.magnitude, scale=3.0)
            x = torch.tanh(x) if layer is module.up else x
        return x.square().mean()

    torch.manual_seed(0)
    model = Stack()
    apply_dora(model, config())
    norms, computed = [], functional.factored_norms_squared
    counted = mock.patch.object(
        functional, "factored_norms_squared", lambda *operands: norms.append(1) or computed(*operands)
    )
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    errors, losses = [], []
    gathered = deepspeed.zero.GatheredParameters
    for _ in range(8):
        x = torch.randn(4, 6)
        with counted:
            loss = engine(x)
        with gathered(list(engine.module.parameters()), enabled=stage == 3), torch.no_grad():
            errors.append(abs(float(loss) - float(dense_loss(engine.module, x))))
        losses.append(float(loss))
        with counted:
            engine.backward(loss)
            engine.step()
    engine.destroy()
    return {"error": max(errors), "norms": len(norms), "losses": losses}


def main() -> None:
    from dora_vl.run.launch import leave_process_group, start_cpu_communication

    os.environ.update(MASTER_ADDR="127.0.0.1", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    start_cpu_communication()  # without the operation that DeepSpeed would build in a folder shared with others
    results = [trained_under(stage) for stage in STAGES]
    sys.stdout.write("\n" + json.dumps(results) + "\n")
    sys.stdout.flush()
    leave_process_group()


if __name__ == "__main__":
    main()
