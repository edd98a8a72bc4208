"""Writes the tables with figures of the pages, from what the repository keeps.

    python -m tests.benchmarks.tables --keep runs/halves/compared --name easy_vqa   # into benchmarks/results/easy_vqa
    python -m tests.benchmarks.tables                                               # writes all pages' tables

A table is between the marks `<!-- results: NAME -->` and `<!-- end -->`; NAME is a kept comparison or one of `TABLES`.
A comparison is kept as its `compare.json` and `scores.jsonl.xz`, the lines of every tested run's `scores.jsonl`. Values
and intervals are computed again from the kept scores; a `compare.json` that says something else ends the command.
Other tables are made from a line of `benchmarks/results.jsonl`, or of estimates of `dora-vl estimate`.
"""

import argparse
import json
import lzma
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.report import table
from dora_vl.errors import UserError, exit_on_user_error
from dora_vl.evaluation.baselines import COMMONEST
from dora_vl.evaluation.test_sets import SCORES, results_of, score_lines
from dora_vl.files import SETS, read_json, write_json
from dora_vl.report.compare import UNTRAINED
from dora_vl.report.contrasts import Contenders, SetScores
from dora_vl.run.folder import read_log
from dora_vl.run.settings_parser import read_run
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.estimate import Cluster, PlannedRun, plan_run, with_shape
from dora_vl.training.memory import GIB
from tests.benchmarks.estimates import HEADS, row_of

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
KEPT, MEASURED = ROOT / "benchmarks" / "results", ROOT / "benchmarks" / "results.jsonl"
TABLE = re.compile(r"(<!-- results: ([\w-]+) -->\n)(.*?)(?=<!-- end -->)", re.DOTALL)
Row = Mapping[str, Any]
Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Holds heads and rows."""
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


def rows_of(record: Row) -> Table:
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


def measured(name: str) -> Row:
    """Returns a benchmark's line of `results.jsonl`."""
    return next(line for line in read_log(MEASURED) if line["name"] == name)


def by_rank(name: str) -> tuple[Sequence[Row], list[str]]:
    """Returns a benchmark's settings by rank and dropout, and their heads."""
    settings = sorted(measured(name)["settings"], key=lambda row: (row["rank"], -row["dropout"]))
    return settings, [
        f"rank {row['rank']}" + (f", dropout {row['dropout']}" if row["dropout"] else "") for row in settings
    ]


def dora_step() -> Table:
    """Ratios of a step here to other contenders', by rank and dropout."""
    settings, heads = by_rank("dora_step")
    ratios = {
        "a step, frozen model = 1": "train_vs_frozen",
        "a step, PEFT's LoRA = 1": "train_vs_peft_lora",
        "a step, PEFT's DoRA = 1": "train_vs_peft_dora",
        "a step of PEFT's DoRA after `accelerate_peft(model)`, before = 1": "accelerated_vs_peft_dora",
        "a decoded token, unmerged, PEFT's LoRA = 1": "decode_vs_peft_lora",
        "a decoded token, unmerged, PEFT's DoRA = 1": "decode_vs_peft_dora",
        "a decoded token, merged, the base = 1": "merged_decode_vs_frozen",
    }
    rows = [[label, *(f"{row[key]:.2f}" if key in row else "" for row in settings)] for label, key in ratios.items()]
    return ["DoRA here", *heads], rows


def dora_memory() -> Table:
    """Bytes of a step of each contender to those of PEFT's LoRA, by rank and dropout."""
    settings, heads = by_rank("dora_memory")
    names = {"frozen": "frozen model", "peft_dora": "PEFT's DoRA", "ours": "DoRA here"}
    ways = {
        ("stored", "alive"): "kept for the backward pass",
        ("non_reentrant", "alive"): "the same with gradient checkpointing",
        ("non_reentrant", "peak"): "at the fullest moment with it",
    }
    rows = []
    for (way, part), label in ways.items():
        sizes = [{name: each["steps"][way][part] for name, each in row["bytes"].items()} for row in settings]
        rows += [
            [f"{label}, {names[name]}", *(f"{row[name] / row['peft_lora']:.2f}" for row in sizes)] for name in names
        ]
    return ["PEFT's LoRA = 1", *heads], rows


def estimates() -> Table:
    """What steps took, and what `dora-vl estimate` said before, as a share of that."""
    return HEADS, [row_of(run) for run in measured("estimates")["runs"]]


def peers() -> Table:
    """Samples per second and GiB of whole runs, here and by TRL with PEFT."""
    runs = [measured(name)["rounds"][0] for name in ("peers", "peers_smolvlm")]
    heads = ["", "demo's LLaVA, samples per second", "GiB", "SmolVLM-256M's shape, samples per second", "GiB"]
    contenders = {
        "TRL, PEFT DoRA": "trl_dora",
        "TRL, PEFT LoRA": "trl_lora",
        "here, outputs of the tower stored": "ours",
        "here, the tower in each step": "ours_unstored",
    }
    forms = {"samples_per_second": ".2f", "gib": ".1f"}
    return heads, [
        [label, *(f"{run[key][figure]:{form}}" for run in runs for figure, form in forms.items())]
        for label, key in contenders.items()
    ]


def preference_step() -> Table:
    """How many times as fast as TRL's a DPO step is, and the MiB of both."""
    rows = []
    for name in ("preference_step", "preference_step_long"):
        settings = measured(name)["settings"]
        first, later = ([f"{row['times_as_fast'][key]:.1f}" for row in settings] for key in ("trees", "kept"))
        mib = [(f"{row['mib']['trees']:,.0f}", f"{row['mib']['trl']:,.0f}") for row in settings]
        prompt = f"a prompt of {settings[0]['prompt_tokens']} tokens"
        rows.append([prompt, *(f"{times} ({a} MiB; TRL {b})" for times, (a, b) in zip(first, mib, strict=True))])
        rows.append(["the same in a later epoch, the reference known", *later])
    pairs = [str(row["pairs"]) for row in measured("preference_step")["settings"]]
    return ["pairs of answers per picture", *pairs], rows


def serve() -> Table:
    """A decoded token of a mixed batch, compared with one adapter's, by rows."""
    steps = measured("serve")["decode_step"]
    times = [f"{row['mixed_vs_by_itself']:.2f}" for row in steps.values()]
    return ["rows of the batch", *steps], [["a token of four adapters and the base, one adapter = 1", *times]]


def choosing() -> Table:
    """Scores of four methods in three comparisons."""
    methods = {
        "DoRA, rank 16": "dora r16",
        "LoRA, rank 16": "lora r16",
        "magnitude only": "magnitude",
        "all weights": "full",
    }
    rows = []
    for name, label in {
        "easy_vqa": "[easy-VQA](comparisons.md#easy-vqa-answers-without-their-reasons)",
        "commonsense": "[commonsense](comparisons.md#commonsense-questions-seen-and-unseen)",
        "nlvr": "[NLVR](comparisons.md#nlvr-peoples-sentences)",
    }.items():
        record = read_json(KEPT / name / "compare.json")
        scores = {row["name"]: row["scores"][record["measures"][0]["name"]]["value"] for row in record["results"]}
        rows.append([label, *(f"{scores[method]:.1f}" for method in methods.values())])
    return ["score on", *methods], rows


def planned(shape: str, *words: str) -> PlannedRun:
    """Plans a run on a base of this shape; no weight is read."""
    with tempfile.TemporaryDirectory() as folder:
        return plan_run(DecoderPipeline(with_shape(read_run(words), shape, Path(folder))))


def cluster() -> Table:
    """Estimates GiB per GPU and seconds per step, for each model and number of GPUs under both stages."""
    rows = []
    for name, shape in MODELS.items():
        stages = [f"--training.deepspeed={stage}" for stage in ("zero2", "zero3")]
        runs = [planned(shape, f"--model.base={shape}", stage, *SETTINGS) for stage in stages]
        for gpus in (1, 8, 64):
            on_cluster = Cluster(-(-gpus // 8), FLOP_PER_SECOND, UTILISATION, BANDWIDTH, NETWORK)
            gib = [f"{run.on(gpus).total / GIB:.1f}" for run in runs]
            rows.append(
                [
                    name,
                    str(gpus),
                    *gib,
                    *(f"{sum(on_cluster.seconds(run.traffic(gpus), run.flop())):.2f}" for run in runs),
                ]
            )
    return ["model", "GPUs", "GiB per GPU, zero2", "zero3", "s per step, zero2", "zero3"], rows


def memory() -> Table:
    """Estimates GiB per GPU of Qwen2.5-VL's recipe with bases of four shapes."""
    zero3 = "--training.deepspeed=zero3"
    columns = {
        "DoRA, rank 8, 1 GPU": (1, "--variant=7b_dora"),
        "without checkpointing": (1, "--variant=7b_dora", "--training.gradient_checkpointing=false"),
        "DoRA, 8 GPUs, `zero3`": (8, "--variant=7b_dora", zero3),
        "all weights, 8 GPUs, `zero3`": (8, "--variant=7b_full", zero3),
    }
    shapes = ("llava-1.5-7b", "qwen2.5-vl-7b", "llava-1.5-13b", "qwen2.5-vl-32b")
    recipe = ("--config=image_text/qwen2_5_vl", "--data.train=my.json", "--data.max_tokens=2048")
    return ["shape", *columns], [
        [shape, *(f"{planned(shape, *recipe, *words).on(gpus).total / GIB:.1f}" for gpus, *words in columns.values())]
        for shape in shapes
    ]


ESTIMATED: Mapping[str, Callable[[], Table]] = {"cluster": cluster, "memory": memory}
TABLES: Mapping[str, Callable[[], Table]] = {
    "dora_step": dora_step,
    "dora_memory": dora_memory,
    "estimates": estimates,
    "peers": peers,
    "preference_step": preference_step,
    "serve": serve,
    "choosing": choosing,
    **ESTIMATED,
}


def with_tables(text: str, kept: Path = KEPT) -> str:
    """Returns a page's text with every table that it has marks of."""

    def written(match: re.Match[str]) -> str:
        made = TABLES[match[2]]() if match[2] in TABLES else rows_of(computed(kept / match[2]))
        return f"{match[1]}{table(*made)}\n"

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
        for page in sorted(DOCS.glob("*.md")):
            page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
