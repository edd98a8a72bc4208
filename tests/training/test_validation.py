"""The validation loss is the mean over usable samples, whatever is skipped and however ranks share the work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dora_vl.errors import UserError
from dora_vl.training.run import train
from tests.training.launched import launch
from tests.training.tiny_run import logged, skipped_by, trained, write_run, write_tiny_data
from tests.training.tiny_vlbart_run import vlbart_run, write_vlbart_data, write_vlbart_run


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    data = write_vlbart_data(tmp_path / "data")
    (data / "features" / "p5.npz").unlink()
    (data / "empty").mkdir()
    (data / "empty" / "other.npz").write_bytes((data / "features" / "p0.npz").read_bytes())
    lines = (data / "records" / "gqa.jsonl").read_text().splitlines()
    whole = [line for line in lines if '"gqa-5"' not in line]
    assert len(whole) == len(lines) - 1
    (data / "whole.jsonl").write_text("\n".join(whole) + "\n")
    return write_vlbart_run(
        tmp_path / "run.yaml",
        data,
        ("vqav2",),
        data={
            "validation_files": {"gqa": str(data / "records" / "gqa.jsonl")},
            "features": dict.fromkeys(("vqav2", "gqa"), str(data / "features")),
            "max_bad_share": 0.5,
        },
        training={"use_cpu": True},
        evaluation={"batch_size": 3},
    )


def test_a_vlbart_sample_without_features_is_named_and_not_in_the_mean(run_file: Path) -> None:
    folder, data = run_file.parent, run_file.parent / "data"
    train(vlbart_run(run_file))
    other = f"--data.validation_files.gqa={data / 'whole.jsonl'}"
    train(vlbart_run(run_file, f"--training.output_dir={folder / 'whole'}", other))
    (result,), (expected,) = (logged(folder / name, "eval_loss") for name in ("run", "whole"))
    assert result["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-5)
    assert (result["eval_samples"], result["eval_skipped"]) == (6, 1)
    assert expected["eval_skipped"] == 0
    lines = map(json.loads, (folder / "run" / "skipped.jsonl").read_text().splitlines())
    (line,) = [line for line in lines if line.get("of") == "validation"]
    assert line["id"] == "gqa-5"
    assert "p5" in line["reason"]


def test_a_wrong_features_folder_stops_before_training(run_file: Path) -> None:
    empty = run_file.parent / "data" / "empty"
    with pytest.raises(UserError):
        train(vlbart_run(run_file, f"--data.features.gqa={empty}"))
    assert not (run_file.parent / "run" / "log.jsonl").exists()


@pytest.fixture
def llava_run(tmp_path: Path, tiny_llava: Path, tiny_data: Path) -> Path:
    """Seven validation samples in batches of two; the first two have no picture."""
    held_out = write_tiny_data(tmp_path / "held", samples=7)
    for name in ("red-0.png", "green-1.png"):
        (held_out.parent / name).unlink()
    for source in tiny_data.parent.glob("*.png"):
        (held_out.parent / "of" / source.name).parent.mkdir(exist_ok=True)
        (held_out.parent / "of" / source.name).write_bytes(source.read_bytes())
    records = json.loads(tiny_data.read_text())
    for record in records:
        record["image"] = f"of/{record['image']}"
    (held_out.parent / "records.json").write_text(json.dumps(records))
    return write_run(
        tmp_path / "run.yaml",
        tiny_llava,
        held_out.parent / "records.json",
        data={"validation": str(held_out), "group_by_modality_length": False},
        training={"per_device_eval_batch_size": 2, "max_steps": 2},
    )


def test_a_llava_batch_without_usable_samples_is_not_in_the_mean(llava_run: Path) -> None:
    folder = llava_run.parent
    records = json.loads((folder / "held" / "train.json").read_text())
    (whole := folder / "held" / "whole.json").write_text(json.dumps(records[2:]))
    trained(llava_run, "--training.use_cpu=true")
    trained(llava_run, "--training.use_cpu=true", f"--data.validation={whole}", name="whole")
    (result,), (expected,) = (logged(folder / name, "eval_loss") for name in ("run", "whole"))
    assert result["eval_loss"] == pytest.approx(expected["eval_loss"], abs=2e-2)  # batches differ: means of token means
    assert (result["eval_samples"], result["eval_skipped"]) == (5, 2)
    assert set(skipped_by(folder / "run")) == {"sample-0", "sample-1"}
    for picture in (folder / "held").glob("*.png"):
        picture.unlink()
    with pytest.raises(UserError):
        trained(llava_run, "--training.use_cpu=true", "--overwrite=true")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_find_the_loss_of_one(llava_run: Path) -> None:
    """Seven samples are no whole number of steps of two ranks; none may count twice."""
    entries = []
    for ranks in (1, 2):
        folder = llava_run.parent / f"ranks-{ranks}"
        settings = (f"--training.output_dir={folder}", "--training.deepspeed=zero2")
        launch(llava_run, *settings, f"--training.gradient_accumulation_steps={2 // ranks}", ranks=ranks)
        assert set(skipped_by(folder)) == {"sample-0", "sample-1"}
        entries += logged(folder, "eval_loss")
    single, two = entries
    assert two["eval_loss"] == pytest.approx(single["eval_loss"], abs=1e-5)
    assert (two["eval_samples"], two["eval_skipped"]) == (5, 2)
