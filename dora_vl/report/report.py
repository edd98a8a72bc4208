"""Everything a report shows, gathered part by part; a part without data has a sentence in its place."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dora_vl import __version__
from dora_vl.data.example import whole_file
from dora_vl.errors import UserError
from dora_vl.report.answers import (
    Confusion,
    Item,
    ScoreRow,
    SetAnswers,
    benchmark_rows,
    blind,
    confusion,
    read_tests,
    score_rows,
    worst,
)
from dora_vl.report.charts import Chart, curves
from dora_vl.report.run_record import InlinePictures, RunRecord
from dora_vl.report.views import (
    SettingTables,
    WatchedTable,
    over_depth,
    plane,
    setting_tables,
    watched_tables,
    weight_changes,
)

WORST = 12
SKIPPED_SHOWN = 20
Notes = Mapping[str, list[str]]


@dataclass(frozen=True, kw_only=True)
class Head:
    """A run in a few numbers."""

    label: str
    folder: str
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class WorstItem:
    """One answer that is wrong; `picture` is a data URL."""

    item: Item
    picture: str
    why_no_picture: str


@dataclass(frozen=True, kw_only=True)
class WorstAnswers:
    """The worst answers of a run to one set."""

    label: str
    test: str
    shown: tuple[WorstItem, ...]
    wrong: int
    n: int
    is_accuracy: bool


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a run wrote before its first step, and what became of its samples."""

    label: str
    tables: tuple[Mapping[str, Any], ...]
    counts: tuple[tuple[str, str], ...]
    skipped: tuple[tuple[str, str, bool], ...]
    more_skipped: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the template draws; `notes` are sentences by section."""

    title: str
    heads: tuple[Head, ...]
    damaged: tuple[str, ...]
    curves: tuple[Chart, ...]
    scores: tuple[ScoreRow, ...]
    benchmarks: tuple[ScoreRow, ...]
    watched: tuple[WatchedTable, ...]
    worst: tuple[WorstAnswers, ...]
    confusions: tuple[Confusion, ...]
    weights: tuple[Chart, ...]
    told: tuple[Told, ...]
    settings: SettingTables
    versions: tuple[tuple[str, tuple[str, ...]], ...]
    notes: Notes


def gather(runs: Sequence[RunRecord], *, weights: bool, base: Path | None) -> Report:
    """Reads, scores and draws all of it.

    Args:
        weights: whether layers are compared with the base, which reads its weights.
        base: where the base is now.
    """
    notes: dict[str, list[str]] = {}
    drawn, notes["curves"] = curves(runs)
    tests = []
    notes["scores"] = []
    for run in runs:
        found, trouble = read_tests(run)
        tests.append(found)
        notes["scores"] += trouble
    scores, told = score_rows(runs, tests)
    notes["scores"] += [*told, *blind(runs)]
    with InlinePictures() as pictures:
        watched, notes["watched"] = watched_tables(runs, pictures)
        bad, notes["worst"] = _worst(runs, tests, pictures)
    confusions, notes["confusion"] = _confusions(runs, tests)
    changes, notes["weights"] = _weights(runs, base) if weights else ([], ["Not measured: --no-weights was given."])
    for run in runs:
        if not run.plan:
            notes.setdefault("parts", []).append(f"{run.label}: it holds no plan.json, which later versions write.")
        if not run.settings:
            notes.setdefault("settings", []).append(f"{run.label}: it holds no settings.json.")
    return Report(
        title=" · ".join(run.label for run in runs),
        heads=tuple(_head(run, found) for run, found in zip(runs, tests, strict=True)),
        damaged=tuple(f"{run.label}: {one}" for run in runs for one in run.damaged),
        curves=tuple(drawn),
        scores=tuple(scores),
        benchmarks=tuple(benchmark_rows(runs)),
        watched=tuple(watched),
        worst=tuple(bad),
        confusions=tuple(confusions),
        weights=tuple(changes),
        told=tuple(map(_told, runs)),
        settings=setting_tables(runs),
        versions=_versions(runs),
        notes=notes,
    )


def _worst(
    runs: Sequence[RunRecord], tests: Sequence[Sequence[SetAnswers]], pictures: InlinePictures
) -> tuple[list[WorstAnswers], list[str]]:
    found: list[WorstAnswers] = []
    for run, several in zip(runs, tests, strict=True):
        for one in several:
            if one.scored is None:
                continue
            items = worst(one.items, len(one.items), is_accuracy=one.is_accuracy)
            shown = tuple(
                WorstItem(item=item, picture=url, why_no_picture=why)
                for item in items[:WORST]
                for url, why in [pictures.shown(one.pictures, item.pictures, item.clip)]
            )
            wrong = len(items) if one.is_accuracy else 0
            n, accuracy = len(one.items), one.is_accuracy
            found.append(
                WorstAnswers(label=run.label, test=one.name, shown=shown, wrong=wrong, n=n, is_accuracy=accuracy)
            )
    return found, [] if found else ["No run has answers that can be scored here."]


def _confusions(runs: Sequence[RunRecord], tests: Sequence[Sequence[SetAnswers]]) -> tuple[list[Confusion], list[str]]:
    found = []
    for run, several in zip(runs, tests, strict=True):
        for one in several:
            table = confusion(f"{run.label}: {one.name}", one.items)
            found += [] if table is None else [table]
    return found, [] if found else ["No test has a short closed list of answers."]


def _weights(runs: Sequence[RunRecord], base: Path | None) -> tuple[list[Chart], list[str]]:
    drawn: list[Chart] = []
    notes: list[str] = []
    for run in runs:
        try:
            panel = weight_changes(run, base)
        except (UserError, OSError) as error:
            notes.append(f"{run.label}: not measured: {error}")
            continue
        drawn += [one for one in (plane(panel), *over_depth(panel)) if one is not None]
    return drawn, notes


def _head(run: RunRecord, tests: Sequence[SetAnswers]) -> Head:
    adapter, last = run.section("adapter"), run.log[-1]
    losses = [line["loss"] for line in run.log if isinstance(line.get("loss"), int | float)]
    checked = [line["eval_loss"] for line in run.log if isinstance(line.get("eval_loss"), int | float)]
    seconds, samples = run.metrics.get("train_seconds"), run.metrics.get("train_samples")
    speed = run.metrics.get("samples_per_second")
    facts = [
        ("base", run.section("model").get("base")),
        ("method", adapter.get("method")),
        ("rank, alpha", f"{adapter.get('rank')}, {adapter.get('alpha')}" if adapter.get("rank") else None),
        ("steps", f"{run.last_step:,}"),
        ("epochs", None if "epoch" not in last else f"{float(last['epoch']):.3g}"),
        ("samples", f"{samples:,}" if isinstance(samples, int) else None),
        ("training took", f"{seconds / 60:.1f} min" if isinstance(seconds, int | float) else None),
        ("samples a second", f"{speed:g}" if isinstance(speed, int | float) else None),
        ("last loss", f"{losses[-1]:.4f}" if losses else None),
        ("best validation loss", f"{min(checked):.4f}" if checked else None),
        *(_headline(one) for one in tests if one.scored is not None),
        ("device", run.plan.get("device")),
        ("ranks", run.plan.get("ranks")),
    ]
    told = tuple((name, str(value)) for name, value in facts if value is not None)
    return Head(label=run.label, folder=str(run.folder), facts=told)


def _headline(one: SetAnswers) -> tuple[str, str | None]:
    if one.scored is None:
        return one.name, None
    name, value = next(iter(one.scored.metrics.items()))
    return f"{one.name}, {name}", f"{value:.2f} of {one.scored.n:,}"


def _told(run: RunRecord) -> Told:
    last = next((line for line in reversed(run.log) if "skipped" in line), {})
    padding = run.metrics.get("padding_share")
    counts = [
        ("samples skipped", last.get("skipped", run.metrics.get("skipped_samples"))),
        ("samples cut", last.get("cut_samples")),
        ("samples whose pictures were shrunk", last.get("shrunk_samples") or None),
        ("padding", f"{padding:.1%}" if isinstance(padding, int | float) else None),
        ("questions that could not be asked", _failed(run)),
    ]
    tables = tuple(
        one for name in ("trained", "not_adapted", "memory") if isinstance(one := run.plan.get(name), Mapping)
    )
    return Told(
        label=run.label,
        tables=tables,
        counts=tuple((name, str(value)) for name, value in counts if value is not None),
        skipped=run.skipped[:SKIPPED_SHOWN],
        more_skipped=max(0, len(run.skipped) - SKIPPED_SHOWN),
    )


def _failed(run: RunRecord) -> int | None:
    failed = run.metrics.get("failed_questions")
    tasks = run.metrics.get("tasks")
    if isinstance(tasks, Mapping):
        return sum(len(one.get("failed", ())) for one in tasks.values())
    return len(failed) if isinstance(failed, Mapping) else None


def _versions(runs: Sequence[RunRecord]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    found = [run.plan.get("versions") or run.recipe.get("versions") or {} for run in runs]
    names = dict.fromkeys(name for one in found for name in one)
    return tuple((name, tuple(str(one.get(name, "–")) for one in found)) for name in names)


# A report as one HTML file: templates with every text escaped, style and script inside, no address of any host.


SECTIONS = (
    ("scores", "Scores"),
    ("curves", "Training"),
    ("watched", "Questions"),
    ("worst", "Worst"),
    ("confusion", "Confusion"),
    ("weights", "Weights"),
    ("parts", "Parts"),
    ("data", "Data"),
    ("settings", "Settings"),
    ("versions", "Versions"),
)


@cache
def _environment() -> Environment:
    loader = FileSystemLoader(Path(__file__).parent / "templates", encoding="utf-8")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def rendered(template: str, values: Mapping[str, Any]) -> str:
    """A template with its values; halves of surrogate pairs, which no file takes, become the sign for the unknown."""
    text = _environment().get_template(template).render(version=__version__, **values)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def report_page(report: Report) -> str:
    """The report's HTML."""
    notes = {name: report.notes.get(name, []) for name, _ in SECTIONS}
    return rendered("report.html.j2", {"report": report, "sections": SECTIONS, "notes": notes})


def write_page(path: Path, text: str) -> int:
    """Writes a page whole or not at all; its size in bytes.

    Raises:
        UserError: it cannot be written.
    """
    with whole_file(path) as file:
        file.write(text)
    return path.stat().st_size


# `dora-vl report`: what a run folder holds as one page: curves, answers, weights, settings; runs side by side.


DESCRIPTION = """\
Makes one HTML file of a run, or of several side by side: scores with 95 % intervals and paired differences, curves,
the watched questions through training, the worst answers with their pictures, confusion of closed answers, magnitude
and direction change of each layer, what trained, settings and versions. It opens without a network.

  dora-vl report runs/demo
  dora-vl report runs/lora runs/dora --to comparison.html

A part that a run holds nothing for says so. The first run is the one that others are compared with.
"""
SUFFIXES = (".html", ".htm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `dora-vl report`."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder, its training.output_dir")
    parser.add_argument("--to", type=Path, metavar="FILE.html", help="default: report.html in the first run's folder")
    parser.add_argument("--label", action="append", metavar="TEXT", help="one for each RUN; default: its folder's name")
    parser.add_argument("--base", type=Path, metavar="DIR", help="where the base is, if not where the adapter says")
    parser.add_argument(
        "--no-weights", action="store_true", help="leave out the change of weights, which reads the base"
    )


def run(arguments: argparse.Namespace) -> Iterator[str]:
    """Reads, draws, writes; yields the lines to print.

    Raises:
        UserError: a folder is no run's, or the file cannot be written.
    """
    from dora_vl.report.run_record import labels_of, read_run

    folders = list(arguments.runs)
    if arguments.label is not None and len(arguments.label) != len(folders):
        raise UserError(f"{len(folders)} times RUN and {len(arguments.label)} times --label; give one for each")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("one run is named twice; name each once")
    to = arguments.to or folders[0] / "report.html"
    if to.suffix not in SUFFIXES or to.is_dir():
        raise UserError(f"--to {to}: give the name of an .html file")
    runs = [
        read_run(folder, label) for folder, label in zip(folders, arguments.label or labels_of(folders), strict=True)
    ]
    for one in runs:
        yield from (f"{one.label}: {trouble}" for trouble in one.damaged)
    report = gather(runs, weights=not arguments.no_weights, base=arguments.base)
    size = write_page(to, report_page(report))
    yield f"{to}: {size / 1e6:.1f} MB"
