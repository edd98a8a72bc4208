"""Run by vLLM's own Python for test_vllm.py: its sharded layers on two ranks, against the equation written out.

python vllm_rank_checks.py FULLY_SHARDED, with RANK in the environment.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import vllm.lora.utils as wrappers
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.lora.layers import LoRAMapping
from vllm.lora.lora_weights import LoRALayerWeights, PackedLoRALayerWeights
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

from dora_vl.serving.vllm.layer import DoRALayer
from dora_vl.serving.vllm.plugin import register

RANK, FULLY_SHARDED = int(os.environ["RANK"]), bool(int(sys.argv[1]))
HIDDEN, INNER, ROWS, RANK_OF_B = 64, 128, 9, 8
TAKEN = (0, 1, 2, 1, 0, 2, 2, 1, 0)
"""Whose adapter each row takes; 0 is the base."""
DRAW = torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=DRAW)


Part = LoRALayerWeights | None


def main() -> None:
    register()
    torch.set_default_dtype(torch.float32)
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(2, RANK, "env://", RANK, backend="gloo")
        initialize_model_parallel(2)
        config = LoRAConfig(max_lora_rank=RANK_OF_B, max_loras=2, fully_sharded_loras=FULLY_SHARDED)
        config.lora_dtype = torch.float32
        slots = PunicaWrapperCPU(64, 16, "cpu")
        slots.update_metadata(LoRAMapping(TAKEN, TAKEN, is_prefill=True), [1, 2], 3, 100)
        qkv = lambda: QKVParallelLinear(HIDDEN, 32, 2, 1, bias=True)  # noqa: E731 - its one kv head is on both ranks
        merged = lambda: MergedColumnParallelLinear(HIDDEN, [INNER, INNER], bias=True)  # noqa: E731
        check("qkv", qkv, ["q", "k", "v"], [64, 32, 32], HIDDEN, config, slots)
        check("gate and up", merged, [0, 1], [INNER, INNER], HIDDEN, config, slots)
        column = lambda: ColumnParallelLinear(HIDDEN, INNER, bias=True, gather_output=True)  # noqa: E731
        check("column", column, [None], [INNER], HIDDEN, config, slots)
        row = lambda: RowParallelLinear(INNER, HIDDEN, bias=True, input_is_parallel=False)  # noqa: E731
        check("row", row, [None], [HIDDEN], INNER, config, slots)


def check(
    name: str, make: Callable[[], Any], shards: list[Any], outs: list[int], inputs: int, config: Any, slots: Any
) -> None:
    """A wrapped layer's rows against the equation, the second adapter with a part left out."""
    layer, weights, biases = make(), [draw(out, inputs) for out in outs], [draw(out) for out in outs]
    for shard, weight, bias in zip(shards, weights, biases, strict=True):
        to = [] if shard is None else [shard]
        layer.weight.weight_loader(layer.weight, weight, *to)
        layer.bias.weight_loader(layer.bias, bias, *to)
    layer.quant_method.process_weights_after_loading(layer)
    packed = [] if shards[0] is None else [str(shard) for shard in shards]
    wrapped = wrappers.from_layer(layer, 2, config, packed, None)
    wrapped.set_mapping(slots)
    assert isinstance(wrapped, DoRALayer), type(wrapped)
    adapters = [parts_of(name, outs, inputs), parts_of(name, outs, inputs, without=1 if len(outs) > 1 else None)]
    for slot, parts in enumerate(adapters):
        packed_parts = PackedLoRALayerWeights.pack(parts) if len(outs) > 1 else parts[0]
        wrapped.set_lora(slot, packed_parts.lora_a, packed_parts.lora_b)
        wrapped.put_dora(slot, wrapped.dora_gains(name, packed_parts))
    x = draw(ROWS, inputs)
    columns = [written_out(x, *pair, number, adapters) for number, pair in enumerate(zip(weights, biases, strict=True))]
    output = wrapped(x)[0]
    torch.testing.assert_close(output, own_part(name, columns), rtol=1e-4, atol=1e-4)
    assert wrapped.dora_minus_one[1:].abs().max() > 0.1


def parts_of(name: str, outs: list[int], inputs: int, without: int | None = None) -> list[Part]:
    parts: list[Part] = []
    for number, out in enumerate(outs):
        if number == without:
            parts.append(None)
            continue
        part = LoRALayerWeights(name, RANK_OF_B, 8, 0.3 * draw(RANK_OF_B, inputs), 0.3 * draw(out, RANK_OF_B), 1.0)
        part.magnitude = draw(out).abs() + 0.5
        parts.append(part)
    return parts


def written_out(x: Tensor, weight: Tensor, bias: Tensor, number: int, adapters: list[list[Part]]) -> Tensor:
    y = x @ weight.t() + bias
    for slot, parts in enumerate(adapters):
        part = parts[number]
        if part is None:
            continue
        direction = weight + part.lora_b @ part.lora_a
        rows = torch.tensor([taken == slot + 1 for taken in TAKEN])
        y[rows] = (part.magnitude / direction.norm(dim=1) * (x @ direction.t()) + bias)[rows]
    return y


def own_part(name: str, columns: list[Tensor]) -> Tensor:
    """What this rank holds of the outputs."""
    if name == "qkv":
        return torch.cat([columns[0][:, 32 * RANK : 32 * RANK + 32], *columns[1:]], dim=1)
    if name == "gate and up":
        return torch.cat([column[:, 64 * RANK : 64 * RANK + 64] for column in columns], dim=1)
    return columns[0]


if __name__ == "__main__":
    main()
