"""Two ranks under a launcher on a CPU train what one rank with the same global batch trains; and what ZeRO casts."""

import json
from pathlib import Path

import pytest
import torch

from dora_vl.evaluation.predictions import read_predictions
from dora_vl.run.folder import read_watched
from tests.training.launched import launch
from tests.training.tiny_run import (
    MakeRun,
    assert_same_weights,
    json_of,
    losses_of,
    trained,
    weights_of,
    write_run,
    write_tiny_data,
    write_tiny_llava,
)

STEPS = 12


@pytest.fixture(scope="module")
def mixed_run(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In every step one rank's micro-batch has pictures and the other's has none."""
    folder = tmp_path_factory.mktemp("mixed")
    data = write_tiny_data(folder / "data", samples=96, text_only_blocks=2)
    training = {"max_steps": STEPS, "per_device_train_batch_size": 2, "train_sampling_strategy": "sequential"}
    training |= {"learning_rate": 1e-2}
    return write_run(folder / "run.yaml", tiny_llava, data, data={"group_by_modality_length": False}, training=training)


@pytest.fixture(scope="module")
def one_rank(mixed_run: Path) -> Path:
    """The run on one rank, without DeepSpeed: accumulation makes the same global batch of the same micro-batches."""
    return trained(mixed_run, "--training.use_cpu=true", "--training.gradient_accumulation_steps=2", name="one")


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("stage", "launcher"),
    [
        pytest.param("zero2", "deepspeed", marks=pytest.mark.slow),
        ("zero3", "torchrun"),  # which starts sooner
        pytest.param("fsdp", "deepspeed", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_train_what_one_rank_trains(mixed_run: Path, one_rank: Path, stage: str, launcher: str) -> None:
    folder = mixed_run.parent / stage
    sharding = "--training.fsdp=true" if stage == "fsdp" else f"--training.deepspeed={stage}"
    launch(mixed_run, f"--training.output_dir={folder}", sharding, ranks=2, launcher=launcher)
    expected, losses = losses_of(one_rank), losses_of(folder)
    assert len(losses) == STEPS
    assert expected[0] - expected[-1] > 0.2  # it does learn: equal losses are not losses that stand still
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=0)
    assert {tensor.dtype for tensor in weights_of(folder).values()} == {torch.float32}
    assert_same_weights(folder, one_rank, atol=2e-3)


@pytest.mark.slow
def test_shards_of_fsdp_are_asked_saved_and_go_on_bitwise(make_run: MakeRun, tiny_data: Path, tmp_path: Path) -> None:
    run_file = make_run(
        data={"cache_features": True},
        training={
            "fsdp": True,
            "save_strategy": "steps",
            "save_steps": 3,
            "max_steps": 6,
            "gradient_checkpointing": True,
        },
        evaluation={"file": str(tiny_data), "limit": 8},
    )
    launch(run_file, ranks=2, launcher="torchrun")
    assert json_of(tmp_path / "run" / "metrics.json")["sets"][tiny_data.stem]["n"] == 8
    watched = read_watched(tmp_path / "run")
    assert watched is not None
    assert list(watched.answers) == [0, 2, 3, 4, 5, 6]
    again = tmp_path / "again"
    more = (f"--training.output_dir={again}", f"--resume={tmp_path / 'run' / 'checkpoint-3'}")
    launch(run_file, *more, ranks=2, launcher="torchrun")
    assert losses_of(again).tolist() == losses_of(tmp_path / "run").tolist()[3:]
    assert_same_weights(again, tmp_path / "run", atol=0)


@pytest.mark.slow
def test_a_quantised_base_in_shards_trains_as_a_whole_one(tiny_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = write_tiny_llava(tmp_path / "base", width=64)
    run_file = write_run(
        tmp_path / "run.yaml", base, tiny_data, model={"quantisation": "nf4"}, training={"max_steps": 4}
    )
    for name, settings in (("whole", ()), ("shards", ("--training.fsdp=true",))):
        launch(run_file, f"--training.output_dir={tmp_path / name}", *settings, ranks=2, launcher="torchrun")
    torch.testing.assert_close(losses_of(tmp_path / "shards"), losses_of(tmp_path / "whole"), atol=1e-4, rtol=0)
    assert_same_weights(tmp_path / "shards", tmp_path / "whole", atol=1e-4)


@pytest.mark.slow
def test_zero3_caches_features_on_both_ranks_and_is_tested_afterwards(make_run, tiny_data, tmp_path) -> None:
    run_file = make_run(
        data={"cache_features": True}, training={"deepspeed": "zero3"}, evaluation={"file": str(tiny_data), "limit": 8}
    )
    launch(run_file, ranks=2)
    metrics = json_of(tmp_path / "run" / "metrics.json")
    assert metrics["sets"][tiny_data.stem]["n"] == 8
    assert metrics["train_steps"] == 6
    watched = read_watched(tmp_path / "run")
    predictions = read_predictions(tmp_path / "run" / "predictions.jsonl")[tiny_data.stem]
    assert watched is not None
    assert len(watched.questions) == 4
    assert list(watched.answers) == [0, 2, 3, 4, 5, 6]
    assert watched.answers[6] == {question.id: predictions[question.id].prediction for question in watched.questions}

    again = launch(run_file, ranks=2, succeeds=False)
    assert again.returncode == 2
    assert len([line for line in again.stderr.splitlines() if "error: " in line]) == 1


@pytest.mark.slow
def test_two_ranks_end_where_one_does_though_they_read_some_samples_twice(tiny_llava: Path, tmp_path: Path) -> None:
    """Ten samples, two bad, one allowed: two ranks read twelve in an epoch, which is no second pass."""
    data = write_tiny_data(tmp_path / "data", samples=10)
    for name in ("green-5.png", "blue-6.png"):
        (data.parent / name).write_bytes(b"no picture")  # a missing one is told before the first step
    run_file = write_run(
        tmp_path / "run.yaml",
        tiny_llava,
        data,
        data={"group_by_modality_length": False, "max_bad_share": 0.1},
        training={"max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 50, "deepspeed": "zero2"},
    )
    launch(run_file, "--training.train_sampling_strategy=sequential", ranks=2, succeeds=False)
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_ranks_without_deepspeeds_engine_are_one_run(mixed_run, one_rank, launcher, tmp_path) -> None:
    """On a CPU they would otherwise be two runs that write to one folder."""
    launch(mixed_run, f"--training.output_dir={tmp_path}/run", ranks=2, launcher=launcher)
    torch.testing.assert_close(losses_of(tmp_path / "run"), losses_of(one_rank), atol=1e-4, rtol=0)
    assert json_of(tmp_path / "run" / "metrics.json")["train_samples"] == STEPS * 4
    assert_same_weights(tmp_path / "run", one_rank, atol=2e-3)


# Trains in a process of its own (DeepSpeed keeps global state) and says what the numbers' types are afterwards.
PROGRAM = """
import json, sys
import torch
from dora_vl.training import run as run_module
from dora_vl.run.settings_parser import read_run_file
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
        '--adapter.targets=["model.language_model*", "lm_head"]',  # and the projector, with a rate of its own
    )
    assert types == {"trained": ["torch.bfloat16"], "frozen": ["torch.bfloat16"]}
