"""What a step holds: estimated by arithmetic, the largest micro-batch tried first, and pictures shrunk to a share."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.dora_memory import LiveBytes
from dora_vl.backbones.video_inputs import grey_video, within_pixels
from dora_vl.cli import main
from dora_vl.core import DoRAConfig, apply_dora
from dora_vl.core.fast import cpu_step
from dora_vl.errors import SettingError, UserError
from dora_vl.run.folder import read_log
from dora_vl.run.settings_parser import read_run_file
from dora_vl.training import estimate, largest_batch
from dora_vl.training.estimate import SHAPES, PlannedRun, Samples, Traffic, plan_run, traffic_of
from dora_vl.training.largest_batch import try_step
from dora_vl.training.memory import ShardingLayout, activations_of, engine_of, held_by
from dora_vl.training.run import train
from dora_vl.training.ways.supervised import NextTokenLoss
from tests.backbones.tiny_image_text import write_tiny
from tests.training.launched import launch
from tests.training.tiny_run import (
    assert_same_weights,
    decoder_run,
    json_of,
    logged,
    logged_losses,
    trained,
    write_pairs,
    write_run,
    write_tiny_data,
    write_tiny_llava,
)
from tests.training.tiny_vlbart_run import vlbart_run, write_vlbart_data, write_vlbart_run

FROZEN = 100 * 200 * 2  # a bfloat16 weight
HOST = {"device": "cpu"}
TRAINED = 100 * 4 + 200 * 4 + 200  # A, B and the magnitude, in float32


def adapted() -> nn.Module:
    model = nn.Sequential(nn.Linear(100, 200, bias=False, dtype=torch.bfloat16))
    apply_dora(model, DoRAConfig(targets=("0",), rank=4))
    return model


WHOLE = FROZEN + 4 * TRAINED


@pytest.mark.parametrize(
    ("zero", "weights", "gradients", "optimizer", "on_host"),
    [
        (None, WHOLE, 4 * TRAINED, 8 * TRAINED, 0),
        ({"stage": 2}, WHOLE, 2 * TRAINED, 6 * TRAINED, 0),
        ({"stage": 3}, WHOLE // 2, 2 * TRAINED, 6 * TRAINED, 0),
        ({"stage": 3, "offload_optimizer": HOST, "offload_param": HOST}, None, None, None, (WHOLE + 12 * TRAINED) // 2),
        ("fsdp", WHOLE // 2, 2 * TRAINED, 4 * TRAINED, 0),
    ],
)
def test_each_engine_splits_what_it_splits(zero, weights, gradients, optimizer, on_host) -> None:
    fsdp = zero == "fsdp"
    deepspeed = {"zero_optimization": {"stage3_param_persistence_threshold": 0, **zero}} if zero and not fsdp else None
    memory = held_by(adapted(), engine_of(deepspeed, ranks=2, hidden_width=8, fsdp=fsdp))
    if fsdp:  # what stands in no layer is whole while the step runs: here all of it
        assert memory.gathered == WHOLE
    assert memory.on_host == on_host
    if weights is not None:
        assert sum(memory.weights.values()) + memory.trained == weights
        assert (memory.gradients, memory.optimizer + memory.masters) == (gradients, optimizer)


def tiny_llama(**adapter: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=6, vocab_size=64)).to(torch.bfloat16)
    apply_dora(model, DoRAConfig(targets=("*proj",), rank=8, **adapter))
    return model.train()


WHOLE_CHANGE = {"dropout": 0.05, "dropout_mode": "whole_change"}


@pytest.mark.parametrize(
    ("adapter", "bound"),
    [
        ({"dropout": 0.0}, 0.15),
        ({"dropout": 0.05}, 0.1),
        (WHOLE_CHANGE, 0.15),
        ({"method": "lora"}, 0.15),
        ({"method": "lora", **WHOLE_CHANGE}, 0.15),
    ],
    ids=str,
)
def test_activations_and_products_are_those_of_a_real_step(monkeypatch, adapter, bound) -> None:
    monkeypatch.setattr(cpu_step, "SMALLEST", 2**60)  # as a GPU has it
    model, ids = tiny_llama(**adapter), torch.randint(64, (4, 96))
    attention = 6 * ids.numel() * 96 * 128  # counted by hand: torch 2.15 counts it on a CPU, earlier ones do not
    expected, kept = activations_of(model), dict[bool, int]()
    for recomputed in (False, True):
        if recomputed:
            newer = hasattr(model, "activation_checkpointing_enable")  # since transformers 5.22
            enable = model.activation_checkpointing_enable if newer else model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        with LiveBytes() as live:
            model(input_ids=ids, use_cache=False).logits.float().square().mean().backward()  # the first fills caches
            before = live.restart_peak()
            with FlopCounterMode(display=False) as counter:
                hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
                kept[recomputed] = live.now - before
                hidden.float().square().mean().backward()
        planned = PlannedRun(model, {"gradient_checkpointing": recomputed}, False, Samples(4, 96, 0))
        counted = counter.get_flop_counts()["Global"].items()
        products = sum(number for operation, number in counted if "attention" not in str(operation))
        flop = products + (18 if recomputed else 14) * attention
        assert planned.flop() == pytest.approx(flop, rel=0.05)
    whole, vectors = (expected.of(tokens=ids.numel(), labelled=0, recomputed=each) for each in (False, True))
    assert whole == pytest.approx(kept[False], rel=bound)
    assert whole - (vectors - ids.numel() * (expected.layer + expected.backward)) == pytest.approx(
        kept[False] - kept[True], rel=bound
    )


def test_a_misspelt_shape_is_named_before_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["estimate", "llava/llava15", "--variant", "7b_dora", "--shape", "llava-1.5-7"])
    assert ended.value.code == 2
    assert "--shape llava-1.5-7 " in capsys.readouterr().err  # not that the recipe's data is missing


LLAVA = ("estimate", "llava/llava15", "--variant", "7b_dora", "--shape", "llava-1.5-7b")


@pytest.mark.slow
def test_a_published_shape_on_eight_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """7,063 million weights, of which CLIP's 303 million do not count as the model's name says."""
    main([*LLAVA, "--gpus", "8", "--json", str(tmp_path / "found.json"), "--training.deepspeed=zero3"])
    output, estimate = _printed(capsys), json.loads((tmp_path / "found.json").read_text())
    assert abs(estimate["held"]["weights"]["bfloat16"] / (2 * 7_063_427_072 / 8) - 1) < 0.01
    assert estimate["held"]["optimizer"] == 2 * estimate["held"]["masters"]
    # A forward product is 2 FLOP a weight and token, one of input gradients and a recomputed one as much; with dropout
    # of the whole change there are two of each.
    tokens = estimate["samples"]["count"] * 2048 * 4  # accumulated
    assert 12 < estimate["flop"] / (tokens * 6.7e9) < 14
    total = f"{estimate['total'] / 2**30:.2f}"
    assert re.search(rf"at the fullest moment +{total}\n", output)
    other = re.search(r"gradient_checkpointing: false ([\d.]+) GiB", output)
    by_engine = re.search(r"by engine: zero0 ([\d.]+), zero2 ([\d.]+), zero3 ([\d.]+)", output)
    assert other is not None
    assert by_engine is not None
    assert float(other[1]) > 2 * float(total)
    assert float(by_engine[1]) > float(by_engine[2]) > float(by_engine[3]) == float(total)


def test_on_this_machine_the_first_batch_is_counted_and_its_speed_measured(tmp_path, capsys, monkeypatch) -> None:
    assert 1e-4 < estimate.teraflops(256) < 1e4
    monkeypatch.setattr(estimate, "teraflops", lambda: 1e-6)
    base, records = write_tiny_llava(tmp_path / "base"), write_tiny_data(tmp_path / "data")
    training: dict[str, object] = {"max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 2}
    data: dict[str, object] = {"validation_share": 0.05, "replay": 0.05}
    run_file = write_run(tmp_path / "run.yaml", base, records, data=data, training=training)
    pairs = (f"--data.train={write_pairs(tmp_path / 'pairs')}", "--objective.loss=dpo", "--data.replay=0")
    for more in ((), pairs):  # both answers are in the batch
        main(["show", "batch", str(run_file), *more])
        facts = re.search(r"samples 4, positions (\d+) sequences of (\d+), .*trained on (\d+) tokens", _printed(capsys))
        assert facts is not None
        rows, length, labelled = map(int, facts.groups())
        main(["estimate", str(run_file), "--json", str(tmp_path / "found.json"), *more])
        written = json.loads((tmp_path / "found.json").read_text())
        assert written["samples"]["tokens"] == math.ceil(rows * length / 4) < 256
        assert written["samples"]["labelled"] == math.ceil(labelled / 4)
        assert written["others"] > 2**26  # libraries and data, as a run's log counts them on a CPU
        steps = 3 * (3 if more else 6)  # 46 samples and 2 chats are 12 micro-batches, two in a step
        minutes = math.ceil(steps * written["flop"] / 1e6 / 60)
        assert f"{steps} steps: at least {minutes:,} min on this machine" in _printed(capsys)


def _printed(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        [*LLAVA],
        [*LLAVA, "--gpus", "8", "--mfu", "1.5"],
        [*LLAVA, "--gpus", "8", "--adapter.ranks", "3"],
        [*LLAVA[:-1], "gpt-5", "--gpus", "8"],
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
        return traffic_of(ShardingLayout(stage, ranks), trained=400, split=10_000, stay_whole=1_000, micro_batches=3)

    assert sent(None) == sent(0) == Traffic(600, 0, 0)  # 2 x 3/4 x 400, once a step
    assert sent(1) == Traffic(300, 300, 0)
    assert sent(2) == Traffic(900, 300, 0)
    assert sent(3) == Traffic(900, 0, 42_750)  # 3/4 x 3 x (20,000 - 1,000)
    assert [sent(stage, ranks=1).total for stage in (None, 0, 2, 3)] == [0, 0, 0, 0]


def test_all_answers_of_a_sample_are_counted(tmp_path: Path) -> None:
    """60 tokens, 10 of them an answer's: a tree has its prompt once, and once more for another picture."""
    base, pairs = write_tiny_llava(tmp_path / "base"), write_pairs(tmp_path / "data")
    run_file = write_run(tmp_path / "run.yaml", base, pairs)
    plain = "--data.packing=plain"
    looks = "--objective.exchange_pictures=true"
    drawn = ("--objective.group=3", "--objective.max_new_tokens=7")
    expected = {
        ("sft",): Samples(4, 60, 10),
        ("dpo",): Samples(4, 50 + 20, 20, reference=True),
        ("simpo",): Samples(4, 50 + 20, 20),
        ("kto",): Samples(4, 50 + 30, 30, reference=True),
        ("dpo", plain): Samples(4, 2 * 60, 20, reference=True),
        ("dpo", looks): Samples(4, 2 * 50 + 30, 30, reference=True),
        ("grpo", *drawn): Samples(4, 50 + 21, 21, drawn=True),
        ("grpo", *drawn, plain, "--objective.kl=0.1"): Samples(4, 3 * 50 + 21, 21, reference=True, drawn=True),
        ("grpo", *drawn, "--objective.vllm=http://localhost:1"): Samples(4, 50 + 21, 21),
    }
    for (loss, *more), samples in expected.items():
        planned = plan_run(decoder_run(run_file, f"--objective.loss={loss}", *more), tokens=60, labelled=10)
        assert planned.samples == samples
        trained = sum(4 * weight.numel() for weight in planned.model.parameters() if weight.requires_grad)
        assert planned.on(1).reference == trained * samples.reference
        alone = replace(planned, samples=replace(samples, reference=False, drawn=False))
        assert planned.on(1).activations == alone.on(1).activations  # these passes hold none
        assert (planned.flop() > 1.2 * alone.flop()) == (samples.reference or samples.drawn)
    rows = json.loads(pairs.read_text())
    rows[3]["rejected"] = " ".join(["wrong"] * 30)
    pairs.write_text(json.dumps(rows))
    longest = 5 + len(
        f"{rows[3]['prompt']} {rows[3]['chosen']} {rows[3]['rejected']}".split()
    )  # 4 of the picture and its mark
    for more, times in (((), 1), ((plain, "--data.group_by_modality_length=false"), 2), ((looks,), 2)):
        run = decoder_run(run_file, "--objective.loss=dpo", *more)
        assert run.data(run.load(), run.arguments()).batch_tokens == 4 * times * longest


IMPOSSIBLE = 1 << 47
SETTINGS = ("--adapter.dropout=0.2", "--training.save_strategy=steps", "--training.save_steps=2")


@pytest.fixture
def run_file(run_file: Path) -> Path:
    run_file.write_text(run_file.read_text().replace("training:\n", "training:\n  weight_decay: 0.1\n"))
    return run_file


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The batches that are tried."""
    tried: list[Any] = []

    def noted(trainer: Any, batch: Any) -> None:
        tried.append(batch)
        try_step(trainer, batch)

    monkeypatch.setattr(largest_batch, "try_step", noted)
    return tried


@pytest.mark.parametrize(
    "more",
    [
        pytest.param((), marks=pytest.mark.slow),
        ("--training.gradient_accumulation_steps=2", "--training.per_device_train_batch_size=2"),
        pytest.param(("--training.optim=adafactor",), marks=pytest.mark.slow),
        pytest.param(("--training.optim=sgd", "--training.optim_args=momentum=0.9"), marks=pytest.mark.slow),
        pytest.param(("--data.streaming=true", "--data.group_by_modality_length=false"), marks=pytest.mark.slow),
    ],
    ids=["adamw", "accumulated", "adafactor", "momentum", "streamed"],
)
def test_a_run_is_the_same_to_the_bit_with_it_and_without(run_file, monkeypatch, more) -> None:
    plain = trained(run_file, *SETTINGS, *more, name="without")
    tried, options = counted(monkeypatch), [*SETTINGS, *more, "--try_largest_batch=true"]
    # a resumed run too: the optimizer's state is the checkpoint's afterwards, not a step older
    for resume in ([], [f"--resume={run_file.parent / 'with' / 'checkpoint-4'}"]):
        folder = trained(run_file, *options, *resume, name="with")
        assert logged_losses(folder) == logged_losses(plain)
        assert_same_weights(folder, plain)
        samples = [json_of(run / "metrics.json")["train_samples"] for run in (folder, plain)]
        assert samples[0] == samples[1]
    assert len(tried) == 2


def test_the_longest_samples_make_it(run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Path(str(read_run_file(run_file).data.train))
    records = json.loads(data.read_text())
    for row in (5, 11):
        records[row]["conversations"][1]["value"] = "blue it " * 30
    path = data.with_name("long.json")
    path.write_text(json.dumps(records))
    tried = counted(monkeypatch)
    options = ("--try_largest_batch=true", "--training.max_steps=1", "--training.per_device_train_batch_size=2")
    trained(run_file, *options, f"--data.train={path}")
    assert sorted(tried[0]["sample_ids"]) == ["sample-11", "sample-5"]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "ranks"), [("zero3", 2), ("zero2", 1)])
def test_under_zero_the_run_is_the_same_to_the_bit(tmp_path: Path, tiny_llava: Path, stage: str, ranks: int) -> None:
    data = write_tiny_data(tmp_path / "data", samples=24, text_only_blocks=2)
    run_file = write_run(tmp_path / "run.yaml", tiny_llava, data, adapter={"dropout": 0.1})
    settings = [f"--training.deepspeed={stage}", "--training.gradient_accumulation_steps=2"]
    settings += ["--training.per_device_train_batch_size=2", "--training.max_steps=4"]
    for flag in ("false", "true"):
        more = [f"--training.output_dir={tmp_path / flag}", f"--try_largest_batch={flag}"]
        launch(run_file, *settings, *more, ranks=ranks)
    assert logged_losses(tmp_path / "true") == logged_losses(tmp_path / "false")
    assert_same_weights(tmp_path / "true", tmp_path / "false")


def test_vlbart_tries_the_longest_of_each_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_vlbart_data(tmp_path / "data")
    tried = counted(monkeypatch)
    for flag in ("false", "true"):
        path = write_vlbart_run(tmp_path / f"{flag}.yaml", data, ("vqav2", "tvc"), training={"optim": "adamw_torch"})
        train(vlbart_run(path, f"--try_largest_batch={flag}"))
    assert len(tried) == 1
    assert logged_losses(tmp_path / "true") == logged_losses(tmp_path / "false")
    assert_same_weights(tmp_path / "true", tmp_path / "false")


# ---- what does not fit


def no_room_above(monkeypatch: pytest.MonkeyPatch, most: int, make: Callable[[], object]) -> None:
    """The real allocator is asked for more than any machine has, where a micro-batch holds more than `most` rows."""
    forward = NextTokenLoss.forward

    def limited(self: NextTokenLoss, input_ids: torch.Tensor, *options: Any, **named: Any) -> Any:
        if len(input_ids) > most:
            make()
        return forward(self, input_ids, *options, **named)

    monkeypatch.setattr(NextTokenLoss, "forward", limited)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(IMPOSSIBLE, dtype=torch.uint8),
        lambda: raised(MemoryError("Unable to allocate 3.00 GiB for an array with shape (1,)")),  # numpy's
        lambda: raised(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has 79 GiB")),
    ],
)
def test_any_allocators_error_ends_a_run(run_file, monkeypatch, make) -> None:
    no_room_above(monkeypatch, 0, make)
    with pytest.raises(UserError):
        trained(run_file)


def raised(error: Exception) -> None:
    raise error


def test_what_does_not_fit_ends_before_the_first_step_with_what_does(run_file, monkeypatch) -> None:
    no_room_above(monkeypatch, 3, lambda: torch.empty(IMPOSSIBLE, dtype=torch.uint8))
    with pytest.raises(UserError) as error:
        trained(
            run_file, "--data.packing=plain", "--training.per_device_train_batch_size=16", "--try_largest_batch=true"
        )
    for fact in ("16 sequences", "2 fit"):
        assert fact in str(error.value)
    assert read_log(run_file.parent / "run" / "log.jsonl") == []


FAMILIES = ("qwen2_vl", "llava_next")
SIDES = ((320, 240), (60, 40), (450, 50))
SHARE = 4_000
PINPOINTS = [[16, 32], [32, 16], [32, 32], [64, 80], [96, 96]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    tiny = {name: write_tiny(name, folder / name) for name in FAMILIES}
    changed(
        tiny["qwen2_vl"] / "processor_config.json", "image_processor", size={"shortest_edge": 64, "longest_edge": 16384}
    )
    changed(tiny["llava_next"] / "processor_config.json", "image_processor", image_grid_pinpoints=PINPOINTS)
    changed(tiny["llava_next"] / "config.json", None, image_grid_pinpoints=PINPOINTS)
    return tiny | {"llava": write_tiny_llava(folder / "llava")}


def changed(path: Path, section: str | None, **values: object) -> None:
    content = json.loads(path.read_text())
    (content if section is None else content[section]).update(values)
    path.write_text(json.dumps(content))


def written(folder: Path, base: Path, **changes: dict[str, object]) -> Path:
    """Twelve samples: a large picture, a small one, a long one, four times."""
    (folder / "data").mkdir(parents=True)
    records = []
    for index in range(12):
        Image.new("RGB", SIDES[index % 3], (200, 20 * index, 40)).save(folder / "data" / f"{index}.png")
        turns = [{"from": "human", "value": "<image>\nSay the colour."}, {"from": "gpt", "value": "It is red."}]
        records.append({"id": f"s{index}", "image": f"{index}.png", "conversations": turns})
    (folder / "data" / "train.json").write_text(json.dumps(records))
    training = {"use_cpu": True, "per_device_train_batch_size": 2, "max_steps": 6, **changes.pop("training", {})}
    changes["data"] = {"max_tokens": 4096, **changes.get("data", {})}
    return write_run(folder / "run.yaml", base, folder / "data" / "train.json", training=training, **changes)


def tokens_of(path: Path, *overrides: str) -> list[int]:
    """Of the first three training samples."""
    pipeline = decoder_run(path, *overrides)
    arguments = pipeline.arguments()
    pipeline.prepare(arguments)
    data = pipeline.data(pipeline.skeleton(), arguments)
    return [len(data.train[index].input_ids) for index in range(3)]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_above_a_samples_share_becomes_fewer_tokens(bases, tmp_path, family) -> None:
    path = written(tmp_path, bases[family])
    whole, budget = tokens_of(path), tokens_of(path, f"--data.max_pixels_per_step={2 * SHARE}")
    assert budget[0] < 0.7 * whole[0]  # 76,800 pixels became at most 4,000
    assert budget[1] == whole[1]  # 2,400 fit
    alone = (f"--data.max_pixels_per_step={2 * SHARE}", "--training.per_device_train_batch_size=1")
    shares = tokens_of(path, *alone)  # one sample has all of it
    assert budget[0] < shares[0] <= whole[0]
    assert shares[1] == whole[1]


def test_a_run_counts_them(bases: Mapping[str, Path], tmp_path: Path) -> None:
    path = written(tmp_path, bases["qwen2_vl"], data={"max_pixels_per_step": 2 * SHARE})
    metrics = json_of(trained(path) / "metrics.json")
    assert (metrics["train_samples"], metrics["shrunk_samples"]) == (12, 8)  # large and long ones
    assert logged(tmp_path / "run")[-1]["shrunk_samples"] == 8


@pytest.mark.parametrize(("family", "pixels"), [("llava", 100_000), ("qwen2_vl", 2_001), ("qwen2_vl", 0)])
def test_it_is_refused_where_it_saves_nothing(bases, tmp_path, family, pixels) -> None:
    with pytest.raises(SettingError) as error:
        tokens_of(written(tmp_path, bases[family]), f"--data.max_pixels_per_step={pixels}")
    assert error.value.key == "data.max_pixels_per_step"


def test_pictures_and_frames_of_a_sample_shrink_by_one_factor() -> None:
    pictures = [Image.new("RGB", (400, 300)), Image.new("RGB", (200, 100))]
    video = grey_video((1, 2, 3), 100, frames=4)
    smaller, (clip,), lost = within_pixels(pictures, [video], 45_000)  # of 180,000, so each side halves
    assert [picture.size for picture in smaller] == [(200, 150), (100, 50)]
    assert {frame.size for frame in clip.pictures} == {(50, 50)}
    assert clip.seconds == video.seconds
    assert lost == 135_000
    same, clips, lost = within_pixels(pictures, [video], 180_000)
    assert (same, clips, lost) == (pictures, [video], 0)
