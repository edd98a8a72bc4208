"""Run by test_zero_freshness.py: trains under one DeepSpeed ZeRO stage and prints what it saw as JSON."""

from __future__ import annotations

import json
import os
import sys

import deepspeed
import torch
from torch import nn

from dora_vl.core import DoRAConfig, apply_dora, functional
from dora_vl.run.launch import leave_process_group, start_cpu_communication


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x))).square().mean()


def dense_loss(state: dict[str, torch.Tensor], x: torch.Tensor, scale: float) -> torch.Tensor:
    for name in ("up", "down"):
        direction = state[f"{name}.weight"] + scale * state[f"{name}.lora_B"] @ state[f"{name}.lora_A"]
        merged = (state[f"{name}.magnitude"] / direction.norm(dim=1)).unsqueeze(1) * direction
        x = x @ merged.t() + state[f"{name}.bias"]
        x = torch.tanh(x) if name == "up" else x
    return x.square().mean()


def main(stage: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    start_cpu_communication()  # without the operation that DeepSpeed would build in a folder shared with others
    torch.manual_seed(0)
    model = Stack()
    apply_dora(model, DoRAConfig(targets=("*",), rank=2, alpha=6.0, dropout=0.0))
    counted, computed = [0], functional.factored_norms_squared

    def count(*operands):
        counted[0] += 1
        return computed(*operands)

    functional.factored_norms_squared = count
    trained = [p for p in model.parameters() if p.requires_grad]
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    engine, _, _, _ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(trained, lr=0.05), config=settings, dist_init_required=False
    )
    errors, losses = [], []
    for _ in range(4):
        for _ in range(2):
            x = torch.randn(4, 6)
            loss = engine(x)
            with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
                state = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
            errors.append(abs(float(loss) - float(dense_loss(state, x, 3.0))))
            losses.append(float(loss))
            engine.backward(loss)
            engine.step()
    sys.stdout.write("\n" + json.dumps({"error": max(errors), "norms": counted[0], "losses": losses}) + "\n")
    sys.stdout.flush()
    engine.destroy()
    leave_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]))
