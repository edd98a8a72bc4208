"""`dora-vl report`: a run as one HTML file, gathered part by part; a part without data is replaced by a sentence.

Templates escape every text; style and script are inside, and nothing in the page asks any host.
"""

from __future__ import annotations

import argparse
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dora_vl import __version__
from dora_vl.data.example import Clip
from dora_vl.errors import UserError
from dora_vl.evaluation.forgetting import forgetting_lines
from dora_vl.evaluation.plots import plain_text, series
from dora_vl.evaluation.test_sets import SetResult
from dora_vl.files import SETS, whole_file
from dora_vl.report.run_record import (
    Results,
    RunRecord,
    blind,
    confusion,
    is_accuracy,
    low_and_high,
    questions_of,
    read_record,
    read_tests,
    score_rows,
)
from dora_vl.report.views import InlinePictures, curves, setting_tables, watched_tables
from dora_vl.run.folder import DRAWN, SETTINGS, evenly, read_log

MOST_ANSWERS, DRAWN_ROWS = 40, 8
SECTIONS = (
    ("scores", "Scores"),
    ("curves", "Training"),
    ("watched", "Questions"),
    ("answers", "Answers"),
    ("confusion", "Confusion"),
    ("parts", "Parts"),
    ("data", "Data"),
    ("settings", "Settings"),
    ("versions", "Versions"),
)


def gather(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Reads, scores and draws all that the template shows."""
    notes: dict[str, list[str]] = {name: [] for name, _ in SECTIONS}
    charts, notes["curves"] = curves(runs)
    tests: list[Results] = []
    for run in runs:
        results, trouble = read_tests(run)
        tests.append(results)
        notes["scores"] += [*trouble, *blind(run.label, results, run.benchmarks)]
        notes["scores"] += [f"{run.label}, {name}: {text}." for name, text in questions_of(results).items()]
    scores, incomparable = score_rows(tests)
    notes["scores"] += incomparable
    answered = [(run, result) for run, results in zip(runs, tests, strict=True) for result in results.values()]
    with closing(InlinePictures()) as pictures:
        watched, notes["watched"] = watched_tables(runs, pictures)
        shown = [_answers(run, result, pictures) for run, result in answered if result.scored is not None]
    tables = [confusion(f"{run.label}: {result.name}", result) for run, result in answered]
    confusions = [table for table in tables if table is not None]
    if not shown:
        notes["answers"].append("No run has answers that can be scored here.")
    if not confusions:
        notes["confusion"].append("No test has a short closed list of answers.")
    versions = [run.plan.get("versions") or run.recipe.get("versions") or {} for run in runs]
    for run in runs:
        if not run.plan:
            notes["parts"].append(f"{run.label}: it holds no plan.json.")
        if not run.settings:
            notes["settings"].append(f"{run.label}: it holds no settings.json.")
    return {
        "title": " · ".join(run.label for run in runs),
        "heads": [_head(run, results) for run, results in zip(runs, tests, strict=True)],
        "curves": charts,
        "scores": scores,
        "benchmarks": [row for row in score_rows([run.benchmarks for run in runs])[0] if not row.is_part],
        "watched": watched,
        "drawn": [(run.label, rows) for run in runs if (rows := _drawn(run.folder))],
        "answers": shown,
        "confusions": confusions,
        "data": [_data(run) for run in runs],
        "settings": setting_tables(runs),
        "versions": {
            name: [str(of_run.get(name, "–")) for of_run in versions]
            for name in dict.fromkeys(name for of_run in versions for name in of_run)
        },
        "notes": notes,
    }


def _drawn(folder: Path) -> list[dict[str, Any]]:
    """Returns some questions with the answers that were drawn to them, the rewards, and how often each came."""
    rows = evenly(read_log(folder / DRAWN), DRAWN_ROWS)
    counts = [Counter((answer["text"], answer["reward"]) for answer in row["answers"]) for row in rows]
    return [{**row, "answers": count.most_common()} for row, count in zip(rows, counts, strict=True)]


def _answers(run: RunRecord, result: SetResult, pictures: InlinePictures) -> dict[str, Any]:
    """Returns answers of a run to one set, with their pictures: wrong or low ones, then right or high ones."""
    halves = low_and_high(result)
    folder = run.section("evaluation").get("image_folder") or run.section("data").get("image_folder")
    root = None if folder is None else run.path(folder)
    shown = [
        (row, item, name, pictures.shown(root, row.images, Clip(**row.videos[0]) if len(row.videos) == 1 else None))
        for name, answers in zip(("wrong", "right"), halves, strict=True)
        for row, item in answers[:MOST_ANSWERS]
    ]
    return {
        "label": run.label,
        "name": result.name,
        "shown": shown,
        "kinds": list(dict.fromkeys(item.kind for _, item, _, _ in shown)),
        "n": sum(not item.score.failed for item in result.items.values()),
        "wrong": len(halves[0]),
        "is_accuracy": is_accuracy(result),
    }


def _head(run: RunRecord, results: Results) -> dict[str, Any]:

    adapter, last = run.section("adapter"), run.log[-1]
    (_, losses), (_, checked) = (series(run.log, key) for key in ("loss", "eval_loss"))
    seconds, samples, speed = map(run.metrics.get, ("train_seconds", "train_samples", "samples_per_second"))
    facts = {
        "base": run.section("model").get("base"),
        "method": adapter.get("method"),
        "rank, alpha": f"{adapter.get('rank')}, {adapter.get('alpha')}" if adapter.get("rank") else None,
        "steps": f"{run.last_step:,}",
        "epochs": None if "epoch" not in last else f"{float(last['epoch']):.3g}",
        "samples": None if samples is None else f"{samples:,}",
        "training took": None if seconds is None else f"{seconds / 60:.1f} min",
        "samples per second": None if speed is None else f"{speed:g}",
        "last loss": f"{losses[-1]:.4f}" if losses else None,
        "best validation loss": f"{min(checked):.4f}" if checked else None,
    }
    for name, result in results.items():
        if result.scored is not None:
            headline = result.entry["headline"]
            facts[f"{name}, {headline}"] = f"{result.scored.metrics[headline]:.2f} of {result.scored.n:,}"
    facts |= forgetting_lines(run.metrics.get("forgetting"))
    facts |= {"device": run.plan.get("device"), "ranks": run.plan.get("ranks")}
    return {"label": run.label, "folder": run.folder, "facts": _stated(facts), "again": _again(run)}


def _again(run: RunRecord) -> str:
    """Returns the command that repeats a run from its settings, into another folder."""
    ranks = run.plan.get("ranks")
    launcher = ["dora-vl"]
    if isinstance(ranks, int) and ranks > 1:
        launcher = ["deepspeed", "--num_gpus", str(ranks), "--module", "dora_vl.cli"]
    words = ["train", str(run.folder / SETTINGS), "--training.output_dir", f"{run.folder}-again"]
    return shlex.join([*launcher, *words]) if run.settings else ""


def _stated(facts: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in facts.items() if value is not None}


def _data(run: RunRecord) -> dict[str, Any]:
    """Returns the tables of a run's plan and the counts of its samples."""
    last = next((line for line in reversed(run.log) if "skipped" in line), {})
    padding, sets = run.metrics.get("padding_share"), run.metrics.get(SETS)
    unasked = None if sets is None else sum(len(entry["failed"]) for entry in sets.values())
    counts = {
        "samples skipped": last.get("skipped", run.metrics.get("skipped_samples")),
        "samples cut": last.get("cut_samples"),
        "samples whose pictures were shrunk": last.get("shrunk_samples") or None,
        "padding": None if padding is None else f"{padding:.1%}",
        "questions that could not be asked": unasked,
    }
    return {
        "label": run.label,
        "tables": [run.plan[name] for name in ("trained", "memory") if name in run.plan],
        "counts": _stated(counts),
        "skipped": run.skipped,
    }


def report(arguments: argparse.Namespace) -> Iterator[str]:
    """Reads, draws, writes; yields the lines to print."""
    folders = list(arguments.runs)
    if arguments.label is not None and len(arguments.label) != len(folders):
        raise UserError(f"{len(folders)} times RUN and {len(arguments.label)} times --label; give one for each")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("one run is named twice; name each once")
    to = arguments.to or (folders[0] if len(folders) == 1 else folders[0].parent) / "report.html"
    if to.suffix not in (".html", ".htm") or to.is_dir():
        raise UserError(f"--to {to}: give the name of an .html file")
    names = [folder.resolve().name for folder in folders]
    unique = names if len(set(names)) == len(names) else [str(folder) for folder in folders]
    runs = [read_record(folder, label) for folder, label in zip(folders, arguments.label or unique, strict=True)]
    with whole_file(to) as file:
        file.write(page(gather(runs)))
    yield f"{to}: {to.stat().st_size / 1e6:.1f} MB"


def page(report: Mapping[str, Any]) -> str:
    """Returns the page, every text of it escaped; halves of surrogate pairs become the sign for the unknown."""
    loader = FileSystemLoader(Path(__file__).parent / "templates", encoding="utf-8")
    options: dict[str, Any] = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
    template = Environment(loader=loader, undefined=StrictUndefined, **options).get_template("report.html.j2")
    return plain_text(template.render(version=__version__, report=report, sections=SECTIONS))
