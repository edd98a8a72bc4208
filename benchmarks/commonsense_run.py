"""DoRA, LoRA and full fine-tuning of SmolLM2-135M on three commonsense sets, three seeds each, with intervals.

    python benchmarks/commonsense_run.py --data data/commonsense --json benchmarks/results/commonsense_run.json

Everybody trains on the same number of questions of OpenBookQA, ARC-Easy and ARC-Challenge (LLM-Adapters' files, which
`--data` holds), in the same order for the same seed, and is asked the same test questions by generation and by
likelihood; `untrained` is the model before any step. Learning rates are one for each method, not tuned on anything.
Each run is a process of its own and stays in `--runs`: stop at any time, start the same command again, and what is
finished is not repeated. Any further `--section.key value` changes every run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import table, write_json

from dora_vl.errors import UserError, exit_on_user_error, positive
from dora_vl.evaluation.predictions import BY_SCORING, read_predictions
from dora_vl.evaluation.questions import Question
from dora_vl.evaluation.scores.commonsense import extracted
from dora_vl.evaluation.scores.scored import Mean, Ratio, Scored, Tally, intervals, paired_differences
from dora_vl.evaluation.test import read_sets
from dora_vl.training.command_line import read_settings
from dora_vl.training.recipe import CommonsenseRunConfig

CONFIG = "configs/commonsense/smollm2_135m_dora.yaml"
SETS = ("openbookqa", "ARC-Easy", "ARC-Challenge")
WAYS = ("likelihood", "generation")
METHODS: Mapping[str, Mapping[str, str]] = {
    "untrained": {"adapter.method": "lora", "training.learning_rate": "0", "training.max_steps": "1"},  # B stays 0
    "dora": {"adapter.method": "dora", "training.learning_rate": "1e-3"},
    "lora": {"adapter.method": "lora", "training.learning_rate": "1e-3"},
    "full": {
        "adapter.method": "full",
        "adapter.targets": '["model.*"]',
        "training.bf16": "true",
        "training.learning_rate": "1e-4",
    },
}
"""What differs between the contenders; everything else is the same."""
FINISHED = "finished.json"


@exit_on_user_error
def main() -> None:
    """Runs what is not finished, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=CONFIG, help="the run that all share")
    parser.add_argument("--data", type=Path, required=True, help="LLM-Adapters' dataset folder")
    parser.add_argument("--runs", type=Path, default=Path("runs/commonsense_benchmark"), help="where runs stay")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=tuple(METHODS))
    parser.add_argument("--test-limit", type=positive, default=400, help="questions of each test set")
    parser.add_argument("--json", default=None, help="file for the figures")
    options, settings = parser.parse_known_args()
    runs = [
        Run(
            method=method,
            seed=seed,
            folder=options.runs / f"{method}_seed{seed}",
            arguments=(*shared(options.config, options.data, options.test_limit), *settings),
        )
        for seed in range(options.seeds)
        for method in options.methods
        if method != "untrained" or seed == 0
    ]
    for number, one in enumerate(runs, start=1):
        print(f"{number}/{len(runs)} {one.method} seed {one.seed}: {one.finish()}", flush=True)
    figures = summarise(runs)
    print_tables(figures)
    if options.json is not None:
        write_json(options.json, {"config": options.config, "settings": settings, **figures})


def shared(config: str, data: Path, test_limit: int) -> Iterator[str]:
    """The arguments that all runs share."""
    if missing := [file for one in SETS for file in files_of(data, one) if not file.is_file()]:
        raise UserError(f"{missing[0]}: no such file; --data is LLM-Adapters' dataset folder")
    train, test = zip(*(files_of(data, one) for one in SETS), strict=True)
    yield f"--config={config}"
    yield f"--data.train={json.dumps([str(file) for file in train])}"
    yield f"--evaluation.files={json.dumps({one: str(file) for one, file in zip(SETS, test, strict=True)})}"
    yield f"--evaluation.limit={test_limit}"


def files_of(data: Path, name: str) -> tuple[Path, Path]:
    """A set's training and test file."""
    return data / name / "train.json", data / name / "test.json"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One contender with one seed, in a folder of its own."""

    method: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        """The shipped task, started as a person starts it."""
        own = {**METHODS[self.method], "training.seed": str(self.seed), "training.output_dir": str(self.folder)}
        flags = [f"--{key}={value}" for key, value in own.items()]
        return ["tasks/commonsense.py", *self.arguments, *flags, "--overwrite=true"]

    @property
    def config(self) -> CommonsenseRunConfig:
        """The settings of this run."""
        return read_settings(self.command[1:], CommonsenseRunConfig)

    def finish(self) -> str:
        """Runs it unless it is finished with the same settings; says how long training took."""
        mark = self.folder / FINISHED
        if not mark.is_file() or json.loads(mark.read_text(encoding="utf-8")) != self.command:
            mark.unlink(missing_ok=True)
            done = subprocess.run([sys.executable, *self.command], stderr=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                raise UserError(f"{self.method} seed {self.seed} ended with {done.returncode}: {done.stderr[-800:]}")
            mark.write_text(json.dumps(self.command), encoding="utf-8")
        metrics = self.metrics()
        accuracies = ", ".join(f"{way} {metrics[way]['accuracy']['average']:.2f} %" for way in WAYS)
        return f"{accuracies}; trained in {metrics['train_seconds']:.0f} s"

    def metrics(self) -> dict[str, Any]:
        """What the run measured."""
        found: dict[str, Any] = json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))
        return found

    def right(self, way: str, asked: Sequence[Question]) -> dict[str, float]:
        """1 or 0 for each question."""
        predictions = read_predictions(self.folder / BY_SCORING[way])
        rule = self.config.evaluation.rule
        return {
            one.id: float(
                one.id in predictions and extracted(predictions[one.id].prediction, str(one.kind), rule) == one.answer
            )
            for one in asked
        }


def over_seeds(runs: Sequence[Run], way: str, asked: Sequence[Question]) -> Scored:
    """A method's score: of each question the share of seeds that got it right, so that questions are what is drawn."""
    rights = [one.right(way, asked) for one in runs]
    tally = Tally()
    for one in asked:
        name, kind = one.id, str(one.kind)
        share = sum(right[name] for right in rights) / len(rights)
        tally.add(name, share, {f"right {kind}": share, f"asked {kind}": 1.0})
    sets = {name: Ratio(f"right {name}", f"asked {name}") for name in SETS}
    return tally.scored({"average": Mean(tuple(sets.values())), **sets})


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """Accuracies over the seeds, and DoRA's differences from the others, with 95 % intervals over questions."""
    asked, _ = read_sets(runs[0].config.evaluation)
    methods = list(dict.fromkeys(one.method for one in runs))
    figures: dict[str, Any] = {
        "test_questions": len(asked),
        "train_questions": {one.method: one.metrics()["train_samples"] for one in runs},
        "learning_rates": {method: METHODS[method]["training.learning_rate"] for method in methods},
        "train_seconds": {method: _each(runs, method, "train_seconds") for method in methods},
    }
    for way in WAYS:
        scored = {method: over_seeds([one for one in runs if one.method == method], way, asked) for method in methods}
        figures[way] = {
            "accuracy": {method: one.metrics for method, one in scored.items()},
            "interval_95": {method: intervals(one) for method, one in scored.items()},
            "average_by_seed": {
                method: [one.metrics()[way]["accuracy"]["average"] for one in runs if one.method == method]
                for method in methods
            },
            "dora_minus": {
                method: {name: vars(one) for name, one in paired_differences(scored["dora"], scored[method]).items()}
                for method in methods
                if "dora" in scored and method != "dora"
            },
        }
    return figures


def _each(runs: Sequence[Run], method: str, name: str) -> list[float]:
    return [float(one.metrics()[name]) for one in runs if one.method == method]


def print_tables(figures: Mapping[str, Any]) -> None:
    """One table for each way of asking; intervals in brackets."""
    for way in WAYS:
        found = figures[way]
        rows = [
            (method, *(_with_interval(value, found["interval_95"][method][name]) for name, value in one.items()))
            for method, one in found["accuracy"].items()
        ]
        print(f"\nby {way}, accuracy in percent [95 % interval]\n{table(('method', 'average', *SETS), rows)}")


def _with_interval(value: float, interval: Sequence[float]) -> str:
    return f"{value:.1f} [{interval[0]:.1f}, {interval[1]:.1f}]"


if __name__ == "__main__":
    main()
