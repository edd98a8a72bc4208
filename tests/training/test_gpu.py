"""The same paths on CUDA: bfloat16 base, adapters in float32, each ZeRO stage, what it saves and goes on from."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from tests.training.launched import launch
from tests.training.tiny_run import MakeRun, losses_of, weights_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.timeout(600),
]


def launch_on_gpu(run_file: Path, *overrides: str) -> None:
    launch(run_file, *overrides, ranks=1, CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES", "0"))


@pytest.fixture
def run_file(make_run: MakeRun) -> Path:
    training = {"max_steps": 10, "save_strategy": "steps", "save_steps": 5, "gradient_checkpointing": True}
    return make_run(model={"dtype": "bfloat16"}, training=training)


@pytest.mark.parametrize("stage", ["zero0", "zero2", "zero3", "zero3_offload"])
def test_every_stage_trains_float32_adapters_over_a_bfloat16_base(run_file: Path, stage: str) -> None:
    if stage == "zero3_offload" and importlib.util.find_spec("ninja") is None:
        pytest.skip("DeepSpeed compiles its CPU Adam with ninja: pip install ninja")
    launch_on_gpu(run_file, f"--training.deepspeed={stage}")
    losses = losses_of(run_file.with_suffix(""))
    assert len(losses) == 10
    assert losses[-1] < losses[0]
    assert {tensor.dtype for tensor in weights_of(run_file.with_suffix("")).values()} == {torch.float32}


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_going_on_repeats_the_whole_run(run_file: Path, stage: str) -> None:
    engine, whole, again = f"--training.deepspeed={stage}", run_file.with_suffix(""), run_file.parent / "again"
    launch_on_gpu(run_file, engine)
    launch_on_gpu(run_file, engine, f"--training.output_dir={again}", f"--resume={whole / 'checkpoint-5'}")
    torch.testing.assert_close(losses_of(again), losses_of(whole)[5:], atol=2e-2, rtol=0)


def test_cached_features_workers_and_full_fine_tuning(run_file: Path) -> None:
    launch_on_gpu(run_file, "--training.deepspeed=zero2", "--data.cache_features=true", "--data.workers=2")
    launch_on_gpu(
        run_file,
        "--training.deepspeed=zero3",
        "--training.bf16=true",
        "--adapter.method=full",
        '--adapter.targets=["model.language_model*"]',
        "--overwrite=true",
    )


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="pip install flash-attn")
def test_flash_attention(run_file: Path) -> None:
    launch_on_gpu(run_file, "--model.attn_implementation=flash_attention_2", "--training.deepspeed=zero2")
