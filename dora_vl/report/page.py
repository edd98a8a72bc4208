"""A report as one HTML file: templates with every text escaped, style and script inside, no address of any host."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dora_vl import __version__
from dora_vl.data.examples import whole_file
from dora_vl.report.report import Report

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
