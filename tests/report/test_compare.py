"""A comparison: which runs it takes, the rate it chooses, what its table says; its trainings are written here."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dora_vl.cli import main
from dora_vl.report import compare
from tests.backbones.tiny_language import write_tiny_language
from tests.training.tiny_run import json_of

pytest.importorskip("matplotlib.font_manager")  # now: its first import looks for fonts with a program
ITEMS = 40


def recipe(folder: Path, **data: Any) -> Path:
    """A run's settings; nothing of it is read but by the trainings that are replaced."""
    settings = {
        "task": "commonsense",
        "model": {"base": str(folder / "base"), "template": "cloze"},
        "adapter": {"rank": 4, "alpha": 12.0},
        "data": {"train": [str(folder / "train.json")], "validation_size": 4, **data},
        "training": {"output_dir": str(folder / "run"), "learning_rate": 0.01, "seed": 5},
        "evaluation": {"files": {"openbookqa": str(folder / "test.json")}},
    }
    (folder / "run.yaml").write_text(json.dumps(settings))
    return folder / "run.yaml"


class Trainings:
    """Stands for `dora-vl train`: the loss is least at a rate that the method has, and the score falls with it."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, stop_after: int | None = None, of_a_picture: int = 1
    ) -> None:
        self.started: list[dict[str, str]] = []
        self.stop_after, self.of_a_picture = stop_after, of_a_picture
        monkeypatch.setattr(compare.subprocess, "run", self)

    def __call__(self, command: list[str], **_: Any) -> SimpleNamespace:
        words = dict(word.removeprefix("--").split("=", 1) for word in command if word.startswith("--"))
        self.started.append(words)
        if self.stop_after is not None and len(self.started) > self.stop_after:
            return SimpleNamespace(returncode=-2)
        folder, rate = Path(words["training.output_dir"]), float(words["training.learning_rate"])
        if rate > 0.02:
            return SimpleNamespace(returncode=1)
        best = 0.003 if words.get("adapter.method") == "lora" else 0.01
        loss = 1 + abs(np.log(max(rate, 1e-9) / best))
        (folder / "log.jsonl").write_text(json.dumps({"step": 3, "eval_loss": loss}) + "\n")
        (folder / "metrics.json").write_text(json.dumps({"train_steps": 3}))
        if words.get("evaluation.files") != "{}":
            right = ITEMS * (0 if rate == 0 else 3 if words["adapter.method"] == "dora" else 2) // 4
            rows = [
                {"id": f"q{number}", "unit": f"p{number // self.of_a_picture}", "score": float(number < right)}
                for number in range(ITEMS)
            ]
            (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return SimpleNamespace(returncode=0)


def compared(folder: Path, *more: str) -> None:
    words = ["--methods", "dora,lora", "--ranks", "4,8", "--seeds", "2", "--untrained", "--to", str(folder / "out")]
    main(["compare", str(recipe(folder)), *words, *more])


def test_each_contender_is_tested_at_the_rate_of_its_lowest_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainings = Trainings(monkeypatch)
    compared(tmp_path)
    tested = [words for words in trainings.started if words.get("evaluation.files") != "{}"]
    sweep = [words for words in trainings.started if words not in tested]
    assert len(sweep) == 2 * (3 + 4)  # of LoRA the smallest was the best at first
    assert {words["training.seed"] for words in sweep} == {"5"}
    assert len(tested) == 1 + 2 * 2 * 2  # the untrained model, and each contender with two seeds
    rates = {
        (words["adapter.method"], words["training.learning_rate"]) for words in tested if "adapter.method" in words
    }
    assert rates == {("dora", "0.01"), ("lora", "0.0032")}
    assert {(words["adapter.rank"], words["adapter.alpha"]) for words in sweep} == {("4", "12"), ("8", "24")}
    results = {row["name"]: row for row in json_of(tmp_path / "out" / "compare.json")["results"]}
    assert list(results) == ["dora r4", "dora r8", "lora r4", "lora r8", "untrained"]
    assert (results["dora r4"]["score"], results["lora r4"]["score"], results["untrained"]["score"]) == (75, 50, 0)
    difference, low, high = results["lora r8"]["difference"]
    assert (results["lora r8"]["against"], difference) == ("dora r8", -25.0)
    assert -45 < low < -25 < high < -5
    gain, low, high = results["lora r4"]["gain"]
    assert gain == 50
    assert 30 < low < 50 < high < 70
    assert results["untrained"]["gain"] is None
    assert results["dora r4"]["losses"]["0.032"] is None  # this rate failed, and says so
    assert (tmp_path / "out" / "dora_r4" / "rate_0.032_seed_5" / "failed.txt").is_file()
    for picture in ("score_by_rank.png", "loss_by_rate.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    assert "-25.00 to dora r4" in capsys.readouterr().out


def test_items_of_one_picture_are_drawn_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    intervals = {}
    for count in (1, 10):
        folder = tmp_path / str(count)
        folder.mkdir()
        Trainings(monkeypatch, of_a_picture=count)
        compared(folder)
        result = json_of(folder / "out" / "compare.json")["results"][0]
        assert (result["name"], result["score"], result["items"]) == ("dora r4", 75, ITEMS)
        intervals[count] = result["interval"]
    low, high = intervals[1]
    assert 55 < low < 65 < 85 < high < 95
    assert intervals[10] == [25, 100]  # of four pictures, of which three are right


def test_a_stopped_comparison_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Trainings(monkeypatch, stop_after=7)
    with pytest.raises(SystemExit):
        compared(tmp_path)
    second = Trainings(monkeypatch)
    compared(tmp_path)
    assert len(first.started[:7]) + len(second.started) == 14 + 9


@pytest.mark.parametrize(
    ("words", "data"),
    [
        (("--methods", "dora,lera"), {}),
        (("--rates", "0.1,x"), {}),
        (("--ranks", "0"), {}),
        ((), {"validation_size": 0}),
    ],
)
def test_what_cannot_be_compared_is_refused_before_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], data: dict[str, Any]
) -> None:
    trainings = Trainings(monkeypatch)
    with pytest.raises(SystemExit) as ended:
        main(["compare", str(recipe(tmp_path, **data)), "--to", str(tmp_path / "out"), *words])
    assert ended.value.code == 2
    assert not trainings.started


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_real_runs_are_compared(tmp_path: Path) -> None:
    """Of a tiny language model on generated questions: rates chosen, tested, and what it forgot."""
    from tests.tasks import generated_commonsense
    from tests.tasks.test_commonsense import arguments

    write_tiny_language(tmp_path / "base")
    generated_commonsense.main(["--to", str(tmp_path / "data")])
    config, *settings = arguments(tmp_path, "run", "--training.max_steps=3", "--training.deepspeed=null")
    words = [
        "--methods",
        "dora,full",
        "--ranks",
        "2",
        "--rates",
        "0.001,0.01",
        "--seeds",
        "2",
        "--to",
        str(tmp_path / "out"),
    ]
    settings += ["--evaluation.scoring=[likelihood]", '--adapter.targets=["*.q_proj", "*.down_proj"]']
    main(["compare", config.removeprefix("--config="), *words, *settings])
    results = json_of(tmp_path / "out" / "compare.json")["results"]
    assert [row["name"] for row in results] == ["dora r2", "full"]
    for row in results:
        assert row["items"] == 40
        assert all(loss > 0 for loss in row["losses"].values())
        assert len(row["by_seed"]) == 2
        for metrics in row["metrics"]:
            assert metrics["forgetting"]["perplexity"]["adapted"] > 1
