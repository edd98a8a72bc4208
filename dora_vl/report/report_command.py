"""`dora-vl report`: what a run folder holds as one page: curves, answers, weights, settings; runs side by side."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from dora_vl.errors import UserError

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
    from dora_vl.report.page import report_page, write_page
    from dora_vl.report.report import gather
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
