"""What the test of a VL-BART run will need is missed before training, and a task's score outlives a later error."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dora_vl.errors import UserError
from dora_vl.training.command_line import read_settings
from dora_vl.training.run import run
from dora_vl.training.vlbart_recipe import VlBartRunConfig
from dora_vl.training.vlbart_task import VlBartTask
from tests.training.tiny_vlbart_run import all_subtasks, write_vlbart_data, write_vlbart_run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_vlbart_data(tmp_path / "data")


def task(data: Path, tested: tuple[str, ...], *overrides: str) -> VlBartTask:
    files = {name: str(data / "records" / f"{name}.jsonl") for name in tested}
    features = dict.fromkeys(("vqav2", *tested), str(data / "features"))
    path = write_vlbart_run(
        data.parent / "run.yaml",
        data,
        ("vqav2",),
        data={"features": features},
        training={"use_cpu": True},
        evaluation={"files": files},
    )
    config = read_settings([f"--config={path}", *overrides], VlBartRunConfig)
    return VlBartTask(config, all_subtasks(), name="vlbart_image")


def no_file(data: Path) -> None:
    (data / "records" / "gqa.jsonl").unlink()


def no_record(data: Path) -> None:
    records = (data / "records" / "gqa.jsonl").read_text()
    (data / "odd.jsonl").write_text(records + '{"id": "odd", "images": 3}\n')


def unlabelled(data: Path) -> None:
    path = data / "records" / "nlvr2.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[4]["answers"] = []
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def other_features(data: Path) -> None:
    (data / "other").mkdir()
    (data / "other" / "x.npz").write_bytes((data / "features" / "p0.npz").read_bytes())


@pytest.mark.parametrize(
    ("spoil", "tested", "overrides", "told"),
    [
        (no_file, "gqa", (), r"gqa\.jsonl does not exist"),
        (
            no_record,
            "gqa",
            ("--evaluation.files.gqa={data}/odd.jsonl",),
            r"sample odd: .*odd\.jsonl, line 8: 'images' must be a list",
        ),
        (unlabelled, "nlvr2", (), r"1 examples have no label, first dev-4-0-0"),
        (other_features, "gqa", ("--evaluation.features.gqa={data}/other",), r"gqa\.jsonl: not one .* gqa-0: .*p0"),
    ],
    ids=["file", "record", "label", "features"],
)
def test_what_the_test_lacks_is_told_before_training(
    data: Path, spoil: Callable[[Path], None], tested: str, overrides: tuple[str, ...], told: str
) -> None:
    spoil(data)
    with pytest.raises(UserError, match=told):
        run(task(data, (tested,), *(one.format(data=data) for one in overrides)))
    assert not (data.parent / "run" / "log.jsonl").exists()


@pytest.mark.parametrize("tested", ["coco_caption", "tvc"])
def test_a_missing_caption_scorer_is_told_before_training(
    data: Path, tested: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pycocoevalcap", "pycocoevalcap.cider", "pycocoevalcap.cider.cider"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="pip install 'dora-vl"):
        run(task(data, (tested,)))
    assert not (data.parent / "run" / "log.jsonl").exists()


def test_each_score_is_written_at_once_and_missing_features_are_named(
    data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The second task's scorer fails after the check; what came before it stays."""
    broken = task(data, ("vqav2", "gqa"), "--data.max_bad_share=0.5")

    def fail(examples: object, answers: object) -> None:
        if answers:
            raise RuntimeError("later")

    known = broken._subtasks
    known["vqav2"] = dataclasses.replace(known["vqav2"], score=fail)  # type: ignore[arg-type]
    (data / "features" / "p5.npz").unlink()
    with pytest.raises(RuntimeError, match="later"):
        run(broken)
    metrics = json.loads((data.parent / "run" / "metrics.json").read_text())
    assert set(metrics["tasks"]) == {"gqa"}
    assert list(metrics["tasks"]["gqa"]["failed"]) == ["gqa-5"]
    assert metrics["train_steps"] > 0
    assert "gqa: gqa-5 could not be asked: " in caplog.text
