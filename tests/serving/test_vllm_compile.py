"""`DoRALayer` under `torch.compile`, as vLLM compiles its models: one graph, which reads the slots anew.

In a process of its own, since `torch.compile` cannot trace through the suite's type checks.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CHECKS = """
import torch
from tests.serving.test_vllm_layer import INPUTS, layer_with, put, weights, written_out

layer = layer_with(-1, 0, 1, -1, 7, -9, 1, 1)  # beyond a step's tokens anything may stand
put(layer, 0, weights(3))
put(layer, 1, weights(4))
compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
torch._dynamo.utils.counters.clear()
for rows in (3, 8, 17):
    x = torch.randn(rows, INPUTS)
    assert torch.equal(compiled(x), layer(x))
layer.punica_wrapper._token_lora_indices.fill_(1)
x = torch.randn(8, INPUTS)
assert torch.equal(compiled(x), layer(x))
torch.testing.assert_close(layer(x), written_out(layer, weights(4), x), rtol=1e-4, atol=1e-4)
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
"""


def test_compiled_it_is_one_graph_that_reads_the_slots_anew() -> None:
    subprocess.run([sys.executable, "-c", CHECKS], cwd=Path(__file__).parents[2], check=True)
