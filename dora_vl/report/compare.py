"""`dora-vl compare`: the runs of a comparison, each in a folder of its own, and what they say together."""

from __future__ import annotations

import argparse
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
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np

from dora_vl.errors import Diverged, UserError, align_columns, one_line
from dora_vl.evaluation.plots import new_figure, plain_axes, save_png
from dora_vl.evaluation.scores.scored import Scored
from dora_vl.evaluation.test_sets import read_scores
from dora_vl.files import read_json, whole_file, whole_folder, write_json
from dora_vl.report.contrasts import LEAST_SEEDS, UNTRAINED, Contenders, Estimate, Measure
from dora_vl.run.folder import ADAPTER, LOSS_LOG, METRICS, SETTINGS, is_tested, read_log
from dora_vl.run.settings import foreign_fields, settings_of
from dora_vl.run.settings_parser import read_run

log = logging.getLogger(__name__)

FAILED = "failed.txt"
"""The file says why a run has no result for good: its training diverged, perhaps at too high a rate."""
WAIT_SECONDS = 10.0
MOST_RATES = 7  # that a sweep tries
COLOURS = ("#2f6fde", "#d9580b", "#1f9d6b", "#a23bb8", "#b8860b", "#6b7280")
NOTHING_LEARNED = (
    *("--training.max_steps=1", "--training.learning_rate=0"),
    # Parts with rates of their own too: the first step of a warm-up is at 0.
    *("--training.lr_scheduler_type=constant_with_warmup", "--training.warmup_steps=1"),
    *("--training.eval_strategy=no", "--training.load_best_model_at_end=false", "--optim.early_stopping=null"),
)


@dataclass(frozen=True)
class Contender:
    """A method with its rank, where it has one."""

    method: str
    rank: int | None = None

    def __str__(self) -> str:
        return self.method if self.rank is None else f"{self.method} r{self.rank}"


@dataclass(frozen=True)
class CellRun:
    """One training run; with `takes_best` it keeps the checkpoint of its lowest validation loss, not the last."""

    folder: Path
    words: tuple[str, ...]
    is_tested: bool
    takes_best: bool = False

    @property
    def is_done(self) -> bool:
        """True once its result is there, or the reason why there is none."""
        is_there = is_tested(self.folder) if self.is_tested else (self.folder / METRICS).is_file()
        return is_there or (self.folder / FAILED).is_file()

    @property
    def loss(self) -> float:
        """The validation loss of the checkpoint that is tested; infinite where the training diverged."""
        lines = [line["eval_loss"] for line in read_log(self.folder / LOSS_LOG) if "eval_loss" in line]
        losses = [float(loss) if isinstance(loss, int | float) else math.inf for loss in lines]
        if not losses or (self.folder / FAILED).is_file():
            return math.inf
        return min(losses) if self.takes_best else losses[-1]

    @property
    def metrics(self) -> dict[str, Any]:
        """Reads what `metrics.json` holds."""
        return read_json(self.folder / METRICS)

    @property
    def scores(self) -> dict[str, Scored]:
        """The score of each set of its test."""
        if (self.folder / FAILED).is_file():
            raise UserError(f"{self.folder}: {one_line((self.folder / FAILED).read_text(encoding='utf-8'))}")
        return read_scores(self.folder)

    def start(self, lock: IO[str]) -> None:
        """Runs it, or goes on with it, in a process of its own; what it says goes to a file beside its folder.

        The process holds the lock too: if this one is killed, the next comparison waits for it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder.parent / f"{self.folder.name}.log").open("a", encoding="utf-8") as output:
            command = [sys.executable, "-m", "dora_vl.cli", "train", *self.words]
            done = subprocess.run(command, stdout=output, stderr=output, check=False, pass_fds=[lock.fileno()])
        if not done.returncode:
            return
        lines = Path(output.name).read_text(encoding="utf-8").strip().splitlines()
        reason = one_line(lines[-1] if lines else f"it ended with status {done.returncode}")
        if done.returncode != Diverged.status:  # a passing reason, such as a full disk, is not a result
            raise UserError(f"{self.folder} did not end: {reason}; the same comparison, started again, resumes it")
        with whole_file(self.folder / FAILED) as file:
            file.write(reason)
        log.warning("%s failed: %s", self.folder, reason)


@dataclass(frozen=True)
class Comparison:
    """Says what is compared, and where.

    Attributes:
        words: the recipe and the settings of all runs, as on a command line; `config` is what they say.
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
        """Returns all runs that are known by now: those at the chosen rate once it is chosen."""
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
        """Returns the runs that find its rate, all with the recipe's seed, untested."""
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
        """Returns the rate of the lowest validation loss."""
        losses = {rate: cell.loss for rate, cell in self.sweep(contender).items()}
        best = min(losses, key=losses.__getitem__)
        if math.isinf(losses[best]):
            raise UserError(f"{contender}: no rate of {', '.join(map('{:g}'.format, self.rates))} gives a loss")
        return best

    def tested(self, contender: Contender) -> list[CellRun]:
        """Returns its runs at the chosen rate, with the test."""
        rate = self.best_rate(contender)
        return [self._cell(contender, rate, seed, is_tested=True) for seed in self._seeds]

    @cached_property
    def untrained_run(self) -> CellRun:
        """Returns the run of the model as it was: one step at a rate of 0, without a validation and what needs one."""
        return self._run(self.to / UNTRAINED, NOTHING_LEARNED, is_tested=True)

    def by_strength(self) -> dict[float, CellRun]:
        """Returns tests of the first contender's first adapter at each strength, in folders that hold a copy of it."""
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
        settings += [f"--training.learning_rate={rate:g}", f"--training.seed={seed}"]
        if self.config.training.get("eval_strategy", "no") == "no":
            settings.append("--training.eval_strategy=epoch")
        if contender.method == "full" and self.config.model.dtype != "float32":  # float32 masters, as adapters have
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
        stops_early = self.config.optim.early_stopping is not None
        best = bool(self.config.training.get("load_best_model_at_end", stops_early))
        return CellRun(folder, (*words, f"--training.output_dir={folder}"), is_tested, takes_best=best)


def stepped(rate: float, steps: int) -> float:
    """Returns a rate `steps` half powers of ten away, in two digits."""
    return float(f"{rate * 10 ** (steps / 2):.2g}")


@dataclass(frozen=True, kw_only=True)
class Result:
    """Holds what one contender reached.

    Attributes:
        losses: validation loss by rate; None where the training diverged.
        scores, by_seed: by measure, the mean over seeds with its interval, and each seed's value.
        runs: the folder of each seed's run, below that of the comparison.
    """

    name: str
    method: str
    rank: int | None = None
    rate: float | None = None
    losses: Mapping[float, float | None] = field(default_factory=dict)
    scores: Mapping[str, Estimate]
    by_seed: Mapping[str, Sequence[float]]
    runs: Sequence[str]
    metrics: Sequence[Mapping[str, Any]] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Says how two contenders differ in a measure, paired over the test's units."""

    measure: str
    name: str
    against: str
    difference: Estimate


def pairs_of(contenders: Sequence[Contender], *, untrained: bool) -> list[tuple[str, str]]:
    """Pairs the contenders that are set against each other.

    Methods of one rank against the first of them; one without rank against the greatest rank of the first method that
    has any, else against the first; each rank of a method against the one before; each against the untrained model.
    """
    pairs: list[tuple[str, str]] = []
    first = next((contender for contender in contenders if contender.rank is not None), contenders[0])
    greatest = max((other for other in contenders if other.method == first.method), key=lambda other: other.rank or 0)
    for contender in contenders:
        same_rank = [other for other in contenders if other.rank == contender.rank]
        against = greatest if contender.rank is None else same_rank[0]
        if against != contender:
            pairs.append((str(contender), str(against)))
    for method in dict.fromkeys(contender.method for contender in contenders):
        ranks = [contender for contender in contenders if contender.method == method]
        pairs += [(str(higher), str(lower)) for lower, higher in pairwise(ranks)]
    return pairs + [(str(contender), UNTRAINED) for contender in contenders if untrained]


def write_report(comparison: Comparison) -> Iterator[str]:
    """Computes everything from the runs' scores, writes the files, and yields the tables."""
    cells = {str(contender): comparison.tested(contender) for contender in comparison.contenders}
    if comparison.untrained:
        cells[UNTRAINED] = [comparison.untrained_run]
    runs = Contenders({name: [cell.scores for cell in several] for name, several in cells.items()})
    pairs = pairs_of(comparison.contenders, untrained=comparison.untrained)
    contrasts = [
        Contrast(
            measure=measure.name,
            name=name,
            against=other,
            difference=runs.difference(measure, name, other, contrasts=len(pairs) * len(runs.measures)),
        )
        for measure in runs.measures
        for name, other in pairs
    ]
    results = [_result(comparison, runs, cells, name) for name in cells]
    record: dict[str, Any] = {
        "settings": list(comparison.words),
        "rates": list(comparison.rates),
        "seeds": comparison.seeds,
        "measures": [asdict(measure) for measure in runs.measures],
        "results": [asdict(result) for result in results],
        "contrasts": [asdict(contrast) for contrast in contrasts],
    }
    if comparison.strengths:
        record["by_strength"] = _by_strength(comparison, runs.measures[0])
        draw_strengths(record["by_strength"], runs.measures[0], comparison.to / "score_by_strength.png")
        yield from (
            f"strength {row['strength']:g}: {row['value']:.2f}, perplexity {row.get('adapted', math.nan):.2f}"
            for row in record["by_strength"]
        )
    write_json(comparison.to / "compare.json", record)
    draw_scores(results, runs.measures[0], comparison.to / "score_by_rank.png")
    draw_losses(results, comparison.to / "loss_by_rate.png")
    for measure in runs.measures:
        yield from tables(measure, results, contrasts)
    yield from remarks(results, contrasts, comparison.seeds)
    yield f"{comparison.to}: compare.json, score_by_rank.png, loss_by_rate.png"


def _result(comparison: Comparison, runs: Contenders, cells: Mapping[str, Sequence[CellRun]], name: str) -> Result:
    tested: dict[str, Any] = {
        "name": name,
        "scores": {measure.name: runs.score(measure, name) for measure in runs.measures},
        "by_seed": {measure.name: runs.by_seed(measure, name) for measure in runs.measures},
        "runs": [str(cell.folder.relative_to(comparison.to)) for cell in cells[name]],
        "metrics": [cell.metrics for cell in cells[name]],
    }
    contender = next((contender for contender in comparison.contenders if str(contender) == name), None)
    if contender is None:
        return Result(method=name, **tested)
    losses = {rate: cell.loss for rate, cell in comparison.sweep(contender).items()}
    return Result(
        method=contender.method,
        rank=contender.rank,
        rate=comparison.best_rate(contender),
        losses={rate: loss if math.isfinite(loss) else None for rate, loss in losses.items()},
        **tested,
    )


def _by_strength(comparison: Comparison, measure: Measure) -> list[dict[str, Any]]:
    """Returns the score, and the perplexity of other text, at each strength of the first contender's adapter."""
    rows = []
    for strength, cell in comparison.by_strength().items():
        lost = cell.metrics.get("forgetting", {}).get("perplexity", {})
        score = Contenders({"": [cell.scores]}).score(measure, "", over_seeds=False)
        rows.append({"strength": strength, **asdict(score), **lost})
    return rows


def tables(measure: Measure, results: Sequence[Result], contrasts: Sequence[Contrast]) -> Iterator[str]:
    """Yields a measure's two tables: the contenders, and how they differ."""
    yield ""
    yield f"{measure.name}: {measure.metric}" + (f", the mean of {len(measure.sets)} sets" if measure.sets[1:] else "")
    rows = [("", "rate", "score", "95 % interval", "seeds +-")]
    for result in results:
        score, by_seed = result.scores[measure.name], result.by_seed[measure.name]
        spread = f"{np.std(by_seed, ddof=1):.2f}" if len(by_seed) > 1 else ""
        rate = "" if result.rate is None else f"{result.rate:g}"
        rows.append((result.name, rate, f"{score.value:.2f}", score.interval(".2f"), spread))
    yield from align_columns(rows, left=len(rows[0]))
    rows = [("", "less", "difference", "95 % interval", "")]
    for contrast in contrasts:
        if contrast.measure == measure.name:
            apart = contrast.difference
            low, high = apart.simultaneous or (0.0, 0.0)
            mark = "*" if low > 0 or high < 0 else ""
            rows.append((contrast.name, contrast.against, f"{apart.value:+.2f}", apart.interval("+.2f"), mark))
    if len(rows) > 1:
        yield ""
        yield from align_columns(rows, left=len(rows[0]))


def remarks(results: Sequence[Result], contrasts: Sequence[Contrast], seeds: int) -> Iterator[str]:
    """Yields what the numbers do not say: multiplicity, too few seeds, a best rate at the edge."""
    if len(contrasts) > 1:
        yield (
            f"{len(contrasts)} contrasts: of as many that are truly 0, {0.05 * len(contrasts):.1f} intervals leave 0 "
            "out by chance; * leaves it out with all of them taken together (Bonferroni)"
        )
    if seeds < LEAST_SEEDS:
        yield f"no intervals: {seeds} seeds do not tell how seeds differ; {LEAST_SEEDS} do (--seeds {LEAST_SEEDS})"
    edges = [row.name for row in results if len(row.losses) > 1 and row.rate in (min(row.losses), max(row.losses))]
    if edges:
        yield f"the best rate is the smallest or the largest of all tried for {', '.join(edges)}: try others (--rates)"


def _chart(across: str, up: str) -> tuple[Any, Any]:
    figure = new_figure(7, 4.2)
    axes = figure.add_subplot()
    plain_axes(axes, across, up)
    return figure, axes


def _points(axes: Any, across: Sequence[float], estimates: Sequence[Mapping[str, Any]], **look: Any) -> None:
    scores, *limits = np.array([[row["value"], row["low"], row["high"]] for row in estimates], dtype=float).T
    limits = np.where(np.isnan(limits), scores, limits)
    axes.errorbar(across, scores, yerr=np.abs(limits - scores), marker="o", capsize=3, **look)


def draw_scores(results: Sequence[Result], measure: Measure, to: Path) -> None:
    """Draws score against rank, a line for each method with its intervals; without a rank it is level."""
    figure, axes = _chart("rank", f"{measure.name}: {measure.metric}, 95 % interval")
    axes.set_xscale("log", base=2)
    if every := sorted({row.rank for row in results if row.rank}):
        axes.set_xticks(every)
        axes.set_xlim(every[0] / 1.5, every[-1] * 1.5)  # a single rank has no width of its own
    axes.xaxis.set_major_formatter("{x:g}")
    methods = list(dict.fromkeys(result.method for result in results))
    for number, method in enumerate(methods):
        colour, rows = COLOURS[number % len(COLOURS)], [result for result in results if result.method == method]
        if rows[0].rank is None:
            axes.axhline(rows[0].scores[measure.name].value, color=colour, linestyle="--", label=method)
            continue
        ranks = [(row.rank or 0) * 1.04 ** (number - 1) for row in rows]  # intervals beside each other
        _points(axes, ranks, [vars(row.scores[measure.name]) for row in rows], color=colour, label=method)
    axes.legend(frameon=False)
    save_png(figure, to)


def draw_strengths(rows: Sequence[Mapping[str, Any]], measure: Measure, to: Path) -> None:
    """Draws score and perplexity of other text against the adapter's strength."""
    figure, axes = _chart("strength of the adapter", f"{measure.name}: {measure.metric}, 95 % interval")
    strengths = [row["strength"] for row in rows]
    _points(axes, strengths, rows, color=COLOURS[0], label="score")
    other, perplexities = axes.twinx(), [row.get("adapted", math.nan) for row in rows]
    other.plot(strengths, perplexities, color=COLOURS[1], marker="s", label="perplexity")
    other.set_ylabel("perplexity of other text")
    figure.legend(frameon=False, loc="upper center", ncols=2)
    save_png(figure, to)


def draw_losses(results: Sequence[Result], to: Path) -> None:
    """Draws validation loss against the learning rate, a line for each contender."""
    figure, axes = _chart("learning rate", "validation loss")
    axes.set_xscale("log")
    methods = list(dict.fromkeys(result.method for result in results))
    for result in results:
        if pairs := [(rate, loss) for rate, loss in result.losses.items() if loss is not None]:
            colour = COLOURS[methods.index(result.method) % len(COLOURS)]
            axes.plot(*zip(*pairs, strict=True), color=colour, marker="o", alpha=0.8, label=result.name)
    axes.legend(frameon=False, fontsize=8)
    save_png(figure, to)


def compare(options: argparse.Namespace) -> Iterator[str]:
    """Runs what is missing, then yields the table."""
    words = [f"--config={options.config}", *options.settings]
    config = read_run(words, program="dora-vl compare")
    rates = options.rates
    if sweep := rates is None:
        rate = float(config.training.get("learning_rate", 0.0))
        if not rate:
            raise UserError("--rates sweep goes around training.learning_rate, which is not set; name rates")
        rates = [stepped(rate, steps) for steps in (-1, 0, 1)]
    ranks = options.ranks or [config.adapter.rank]
    contenders = [
        Contender(method, rank)
        for method in options.methods
        for rank in (ranks if method not in ("magnitude", "full") else [None])
    ]
    strengths = [0.0, *options.strengths] if options.strengths else []
    comparison = Comparison(
        words, config, options.to, contenders, rates, options.seeds, sweep, options.untrained, strengths
    )
    yield from comparison.run()
    yield from write_report(comparison)
