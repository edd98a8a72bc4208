"""A comparison: which runs it takes, the rate it chooses, its table; intervals over seeds and units together."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD
from transformers import get_scheduler

from dora_vl.cli import main
from dora_vl.data.example import Example
from dora_vl.errors import Diverged, UserError
from dora_vl.evaluation.predictions import Predictions
from dora_vl.evaluation.scores.scored import ACCURACY, Mean, Ratio, Scored, Tally
from dora_vl.evaluation.test_sets import ResultFolder, Tested, TestSet
from dora_vl.report import compare, contrasts
from dora_vl.report.contrasts import Contenders, Estimate, half_width, quantile
from dora_vl.run.arguments import training_arguments
from dora_vl.run.settings_parser import read_run
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

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, stop_after: int | None = None) -> None:
        self.started: list[dict[str, str]] = []
        self.stop_after = stop_after
        monkeypatch.setattr(compare.subprocess, "run", self)

    def __call__(self, command: list[str], **_: Any) -> SimpleNamespace:
        words = dict(word.removeprefix("--").split("=", 1) for word in command if word.startswith("--"))
        self.started.append(words)
        if self.stop_after is not None and len(self.started) > self.stop_after:
            return SimpleNamespace(returncode=-2)
        folder, rate = Path(words["training.output_dir"]), float(words["training.learning_rate"])
        if rate > 0.02:
            return SimpleNamespace(returncode=Diverged.status)
        best = 0.003 if words.get("adapter.method") == "lora" else 0.01
        loss = 1 + abs(np.log(max(rate, 1e-9) / best))
        (folder / "log.jsonl").write_text(json.dumps({"step": 3, "eval_loss": loss}) + "\n")
        (folder / "metrics.json").write_text(json.dumps({"train_steps": 3}))
        if words.get("evaluation.files") != "{}":
            right = ITEMS * (0 if rate == 0 else 3 if words["adapter.method"] == "dora" else 2) // 4
            tally = Tally()
            for number in range(ITEMS):
                hit = float(number < right)
                tally.add(f"q{number}", hit, {"right": hit, "asked": 1.0}, unit=f"p{number}")
            examples = [Example(id=f"q{number}") for number in range(ITEMS)]
            test = TestSet(name="openbookqa", examples=examples, score=None)
            tested = Tested(test=test, predictions=Predictions(), scored=tally.scored({"accuracy": ACCURACY}))
            ResultFolder(folder=folder, header={"train_steps": 3}).write([tested])
        return SimpleNamespace(returncode=0)


def compared(folder: Path, *more: str) -> None:
    words = ["--methods", "dora,lora", "--ranks", "4,8,4", "--seeds", "3", "--untrained", "--to", str(folder / "out")]
    main(["compare", str(recipe(folder)), *words, *more])


def test_each_contender_is_tested_at_the_rate_of_its_lowest_loss(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    trainings = Trainings(monkeypatch)
    compared(tmp_path)
    tested = [words for words in trainings.started if words.get("evaluation.files") != "{}"]
    sweep = [words for words in trainings.started if words not in tested]
    assert len(sweep) == 2 * (3 + 4)  # of LoRA the smallest was the best at first
    assert {words["training.seed"] for words in sweep} == {"5"}
    assert len(tested) == 1 + 2 * 2 * 3  # the untrained model, and each contender with three seeds
    rates = {(words.get("adapter.method"), words["training.learning_rate"]) for words in tested}
    assert rates == {("dora", "0.01"), ("lora", "0.0032"), (None, "0")}
    assert {(words["adapter.rank"], words["adapter.alpha"]) for words in sweep} == {("4", "12"), ("8", "24")}
    results = {row["name"]: row for row in json_of(tmp_path / "out" / "compare.json")["results"]}
    assert list(results) == ["dora r4", "dora r8", "lora r4", "lora r8", "untrained"]
    names, written = ("dora r4", "lora r4", "untrained"), json_of(tmp_path / "out" / "compare.json")
    assert [results[name]["scores"]["openbookqa"]["value"] for name in names] == [75, 50, 0]
    contrasts = {(row["name"], row["against"]): row["difference"] for row in written["contrasts"]}
    of_methods = {(f"lora r{rank}", f"dora r{rank}") for rank in (4, 8)}
    of_ranks = {(f"{method} r8", f"{method} r4") for method in ("dora", "lora")}
    assert contrasts.keys() == of_methods | of_ranks | {(name, "untrained") for name in results if name != "untrained"}
    apart = contrasts["lora r8", "dora r8"]
    assert apart["value"] == -25
    assert -45 < apart["low"] < -25 < apart["high"] < -5
    gain = contrasts["lora r4", "untrained"]
    assert gain["value"] == 50
    assert 30 < gain["low"] < 50 < gain["high"] < 70
    assert gain["simultaneous"][0] < gain["low"]
    assert contrasts["dora r8", "dora r4"]["value"] == 0
    assert results["dora r4"]["losses"]["0.032"] is None  # this rate failed, and says so
    assert (tmp_path / "out" / "dora_r4" / "rate_0.032_seed_5" / "failed.txt").is_file()
    for picture in ("score_by_rank.png", "loss_by_rate.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    assert "lora r4 dora r4 -25.00" in " ".join(capsys.readouterr().out.split())


def test_a_stopped_comparison_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ended for a passing reason, such as a full disk, has no result for good."""
    first = Trainings(monkeypatch, stop_after=2)
    with pytest.raises(SystemExit, match="2"):
        compared(tmp_path)
    assert not list((tmp_path / "out").rglob("failed.txt"))
    second = Trainings(monkeypatch)
    compared(tmp_path)
    assert len(first.started[:2]) + len(second.started) == 14 + 13


@pytest.mark.parametrize(
    "own", [["--training.load_best_model_at_end=true"], ["--optim.early_stopping=2", "--optim.rates", '{"dora": 0.1}']]
)
def test_the_untrained_model_takes_no_step_whatever_the_recipe_says(tmp_path: Path, own: list[str]) -> None:
    words = [f"--config={recipe(tmp_path)}", "--training.eval_strategy=epoch", "--training.save_strategy=epoch", *own]
    cells = compare.Comparison(words, read_run(words), tmp_path / "out", [compare.Contender("dora", 4)], [0.01], 1)
    assert cells.sweep(cells.contenders[0])[0.01].takes_best
    config, *settings = cells.untrained_run.words
    arguments = training_arguments(read_run([f"--config={config}", *settings]))
    assert (arguments.max_steps, arguments.get_warmup_steps(1)) == (1, 1)
    parts = [{"params": [Parameter(torch.zeros(1))], "lr": rate} for rate in (0.0, 0.1)]
    scheduler = get_scheduler(arguments.lr_scheduler_type, SGD(parts), num_warmup_steps=1, num_training_steps=1)
    assert scheduler.get_last_lr() == [0, 0]


@pytest.mark.parametrize("names", ["full,dora 4,dora 16", "dora 16,dora 4,full", "magnitude,full"])
def test_a_method_without_rank_is_set_against_the_greatest_rank_whatever_the_order(names: str) -> None:
    several = [name.partition(" ") for name in names.split(",")]
    contenders = [compare.Contender(method, int(rank) if rank else None) for method, _, rank in several]
    against = dict(compare.pairs_of(contenders, untrained=False))
    assert against["full"] == ("dora r16" if "dora" in names else "magnitude")


@pytest.mark.parametrize("best", [False, True])
def test_the_loss_is_that_of_the_checkpoint_that_is_tested(tmp_path: Path, best: bool) -> None:
    cell = compare.CellRun(tmp_path, (), is_tested=False, takes_best=best)
    lines = [{"step": step, "eval_loss": loss} for step, loss in enumerate((2.0, 1.0, 1.5))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cell.loss == (1.0 if best else 1.5)


def test_a_recipes_own_strategy_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainings = Trainings(monkeypatch)
    compared(tmp_path, "--training.eval_strategy=steps", "--training.load_best_model_at_end=true")
    tested = [words for words in trainings.started if "adapter.method" in words]
    assert {words["training.eval_strategy"] for words in tested} == {"steps"}


@pytest.mark.parametrize(
    ("words", "data"),
    [(("--methods", "dora,lera"), {}), (("--ranks", "0"), {}), (("--rates", ","), {}), ((), {"validation_size": 0})],
)
def test_what_cannot_be_compared_is_refused_before_a_run(tmp_path, monkeypatch, words, data) -> None:
    trainings = Trainings(monkeypatch)
    with pytest.raises(SystemExit, match="2"):
        main(["compare", str(recipe(tmp_path, **data)), "--to", str(tmp_path / "out"), *words])
    assert not trainings.started


@pytest.mark.slow
def test_real_runs_are_compared(tmp_path: Path) -> None:
    from tests.training.generated_commonsense import write_commonsense
    from tests.training.test_commonsense import arguments

    write_tiny_language(tmp_path / "base")
    write_commonsense(tmp_path / "data")
    config, *settings = arguments(tmp_path, "run", "--training.max_steps=3", "--training.deepspeed=null")
    words = f"--methods dora,full --ranks 2 --rates 0.001,0.01 --seeds 2 --to {tmp_path / 'out'}".split()
    settings += ["--evaluation.scoring=[likelihood]", '--adapter.targets=["*.q_proj", "*.down_proj"]']
    main(["compare", config.removeprefix("--config="), *words, *settings])
    results = json_of(tmp_path / "out" / "compare.json")["results"]
    assert [row["name"] for row in results] == ["dora r2", "full"]
    for row in results:
        assert len(row["scores"]) == 1
        assert all(loss > 0 for loss in row["losses"].values())
        assert [len(values) for values in row["by_seed"].values()] == [2]
        for metrics in row["metrics"]:
            assert metrics["forgetting"]["perplexity"]["adapted"] > 1


def scored(hits: Sequence[float], *, metric: str = "accuracy") -> Scored:
    tally = Tally()
    for number, hit in enumerate(hits):
        tally.add(str(number), hit, {"right": hit, "asked": 1.0})
    return tally.scored({metric: Ratio("right", "asked")})


def runs(*hits: Sequence[float]) -> list[dict[str, Scored]]:
    return [{"test": scored(row)} for row in hits]


@pytest.mark.parametrize(
    ("tail", "freedom", "expected"),
    [(0.025, 2, 4.302653), (0.025, 10, 2.228139), (0.005, 3, 5.840909), (0.025, np.inf, 1.959964)],
)
def test_quantiles_are_those_of_the_tables(tail: float, freedom: float, expected: float) -> None:
    assert quantile(tail, freedom) == pytest.approx(expected, abs=2e-5)


def variances(hits: np.ndarray) -> tuple[contrasts.SeedPart, float]:
    """What seeds and units add to the variance of a mean, by their formulas instead of a bootstrap."""
    each, together = 1e4 * (hits.var(1) / hits.shape[1]).mean(), 1e4 * hits.mean(0).var() / hits.shape[1]
    return contrasts.seed_part(list(100 * hits.mean(1)), float(each), float(together)), float(together)


@pytest.mark.parametrize(("seeds", "spread"), [(3, 0.0), (3, 0.02), (3, 0.08), (5, 0.0), (5, 0.02), (5, 0.08)])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds: int, spread: float) -> None:
    """Of a mean and of a difference, where seeds move the share right by 0, 2 and 8 points: 2,000 tables."""
    random, units, tables = np.random.default_rng(7), 200, 2000
    difficulty = random.beta(1.3, 0.7, (tables, 1, units))

    def drawn() -> np.ndarray:
        shift = random.normal(0, spread, (tables, seeds, 1))
        return (random.random((tables, seeds, units)) < np.clip(difficulty + shift, 0, 1)).astype(float)

    every, others = drawn(), drawn()
    truth = 100 * np.clip(random.beta(1.3, 0.7, 10**6) + random.normal(0, spread, 10**6), 0, 1).mean()
    held = np.zeros(2)
    for number, (ours, theirs) in enumerate(zip(every, others, strict=True)):
        (own, of_units), (other, _) = variances(ours), variances(theirs)
        apart = 1e4 * float((ours.mean(0) - theirs.mean(0)).var()) / units
        halves = half_width([own], of_units, 0.025, units), half_width([own, other], apart, 0.025, units)
        held += np.abs([100 * ours.mean() - truth, 100 * (ours.mean() - theirs.mean())]) <= halves
        if number == 0:  # the bootstrap itself says the same
            table = Contenders({"ours": runs(*ours), "theirs": runs(*theirs)})
            (measure,) = table.measures
            drawn_limits = table.score(measure, "ours"), table.difference(measure, "ours", "theirs")
            assert [row.high - row.low for row in drawn_limits] == pytest.approx(2 * np.array(halves), rel=0.08)
    assert (held / tables > 0.93).all()
    assert (held / tables < 0.975).all()  # 97, and the chance of 2,000 tables


def test_few_seeds_give_an_interval_over_items_only_where_it_is_asked_for() -> None:
    first, second = [1.0] * 60 + [0.0] * 40, [1.0] * 90 + [0.0] * 10
    two, three = (Contenders({"a": runs(first, second, *more)}) for more in ([], [[1.0] * 75 + [0.0] * 25]))
    assert two.score(two.measures[0], "a") == Estimate(pytest.approx(75))
    assert two.difference(two.measures[0], "a", "a") == Estimate(0.0)
    narrow, wide = two.score(two.measures[0], "a", over_seeds=False), three.score(three.measures[0], "a")
    assert None not in (narrow.low, narrow.high, wide.low, wide.high)
    assert narrow.value == wide.value == pytest.approx(75)
    assert narrow.high - narrow.low < 16
    assert wide.high - wide.low > 40  # seeds of 60, 75 and 90, and t of two degrees of freedom


def test_a_score_is_the_formula_of_its_scorer_and_the_mean_over_sets() -> None:
    """300 items of one set right and 100 of another wrong are 50, not 75; CIDEr is no share."""
    right, wrong = scored([1.0] * 300), scored([0.0] * 100)
    table = Contenders({"a": [{"boolq": right, "piqa": wrong}]})
    assert [measure.name for measure in table.measures] == ["average", "boolq", "piqa"]
    assert table.score(table.measures[0], "a").value == 50
    tally = Tally()
    for number, task in enumerate(["boolq"] * 300 + ["piqa"] * 100):
        tally.add(str(number), float(task == "boolq"), {f"right {task}": float(task == "boolq"), f"asked {task}": 1.0})
    shares = {task: Ratio(f"right {task}", f"asked {task}") for task in ("boolq", "piqa")}
    average = tally.scored({"average": Mean(tuple(shares.values())), **shares})
    table = Contenders({"a": [{"generation": average}]})
    assert table.score(table.measures[0], "a").value == 50
    twice = Contenders({"a": [{"generation": average, "likelihood": average}]})
    assert [measure.name for measure in twice.measures] == ["generation", "likelihood"]
    captions = scored([3.1, 3.0, 3.2] * 10, metric="CIDEr")
    table = Contenders({"a": [{"coco": captions, "vqa": right}]})
    assert [(measure.name, measure.metric) for measure in table.measures] == [("coco", "CIDEr"), ("vqa", "accuracy")]
    score = table.score(table.measures[0], "a", over_seeds=False)
    assert score.value == pytest.approx(310)
    assert 305 < score.low < 310 < score.high < 315


def test_runs_of_other_items_are_refused() -> None:
    with pytest.raises(UserError):
        Contenders({"a": runs([1.0, 0.0, 1.0]), "b": runs([1.0, 0.0])})
