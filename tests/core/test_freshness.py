"""The norm is never stale, whatever edits, replaces, averages or shards its tensors, and computed once for a set."""

import copy
import io
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from dora_vl.core import adapted_layers, apply_dora, functional, merge_dora, unmerge_dora
from dora_vl.core.layer import CountedParameter
from tests.core.dense_dora import assert_fresh, config, dense_dora, move, moved_layer


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("foreach", [True, False])
def test_after_optimizer_steps(optimizer, foreach):
    layer = moved_layer(config())
    stepper = optimizer([p for p in layer.parameters() if p.requires_grad], lr=0.1, foreach=foreach)
    for _ in range(3):
        layer(torch.randn(3, 6, dtype=torch.float64)).square().sum().backward()
        stepper.step()
        stepper.zero_grad()
        assert_fresh(layer)


@pytest.mark.parametrize(("assign", "swap"), [(True, False), (False, False), (False, True)])
def test_after_loading_a_state(assign, swap):
    layer, other = moved_layer(config()).eval(), moved_layer(config())
    assert_fresh(layer)
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        layer.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    assert_fresh(layer)


@pytest.mark.parametrize("leaf", ["weight", "lora_A", "lora_B", "magnitude"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("history", ["new", "merged", "loaded", "pickled"])
def test_writes_through_data_are_seen(leaf, training, history):
    layer = moved_layer(config()).train(training)
    if history == "merged":
        merge_dora(layer)
        unmerge_dora(layer)
    elif history == "loaded":
        layer.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
        layer.weight.requires_grad_(False)
    elif history == "pickled":
        layer = copy.deepcopy(layer)
    assert_fresh(layer)
    parameter = getattr(layer, leaf)
    parameter.data.mul_(1.3)
    assert_fresh(layer)
    parameter.data.copy_(torch.randn_like(parameter).abs())
    assert_fresh(layer)
    parameter.data[:] = 2 * parameter.data
    assert_fresh(layer)
    torch._foreach_add_([parameter.data], 0.05)
    assert_fresh(layer)
    parameter.data = parameter.data * 1.4
    assert_fresh(layer)
    kept = parameter.data
    assert_fresh(layer)
    kept.add_(0.02)
    assert_fresh(layer)


def test_after_edits_of_the_frozen_weight_of_the_dtype_and_of_the_scale():
    layer = moved_layer(config()).eval()
    for edit in (
        lambda: layer.weight.detach().mul_(1.3),
        lambda: setattr(layer.weight, "data", layer.weight.data * 1.4),
        lambda: layer.weight.data.mul_(1.2),
        lambda: setattr(layer, "weight", nn.Parameter(1.3 * layer.weight.data, requires_grad=False)),
        lambda: layer.weight.data.mul_(1.2),
        lambda: layer.float().double(),
        lambda: setattr(layer, "adapter", config(alpha=3.0)),
    ):
        assert_fresh(layer)
        edit()
        assert_fresh(layer)


def test_an_edit_that_leaves_no_trace_is_seen_when_it_is_said():
    """The call without `frozen` costs no pass over W, since hand-written optimizers make it at every step."""
    layer = moved_layer(config()).eval()
    traceless = layer.lora_B.detach().numpy(), layer.weight.detach().numpy()
    assert_fresh(layer)
    kept = layer.weight_norms_squared()
    traceless[0][:] *= 2
    layer.forget_norms()
    assert_fresh(layer)
    assert layer.weight_norms_squared() is kept
    traceless[1][:] *= 1.5
    layer.forget_norms(frozen=True)
    assert_fresh(layer)


def test_an_adapters_parameters_are_parameters_everywhere_else(tmp_path):
    layer = moved_layer(config())
    assert_fresh(layer)
    parameter = layer.lora_B
    assert type(parameter) is CountedParameter
    parameter.data = parameter.data.clone()
    torch.save({"one": parameter, "state": layer.state_dict()}, tmp_path / "file.pt")
    loaded = torch.load(tmp_path / "file.pt", weights_only=True)
    assert type(loaded["one"]) is nn.Parameter
    assert torch.equal(loaded["one"], parameter)


def test_copies_follow_their_own_parameters():
    layer = moved_layer(config()).eval()
    assert_fresh(layer)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert_fresh(twin)
        twin.lora_B.data.mul_(2.0)
        assert_fresh(twin)
        optimizer = torch.optim.SGD([twin.magnitude], lr=1.0)
        twin(torch.randn(3, 6, dtype=torch.float64)).sum().backward()
        optimizer.step()
        assert_fresh(twin)
        assert_fresh(layer)


@pytest.mark.parametrize("training", [True, False])
def test_functional_calls_with_one_set_of_tensors_after_another(training):
    layer, x = moved_layer(config()).train(training), torch.randn(7, 6, dtype=torch.float64)
    assert_fresh(layer)
    for seed in (1, 2, 1):
        generator = torch.Generator().manual_seed(seed)
        values = {
            name: torch.randn(value.shape, dtype=value.dtype, generator=generator)
            for name, value in layer.named_parameters()
        }
        factors = values["lora_A"], values["lora_B"]
        expected = dense_dora(x, values["weight"], values["bias"], factors, values["magnitude"], scale=3.0)
        torch.testing.assert_close(functional_call(layer, values, (x,)), expected, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            torch.testing.assert_close(functional_call(layer, values, (x,)), expected, rtol=1e-9, atol=1e-9)
    assert_fresh(layer)


class Doubled(nn.Module):
    def forward(self, original: torch.Tensor) -> torch.Tensor:
        return 2 * original


@pytest.mark.parametrize("leaf", ["lora_A", "lora_B", "magnitude"])
def test_parametrizations_of_what_trains(leaf):
    layer, x = moved_layer(config()), torch.randn(7, 6, dtype=torch.float64)
    assert_fresh(layer)
    values = {name: value.detach().clone() for name, value in layer.named_parameters()}
    parametrize.register_parametrization(layer, leaf, Doubled())
    for factor in (1.0, 3.0):
        with torch.no_grad():
            layer.parametrizations[leaf].original.copy_(factor * values[leaf])
        now = {**values, leaf: 2 * factor * values[leaf]}
        factors = now["lora_A"], now["lora_B"]
        expected = dense_dora(x, now["weight"], now["bias"], factors, now["magnitude"], scale=3.0)
        y = layer(x)
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
        y.sum().backward()
        assert layer.parametrizations[leaf].original.grad is not None


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


@pytest.mark.parametrize("kind", ["none", "reentrant", "non_reentrant"])
@pytest.mark.parametrize("mode", ["low_rank", "whole_change"])
def test_one_norm_a_layer_and_step(monkeypatch, kind, mode):
    calls: list[int] = []
    computed = functional.factored_norms_squared

    def counted(*operands):
        calls.append(1)
        return computed(*operands)

    monkeypatch.setattr(functional, "factored_norms_squared", counted)
    model = nn.Sequential(Block(), Block())
    apply_dora(model, config(dropout=0.2, dropout_mode=mode))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for step in range(2):
        for _ in range(3):
            model.train()  # as trainers do before every micro-batch
            x = torch.randn(2, 6, requires_grad=True)
            for block in model:
                x = block(x) if kind == "none" else checkpoint(block, x, use_reentrant=kind == "reentrant")
            x.square().sum().backward()
        assert len(calls) == 4 * (step + 1)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(2, 6))
    assert len(calls) == 4 * 3


RANKS = 2


def assert_fresh_on_a_rank(model: nn.Module, x: torch.Tensor) -> None:
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
        assert_fresh_on_a_rank(model, x)
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_fresh_on_a_rank(model, x)
        for shard_of in (lambda parameter: parameter, lambda parameter: parameter.to_local()):  # as `dcp.load` writes
            with torch.no_grad():
                for _, layer in adapted_layers(model):
                    shard_of(layer._parameters[leaf]).mul_(1.3)
            assert_fresh_on_a_rank(model, x)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch is built without distributed support")
def test_edits_of_shards_and_optimizer_steps_on_two_ranks():
    with socket.socket() as waiting:
        waiting.bind(("127.0.0.1", 0))
        port = waiting.getsockname()[1]
    mp.start_processes(on_a_rank, args=(port,), nprocs=RANKS, start_method="spawn")
