"""One run in this process, without DeepSpeed: what it leaves, that it repeats, goes on and refuses."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import pytest
import torch

from dora_vl.adapters.folder import load_adapter
from dora_vl.backbones.model import open_backbone
from dora_vl.errors import UserError
from dora_vl.run.folder import add_metrics, is_finished_run
from dora_vl.run.settings_parser import read_run_file
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.faults import StepFaults
from tasks import llava_instruct
from tests.training.own_data import items, write_parquet
from tests.training.tiny_run import (
    assert_same_weights,
    json_of,
    logged,
    logged_losses,
    skipped_by,
    trained,
    weights_of,
    write_run,
    write_tiny_data,
)

pytestmark = pytest.mark.usefixtures("one_thread")
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
