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
from safetensors.torch import load_file

from dora_vl.adapters.folder import load_adapter
from dora_vl.backbones.model import open_backbone
from dora_vl.errors import UserError
from dora_vl.run.folder import add_metrics, finished_already, read_log
from dora_vl.run.reading import read_run_file
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.faults import StepFaults
from dora_vl.training.run import train
from tasks import llava_instruct
from tests.training.tiny_run import logged_losses, write_run, write_tiny_data

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run_file(tmp_path: Path, tiny_llava: Path, tiny_data: Path) -> Path:
    return write_run(tmp_path / "run.yaml", tiny_llava, tiny_data, training={"use_cpu": True})


def run_folder(run_file: Path) -> Path:
    return run_file.parent / run_file.stem


def train_file(run_file: Path, *overrides: str) -> list[float]:
    """Trains and returns the logged losses."""
    config = read_run_file(run_file, *overrides)
    train(DecoderPipeline(config))
    return logged_losses(Path(config.training["output_dir"]))


def test_a_run_leaves_its_trained_adapter_a_log_and_numbers(run_file: Path, tiny_llava: Path) -> None:
    losses = train_file(run_file, "--data.validation", str(read_run_file(run_file).data.train))
    folder = run_folder(run_file)
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    lines = read_log(folder / "log.jsonl")
    assert {"samples_per_second", "padding_share", "skipped", "learning_rate"} <= lines[0].keys()
    assert any("eval_loss" in line for line in lines)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["train_samples"] == 24
    assert metrics["train_seconds"] > 0
    recipe = json.loads((folder / "adapter" / "recipe.json").read_text())
    assert (recipe["base"], recipe["template"], len(recipe["base_sha256"])) == (str(tiny_llava), "vicuna_v1", 64)
    assert "activations (rough)" in [row[0] for row in json.loads((folder / "plan.json").read_text())["memory"]["rows"]]
    assert not list(folder.glob("checkpoint-*"))
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    magnitudes = [name for name in tensors if name.endswith("lora_magnitude_vector")]
    assert len(magnitudes) == 14  # seven linears in each of two layers
    backbone = open_backbone(str(tiny_llava))
    assert len(load_adapter(backbone.model, folder / "adapter")) == 14
    base = open_backbone(str(tiny_llava)).model.state_dict()
    moved = [name for name in magnitudes if not torch.equal(tensors[name], _base_norm(name, base))]
    assert moved == magnitudes


def _base_norm(name: str, base: dict[str, torch.Tensor]) -> torch.Tensor:
    weight = name.removeprefix("base_model.model.").replace("lora_magnitude_vector", "weight")
    return base[weight].norm(dim=1)


def test_same_seed_same_losses_whatever_the_workers(run_file: Path) -> None:
    alone = train_file(run_file, "--adapter.dropout=0.2")
    helped = train_file(run_file, "--adapter.dropout=0.2", "--data.workers=2", "--overwrite=true")
    other_seed = train_file(run_file, "--adapter.dropout=0.2", "--training.seed=4", "--overwrite=true")
    assert alone == helped
    assert alone != other_seed


@pytest.mark.parametrize(
    "adapter",
    [
        (),
        *(
            pytest.param(settings, marks=pytest.mark.slow)
            for settings in (
                ("--adapter.method=dvora",),
                ("--adapter.init=pissa",),
                ('--adapter.rank_pattern={"*.q_proj": 3}', '--adapter.alpha_pattern={"*.k_proj": 5.0}'),
                (
                    '--adapter.targets=["*language_model*.q_proj"]',
                    '--adapter.magnitude_targets=["*language_model*.up_proj"]',
                ),
            )
        ),
    ],
    ids=["dora", "dvora", "pissa", "patterns", "magnitudes beside"],
)
def test_going_on_gives_the_losses_of_the_whole_run(run_file: Path, adapter: tuple[str, ...]) -> None:
    settings = [
        *adapter,
        "--adapter.dropout=0.2",
        "--training.max_steps=16",
        "--training.save_strategy=steps",
        "--training.save_steps=5",
    ]
    settings += ["--training.gradient_accumulation_steps=2", "--training.per_device_train_batch_size=2"]
    whole = train_file(run_file, *settings, f"--training.output_dir={run_file.parent / 'whole'}")
    checkpoint = run_file.parent / "whole" / "checkpoint-15"  # in the second epoch of twelve steps
    assert checkpoint.is_dir()
    again = train_file(run_file, *settings, f"--resume={checkpoint}")
    assert again == whole[15:]
    ours, theirs = (
        load_file(folder / "adapter" / "adapter_model.safetensors")
        for folder in (run_folder(run_file), checkpoint.parent)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_whole_run_that_is_resumed_takes_no_further_step(run_file: Path) -> None:
    settings = ["--training.max_steps=2", "--training.save_strategy=steps", "--training.save_steps=1"]
    losses = train_file(run_file, *settings)
    folder = run_folder(run_file)
    adapter = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    metrics = (folder / "metrics.json").read_text()
    assert train_file(run_file, *settings, "--resume=last") == losses
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert (folder / "metrics.json").read_text() == metrics
    assert not (folder / "checkpoint-3").exists()


@pytest.mark.slow
def test_a_run_from_an_earlier_checkpoint_saves_and_logs_as_it_says_now(run_file: Path) -> None:
    data = str(read_run_file(run_file).data.train)
    settings = ["--training.save_strategy=steps", "--training.eval_strategy=steps", f"--data.validation={data}"]
    folder = run_folder(run_file)
    train_file(run_file, *settings, "--training.save_steps=2", "--training.eval_steps=2", "--training.max_steps=8")
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    often = ["--training.save_steps=1", "--training.eval_steps=7", "--training.logging_steps=3"]
    train_file(run_file, *settings, *often, "--training.max_steps=9", f"--resume={folder / 'checkpoint-6'}")
    assert sorted(path.name for path in folder.glob("*checkpoint-*")) == [
        "checkpoint-8",
        "checkpoint-9",
        "superseded-checkpoint-8",
    ]
    lines = read_log(folder / "log.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6, 9]
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4, 6, 7, 9]


def test_other_data_or_another_base_under_the_same_path_is_not_resumed(
    run_file: Path, tiny_llava: Path, tmp_path: Path
) -> None:
    data, base = write_tiny_data(tmp_path / "own", samples=24), shutil.copytree(tiny_llava, tmp_path / "base")
    settings = [f"--data.train={data}", f"--data.image_folder={data.parent}", f"--model.base={base}"]
    settings += ["--training.save_strategy=steps", "--training.save_steps=2"]
    whole = train_file(run_file, *settings)
    again = [*settings, f"--resume={run_folder(run_file) / 'checkpoint-4'}"]
    records, config = data.read_text(), (base / "config.json").read_text()
    rows = json.loads(records)
    data.write_text(json.dumps([*rows, {**rows[0], "id": "new"}]))
    with pytest.raises(UserError):
        train_file(run_file, *again)
    data.write_text(json.dumps(rows[::-1]))
    with pytest.raises(UserError):
        train_file(run_file, *again)
    data.write_text(records)
    (base / "config.json").write_text(config + "\n")
    with pytest.raises(UserError):
        train_file(run_file, *again)
    (base / "config.json").write_text(config)
    assert train_file(run_file, *again) == whole


def test_checkpoints_hold_nothing_of_the_base_and_a_half_written_one_is_not_taken(run_file: Path) -> None:
    train_file(run_file, "--training.save_strategy=steps", "--training.save_steps=2", "--training.save_total_limit=2")
    folder = run_folder(run_file)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    written = {path.name for path in (folder / "checkpoint-6").rglob("*") if path.is_file()}
    assert {"adapter_model.safetensors", "recipe.json", "tensors-00001.safetensors", "state.json"} <= written
    assert "model.safetensors" not in written
    last = load_file(folder / "checkpoint-6" / "adapter" / "adapter_model.safetensors")
    final = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(last[name], final[name]) for name in final)
    half = folder / "checkpoint-9"
    (half / "state").mkdir(parents=True)
    (half / "state" / "state.json").write_bytes(b"half")
    whole = train_file(run_file, "--training.max_steps=8", "--resume=last")
    assert len(whole) == 8  # lines 1 to 6 are kept, 7 and 8 are new: it went on from checkpoint-6


def test_results_and_somebody_elses_files_are_not_written_over(run_file: Path) -> None:
    train_file(run_file)
    before = contents(run_folder(run_file))
    for options in ((), ("--resume=last",)):
        with pytest.raises(UserError):
            train_file(run_file, *options)
    (run_folder(run_file) / "adapter" / "notes.txt").write_text("mine")
    with pytest.raises(UserError):
        train_file(run_file, "--overwrite=true")
    (run_folder(run_file) / "adapter" / "notes.txt").unlink()
    assert contents(run_folder(run_file)) == before


def test_cached_features_train_like_pixels(run_file: Path) -> None:
    pixels = train_file(run_file)
    cached = train_file(run_file, "--data.cache_features=true", "--overwrite=true")
    assert cached == pytest.approx(pixels, abs=1e-5)
    assert list((run_folder(run_file) / "features").rglob("*.safetensors"))


def test_too_many_bad_samples_end_the_run_with_an_example(run_file: Path, tmp_path: Path) -> None:
    data = write_tiny_data(tmp_path / "broken", samples=24)
    (data.parent / "red-0.png").write_bytes(b"no picture")  # a missing one is told before weights are read
    overrides = [f"--data.train={data}", f"--data.image_folder={data.parent}"]
    with pytest.raises(UserError):
        train_file(run_file, *overrides)
    with pytest.raises(UserError):  # also where no loss is logged; nothing was saved, so nothing is in the way
        train_file(run_file, *overrides, "--training.logging_strategy=no")
    train_file(run_file, *overrides, "--data.max_bad_share=0.05")
    (line,) = (run_folder(run_file) / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "sample-0"


def test_a_missing_picture_shows_before_weights_are_read_and_leaves_nothing(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_tiny_data(tmp_path / "broken", samples=24)
    (data.parent / "red-0.png").unlink()
    overrides = [f"--data.train={data}", f"--data.image_folder={data.parent}"]
    with monkeypatch.context() as patch:
        patch.setattr(DecoderPipeline, "load", lambda self: pytest.fail("weights are read"))
        with pytest.raises(UserError):
            train_file(run_file, *overrides)
    assert not run_folder(run_file).exists()
    train_file(run_file, *overrides, "--data.max_bad_share=0.05")
    assert "sample-0" in (run_folder(run_file) / "skipped.jsonl").read_text()


def test_if_stopped_resumes_what_was_stopped_and_refuses_other_settings(run_file: Path) -> None:
    settings = ["--training.save_strategy=steps", "--training.save_steps=3", "--training.save_total_limit=5"]
    folder = run_folder(run_file)
    whole = train_file(run_file, *settings, "--resume=if_stopped")  # nothing is there: it starts
    (folder / "metrics.json").unlink()
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / "checkpoint-6")  # as a Ctrl-C after step 3 would have left it
    (folder / "checkpoint-3" / "mark").touch()
    with pytest.raises(UserError):
        train_file(run_file, *settings, "--resume=if_stopped", "--training.learning_rate=1e-4")
    assert train_file(run_file, *settings, "--resume=if_stopped") == whole
    assert (folder / "checkpoint-3" / "mark").is_file()  # resumed from it, or it would be another one
    assert finished_already(read_run_file(run_file, *settings, "--resume=if_stopped"))
    longer = [*settings, "--training.max_steps=9"]
    train_file(run_file, *longer, "--resume=last", "--training.save_steps=1")
    add_metrics(folder / "metrics.json", {"train_steps": 6})  # as if it had been stopped before its end
    assert not finished_already(read_run_file(run_file, *longer, "--resume=if_stopped"))


@pytest.mark.parametrize(
    ("options", "status"),
    [
        (["--resume=if_stopped"], 0),
        (["--config={run}/settings.json"], 2),
        (["--config={run}/settings.json", "--resume=if_stopped"], 0),
        (["--resume=if_stopped", "--training.learning_rate=1e-4"], 2),
    ],
)
def test_a_finished_run_stays_as_it_is_to_the_byte(
    run_file: Path, options: list[str], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_folder(run_file)
    train_file(run_file, "--resume=if_stopped", "--overwrite=true", "--training.max_steps=2")
    before = contents(folder)
    for _ in range(2):
        words = [option.format(run=folder) for option in options]
        more = [] if words[0].startswith("--config") else [f"--config={run_file}", "--training.max_steps=2"]
        monkeypatch.setattr("sys.argv", ["llava_instruct.py", *more, *words])
        with contextlib.nullcontext() if status == 0 else pytest.raises(SystemExit) as ended:
            llava_instruct.main()
        assert ended is None or ended.value.code == status
    assert contents(folder) == before


def test_starts_from_a_projector_alone(run_file: Path, tmp_path: Path) -> None:
    stage_one = tmp_path / "stage_one"
    projector = '--adapter.targets=["model.multi_modal_projector*"]'
    train_file(
        run_file,
        "--adapter.method=full",
        projector,
        "--optim.projector_learning_rate=null",
        f"--training.output_dir={stage_one}",
    )
    first = load_file(stage_one / "adapter" / "adapter_model.safetensors")
    assert {name.rpartition("multi_modal_projector")[1] for name in first} == {"multi_modal_projector"}
    train_file(
        run_file,
        f"--adapter.initial={stage_one / 'adapter'}",
        "--training.learning_rate=1e-12",
        "--optim.projector_learning_rate=1e-12",
    )
    second = load_file(run_folder(run_file) / "adapter" / "adapter_model.safetensors")
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-6, rtol=0)


@pytest.mark.parametrize("evaluates", ["epoch", pytest.param("steps", marks=pytest.mark.slow)])
def test_going_on_at_an_epochs_end_gives_the_whole_run(run_file: Path, evaluates: str) -> None:
    """Validation stands between the epoch's last step and the next epoch; dropout is drawn after it."""
    records = str(read_run_file(run_file).data.train)
    settings = [
        "--adapter.dropout=0.2",
        f"--data.validation={records}",
        "--data.validation_limit=5",
        f"--training.eval_strategy={evaluates}",
        "--training.eval_steps=12",
        "--training.max_steps=18",
        "--training.save_strategy=steps",
        "--training.save_steps=6",
        "--training.load_best_model_at_end=false",
    ]
    whole_folder = run_file.parent / "whole"
    whole = train_file(run_file, *settings, "--training.save_total_limit=5", f"--training.output_dir={whole_folder}")
    again = train_file(run_file, *settings, f"--resume={whole_folder / 'checkpoint-12'}")  # twelve steps an epoch
    assert again == whole[12:]
    found, expected = (read_log(folder / "log.jsonl") for folder in (run_folder(run_file), whole_folder))
    assert [line["step"] for line in expected if "eval_loss" in line] == [12, 18]
    evaluated = json.loads((whole_folder / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in evaluated if "eval_loss" in line] == [12]
    last = [line["eval_loss"] for line in found if "eval_loss" in line]
    assert last == [line["eval_loss"] for line in expected if "eval_loss" in line and line["step"] > 12]


def test_validation_changes_no_dropout(run_file: Path) -> None:
    settings = ["--adapter.dropout=0.2", "--training.max_steps=5"]
    alone = train_file(run_file, *settings)
    records = str(read_run_file(run_file).data.train)
    often = [f"--data.validation={records}", "--training.eval_strategy=steps", "--training.eval_steps=2"]
    assert train_file(run_file, *settings, *often, "--overwrite=true") == alone


def test_a_resume_that_other_samples_refuse_changes_nothing(tmp_path: Path, tiny_llava: Path) -> None:
    """The ids are known once the data are read, which is after the settings were compared."""
    records = write_tiny_data(tmp_path / "data", samples=12)
    run_file = write_run(tmp_path / "run.yaml", tiny_llava, records, training={"use_cpu": True})
    saved = ["--training.save_strategy=steps", "--training.save_steps=2", "--training.max_steps=6"]
    train_file(run_file, *saved, "--training.save_total_limit=5")
    folder = run_folder(run_file)
    (folder / ".checkpoint-1.removing").mkdir()  # of a crash
    before = contents(folder)
    content = json.loads(records.read_text())
    records.write_text(json.dumps(content[::-1]))
    with pytest.raises(UserError):
        train_file(run_file, *saved, "--resume", str(folder / "checkpoint-2"))
    assert contents(folder) == before


def contents(folder: Path) -> dict[str, bytes]:
    """Every name below a folder, and what its file holds."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("steps", "stopped_at"),
    [
        pytest.param(6, 3, id="an epoch"),
        pytest.param(6, 6, id="the run", marks=pytest.mark.slow),
        pytest.param(5, 5, id="amid one", marks=pytest.mark.slow),
    ],
)
def test_a_stop_in_front_of_a_validation_leaves_it_to_the_run_that_goes_on(
    tmp_path: Path, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch, steps: int, stopped_at: int
) -> None:
    """A signal in the last step of an epoch (three of them), of the run, or of a run that ends within an epoch."""
    records = write_tiny_data(tmp_path / "data", samples=12)
    run_file = write_run(tmp_path / "run.yaml", tiny_llava, records, training={"use_cpu": True})
    settings = ["--adapter.dropout=0.2", f"--data.validation={records}", f"--training.max_steps={steps}"]
    settings += ["--training.load_best_model_at_end=true", "--training.metric_for_best_model=loss"]
    settings += ["--training.save_strategy=epoch", "--training.save_total_limit=5"]
    whole, folder = tmp_path / "whole", run_folder(run_file)
    expected = train_file(run_file, *settings, f"--training.output_dir={whole}")
    with monkeypatch.context() as patched:
        send_at_step(patched, stopped_at)
        assert train_file(run_file, *settings) == expected[:stopped_at]
    assert validated(folder) == [one for one in validated(whole) if one[0] < stopped_at]
    checkpoint = folder / f"checkpoint-{stopped_at}"
    for _ in range(2):  # the second time as after a kill before the next checkpoint
        assert train_file(run_file, *settings, f"--resume={checkpoint}") == expected
        assert validated(folder) == validated(whole)
    ours, theirs = (load_file(one / "adapter" / "adapter_model.safetensors") for one in (folder, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


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
    lines = [line for line in read_log(folder / "log.jsonl") if "eval_loss" in line]
    return [(line["step"], line["eval_loss"], line["eval_samples"]) for line in lines]
