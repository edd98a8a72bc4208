"""DeepSpeed casts nothing: a bfloat16 base stays bfloat16 under each ZeRO stage, and what trains stays float32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.training.launched import launch
from tests.training.tiny_run import MakeRun

# Trains in a process of its own (DeepSpeed keeps global state) and says what the numbers' types are afterwards.
PROGRAM = """
import json, sys
import torch
from dora_vl.training import run as run_module
from dora_vl.run.reading import read_run_file
from dora_vl.training.decoder_pipeline import DecoderPipeline

seen = {}
def keep(task, arguments, backbone):
    seen["backbone"] = backbone
    return build(task, arguments, backbone)

build, run_module.build_trainer = run_module.build_trainer, keep
run_module.train(DecoderPipeline(read_run_file(sys.argv[2], *sys.argv[3:])))
types = {True: set(), False: set()}
for parameter in seen["backbone"].parameters():
    held = getattr(parameter, "ds_tensor", parameter)
    types[parameter.requires_grad].add(str(held.dtype))
print("TYPES " + json.dumps({"trained": sorted(types[True]), "frozen": sorted(types[False])}))
run_module.leave_process_group()
"""


def types_after_training(run_file: Path, *overrides: str) -> dict[str, list[str]]:
    result = launch(run_file, *overrides, ranks=1, program=("-c", PROGRAM), launcher="")
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("TYPES ")]
    return json.loads(line.removeprefix("TYPES "))


@pytest.fixture
def run_file(make_run: MakeRun) -> Path:
    settings = {"model": {"dtype": "bfloat16"}, "training": {"max_steps": 2}}
    return make_run(**settings)


@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=pytest.mark.slow) for stage in ("zero0", "zero2", "zero3")]
)
def test_adapters_are_float32_over_a_bfloat16_base(run_file: Path, stage: str) -> None:
    types = types_after_training(run_file, f"--training.deepspeed={stage}")
    assert types == {"trained": ["torch.float32"], "frozen": ["torch.bfloat16"]}


@pytest.mark.slow
def test_full_fine_tuning_is_bfloat16_with_masters(run_file: Path) -> None:
    types = types_after_training(
        run_file,
        "--training.deepspeed=zero3",
        "--training.bf16=true",
        "--adapter.method=full",
        '--adapter.targets=["model.language_model*", "lm_head", "model.multi_modal_projector*"]',
        "--optim.projector_learning_rate=null",
    )
    assert types == {"trained": ["torch.bfloat16"], "frozen": ["torch.bfloat16"]}
