"""One run in this process: what it leaves, that it repeats and goes on; what ends it, saved and named; refusals."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from dora_vl.adapters.files import complete_checkpoints
from dora_vl.adapters.folder import load_adapter
from dora_vl.backbones.model import open_backbone
from dora_vl.cli import main
from dora_vl.core import TrainedPart
from dora_vl.errors import SettingError, UserError
from dora_vl.run.folder import add_metrics, is_finished_run, read_log
from dora_vl.run.settings_parser import read_run_file
from dora_vl.training.callbacks import StopOnSignal
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.faults import StepFaults, check_base_weights, check_trained_weights
from dora_vl.training.run import run, train
from dora_vl.training.trainer import AdapterTrainer
from tasks import llava_instruct
from tests.training.launched import ROOT, free_port, launch
from tests.training.own_data import items, write_parquet
from tests.training.tiny_run import (
    MakeRun,
    assert_same_weights,
    json_of,
    logged,
    logged_losses,
    losses_of,
    skipped_by,
    trained,
    weights_of,
    write_run,
    write_tiny_data,
)

DROPOUT = "--adapter.dropout=0.2"


def saving(save_steps: int, steps: int) -> list[str]:
    return ["--training.save_strategy=steps", f"--training.save_steps={save_steps}", f"--training.max_steps={steps}"]


def data_of(run_file: Path) -> str:
    return str(read_run_file(run_file).data.train)


def contents(folder: Path) -> dict[str, bytes]:
    """Every name below a folder, and what its file holds."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*checkpoint-*"))


def test_a_run_leaves_its_trained_adapter_a_log_and_numbers(run_file: Path, tiny_llava: Path) -> None:
    folder = trained(run_file, "--data.validation", data_of(run_file))
    losses, noted = logged_losses(folder), {"samples_per_second", "padding_share", "data_wait_share", "learning_rate"}
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert {*noted, "skipped"} <= logged(folder)[0].keys()
    assert logged(folder, "eval_loss")
    metrics, recipe = json_of(folder / "metrics.json"), json_of(folder / "adapter" / "recipe.json")
    assert metrics["train_samples"] == 24
    assert metrics["train_seconds"] > 0
    assert (recipe["base"], recipe["template"], len(recipe["base_sha256"])) == (str(tiny_llava), "vicuna_v1", 64)
    assert "activations and loss" in [row[0] for row in json_of(folder / "plan.json")["memory"]["rows"]]
    assert not checkpoints(folder)
    assert len(load_adapter(open_backbone(str(tiny_llava)).model, folder / "adapter")) == 14
    base = open_backbone(str(tiny_llava)).model.state_dict()
    magnitudes = {name: tensor for name, tensor in weights_of(folder).items() if name.endswith("lora_magnitude_vector")}
    assert len(magnitudes) == 14  # seven linears in each of two layers
    for name, magnitude in magnitudes.items():
        layer = name.removeprefix("base_model.model.").removesuffix("lora_magnitude_vector")
        assert not torch.equal(magnitude, base[f"{layer}weight"].norm(dim=1))


def test_same_seed_same_losses_whatever_the_workers(run_file: Path) -> None:
    alone = logged_losses(trained(run_file, DROPOUT))
    assert logged_losses(trained(run_file, DROPOUT, "--data.workers=2", name="helped")) == alone
    assert logged_losses(trained(run_file, DROPOUT, "--training.seed=4", name="other")) != alone


BESIDE = ('--adapter.targets=["*language_model*.q_proj"]', '--adapter.magnitude_targets=["*language_model*.up_proj"]')


@pytest.mark.parametrize(
    "adapter",
    [
        (),
        pytest.param(("--adapter.method=dvora",), marks=pytest.mark.slow),
        pytest.param(("--adapter.init=pissa",), marks=pytest.mark.slow),
        pytest.param(BESIDE, marks=pytest.mark.slow),
    ],
    ids=["dora", "dvora", "pissa", "magnitudes beside"],
)
def test_going_on_gives_the_losses_of_the_whole_run(run_file: Path, adapter: tuple[str, ...]) -> None:
    settings = [*adapter, DROPOUT, *saving(5, 16), "--training.gradient_accumulation_steps=2"]
    settings += ["--training.per_device_train_batch_size=2"]
    whole = trained(run_file, *settings, name="whole")
    resume = f"--resume={whole / 'checkpoint-15'}"  # in the second epoch of twelve steps
    again = trained(run_file, *settings, resume)
    assert logged_losses(again) == logged_losses(whole)[15:]
    assert_same_weights(again, whole)


@pytest.mark.parametrize("replay", [0.0, pytest.param(0.2, marks=pytest.mark.slow)])
def test_going_on_with_other_micro_batches_takes_the_samples_of_the_whole_run(run_file, monkeypatch, replay) -> None:
    taken: list[list[str]] = []
    begin_step = StepFaults.begin_step

    def noted(self: StepFaults, ids: list[tuple[str, ...]]) -> None:
        taken.append(sorted(name for of_batch in ids for name in of_batch))
        begin_step(self, ids)

    monkeypatch.setattr(StepFaults, "begin_step", noted)
    halves = ("--training.per_device_train_batch_size=2", "--training.gradient_accumulation_steps=2")
    settings = (f"--data.replay={replay}", "--training.save_total_limit=9", "--watch=0", *saving(2, 16))
    folder = trained(run_file, *settings, name="whole")  # an epoch has twelve steps
    whole = taken.copy()
    taken.clear()
    trained(run_file, *settings, *halves, f"--resume={folder / 'checkpoint-4'}", name="whole")
    assert taken == whole[4:]
    taken.clear()
    trained(run_file, *settings, *halves, f"--resume={folder / 'checkpoint-8'}", name="whole")  # which it wrote itself
    assert taken == whole[8:]


def test_a_resume_on_other_data_or_another_base_is_refused_and_changes_nothing(tmp_path, tiny_llava) -> None:
    """What is under a path is known once it was read, which is after the settings were compared."""
    records = write_tiny_data(tmp_path / "data", samples=12)
    base = Path(shutil.copytree(tiny_llava, tmp_path / "base"))
    run_file = write_run(tmp_path / "run.yaml", base, records, training={"use_cpu": True})
    folder = trained(run_file, *saving(2, 6), "--training.save_total_limit=5")
    (folder / ".checkpoint-1.removing").mkdir()  # of a crash
    before, rows = contents(folder), json.loads(records.read_text())
    for path, content in (
        (records, json.dumps([*rows, {**rows[0], "id": "new"}])),
        (records, json.dumps(rows[::-1])),
        (base / "config.json", (base / "config.json").read_text() + "\n"),
    ):
        was = path.read_text()
        path.write_text(content)
        with pytest.raises(UserError):
            trained(run_file, *saving(2, 6), f"--resume={folder / 'checkpoint-2'}")
        assert contents(folder) == before
        path.write_text(was)


def test_checkpoints_hold_nothing_of_the_base_and_a_half_written_one_is_not_taken(run_file: Path) -> None:
    folder = trained(run_file, *saving(2, 6), "--training.save_total_limit=2")
    assert checkpoints(folder) == ["checkpoint-4", "checkpoint-6"]
    assert not list(folder.glob("checkpoint-*/**/model.safetensors"))
    assert_same_weights(folder / "checkpoint-6", folder)
    (folder / "checkpoint-9" / "state").mkdir(parents=True)
    (folder / "checkpoint-9" / "state" / "state.json").write_bytes(b"half")
    trained(run_file, "--training.max_steps=8", "--resume=last")
    assert len(logged_losses(folder)) == 8  # lines 1 to 6 are kept, 7 and 8 are new: it went on from checkpoint-6


@pytest.mark.parametrize("in_the_file", [pytest.param(False, marks=pytest.mark.slow), True])
def test_cached_features_train_like_pixels(tmp_path, tiny_llava, tiny_data, monkeypatch, in_the_file) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    records = write_parquet(tmp_path, items(8)) if in_the_file else tiny_data
    run_file = write_run(tmp_path / "run.yaml", tiny_llava, records, training={"use_cpu": True, "max_steps": 3})
    pixels = trained(run_file, name="pixels")
    cached = trained(run_file, "--data.cache_features=true", f"--data.workers={int(in_the_file)}", name="cached")
    assert logged_losses(cached) == pytest.approx(logged_losses(pixels), abs=1e-5)
    assert list((cached / "features").rglob("*.safetensors"))


@pytest.mark.parametrize("missing", [False, True])
def test_too_many_bad_samples_end_a_run_and_a_missing_picture_shows_before_weights_are_read(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: bool
) -> None:
    data = write_tiny_data(tmp_path / "broken", samples=24)
    bad, overrides = data.parent / "red-0.png", [f"--data.train={data}", f"--data.image_folder={data.parent}"]
    bad.unlink() if missing else bad.write_bytes(b"no picture")
    with monkeypatch.context() as patch:
        if missing:
            patch.setattr(DecoderPipeline, "load", lambda self: pytest.fail("weights are read"))
        for more in ((), ("--training.logging_strategy=no",)):  # also where no loss is logged
            with pytest.raises(UserError):
                trained(run_file, *overrides, *more)
    assert (tmp_path / "run").exists() is not missing
    folder = trained(run_file, *overrides, "--data.max_bad_share=0.05")  # nothing was saved that is in the way
    assert list(skipped_by(folder)) == ["sample-0"]


def test_if_stopped_resumes_what_was_stopped_and_refuses_other_settings(run_file: Path) -> None:
    settings = [*saving(3, 6), "--training.save_total_limit=5", "--resume=if_stopped"]
    folder = trained(run_file, *settings)  # nothing is there: it starts
    whole = logged_losses(folder)
    (folder / "metrics.json").unlink()
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / "checkpoint-6")  # as a Ctrl-C after step 3 would have left it
    (folder / "checkpoint-3" / "mark").touch()
    with pytest.raises(UserError):
        trained(run_file, *settings, "--training.learning_rate=1e-4")
    assert logged_losses(trained(run_file, *settings)) == whole
    assert (folder / "checkpoint-3" / "mark").is_file()  # resumed from it, or it would be another one
    assert is_finished_run(read_run_file(run_file, *settings))
    trained(run_file, *settings, *saving(1, 9), "--resume=last")
    add_metrics(folder / "metrics.json", {"train_steps": 6})  # as if it had been stopped before its end
    assert not is_finished_run(read_run_file(run_file, *settings, "--training.max_steps=9"))


def test_a_finished_run_stays_as_it_is_to_the_byte(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = trained(run_file, "--resume=if_stopped", "--overwrite=true", "--training.max_steps=2")
    before, own = contents(folder), [f"--config={run_file}", "--training.max_steps=2", "--resume=if_stopped"]
    left = f"--config={folder / 'settings.json'}"
    for words, status in (
        (own, 0),
        ([left], 2),
        ([left, "--resume=if_stopped"], 0),
        ([*own, "--training.learning_rate=1e-4"], 2),
    ):
        monkeypatch.setattr("sys.argv", ["llava_instruct.py", *words])
        with contextlib.nullcontext() if status == 0 else pytest.raises(SystemExit) as ended:
            llava_instruct.main()
        assert ended is None or ended.value.code == status
        assert contents(folder) == before


@pytest.mark.slow
@pytest.mark.parametrize("evaluates", ["epoch", "steps"])
def test_going_on_at_an_epochs_end_gives_the_whole_run(run_file: Path, evaluates: str) -> None:
    """Validation stands between the epoch's last step and the next epoch; dropout is drawn after it."""
    settings = [DROPOUT, *saving(6, 18), f"--data.validation={data_of(run_file)}", "--data.validation_limit=5"]
    settings += [f"--training.eval_strategy={evaluates}", "--training.eval_steps=12"]  # twelve steps an epoch
    whole = trained(run_file, *settings, "--training.save_total_limit=5", name="whole")
    again = trained(run_file, *settings, f"--resume={whole / 'checkpoint-12'}")
    assert logged_losses(again) == logged_losses(whole)[12:]
    expected = logged(whole, "eval_loss")
    assert [line["step"] for line in expected] == [12, 18]
    history = json_of(whole / "checkpoint-12" / "trainer_state.json")["log_history"]
    assert [line["step"] for line in history if "eval_loss" in line] == [12]
    assert [line["eval_loss"] for line in logged(again, "eval_loss")] == [expected[1]["eval_loss"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "stopped_at"),
    [pytest.param(6, 3, id="an epoch"), pytest.param(6, 6, id="the run"), pytest.param(5, 5, id="amid one")],
)
def test_a_stop_in_front_of_a_validation_leaves_it_to_the_run_that_goes_on(
    tmp_path: Path, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch, steps: int, stopped_at: int
) -> None:
    """A signal in the last step of an epoch (three of them), of the run, or of a run that ends within an epoch."""
    records = write_tiny_data(tmp_path / "data", samples=12)
    run_file = write_run(tmp_path / "run.yaml", tiny_llava, records, training={"use_cpu": True})
    settings = [DROPOUT, f"--data.validation={records}", f"--training.max_steps={steps}"]
    settings += ["--training.load_best_model_at_end=true", "--training.metric_for_best_model=loss"]
    settings += ["--training.save_strategy=epoch", "--training.save_total_limit=5"]
    whole = trained(run_file, *settings, name="whole")
    with monkeypatch.context() as patched:
        send_at_step(patched, stopped_at)
        folder = trained(run_file, *settings)
    assert logged_losses(folder) == logged_losses(whole)[:stopped_at]
    assert validated(folder) == [line for line in validated(whole) if line[0] < stopped_at]
    for _ in range(2):  # the second time as after a kill before the next checkpoint
        trained(run_file, *settings, f"--resume={folder / f'checkpoint-{stopped_at}'}")
        assert logged_losses(folder) == logged_losses(whole)
        assert validated(folder) == validated(whole)
    assert_same_weights(folder, whole)


def send_at_step(patched: pytest.MonkeyPatch, number: int) -> None:
    """A SIGTERM to this process as the step begins."""
    begin = StepFaults.begin_step
    begun = count(1)

    def begin_and_send(self: StepFaults, ids: Sequence[Sequence[str]]) -> None:
        begin(self, ids)
        if next(begun) == number:
            os.kill(os.getpid(), signal.SIGTERM)

    patched.setattr(StepFaults, "begin_step", begin_and_send)


def validated(folder: Path) -> list[tuple[int, float, int]]:
    """Step, loss and samples of each validation in the log."""
    return [(line["step"], line["eval_loss"], line["eval_samples"]) for line in logged(folder, "eval_loss")]


@pytest.mark.slow
def test_ctrl_c_saves_and_the_run_goes_on_as_if_nothing_had_been(make_run: MakeRun, tmp_path: Path) -> None:
    run_file = make_run(adapter={"dropout": 0.2}, training={"max_steps": 60, "deepspeed": "zero3"})
    whole = tmp_path / "whole"
    launch(run_file, f"--training.output_dir={whole}", ranks=2)

    folder = tmp_path / "run"
    stop_after_two_steps(run_file, folder)
    (checkpoint,) = complete_checkpoints(folder)
    assert not (folder / "adapter").exists()  # nothing that looks like the result of a whole run
    assert (checkpoint / "adapter" / "adapter_model.safetensors").is_file()
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    assert size < 1_000_000  # three copies of 6,208 float32 trained numbers, not the base

    launch(run_file, "--resume=last", ranks=2)
    torch.testing.assert_close(losses_of(folder), losses_of(whole), atol=1e-6, rtol=0)
    assert_same_weights(folder, whole, atol=1e-6)


def stop_after_two_steps(run_file: Path, folder: Path) -> None:
    """Sends what a terminal's Ctrl-C sends: SIGINT to every process of the group; who stopped is told once."""
    launcher = ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", str(free_port())]
    process = subprocess.Popen(
        [sys.executable, *launcher, "tasks/llava_instruct.py", "--config", str(run_file)],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while len(read_log(folder / "log.jsonl")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=200)
    assert stderr.count("stopped by SIGINT; --resume last resumes from there") == 1


def test_a_signal_ends_a_run_with_its_status_once_the_step_is_saved(make_run, tmp_path, monkeypatch) -> None:
    run_file = make_run(training={"use_cpu": True})
    before = [signal.getsignal(number) for number in StopOnSignal.SIGNALS]
    send_at_step(monkeypatch, 2)
    with pytest.raises(SystemExit) as ended:
        main(["train", str(run_file)])
    assert ended.value.code == 128 + signal.SIGTERM
    assert [checkpoint.name for checkpoint in complete_checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert [signal.getsignal(number) for number in StopOnSignal.SIGNALS] == before


def test_what_nohup_ignores_stays_ignored(tmp_path: Path) -> None:
    stop, before = StopOnSignal(), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop.on_train_begin(TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerState(), TrainerControl())
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        stop.restore()
        signal.signal(signal.SIGHUP, before)


STEPS, EVERY, PATIENCE = 40, 2, 3


@pytest.fixture
def validating(make_run: MakeRun, tiny_data: Path) -> Path:
    """Validates on answers that are never right, so that their loss falls with the words' form and rises afterwards."""
    records = json.loads(tiny_data.read_text())
    for record in records:
        record["conversations"][-1]["value"] = "chat between"
    other = tiny_data.with_name("other.json")
    other.write_text(json.dumps(records))
    training: dict[str, Any] = {"use_cpu": True, "max_steps": STEPS, "eval_strategy": "steps", "eval_steps": EVERY}
    written = make_run(
        data={"validation": str(other)},
        optim={"early_stopping": PATIENCE},
        training={**training, "learning_rate": 0.02, "lr_scheduler_type": "constant"},
    )
    written.write_text(written.read_text().replace("  save_strategy: 'no'\n", ""))
    return written


def reason(validating: Path, *words: str) -> int | None:
    return train(DecoderPipeline(read_run_file(validating, *words)))[0]


def validations(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["eval_loss"]) for line in logged(folder, "eval_loss")]


def test_a_run_ends_and_keeps_the_best(validating: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert reason(validating, f"--training.output_dir={whole}") is None
    losses = validations(whole)
    best, _ = min(losses, key=lambda pair: pair[1])
    last, _ = losses[-1]
    assert (last - best, last < STEPS) == (PATIENCE * EVERY, True)
    assert json.loads((whole / "metrics.json").read_text())["train_steps"] == last
    assert_same_weights(whole, whole / f"checkpoint-{best}")


@pytest.mark.slow
def test_a_stopped_run_goes_on_counting(validating: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert reason(validating, f"--training.output_dir={whole}") is None
    losses = validations(whole)
    best, _ = min(losses, key=lambda pair: pair[1])
    send_at_step(monkeypatch, best + EVERY + 1)  # one validation without a lower loss is counted by then
    assert reason(validating, f"--training.output_dir={stopped}") is not None
    monkeypatch.undo()
    for _ in range(2):  # its end is its end
        assert reason(validating, f"--training.output_dir={stopped}", "--resume=last") is None
        assert validations(stopped) == losses
        assert_same_weights(stopped, whole)
    assert complete_checkpoints(stopped)[-1].name == f"checkpoint-{losses[-1][0]}"


def test_it_needs_something_to_validate_on(make_run: MakeRun, tiny_data: Path, tmp_path: Path) -> None:
    run_file = make_run(optim={"early_stopping": 2}, training={"use_cpu": True})
    for words in ([], [f"--data.validation={tiny_data}", "--training.eval_strategy=no"]):
        with pytest.raises(SettingError) as refused:
            run(DecoderPipeline(read_run_file(run_file, *words)))
        assert refused.value.key == "optim.early_stopping"
    assert not (tmp_path / "run").exists()
    with pytest.raises(SettingError) as refused:
        read_run_file(run_file, "--optim.early_stopping=0")
    assert refused.value.key == "optim.early_stopping"


@pytest.fixture
def in_order(make_run: MakeRun) -> Path:
    return make_run(
        data={"group_by_modality_length": False}, training={"use_cpu": True, "train_sampling_strategy": "sequential"}
    )


Change = Callable[[AdapterTrainer, Tensor], Tensor]


def change_loss(monkeypatch: pytest.MonkeyPatch, steps: Sequence[int], change: Change) -> None:
    """At these steps (from 0) the training loss is another."""
    compute = AdapterTrainer.compute_loss

    def changed(self: AdapterTrainer, *options: Any, **named: Any) -> Tensor:
        value: Tensor = compute(self, *options, **named)
        trains = cast(nn.Module, self.model).training and self.state.global_step in steps
        return change(self, value) if trains else value

    monkeypatch.setattr(AdapterTrainer, "compute_loss", changed)


def watched(trainer: AdapterTrainer, noted: Tensor, value: Tensor) -> Tensor:
    """The loss, of which the watch has noted another one."""
    trainer.faults._losses[-1] = noted.detach()
    return value


def spoil(monkeypatch: pytest.MonkeyPatch, *steps: int, loss: bool) -> None:
    """The loss is NaN, or its gradient alone."""

    def spoilt(trainer: AdapterTrainer, value: Tensor) -> Tensor:
        if loss:
            return watched(trainer, value * math.nan, value * math.nan)
        value.register_hook(lambda gradient: gradient * math.nan)
        return value

    change_loss(monkeypatch, steps, spoilt)


@pytest.mark.parametrize("loss", [True, False])
def test_a_step_that_is_no_number_is_left_out_and_the_run_ends_with_its_samples(in_order, monkeypatch, loss) -> None:
    constant = "--training.lr_scheduler_type=constant"
    sound, folder = trained(in_order, "--training.max_steps=3", constant, name="sound"), in_order.with_suffix("")
    spoil(monkeypatch, 3, loss=loss)
    with pytest.raises(UserError):
        trained(in_order, constant)
    assert not (folder / "adapter").exists()
    assert not (folder / "metrics.json").exists()
    assert_same_weights(folder / "checkpoint-4", sound)  # as the step before left them
    (line,) = read_log(folder / "faults.jsonl")
    assert line["step"] == 4
    assert line["fault"] == ("loss" if loss else "gradient")
    assert line["samples"] == ([f"sample-{number}" for number in range(12, 16)] if loss else [])  # of the fourth step


@pytest.mark.slow
def test_ten_such_steps_in_a_row_end_it_all_the_same(in_order: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, *range(2, 40), loss=False)
    with pytest.raises(UserError):
        trained(in_order, "--optim.not_finite=skip", "--training.max_steps=40")
    assert read_log(in_order.with_suffix("") / "faults.jsonl")[-1]["step"] == 12


def test_a_run_that_skips_counts_and_a_resumed_one_goes_on_after_the_step(in_order, monkeypatch) -> None:
    with monkeypatch.context() as spoilt:
        spoil(spoilt, 3, loss=True)
        with pytest.raises(UserError):
            trained(in_order)
    spoil(monkeypatch, 4, loss=True)
    folder = trained(in_order, "--resume=last", "--optim.not_finite=skip")
    numbers = json_of(folder / "metrics.json")
    assert [numbers[name] for name in ("train_steps", "steps_left_out", "train_samples")] == [6, 2, 24]
    assert all(bool(tensor.isfinite().all()) for tensor in weights_of(folder).values())


def test_a_base_with_a_weight_that_is_no_number_is_refused_before_the_first_step(
    in_order: Path, tiny_llava: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_llava, tmp_path / "broken")
    weights = load_file(base / "model.safetensors")
    spoilt = next(name for name in weights if "layers.1.mlp.down_proj" in name)
    weights[spoilt][3, 5] = math.nan
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError):
        trained(in_order, f"--model.base={base}")
    assert not (in_order.with_suffix("") / "log.jsonl").exists()


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_are_read_whatever_their_number_type(value: float, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)).to(torch.bfloat16)
    weights = [cast(nn.Parameter, layer.weight) for layer in model]
    part = TrainedPart("dora.A", {"1.weight": weights[1]}, weight_decay=True)
    with torch.no_grad():
        weights[0].fill_(3e38)  # finite, though their float32 sum is not
    check_base_weights(model, "base")
    check_trained_weights([part], step=7, folder=tmp_path)
    with torch.no_grad():
        weights[1][1, 2] = value
    with pytest.raises(UserError):
        check_base_weights(model, "base")
    with pytest.raises(UserError):
        check_trained_weights([part], step=7, folder=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "zero"), [(1, "zero0"), (2, "zero2"), (2, "zero3")])
def test_a_picture_whose_features_are_no_numbers_under_the_launcher(make_run, tmp_path, ranks, zero) -> None:
    in_order = make_run(
        data={"group_by_modality_length": False, "cache_features": True, "feature_cache": str(tmp_path / "features")},
        training={"deepspeed": zero, "train_sampling_strategy": "sequential", "per_device_train_batch_size": 2},
    )
    launch(in_order, "--training.max_steps=1", ranks=ranks)
    spoil_features(tmp_path / "features")
    launch(in_order, "--overwrite=true", ranks=ranks, succeeds=False)
    assert read_log(tmp_path / "run" / "faults.jsonl")[0]["fault"] == "loss"
    assert not (tmp_path / "run" / "adapter").exists()
    saved = weights_of(next((tmp_path / "run").glob("checkpoint-*")))
    assert all(bool(tensor.isfinite().all()) for tensor in saved.values())


def spoil_features(folder: Path) -> None:
    """Makes every stored feature NaN; the store's own account of its shards stays."""
    for shard in folder.rglob("*.safetensors"):
        with safe_open(shard, framework="pt") as opened:
            tensors, index = load_file(shard), opened.metadata()
        for tensor in tensors.values():
            if tensor.is_floating_point():
                tensor.fill_(math.nan)
        save_file(tensors, shard, index)
    assert json.loads((next(folder.rglob("*.json"))).read_text())
