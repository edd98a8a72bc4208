"""Writes the tables of docs/comparisons.md from finished comparisons, and keeps what they can be computed again from.

    python -m benchmarks.tables --keep runs/halves/compared --name easy_vqa   # into benchmarks/results/easy_vqa
    python -m benchmarks.tables                                               # writes both pages' tables

A comparison is kept as its `compare.json` and `scores.jsonl.xz`, the lines of every tested run's `scores.jsonl`. Its
table is between the marks `<!-- results: NAME -->` and `<!-- end -->`. Values and intervals are computed again from
the kept scores; a `compare.json` that says something else ends the command. The table `cluster` of docs/starting.md is
made of estimates of `dora-vl estimate`; no weight is read.
"""

from __future__ import annotations

import argparse
import json
import lzma
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.report import table
from dora_vl.errors import UserError, exit_on_user_error
from dora_vl.evaluation.baselines import COMMONEST
from dora_vl.evaluation.results import SCORES, results_of, score_lines
from dora_vl.files import SETS, read_json, write_json
from dora_vl.report.compare import UNTRAINED
from dora_vl.report.contrasts import Contenders, SetScores
from dora_vl.run.settings_parser import read_run
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.estimate import Cluster, plan_run, with_shape
from dora_vl.training.memory import GIB

ROOT = Path(__file__).resolve().parents[1]
PAGE, CLUSTER_PAGE = ROOT / "docs" / "comparisons.md", ROOT / "docs" / "starting.md"
KEPT = ROOT / "benchmarks" / "results"
TABLE = re.compile(r"(<!-- results: ([\w-]+) -->\n)(.*?)(?=<!-- end -->)", re.DOTALL)
Row = Mapping[str, Any]
CLUSTER = "cluster"
MODELS = {"LLaVA-1.5 7B": "llava-1.5-7b", "LLaVA-1.5 13B": "llava-1.5-13b", "Qwen2.5-VL 32B": "qwen2.5-vl-32b"}
SETTINGS = (
    "--adapter.rank=64",
    "--data.train=my.json",
    "--data.max_tokens=2048",
    "--training.per_device_train_batch_size=4",
    "--training.gradient_checkpointing=true",
)
"""Each row is a run with DoRA on all linears of the language model and 4 samples of 2,048 tokens per GPU and step."""
FLOP_PER_SECOND, UTILISATION, BANDWIDTH, NETWORK = 312e12, 0.4, 230e9, 100e9
"""The figures are an A100's in bfloat16, its NVLink's, and those of four 200 Gbit/s links per machine."""
HEADS = ("model", "GPUs", "GiB per GPU, zero2", "zero3", "s per step, zero2", "zero3")


def keep(comparison: Path, to: Path) -> None:
    """Copies a comparison's numbers into a folder of the repository."""
    record = read_json(comparison / "compare.json")
    write_json(to / "compare.json", record)
    with lzma.open(to / f"{SCORES}.xz", "wt", encoding="utf-8", preset=9) as file:
        for run in dict.fromkeys(run for result in record["results"] for run in result["runs"]):
            file.writelines(json.dumps({"run": run, **line}) + "\n" for line in score_lines(comparison / run))


def computed(folder: Path) -> dict[str, Any]:
    """Returns the kept `compare.json`, once its scores and differences have been computed again.

    Raises:
        UserError: the two do not agree.
    """
    record = read_json(folder / "compare.json")
    lines: defaultdict[str, list[Row]] = defaultdict(list)
    with lzma.open(folder / f"{SCORES}.xz", "rt", encoding="utf-8") as file:
        for line in map(json.loads, file):
            lines[line["run"]].append(line)
    runs: dict[str, list[SetScores]] = {}
    for result in record["results"]:
        of_runs = [
            results_of(metrics[SETS], lines[run])
            for metrics, run in zip(result["metrics"], result["runs"], strict=True)
        ]
        runs[result["name"]] = [
            {name: tested.scored for name, tested in sets.items() if tested.scored} for sets in of_runs
        ]
    contenders, count = Contenders(runs), len(record["contrasts"])
    for measure in contenders.measures:
        again = {row["name"]: asdict(contenders.score(measure, row["name"])) for row in record["results"]}
        _refuse_others(folder, again, {row["name"]: row["scores"][measure.name] for row in record["results"]})
        kept = {(row["name"], row["against"]): row for row in record["contrasts"] if row["measure"] == measure.name}
        differences = {pair: contenders.difference(measure, *pair, contrasts=count) for pair in kept}
        again = {" - ".join(pair): asdict(difference) for pair, difference in differences.items()}
        _refuse_others(folder, again, {" - ".join(pair): row["difference"] for pair, row in kept.items()})
    return record


def _refuse_others(folder: Path, computed_again: Mapping[str, Row], kept: Mapping[str, Row]) -> None:
    """Sees that values and limits are equal to a thousandth of a point."""
    for name, row in kept.items():
        limits = ("value",) if row["low"] is None else ("value", "low", "high")
        again = computed_again[name]
        if any(again[part] is None or abs(again[part] - row[part]) > 1e-3 for part in limits):
            raise UserError(f"{folder}: {name} is kept as {row}, computed again as {again}")


def rows_of(record: Row) -> tuple[list[str], list[tuple[str, ...]]]:
    """Returns the heads and rows of a comparison's table, by its first measure; parts are sets, or tasks of a mean."""
    measure, results = record["measures"][0], record["results"]
    differences = {
        (row["name"], row["against"]): row for row in record["contrasts"] if row["measure"] == measure["name"]
    }
    against = [row for row in differences.values() if row["against"] != UNTRAINED]
    parts = [name for name, _ in _parts(results[0]["metrics"][0])]
    heads = ["", "rate", "score", *(["to the untrained model"] if len(differences) > len(against) else [])]
    heads += [*(["to others"] if against else []), *parts]
    rows = []
    for row in results:
        means = [fmean(dict(_parts(of_run))[name] for of_run in row["metrics"]) for name in parts]
        gain = differences.get((row["name"], UNTRAINED))
        others = [
            f"{other['against']}: {_limits(other['difference'], '+')}"
            for other in against
            if other["name"] == row["name"]
        ]
        cells = [row["name"], f"{row['rate']:g}" if row["rate"] else "", _limits(row["scores"][measure["name"]])]
        cells += ["" if gain is None else _limits(gain["difference"], "+")] if "to the untrained model" in heads else []
        cells += ["; ".join(others)] if against else []
        rows.append((*cells, *(f"{mean:.1f}" for mean in means)))
    for name, entry in results[0]["metrics"][0][SETS].items():
        if name in measure["sets"] and (baseline := entry.get("baselines", {}).get(COMMONEST)):
            low, high = baseline["interval_95"] or (baseline["value"], baseline["value"])
            limits = _limits({"value": baseline["value"], "low": low, "high": high})
            rows.append((f"the commonest answer ({name})", "", limits, *[""] * (len(heads) - 3)))
    return heads, rows


def _parts(metrics: Row) -> Iterator[tuple[str, float]]:
    """Yields a run's sets where it has several, and the tasks that the headline of its one set is a mean of."""
    sets = {name: entry for name, entry in metrics[SETS].items() if entry["metrics"]}
    if len(sets) > 1:
        yield from ((name, entry["metrics"][entry["headline"]]["value"]) for name, entry in sets.items())
        return
    (entry,) = sets.values()
    tasks = (entry["formulas"][entry["headline"]] or {}).get("parts", ())
    yield from (
        (name, entry["metrics"][name]["value"]) for name, formula in entry["formulas"].items() if formula in tasks
    )


def _limits(estimate: Row, sign: str = "") -> str:
    """Formats a value with its interval."""
    limits = "" if estimate["low"] is None else f" ({estimate['low']:.1f} to {estimate['high']:.1f})"
    return f"{estimate['value']:{sign}.1f}{limits}"


def cluster_rows() -> Iterator[tuple[str, ...]]:
    """Estimates GiB per GPU and seconds per step, for each model and number of GPUs under both stages."""
    for name, shape in MODELS.items():
        runs = []
        with tempfile.TemporaryDirectory() as folder:
            for stage in ("zero2", "zero3"):
                config = read_run([f"--model.base={shape}", f"--training.deepspeed={stage}", *SETTINGS])
                runs.append(plan_run(DecoderPipeline(with_shape(config, shape, Path(folder)))))
        for gpus in (1, 8, 64):
            estimates = [run.on(gpus) for run in runs]
            cluster = Cluster(-(-gpus // 8), FLOP_PER_SECOND, UTILISATION, BANDWIDTH, NETWORK)
            traffic = [run.traffic(gpus) for run in runs]
            seconds = [sum(cluster.seconds(sent, run.flop())) for sent, run in zip(traffic, runs, strict=True)]
            yield (
                name,
                f"{gpus}",
                *(f"{estimate.total / GIB:.1f}" for estimate in estimates),
                *(f"{each:.2f}" for each in seconds),
            )


def with_tables(text: str, kept: Path = KEPT) -> str:
    """Returns a page's text with the table of every comparison that it has marks of, and of clusters."""

    def written(match: re.Match[str]) -> str:
        heads, rows = (HEADS, [*cluster_rows()]) if match[2] == CLUSTER else rows_of(computed(kept / match[2]))
        return f"{match[1]}{table(heads, rows)}\n"

    return TABLE.sub(written, text)


@exit_on_user_error
def main() -> None:
    """Keeps a comparison, or writes the pages' tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keeps the comparison of this folder")
    parser.add_argument("--name", help="of the kept comparison")
    options = parser.parse_args()
    if (options.keep is None) != (options.name is None):
        parser.error("--keep and --name go together")
    if options.keep is not None:
        keep(options.keep, KEPT / options.name)
    else:
        for page in (PAGE, CLUSTER_PAGE):
            page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
