"""The estimate against what a run allocates on a CPU: bytes of tensors alive, over every operation of a step."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from dora_vl.core import DoRAConfig, apply_dora
from dora_vl.core.fast import cpu_step
from dora_vl.heads import next_token
from dora_vl.run.reading import read_run_file
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.estimate import FusedOperations, LiveBytes, imagine_run, imagine_step
from tests.training.tiny_run import write_run, write_tiny_llava

ROOT = Path(__file__).parents[2]
WITHIN = 0.10


@dataclass(frozen=True)
class Size:
    """Of a tiny LLaVA and its micro-batch: one in which activations count most, one in which weights do."""

    width: int
    rank: int
    rows: int
    words: int


SIZES = {"activations": Size(64, 4, 8, 20), "weights": Size(320, 32, 1, 1)}


def write_sized_run(folder: Path, size: Size) -> Path:
    """Samples are all alike, so that every micro-batch has the same numbers of tokens and labels."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (200, 30, 30)).save(folder / "red.png")
    turns = [
        {"from": "human", "value": "<image>\n" + "Say the colour. " * size.words},
        {"from": "gpt", "value": "red it " * size.words},
    ]
    rows = [{"id": str(n), "image": "red.png", "conversations": turns} for n in range(64)]
    (folder / "train.json").write_text(json.dumps(rows))
    base = write_tiny_llava(folder / "base", width=size.width)
    training = {"max_steps": 3, "per_device_train_batch_size": size.rows}
    adapter, data = {"rank": size.rank}, {"rows": "plain"}  # a row a sample is what the estimate counts
    return write_run(folder / "run.yaml", base, folder / "train.json", adapter=adapter, data=data, training=training)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sizes")
    return {name: write_sized_run(folder / name, size) for name, size in SIZES.items()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def measure(run_file: Path, out: Path, *settings: str, ranks: int) -> dict[str, int]:
    """The largest rank's bytes."""
    port = str(free_port())
    processes = []
    for rank in range(ranks):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
        environment = {**os.environ, **{name: str(value) for name, value in names.items()}, **where}
        command = [sys.executable, "-m", "tests.pipelines.measured_step", str(out), "--config", str(run_file)]
        command += [*settings, f"--training.output_dir={out}.run"]
        processes.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
        )
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, errors[0][-3000:]
    results = [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(ranks)]
    return max(results, key=lambda result: result["peak"])


def grouped_attention_is_fused() -> bool:
    """Whether this torch has one kernel for it on a CPU; 2.8 keeps all scores, which no GPU does, nor the estimate."""
    queries, keys = torch.zeros(1, 4, 8, 8), torch.zeros(1, 2, 8, 8)
    return torch._fused_sdp_choice(queries, keys, keys, enable_gqa=True) != SDPBackend.MATH.value


FULL = pytest.mark.slow
# Without DDP, whose buckets are made in C++ before the step, where no count of operations sees them.
CASES = [
    pytest.param("activations", "none", 1, True, marks=FULL),
    pytest.param("activations", "zero3", 2, False, marks=FULL),
    pytest.param("weights", "none", 1, True, marks=FULL),
    pytest.param("weights", "zero0", 2, False, marks=FULL),
    pytest.param("weights", "zero2", 2, True, marks=FULL),
    pytest.param("weights", "zero3", 1, False, marks=FULL),
    pytest.param("weights", "zero3", 2, True, marks=FULL),
]


@pytest.mark.skipif(not grouped_attention_is_fused(), reason="this torch keeps grouped attention's scores on a CPU")
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "engine", "ranks", "checkpointing"), CASES)
def test_it_is_within_a_tenth_of_what_a_run_allocates(
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    engine: str,
    ranks: int,
    checkpointing: bool,
) -> None:
    monkeypatch.setattr(next_token, "SMALL_VOCABULARY", 0)
    settings = [f"--training.gradient_checkpointing={str(checkpointing).lower()}"]
    settings += [] if engine == "none" else [f"--training.deepspeed={engine}"]
    measured = measure(runs[name], tmp_path / "measured", *settings, ranks=ranks)
    pipeline = DecoderPipeline(read_run_file(runs[name], *settings))
    expected = imagine_run(pipeline, tokens=measured["tokens"], labelled=measured["labelled"]).on(ranks)
    assert measured["rows"] == SIZES[name].rows
    if name == "weights":  # in the other, batches that wait and the layers' norms are a fifth of what is held
        assert abs(expected.held.between_steps(expected.engine) - measured["before"]) < WITHIN * measured["before"]
    assert abs(expected.total - measured["peak"]) < WITHIN * measured["peak"]


class SquaredLogits(nn.Module):
    def __init__(self, device: str, **changes: Any) -> None:
        super().__init__()
        sizes: dict[str, Any] = {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        }
        with torch.device(device):
            self.model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=4, vocab_size=64))
        apply_dora(self.model, DoRAConfig(targets=("*proj",), rank=8, **changes))

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"loss": self.model(input_ids=input_ids).logits.float().square().mean()}


def added_in_place(total: Any, rows: Any, matrix: Any, **_: Any) -> int:
    return 2 * rows[0] * rows[1] * matrix[1]


def real_step(ids: Tensor, **changes: Any) -> tuple[int, int]:
    """Products and kept bytes of a second micro-batch that computes; torch counts its attention on a CPU as nothing."""
    loss, custom = SquaredLogits("cpu", **changes).train(), {torch.ops.aten.addmm_: added_in_place}
    with FusedOperations(), LiveBytes() as live:
        loss(ids)["loss"].backward()
        loss.zero_grad()
        before = live.restart_peak()
        with FlopCounterMode(display=False, custom_mapping=custom) as counter:
            result = loss(ids)["loss"]
            kept = live.now - before
            result.backward()
    attention = 4 * (4 + 10) * ids.numel() * 128 * ids.shape[1]
    return counter.get_total_flops() + attention, kept


@pytest.mark.parametrize("mode", ["low_rank", "whole_change"])
def test_the_imagined_step_has_the_dropout_of_the_real_one(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_step, "SMALLEST", 2**60)
    ids = torch.randint(64, (4, 48))
    loss = SquaredLogits("meta", dropout=0.05, dropout_mode=mode).train()
    imagined = imagine_step(loss, loss.model.lm_head, {"input_ids": ids})
    flop, kept = real_step(ids, dropout=0.05, dropout_mode=mode)
    assert imagined.flop == flop
    assert abs(imagined.kept + imagined.logits - kept) < 0.001 * kept


def test_a_run_is_imagined_with_its_dropout(runs: dict[str, Path]) -> None:
    """The second frozen product of dropout on the whole change."""
    modes = ("low_rank", "whole_change")
    once, twice = (
        imagine_run(
            DecoderPipeline(
                read_run_file(runs["activations"], "--adapter.dropout=0.1", f"--adapter.dropout_mode={mode}")
            )
        ).plain
        for mode in modes
    )
    assert twice.flop > 1.3 * once.flop
    assert twice.kept > 1.2 * once.kept


def test_nothing_of_torch_is_replaced_while_a_step_is_imagined() -> None:
    names: dict[Any, tuple[str, ...]] = {
        functional: ("scaled_dot_product_attention", "dropout"),
        torch: ("autocast", "is_autocast_enabled"),
    }
    before = [getattr(module, name) for module, leaves in names.items() for name in leaves]
    seen: list[Any] = []
    loss = SquaredLogits("meta").train()

    def look(*_: Any) -> None:
        seen.extend(getattr(module, name) for module, leaves in names.items() for name in leaves)

    loss.model.model.layers[0].register_forward_hook(look)
    imagine_step(loss, loss.model.lm_head, {"input_ids": torch.zeros(1, 3, dtype=torch.int64)})
    assert seen == 2 * before
