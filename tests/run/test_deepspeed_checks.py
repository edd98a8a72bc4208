"""DeepSpeed JSON and number types that would train something else than the recipe says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from transformers import TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from dora_vl.errors import SettingError, UserError
from dora_vl.files import shipped_folder
from dora_vl.run.arguments import SHORT_NAMES, check_deepspeed, read_deepspeed, zero_stage
from dora_vl.run.reading import read_run_file
from dora_vl.training.decoder_pipeline import DecoderPipeline
from tests.training.tiny_run import write_run


@pytest.mark.parametrize(
    ("block", "key"),
    [
        ({"optimizer": {"enabled": True}}, ".optimizer"),
        ({"fp16": {"enabled": True}}, ".fp16"),
        ({"torch_autocast": {"enabled": True}}, ".torch_autocast"),
        ({"zero_optimization": 3}, ".zero_optimization"),
        ({"bf16": True}, ".bf16"),
        ({"zero_optimization": {"stage": 7}}, ""),
        ({"zero_optimization": {"stag": 2}}, ""),
        ({"communication_data_type": "fp99"}, ""),
    ],
)
def test_what_is_unsafe_or_not_taken_is_refused(block: dict[str, Any], key: str) -> None:
    with pytest.raises(SettingError) as error:
        check_deepspeed({**read_deepspeed("zero2"), **block}, method="dora")
    assert error.value.key == f"training.deepspeed{key}"


def test_what_is_safe_is_taken() -> None:
    shipped = sorted(path.stem for path in (shipped_folder() / "deepspeed").glob("*.json"))
    assert shipped == sorted(SHORT_NAMES)
    for name in shipped:
        check_deepspeed(read_deepspeed(name), method="dora")
    check_deepspeed({**read_deepspeed("zero2"), "bf16": {"enabled": True}}, method="full")  # with float32 masters


def test_a_config_is_found_by_name_path_and_below_the_repository(tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    assert zero_stage(read_deepspeed(str(own))) == 1
    assert zero_stage(read_deepspeed("zero3")) == 3
    assert read_deepspeed("configs/deepspeed/zero3.json") == read_deepspeed("zero3")
    with pytest.raises(SettingError) as error:
        read_deepspeed("zero4")
    assert error.value.key == "training.deepspeed"
    own.write_text("{")
    with pytest.raises(UserError):
        read_deepspeed(str(own))


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["--training.bf16=true"], "training.bf16"),
        (["--adapter.method=full", "--model.dtype=bfloat16"], "adapter.method"),
        (["--adapter.method=full", "--model.dtype=bfloat16", "--training.bf16=true"], "training.bf16"),
        (["--training.eval_strategy=steps"], "training.eval_strategy"),
        (["--training.deepspeed={folder}/batch"], "training.deepspeed"),
        (["--training.deepspeed={folder}/steps"], "training.deepspeed"),
    ],
)
def test_settings_that_contradict_are_refused(tmp_path: Path, overrides: list[str], key: str) -> None:
    run_file = write_run(tmp_path / "run.yaml", tmp_path / "base", tmp_path / "train.json")
    for name, field in {"batch": "train_batch_size", "steps": "gradient_accumulation_steps"}.items():
        (tmp_path / name).write_text(json.dumps({**read_deepspeed("zero2"), field: 7}))
    with pytest.raises(SettingError) as error:
        DecoderPipeline(read_run_file(run_file, *(word.format(folder=tmp_path) for word in overrides))).arguments()
    assert error.value.key == key


def test_a_run_without_a_folder_is_refused(tmp_path: Path) -> None:
    config = read_run_file(write_run(tmp_path / "run.yaml", tmp_path / "base", tmp_path / "train.json"))
    training = {key: value for key, value in config.training.items() if key != "output_dir"}
    with pytest.raises(SettingError) as error:
        DecoderPipeline(dataclasses.replace(config, training=training)).arguments()
    assert error.value.key == "training.output_dir"


def test_what_a_config_does_not_say_of_batches_and_clipping_is_the_sections(tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": 3}, "train_batch_size": 6}))
    batch: Any = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_grad_norm": 0.4}
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **batch)
    config = HfTrainerDeepSpeedConfig(read_deepspeed(str(own)))
    config.trainer_config_process(arguments)
    assert not config.mismatches
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
    assert [config.config[name] for name in names] == [3, 2, 6, 0.4]
    DeepSpeedConfig(config.config)  # which asserts that a batch is stated
