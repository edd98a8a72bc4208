"""The runs of a comparison, each in a folder of its own, and what they say together."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from dora_vl.data.text_file import json_lines
from dora_vl.errors import UserError, aligned, one_line
from dora_vl.evaluation.pictures import new_figure, plain_axes, save_png
from dora_vl.evaluation.scores.scored import PERCENT, PERCENTILES, RESAMPLES
from dora_vl.evaluation.test import SCORES
from dora_vl.files import read_json, whole_file, whole_folder, write_json
from dora_vl.run.folder import ADAPTER, LOSS_LOG, METRICS, SETTINGS, read_log
from dora_vl.run.settings import foreign_fields, settings_of

log = logging.getLogger(__name__)

FAILED = "failed.txt"
"""In a run's folder: why it ended without a result, such as a rate at which the loss is no number."""
WAIT_SECONDS = 10.0
MOST_RATES = 7
"""Of a sweep that goes on."""
COLOURS = ("#2f6fde", "#d9580b", "#1f9d6b", "#a23bb8", "#b8860b", "#6b7280")
UNTRAINED = "untrained"
SCORE = "score of the test (%), with 95 % interval"


@dataclass(frozen=True)
class Contender:
    """A method with its rank, where it has one."""

    method: str
    rank: int | None = None

    def __str__(self) -> str:
        return self.method if self.rank is None else f"{self.method} r{self.rank}"


@dataclass(frozen=True)
class CellRun:
    """One training run of the comparison; `is_tested` asks the test after it."""

    folder: Path
    words: tuple[str, ...]
    is_tested: bool

    @property
    def is_done(self) -> bool:
        """Whether its result is there, or the reason why there is none."""
        return (self.folder / (SCORES if self.is_tested else METRICS)).is_file() or (self.folder / FAILED).is_file()

    @property
    def loss(self) -> float:
        """Its last validation loss; infinite where it failed."""
        losses = [line["eval_loss"] for line in read_log(self.folder / LOSS_LOG) if "eval_loss" in line]
        last = losses[-1] if losses and not (self.folder / FAILED).is_file() else math.inf
        return float(last) if isinstance(last, int | float) else math.inf

    @property
    def metrics(self) -> dict[str, Any]:
        """What `metrics.json` holds."""
        return read_json(self.folder / METRICS)

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """Unit -> item's id -> share."""
        if not (self.folder / SCORES).is_file():
            reason = (self.folder / FAILED).read_text(encoding="utf-8") if (self.folder / FAILED).is_file() else ""
            raise UserError(f"{self.folder} has no {SCORES}: {one_line(reason) or 'its test did not end'}")
        scores: dict[str, dict[str, float]] = {}
        for _, row in json_lines(self.folder / SCORES, "scores"):
            scores.setdefault(str(row["unit"]), {})[str(row["id"])] = float(str(row["score"]))
        return scores

    def start(self, lock: IO[str]) -> None:
        """Runs it, or goes on with it, in a process of its own; what it says goes to a file beside its folder.

        The process holds the lock too: if this one is killed, the next comparison waits for it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder.parent / f"{self.folder.name}.log").open("a", encoding="utf-8") as output:
            command = [sys.executable, "-m", "dora_vl.cli", "train", *self.words]
            done = subprocess.run(command, stdout=output, stderr=output, check=False, pass_fds=[lock.fileno()])
        if done.returncode >= 128 or done.returncode < 0:  # a signal: the same comparison goes on with it
            raise UserError(f"{self.folder} was stopped; start the same comparison again")
        if done.returncode:
            lines = Path(output.name).read_text(encoding="utf-8").strip().splitlines()
            with whole_file(self.folder / FAILED) as file:
                file.write(lines[-1] if lines else f"status {done.returncode}")
            log.warning("%s failed: %s", self.folder, one_line(lines[-1] if lines else ""))


@dataclass(frozen=True)
class Comparison:
    """What is compared, and where.

    Attributes:
        words: the recipe and the settings of all runs, as on a command line.
        config: what they say.
        rates: learning rates that every contender tries; `goes_on` tries others beyond while the last one is best.
        seeds: runs of each contender at its best rate; the first is the one that found it.
        strengths: at which the first contender's adapter is tested too.
    """

    words: Sequence[str]
    config: Any
    to: Path
    contenders: Sequence[Contender]
    rates: Sequence[float]
    seeds: int
    goes_on: bool = False
    untrained: bool = False
    strengths: Sequence[float] = ()

    def run(self) -> Iterator[str]:
        """Trains and tests what is missing; other processes may do so at the same time."""
        self._check()
        while pending := [cell for cell in self._cells() if not cell.is_done]:
            for cell in pending:
                cell.folder.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(BlockingIOError), Path(f"{cell.folder}.lock").open("a") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if not cell.is_done:
                        what = "with the test" if cell.is_tested else "for its rate"
                        yield f"{cell.folder}: {what}; {len(pending)} runs to go"
                        cell.start(lock)
                    break
            else:
                time.sleep(WAIT_SECONDS)  # others have them all

    def _check(self) -> None:
        data, evaluation = self.config.data, self.config.evaluation
        if data.held_out is None:
            raise UserError("a rate is chosen on held-out samples: set data.validation, or data.validation_share")
        if any(contender.method == "full" for contender in self.contenders) and not self.config.adapter.targets:
            raise UserError("full trains the layers that adapter.targets names: name them, for all methods alike")
        if self.strengths and "evaluation.strength" in foreign_fields(self.config.task):
            raise UserError("--strengths is for decoders; leave it out")
        if evaluation.tested is None:
            raise UserError("nothing is tested: set the recipe's evaluation file")
        same, file = settings_of(self.config), self.to / SETTINGS
        if file.is_file() and read_json(file) != same:
            raise UserError(f"{self.to} holds runs of other settings; name another folder with --to")
        write_json(file, same)

    def _cells(self) -> list[CellRun]:
        """All runs that can be known by now: those at the chosen rate once the rate is."""
        cells = [self.untrained_run] if self.untrained else []
        for contender in self.contenders:
            sweep = self.sweep(contender)
            cells += sweep.values()
            if all(cell.is_done for cell in sweep.values()):
                cells += self.tested(contender)
        first = self.contenders[0]
        rate_is_known = all(cell.is_done for cell in self.sweep(first).values())
        if self.strengths and rate_is_known and self.tested(first)[0].is_done:
            cells += self.by_strength().values()
        return cells

    def sweep(self, contender: Contender) -> dict[float, CellRun]:
        """The runs that find its rate, all with the recipe's seed, untested."""
        rates = sorted(self.rates)
        while True:
            cells = {rate: self._cell(contender, rate, self._seeds[0], is_tested=False) for rate in rates}
            if not self.goes_on or len(rates) >= MOST_RATES or not all(cell.is_done for cell in cells.values()):
                return cells
            best = min(rates, key=lambda rate: cells[rate].loss)
            if best not in (rates[0], rates[-1]):
                return cells
            rates = sorted([*rates, stepped(best, -1 if best == rates[0] else 1)])

    def best_rate(self, contender: Contender) -> float:
        """The rate of the lowest validation loss."""
        losses = {rate: cell.loss for rate, cell in self.sweep(contender).items()}
        best = min(losses, key=losses.__getitem__)
        if math.isinf(losses[best]):
            raise UserError(f"{contender}: no rate of {', '.join(map('{:g}'.format, self.rates))} gives a loss")
        return best

    def tested(self, contender: Contender) -> list[CellRun]:
        """Its runs at the chosen rate, with the test."""
        rate = self.best_rate(contender)
        return [self._cell(contender, rate, seed, is_tested=True) for seed in self._seeds]

    @cached_property
    def untrained_run(self) -> CellRun:
        """The model as it was: one step at a rate of 0."""
        settings = ("--training.max_steps=1", "--training.learning_rate=0", "--training.eval_strategy=no")
        return self._run(self.to / UNTRAINED, settings, is_tested=True)

    def by_strength(self) -> dict[float, CellRun]:
        """Tests of the first contender's first adapter at each strength, in folders that hold a copy of it."""
        cells: dict[float, CellRun] = {}
        for strength in self.strengths:
            folder, trained = self.to / f"strength_{strength:g}", self.tested(self.contenders[0])[0]
            if not (folder / ADAPTER).is_dir():
                with whole_folder(folder / ADAPTER) as copy:
                    shutil.copytree(trained.folder / ADAPTER, copy, dirs_exist_ok=True)
            kept = [word for word in trained.words if not word.startswith("--training.output_dir")]
            words = (*kept, f"--evaluation.strength={strength:g}", f"--training.output_dir={folder}")
            cells[strength] = CellRun(folder, words, is_tested=True)
        return cells

    @property
    def _seeds(self) -> range:
        first = int(self.config.training.get("seed", 42))
        return range(first, first + self.seeds)

    def _cell(self, contender: Contender, rate: float, seed: int, *, is_tested: bool) -> CellRun:
        name = str(contender).replace(" ", "_")
        settings = [f"--adapter.method={contender.method}"]
        if contender.rank is not None:
            alpha = contender.rank * self.config.adapter.alpha / self.config.adapter.rank
            settings += [f"--adapter.rank={contender.rank}", f"--adapter.alpha={alpha:g}"]
        settings += [f"--training.learning_rate={rate:g}", f"--training.seed={seed}", "--training.eval_strategy=epoch"]
        if contender.method == "full" and self.config.model.dtype != "float32":  # its masters are float32, as adapters
            settings.append("--training.bf16=true")
        # The run that found the rate is tested as it is.
        again = is_tested and seed == self._seeds[0]
        if again:
            settings.append("--test_only=true")
        return self._run(self.to / name / f"rate_{rate:g}_seed_{seed}", settings, is_tested=is_tested, again=again)

    def _run(self, folder: Path, settings: Sequence[str], *, is_tested: bool, again: bool = False) -> CellRun:
        several = "evaluation.files" not in foreign_fields(self.config.task)
        no_test = () if is_tested else ("--evaluation.files={}" if several else "--evaluation.file=null",)
        resumed = () if again else ("--resume=if_stopped",)
        config, *own = self.words
        words = (config.removeprefix("--config="), *own, *settings, *no_test, *resumed)
        return CellRun(folder, (*words, f"--training.output_dir={folder}"), is_tested)


def stepped(rate: float, steps: int) -> float:
    """A rate so many half powers of ten away, in two digits."""
    return float(f"{rate * 10 ** (steps / 2):.2g}")


# The result.


@dataclass(frozen=True)
class Result:
    """What one contender reached; shares in percent, intervals of 95 %.

    Attributes:
        losses: validation loss by rate; None where the run failed.
        score: mean over seeds and items; `spread` is the standard deviation of the seeds' means.
        difference: to the first contender of its rank, of one without to the first method's last, paired over units.
        gain: as `difference`, to the untrained model, where that is tested.
    """

    name: str
    method: str
    rank: int | None
    rate: float | None
    losses: Mapping[float, float | None]
    score: float
    interval: tuple[float, float]
    by_seed: tuple[float, ...]
    spread: float
    items: int
    against: str = ""
    difference: tuple[float, float, float] | None = None
    gain: tuple[float, float, float] | None = None
    metrics: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)


def written(comparison: Comparison) -> Iterator[str]:
    """Scores all of it, writes the files; yields the table."""
    cells = {str(contender): comparison.tested(contender) for contender in comparison.contenders}
    if comparison.untrained:
        cells[UNTRAINED] = [comparison.untrained_run]
    scores = {name: [cell.scores for cell in runs] for name, runs in cells.items()}
    items: dict[str, dict[str, float]] = {}
    for unit, own in (pair for rows in scores.values() for row in rows for pair in row.items()):
        items.setdefault(unit, {}).update(own)
    shares = {name: np.array([_shares(row, items) for row in rows]) for name, rows in scores.items()}
    results = [_result(comparison, contender, shares) for contender in comparison.contenders]
    if comparison.untrained:
        results.append(_scored(UNTRAINED, shares[UNTRAINED]))
    record = {
        "settings": list(comparison.words),
        "rates": list(comparison.rates),
        "seeds": comparison.seeds,
        "results": [asdict(result) for result in results],
        "by_set": _by_set([next(iter(unit)) for unit in items.values()], shares),
    }
    if comparison.strengths:
        rows = []
        for strength, cell in comparison.by_strength().items():
            score, metrics = _scored("", _shares(cell.scores, cell.scores)[None]), cell.metrics
            lost = metrics.get("forgetting", {}).get("perplexity", {})
            rows.append({"strength": strength, "score": score.score, "interval": score.interval, **lost})
        record["by_strength"] = rows
        draw_strengths(rows, comparison.to / "score_by_strength.png")
        yield from (
            f"strength {row['strength']:g}: {row['score']:.2f}, perplexity {row.get('adapted', math.nan):.2f}"
            for row in rows
        )
    write_json(comparison.to / "compare.json", record)
    draw_scores(results, comparison.to / "score_by_rank.png")
    draw_losses(results, comparison.to / "loss_by_rate.png")
    yield from _table(results)
    for name, scores_there in record["by_set"].items():
        yield f"{name}: " + ", ".join(f"{who} {score:.1f}" for who, score in scores_there.items())
    edges = [row.name for row in results if len(row.losses) > 1 and row.rate in (min(row.losses), max(row.losses))]
    if edges:
        yield f"the best rate is the smallest or the largest of all tried for {', '.join(edges)}: try others (--rates)"
    yield f"{comparison.to}: compare.json, score_by_rank.png, loss_by_rate.png"


Shares = NDArray[np.float64]
"""`[seeds, units, items of a unit]`, NaN where a unit has fewer."""


def _shares(row: Mapping[str, Mapping[str, float]], items: Mapping[str, Mapping[str, float]]) -> Shares:
    rows = [[row.get(unit, {}).get(name, 0.0) for name in names] for unit, names in items.items()]
    return np.array([*zip_longest(*rows, fillvalue=math.nan)]).T


def _scored(name: str, shares: Shares, **more: Any) -> Result:
    means = PERCENT * np.nanmean(shares, (1, 2))
    defaults: dict[str, Any] = {"method": name, "rank": None, "rate": None, "losses": {}}
    return Result(
        name=name,
        score=float(means.mean()),
        interval=_interval(shares),
        by_seed=tuple(means.tolist()),
        spread=float(means.std(ddof=1)) if len(means) > 1 else 0.0,
        items=int(np.isfinite(shares[0]).sum()),
        **{**defaults, **more},
    )


def _interval(shares: Shares, others: Shares | None = None) -> tuple[float, float]:
    """Of the mean in percent, or of that less the others'. Units are drawn again, for both alike, and seeds of each."""
    chance = np.random.default_rng(0)

    def drawn(rows: Shares, units: NDArray[np.int64]) -> float:
        return float(np.nanmean(rows[chance.integers(0, len(rows), len(rows))][:, units]))

    draws: list[float] = []
    for _ in range(RESAMPLES):
        units = chance.integers(0, shares.shape[1], shares.shape[1])
        draws.append(drawn(shares, units) - (0.0 if others is None else drawn(others, units)))
    low, high = np.percentile(draws, PERCENTILES) * PERCENT
    return float(low), float(high)


def _result(comparison: Comparison, contender: Contender, shares: Mapping[str, Shares]) -> Result:
    own, cells = shares[str(contender)], comparison.tested(contender)
    losses = {rate: cell.loss for rate, cell in comparison.sweep(contender).items()}
    others = [other for other in comparison.contenders if other.rank == contender.rank]
    if contender.rank is None:  # beside the most that the first method was given
        others = [other for other in comparison.contenders if other.method == comparison.contenders[0].method][-1:]
    against = others[0]
    difference = None if against == contender else _difference(own, shares[str(against)])
    return _scored(
        str(contender),
        own,
        method=contender.method,
        rank=contender.rank,
        rate=comparison.best_rate(contender),
        losses={rate: loss if math.isfinite(loss) else None for rate, loss in losses.items()},
        against="" if difference is None else str(against),
        difference=difference,
        gain=_difference(own, shares[UNTRAINED]) if UNTRAINED in shares else None,
        metrics=tuple(cell.metrics for cell in cells),
    )


def _difference(shares: Shares, others: Shares) -> tuple[float, float, float]:
    """In percent, and its interval."""
    return float(PERCENT * (np.nanmean(shares) - np.nanmean(others))), *_interval(shares, others)


def _by_set(ids: Sequence[str], shares: Mapping[str, Shares]) -> dict[str, dict[str, float]]:
    """Set -> contender -> its score there, where the test has several sets."""
    sets = np.array([item.partition("/")[0] if "/" in item else "" for item in ids])
    names = [name for name in dict.fromkeys(sets.tolist()) if name]
    return {
        name: {who: float(PERCENT * np.nanmean(rows[:, sets == name])) for who, rows in shares.items()}
        for name in names
    }


def _table(results: Sequence[Result]) -> list[str]:
    within = "95 % interval"
    rows: list[tuple[str, ...]] = [
        ("", "rate", "score", within, "seeds +-", "difference", within, "to untrained", within)
    ]

    def cells(difference: tuple[float, float, float] | None, against: str = "") -> tuple[str, str]:
        if difference is None:
            return "", ""
        return f"{difference[0]:+.2f}{against}", "{:+.2f} to {:+.2f}".format(*difference[1:])

    for result in results:
        rate, interval = "" if result.rate is None else f"{result.rate:g}", "{:.2f} to {:.2f}".format(*result.interval)
        own = (result.name, rate, f"{result.score:.2f}", interval, f"{result.spread:.2f}")
        rows.append((*own, *cells(result.difference, f" to {result.against}"), *cells(result.gain)))
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    return aligned([*zip(*columns, strict=True)], left=len(columns))


def _chart(across: str, up: str) -> tuple[Any, Any]:
    figure = new_figure(7, 4.2)
    axes = figure.add_subplot()
    plain_axes(axes, across, up)
    return figure, axes


def _points(axes: Any, across: Sequence[float], rows: Sequence[tuple[float, Sequence[float]]], **look: Any) -> None:
    scores = np.array([score for score, _ in rows])
    limits = np.abs(np.array([interval for _, interval in rows]).T - scores)
    axes.errorbar(across, scores, yerr=limits, marker="o", capsize=3, **look)


def draw_scores(results: Sequence[Result], to: Path) -> None:
    """Score against rank, a line for each method with its intervals; what has no rank is a level line."""
    figure, axes = _chart("rank", SCORE)
    axes.set_xscale("log", base=2)
    if every := sorted({row.rank for row in results if row.rank}):
        axes.set_xticks(every)
        axes.set_xlim(every[0] / 1.5, every[-1] * 1.5)  # a single rank has no width of its own
    axes.xaxis.set_major_formatter("{x:g}")
    methods = list(dict.fromkeys(result.method for result in results))
    for number, method in enumerate(methods):
        colour, rows = COLOURS[number % len(COLOURS)], [result for result in results if result.method == method]
        if rows[0].rank is None:
            axes.axhline(rows[0].score, color=colour, linestyle="--", label=method)
            continue
        ranks = [(row.rank or 0) * 1.04 ** (number - 1) for row in rows]  # intervals beside each other
        _points(axes, ranks, [(row.score, row.interval) for row in rows], color=colour, label=method)
    axes.legend(frameon=False)
    save_png(figure, to)


def draw_strengths(rows: Sequence[Mapping[str, Any]], to: Path) -> None:
    """Score and perplexity of other text against the adapter's strength."""
    figure, axes = _chart("strength of the adapter", SCORE)
    strengths = [row["strength"] for row in rows]
    _points(axes, strengths, [(row["score"], row["interval"]) for row in rows], color=COLOURS[0], label="score")
    other, perplexities = axes.twinx(), [row.get("adapted", math.nan) for row in rows]
    other.plot(strengths, perplexities, color=COLOURS[1], marker="s", label="perplexity")
    other.set_ylabel("perplexity of other text")
    figure.legend(frameon=False, loc="upper center", ncols=2)
    save_png(figure, to)


def draw_losses(results: Sequence[Result], to: Path) -> None:
    """Validation loss against the learning rate, a line for each contender."""
    figure, axes = _chart("learning rate", "validation loss")
    axes.set_xscale("log")
    methods = list(dict.fromkeys(result.method for result in results))
    for result in results:
        if pairs := [(rate, loss) for rate, loss in result.losses.items() if loss is not None]:
            colour = COLOURS[methods.index(result.method) % len(COLOURS)]
            axes.plot(*zip(*pairs, strict=True), color=colour, marker="o", alpha=0.8, label=result.name)
    axes.legend(frameon=False, fontsize=8)
    save_png(figure, to)
