"""DeepSpeed JSON and number types that would train something else than the recipe says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dora_vl.errors import UserError
from dora_vl.run.arguments import (
    check_agreement,
    check_deepspeed,
    check_form,
    read_deepspeed,
    training_arguments,
    zero_stage,
)
from dora_vl.run.reading import read_run_file
from tests.training.tiny_run import write_run


@pytest.mark.parametrize("name", ["optimizer", "scheduler", "bf16", "fp16", "torch_autocast"])
def test_unsafe_blocks_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f'"{name}"'):
        check_deepspeed({**read_deepspeed("zero2"), name: {"enabled": True}}, method="dora", bf16=False)


@pytest.mark.parametrize(
    ("block", "fact"),
    [
        ({"zero_optimization": 3}, "zero_optimization"),
        ({"zero_optimization": None}, "zero_optimization"),
        ({"zero_optimization": {"stage": "two"}}, "stage"),
        ({"zero_optimization": {"stage": 7}}, "stage"),
        ({"zero_optimization": {"stag": 2}}, "stag"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, "offload_optimizer"),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "big"}}, "reduce_bucket_size"),
        ({"bf16": True}, "bf16"),
        ({"fp16": "yes"}, "fp16"),
        ({"torch_autocast": True}, "torch_autocast"),
        ({"activation_checkpointing": 5}, "activation_checkpointing"),
        ({"communication_data_type": "fp99"}, "fp99"),
    ],
)
def test_what_deepspeed_does_not_take_is_one_line(block: dict[str, Any], fact: str) -> None:
    with pytest.raises(UserError, match=fact):
        check_form({**read_deepspeed("zero2"), **block})


@pytest.mark.parametrize("name", ["zero0", "zero2", "zero3", "zero3_offload"])
def test_the_shipped_configs_are_taken(name: str) -> None:
    check_form(read_deepspeed(name))


def test_a_number_that_is_said_twice_must_agree() -> None:
    section = SimpleNamespace(
        per_device_train_batch_size=4, gradient_accumulation_steps=2, max_grad_norm=1.0, world_size=3
    )
    check_agreement(read_deepspeed("zero2"), section)
    check_agreement({"gradient_accumulation_steps": 2, "gradient_clipping": 1.0, "train_batch_size": 24}, section)
    for name in ("train_batch_size", "gradient_accumulation_steps"):
        with pytest.raises(UserError, match=f'"{name}" is 8, .*(24|2)'):
            check_agreement({name: 8}, section)


def test_full_fine_tuning_may_use_bf16_with_masters() -> None:
    check_deepspeed({"bf16": {"enabled": True}}, method="full", bf16=True)
    with pytest.raises(UserError, match='"bf16"'):
        check_deepspeed({"bf16": {"enabled": False}}, method="full", bf16=True)


def test_a_config_is_found_by_name_path_and_below_the_repository(tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    assert zero_stage(read_deepspeed(str(own))) == 1
    assert zero_stage(read_deepspeed("zero3")) == 3
    assert read_deepspeed("configs/deepspeed/zero3.json") == read_deepspeed("zero3")
    with pytest.raises(UserError, match=r"zero4 .*zero3_offload"):
        read_deepspeed("zero4")
    own.write_text("{")
    with pytest.raises(UserError, match=r"own.json"):
        read_deepspeed(str(own))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["--training.bf16=true"], "training.bf16 .*adapter.method: full"),
        (["--adapter.method=full", "--model.dtype=bfloat16"], "model.dtype bfloat16"),
        (["--adapter.method=full", "--model.dtype=bfloat16", "--training.bf16=true"], "training.deepspeed"),
        (["--training.eval_strategy=steps"], "data.validation"),
    ],
)
def test_settings_that_contradict_are_refused(tmp_path: Path, overrides: list[str], named: str) -> None:
    run_file = write_run(tmp_path / "run.yaml", tmp_path / "base", tmp_path / "train.json")
    with pytest.raises(UserError, match=named):
        training_arguments(read_run_file(run_file, *overrides))


def test_a_run_without_a_folder_is_refused(tmp_path: Path) -> None:
    config = read_run_file(write_run(tmp_path / "run.yaml", tmp_path / "base", tmp_path / "train.json"))
    training = {key: value for key, value in config.training.items() if key != "output_dir"}
    with pytest.raises(UserError, match=r"training.output_dir"):
        training_arguments(dataclasses.replace(config, training=training))
