"""FSDP2 shards a parameter and gathers it, as the same object, at every pass: the norm follows edits of the shard."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard

from dora_vl.core import adapted_layers, apply_dora
from tests.core.dense_dora import config, dense_dora, move

RANKS = 2


def assert_fresh(model: nn.Module, x: torch.Tensor) -> None:
    values = {name: value.full_tensor().detach().clone() for name, value in model.named_parameters()}  # pyright: ignore
    expected = x
    for index in (0, 2):
        layer = {name.partition(".")[2]: value for name, value in values.items() if name.startswith(f"{index}.")}
        factors = layer["lora_A"], layer["lora_B"]
        expected = dense_dora(expected, layer["weight"], layer["bias"], factors, layer["magnitude"], scale=3.0)
        expected = torch.tanh(expected) if index == 0 else expected
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


def on_a_rank(rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).double()
    apply_dora(model, config())
    move(model)
    for _, layer in adapted_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for leaf in ("lora_A", "lora_B", "magnitude", "weight"):
        assert_fresh(model, x)
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_fresh(model, x)
        for shard_of in (lambda parameter: parameter, lambda parameter: parameter.to_local()):  # as `dcp.load` writes
            with torch.no_grad():
                for _, layer in adapted_layers(model):
                    shard_of(layer._parameters[leaf]).mul_(1.3)
            assert_fresh(model, x)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch is built without distributed support")
def test_edits_of_shards_and_optimizer_steps_on_two_ranks():
    with socket.socket() as waiting:
        waiting.bind(("127.0.0.1", 0))
        port = waiting.getsockname()[1]
    mp.start_processes(on_a_rank, args=(port,), nprocs=RANKS, start_method="spawn")
