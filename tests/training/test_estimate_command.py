"""`dora-vl estimate`: what it prints of a published shape, and one line for what it cannot use."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import AutoConfig

from dora_vl.cli import main
from dora_vl.training.estimate import SHAPES, Cluster, Traffic, traffic_of
from dora_vl.training.memory import Engine, engine_of

LLAVA = ("estimate", "llava/llava15", "--variant", "7b_dora", "--shape", "llava-1.5-7b")


@pytest.mark.slow
def test_a_published_shape_on_eight_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """7,063 million weights, of which CLIP's 303 million do not count as the model's name says."""
    main([*LLAVA, "--gpus", "8", "--json", str(tmp_path / "found.json"), "--training.deepspeed=zero3"])
    output = capsys.readouterr().out
    estimate = json.loads((tmp_path / "found.json").read_text())
    whole = 2 * 7_063_427_072
    assert abs(estimate["held"]["weights"]["bfloat16"] / (whole / 8) - 1) < 0.01
    assert estimate["held"]["optimizer"] == 2 * estimate["held"]["masters"]
    assert "a rank of 8 (ZeRO-3)" in output
    assert "frozen weights, bfloat16" in output
    # Each forward product is 2 FLOP a weight and token, each of input gradients as much, each recomputed one too.
    tokens = estimate["samples"]["rows"] * 2048 * 4  # accumulated
    assert 6 < estimate["flop"] / (tokens * 6.7e9) < 7
    total = f"{estimate['total'] / 2**30:.2f}"
    assert re.search(rf"at the fullest moment +{total}\n", output)
    other = re.search(r"gradient_checkpointing: false ([\d.]+) GiB", output)
    assert other is not None
    assert float(other[1]) > 2 * float(total)
    by_engine = re.search(r"by engine: zero0 ([\d.]+), zero2 ([\d.]+), zero3 ([\d.]+)", output)
    assert by_engine is not None
    assert float(by_engine[1]) > float(by_engine[2]) > float(by_engine[3]) == float(total)


@pytest.mark.parametrize(
    "words",
    [
        [*LLAVA, "--gpus", "0"],
        [*LLAVA, "--gpus", "8", "--mfu", "1.5"],
        [*LLAVA, "--gpus", "9"],
        [*LLAVA, "--gpus", "8", "--adapter.ranks", "3"],
        [*LLAVA, "--gpus", "8", "--tokens", "100"],
        [*LLAVA, "--gpus", "8", "--model.quantisation", "nf4"],
        [*LLAVA[:-1], "gpt-5", "--gpus", "8"],
        [*LLAVA[:-2], "--gpus", "8", "--model.base", "not/there"],
        ["estimate", "vlbart/image", "--gpus", "8"],
    ],
)
def test_what_cannot_be_used_is_status_two(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2


def test_published_shapes_open_as_what_they_are(tmp_path: Path) -> None:
    for name, shape in SHAPES.items():
        (tmp_path / "config.json").write_text(json.dumps(shape))
        config = AutoConfig.from_pretrained(tmp_path)
        assert config.get_text_config().hidden_size == shape["text_config"]["hidden_size"], name
        assert config.vision_config.hidden_size == shape["vision_config"]["hidden_size"], name


def test_traffic_by_hand() -> None:
    def sent(stage: int | None, ranks: int = 4) -> Traffic:
        return traffic_of(Engine(stage, ranks), trained=400, split=10_000, stay_whole=1_000, micro_batches=3)

    assert sent(None) == sent(0) == Traffic(600, 0, 0)  # 2 x 3/4 x 400, once a step
    assert sent(1) == Traffic(300, 300, 0)
    assert sent(2) == Traffic(900, 300, 0)
    assert sent(3) == Traffic(900, 0, 42_750)  # 3/4 x 3 x (20,000 - 1,000)
    assert [sent(stage, ranks=1).total for stage in (None, 0, 2, 3)] == [0, 0, 0, 0]


def test_the_slowest_link_and_the_utilisation_make_the_time() -> None:
    traffic = Traffic(gradients=40, trained=10, weights=50)
    assert Cluster(1, 1000.0, 0.5, bandwidth=20.0, network=5.0).seconds(traffic, 2000) == (4.0, 5.0)
    assert Cluster(2, 1000.0, 0.5, bandwidth=20.0, network=5.0).seconds(traffic, 2000) == (4.0, 20.0)


def test_the_engine_has_deepspeeds_sizes_and_transformers_automatic_ones() -> None:
    zero = {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"}
    engine = engine_of({"zero_optimization": zero}, ranks=8, hidden_width=100)
    assert (engine.stage, engine.bucket, engine.prefetched) == (3, 10_000, 9_000)
    assert engine.kept_whole == 100_000  # DeepSpeed's own where the file does not say auto
    offloaded = {**zero, "offload_optimizer": {"device": "cpu"}, "stage3_param_persistence_threshold": "auto"}
    engine = engine_of({"zero_optimization": offloaded}, ranks=8, hidden_width=100)
    assert (engine.offloads_optimizer, engine.offloads_weights, engine.kept_whole) == (True, False, 1_000)
    assert engine_of(None, ranks=2, hidden_width=100) == Engine(None, 2)
