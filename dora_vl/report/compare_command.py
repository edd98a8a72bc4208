"""`dora-vl compare`: methods and ranks of one recipe against each other, each at the rate that suits it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from dora_vl.errors import UserError, positive_int

DESCRIPTION = """\
Trains one recipe by several methods and ranks at equal budgets, and says how they differ. The learning rate of each
method and rank is chosen by the validation loss of the checkpoint that is tested: of three around the recipe's, or of
more beyond them while the last one is best (seven at most). Only then the test is asked, once for each seed.

  dora-vl compare commonsense/smollm2_135m_cloze --methods dora,lora,full --ranks 1,4,16 --to runs/compared
  dora-vl compare runs/my/run.yaml --methods dora,lora --ranks 8 --rates 1e-4,3e-4,1e-3 --seeds 5 --to runs/compared

A score is the test's own metric; several sets are averaged where they have the same one. Differences of methods, of
neighbouring ranks and to the untrained model are paired over the test's items; 95 % intervals are over items and seeds
together, from three seeds on, and a star marks a difference that holds with all of the table's taken together.

The recipe needs data.validation (or data.validation_share) and a test. A recipe's `alpha / rank` is kept for every
rank. Started again, also by several processes or on several machines at a time, it resumes: each run is a folder of its
own in --to. A run whose training diverged has no result for good; one that ended for another reason is run again.
Writes compare.json, score_by_rank.png and loss_by_rate.png there.
"""
TAKES_SETTINGS = True
METHODS = ("dora", "lora", "magnitude", "dvora", "full")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options; a run's own settings may come between them, for all runs."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file with the run's settings, or a recipe's name")
    parser.add_argument("--methods", default="dora,lora", help=f"of {', '.join(METHODS)} (default: dora,lora)")
    parser.add_argument("--ranks", default="", help="with commas (default: the recipe's)")
    parser.add_argument("--rates", default="sweep", help="learning rates, or sweep: from the recipe's (default)")
    parser.add_argument("--seeds", type=positive_int, default=3, help="runs at the chosen rate (default: 3)")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="of all runs and of the result")
    parser.add_argument("--strengths", default="", help="tests the first contender's adapter at these strengths too")
    parser.add_argument("--untrained", action="store_true", help="asks the model before training too")


def run(options: argparse.Namespace) -> Iterator[str]:
    """Runs what is missing, then yields the table."""
    from dora_vl.report.compare import Comparison, Contender, stepped, write_report
    from dora_vl.run.settings_parser import read_run

    words = [f"--config={options.config}", *options.settings]
    config = read_run(words, program="dora-vl compare")
    methods = [*dict.fromkeys(method.strip() for method in options.methods.split(","))]
    if strange := [method for method in methods if method not in METHODS]:
        raise UserError(f"--methods {strange[0]}: there are {', '.join(METHODS)}")
    ranks = [int(rank) for rank in _numbers(options.ranks, int, "--ranks")] or [config.adapter.rank]
    rate = float(config.training.get("learning_rate", 0.0))
    if options.rates == "sweep" and not rate:
        raise UserError("--rates sweep goes around training.learning_rate, which the recipe does not set; name rates")
    sweep = options.rates == "sweep"
    rates = [stepped(rate, steps) for steps in (-1, 0, 1)] if sweep else _numbers(options.rates, float, "--rates")
    if not rates:
        raise UserError("--rates is empty; write learning rates with commas between, or sweep")
    contenders = [
        Contender(method, rank)
        for method in methods
        for rank in (ranks if method not in ("magnitude", "full") else [None])
    ]
    strengths = [0.0, *_numbers(options.strengths, float, "--strengths")] if options.strengths else []
    comparison = Comparison(
        words, config, options.to, contenders, rates, options.seeds, sweep, options.untrained, strengths
    )
    yield from comparison.run()
    yield from write_report(comparison)


def _numbers(text: str, kind: type[int] | type[float], option: str) -> list[float]:
    try:
        numbers: list[float] = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = [0]
    if any(number <= 0 for number in numbers):
        raise UserError(f"{option} {text}: write numbers above 0 with commas between")
    return [*dict.fromkeys(numbers)]
