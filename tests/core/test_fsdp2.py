"""FSDP2 shards a parameter and gathers it, as the same object, at every pass: the norm follows edits of the shard."""

from __future__ import annotations

import copy
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard

from dora_vl.core import DoRAConfig, adapted_layers, apply_dora
from dora_vl.run.launch import leave_process_group
from tests.core.dense_dora import dense_dora, move

RANKS = 2


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).double()
    apply_dora(model, DoRAConfig(targets=("*",), rank=2, alpha=6.0, dropout=0.0))
    move(model)
    return model


def dense_output(values: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    for index in (0, 2):
        own = {name.partition(".")[2]: value for name, value in values.items() if name.startswith(f"{index}.")}
        factors = own["lora_A"], own["lora_B"]
        x = dense_dora(x, own["weight"], own["bias"], factors, own["magnitude"], scale=3.0)
        x = torch.tanh(x) if index == 0 else x
    return x


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.full_tensor().detach() for name, value in model.named_parameters()}  # pyright: ignore


def on_a_rank(rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    model = model_of()
    for _, layer in adapted_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(4):
        before = copy.deepcopy(whole(model))
        torch.testing.assert_close(model(x), dense_output(before, x), rtol=1e-9, atol=1e-9)
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(model(x), dense_output(whole(model), x), rtol=1e-9, atol=1e-9)
        leaf = ("lora_A", "lora_B", "magnitude", "weight")[step]
        for shard_of in (lambda parameter: parameter, lambda parameter: parameter.to_local()):  # as `dcp.load` writes
            with torch.no_grad():
                for _, layer in adapted_layers(model):
                    shard_of(layer._parameters[leaf]).mul_(1.3)
            torch.testing.assert_close(model(x), dense_output(whole(model), x), rtol=1e-9, atol=1e-9)
    leave_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch is built without distributed support")
def test_edits_of_shards_and_optimizer_steps_on_two_ranks():
    with socket.socket() as waiting:
        waiting.bind(("127.0.0.1", 0))
        port = waiting.getsockname()[1]
    mp.start_processes(on_a_rank, args=(port,), nprocs=RANKS, start_method="spawn")
