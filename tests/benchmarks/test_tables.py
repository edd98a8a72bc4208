"""The figures of the pages: each table is made from what the repository keeps, or a test reads it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.dora_memory import LiveBytes
from dora_vl.errors import UserError
from dora_vl.files import read_json
from dora_vl.run.settings_parser import read_run
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.estimate import plan_run, with_shape
from dora_vl.training.memory import GIB
from tests.benchmarks.tables import DOCS, ESTIMATED, KEPT, ROOT, TABLE, TABLES, keep, measured, with_tables
from tests.report.test_compare import Trainings, compared

PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
CHECKED = {
    "choosing.md": "benchmarks/test_tables.py",
    "models.md": "backbones/model_table.py",
    "recipes.md": "benchmarks/test_tables.py",
    "serving.md": "serving/test_server.py",
    "settings.md": "run/settings_page.py",
}
"""Pages whose other tables with figures are read or written by a file of tests."""
FIGURE = re.compile(r"[+-]?[\d.,]+(e-?\d+)?( \(.*\)| %|( /|,| and) .*|)")
DECIMAL = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.])")


def test_a_kept_comparison_gives_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Trainings(monkeypatch)
    compared(tmp_path)
    keep(tmp_path / "out", tmp_path / "kept" / "tiny")
    page = with_tables("Text.\n<!-- results: tiny -->\nold\n<!-- end -->\nMore.\n", tmp_path / "kept")
    assert "old" not in page
    assert page.startswith("Text.\n<!-- results: tiny -->\n| ")
    assert page.endswith(" |\n<!-- end -->\nMore.\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    assert rows[0] == ["", "rate", "score", "to the untrained model", "to others"]
    assert [row[0] for row in rows[2:]] == ["dora r4", "dora r8", "lora r4", "lora r8", "untrained"]
    assert [cell.split(" (")[0] for cell in rows[4]] == ["lora r4", "0.0032", "50.0", "+50.0", "dora r4: -25.0"]
    assert with_tables(page, tmp_path / "kept") == page
    file = tmp_path / "kept" / "tiny" / "compare.json"
    record = json.loads(file.read_text())
    record["contrasts"][0]["difference"]["low"] -= 0.1
    file.write_text(json.dumps(record))
    with pytest.raises(UserError):
        with_tables(page, tmp_path / "kept")


def marked() -> list[Any]:
    parameters = []
    for page in PAGES:
        for match in TABLE.finditer(page.read_text(encoding="utf-8")):
            slow = [pytest.mark.slow] if match[2] in ESTIMATED else []
            parameters.append(pytest.param(f"{match[0]}<!-- end -->", id=match[2], marks=slow))
    return parameters


@pytest.mark.parametrize("made", marked())
def test_a_marked_table_is_what_is_kept(made: str) -> None:
    assert with_tables(made) == made


def test_what_is_kept_has_its_table() -> None:
    names = {match[2] for page in PAGES for match in TABLE.finditer(page.read_text(encoding="utf-8"))}
    assert names == TABLES.keys() | {path.parent.name for path in KEPT.glob("*/compare.json")}
    assert sum(path.stat().st_size for path in KEPT.rglob("*") if path.is_file()) < 3_000_000


def test_estimates_are_within_15_per_cent() -> None:
    runs = measured("estimates")["runs"]
    assert len(runs) >= 8
    for run in runs:
        for name in ("flop", "activations", "fullest"):
            counted, estimated = run[name]["counted"], run[name]["estimated"]
            assert estimated == pytest.approx(counted, rel=0.15), (run["run"], name)


def tables_of(text: str) -> Iterator[list[list[str]]]:
    """The rows of each table of a page, without its head."""
    for lines in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        yield [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines.splitlines()[2:]]


def has_figures(rows: list[list[str]]) -> bool:
    """Tells a table of which one column, or one row, is mostly figures, not all of them whole numbers."""
    lines = [*zip(*rows, strict=True), *(row[1:] for row in rows if len(row) > 2)]
    figures = [[cell for cell in line if FIGURE.fullmatch(cell)] for line in lines]
    return any(
        2 * len(found) > len(line) and re.search(r"\d\.\d|\de-\d", " ".join(found))
        for found, line in zip(figures, lines, strict=True)
    )


def test_figures_are_told_from_words() -> None:
    assert has_figures([["dora", "57.3 (54.5 to 60.1)"], ["lora", "58.0"]])
    assert has_figures([["a step", "1.02", "1.10", ""], ["why", "words", "a", "b"], ["more", "", "", ""]])
    assert has_figures([["DoRA", "2e-4"], ["a base", "1e-2 and 3e-3"], ["more", ""]])
    assert has_figures([["`dora`", "65.8 / 54.7"]])
    assert not has_figures([["`zero2`", "gradients"], ["`conv`", "2 GPUs or more"], ["`a`", "b"]])
    assert not has_figures([["`nf4`", "4 bits"], ["rows", "1"], ["`gqa`", "100/60"], ["seconds", "30"]])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_table_with_figures_has_its_source(page: Path) -> None:
    unmarked = TABLE.sub("", page.read_text(encoding="utf-8"))
    figures = [rows for rows in tables_of(unmarked) if has_figures(rows)]
    if page.name in CHECKED:
        assert page.name in (ROOT / "tests" / CHECKED[page.name]).read_text(encoding="utf-8")
    else:
        assert not figures, "put the table between marks (tests/benchmarks/tables.py), or remove it"


def test_expected_scores_are_those_of_the_recipe_files() -> None:
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    ours = (DOCS / "comparisons.md").read_text(encoding="utf-8")
    demo = read_json(KEPT / "demo" / "metrics.json")["sets"]["test"]["metrics"]["accuracy"]
    scored = [row for rows in tables_of(text) for row in rows if DECIMAL.search(row[-1])]
    assert len(scored) > 15
    for file, variants, *_, expected in scored:
        if "make demo`" in expected:
            assert expected == f"`make demo`: {demo['value']:.1f} % of {demo['n']:,} test questions"
            asked = f"asks {demo['n']:,} test questions. About {demo['value']:.1f} % of the answers are right"
            assert asked in (DOCS / "ten_minutes.md").read_text(encoding="utf-8")
            continue
        recipe = (ROOT / "configs" / file.strip("`")).read_text(encoding="utf-8")
        for figure in DECIMAL.findall(expected):
            assert figure in (ours if "comparisons" in expected else recipe), (variants, figure)


def test_rates_are_those_of_recipes_and_comparisons() -> None:
    known = [row["rate"] for path in KEPT.glob("*/compare.json") for row in read_json(path)["results"]]
    for path in (ROOT / "configs" / "llava").glob("*.yaml"):
        known += re.findall(r"learning_rate: ([\d.e-]+)", path.read_text(encoding="utf-8"))
    section = (DOCS / "choosing.md").read_text(encoding="utf-8").split("## Learning rate")[1].split("\n## ")[0]
    ((*rows,),) = tables_of(section)
    for row in rows:
        for rate in row[1].split(" and "):
            assert any(float(rate) == pytest.approx(float(other or 0), rel=0.07) for other in known), row


OTHERS = {"0.83", "0.62", "0.31"}
"""The paper's correlations."""


@pytest.mark.parametrize("page", ["choosing.md", "comparisons.md"])
def test_sentences_have_the_figures_of_the_tables(page: str) -> None:
    tables = "".join(f"{match[0]}" for match in TABLE.finditer((DOCS / "comparisons.md").read_text(encoding="utf-8")))
    known = {*DECIMAL.findall(tables), *OTHERS}
    for path in KEPT.glob("*/compare.json"):
        for row in read_json(path).get("by_strength") or ():
            known |= {f"{value:.1f}" for value in row.values() if isinstance(value, float)}
    prose = re.sub(
        r"(?s)```.*?```|`[^`]*`|arXiv \d+\.\d+", "", TABLE.sub("", (DOCS / page).read_text(encoding="utf-8"))
    )
    lines = [line for line in prose.splitlines() if not line.startswith("|")]
    assert {figure for line in lines for figure in DECIMAL.findall(line)} <= known


def test_the_readmes_price_is_the_measured_one() -> None:
    rows = {row[0]: row[1:] for rows in tables_of((DOCS / "measurements.md").read_text()) for row in rows}
    with_dropout, without = (sorted(map(float, rows["a step, PEFT's LoRA = 1"][first::2])) for first in (0, 1))
    said = re.sub(r"\s+", " ", (ROOT / "README.md").read_text(encoding="utf-8"))
    low, high = (round(100 * (ratio - 1)) for ratio in without)
    assert f"without, {low} to {high} % more than PEFT's LoRA" in said
    low, high = (round(100 * (1 - ratio)) for ratio in reversed(with_dropout))
    assert f"With dropout, a step takes {low} to {high} % less time than PEFT's LoRA" in said


def test_what_the_demo_forgets_is_the_kept_run() -> None:
    lost = read_json(KEPT / "demo" / "metrics.json")["forgetting"]
    times = lost["perplexity"]["adapted"] / lost["perplexity"]["base"]
    before, after = (lost["answers"]["nats"][name] for name in ("base", "adapted"))
    text = (DOCS / "training.md").read_text(encoding="utf-8")
    assert f"is {times:.2f} times the base's" in text
    assert f"cost {after:.2f} nats per token ({before:.2f} before)" in text


def test_counts_of_kills_and_tokens_are_those_measured() -> None:
    kills, vllm = measured("kills"), measured("vllm_dora")
    text = re.sub(r"\s+", " ", (DOCS / "measurements.md").read_text(encoding="utf-8"))
    assert kills["same"] == kills["of"] == kills["killed"]
    assert f"All {kills['of']} ({kills['in_a_save_or_removal']} of them killed while saving or removing)" in text
    answers = [answer for case in vllm["language"].values() if case["gains"] for answer in case["answers"].values()]
    assert {(number, answer["of"]) for answer in answers for number in answer["same_tokens"]} == {(24, 24)}
    assert "24 of 24" in (DOCS / "export.md").read_text(encoding="utf-8")


def test_live_bytes_follows_what_is_made_until_it_dies():
    older = torch.ones(50)
    with LiveBytes() as live:
        older.add_(1)
        assert (live.now, live.peak) == (0, 0), "made before, changed in place"
        tensor = torch.ones(1000)
        view = tensor.view(10, 100)
        del tensor
        assert live.now == 4000, "its view keeps it"
        view = view.half()
        assert (live.now, live.peak) == (2000, 6000)
        live.restart_peak()
        del view
        assert (live.now, live.peak) == (0, 2000)


@pytest.mark.parametrize(("column", "gpus", "more"), [(1, 1, ()), (3, 8, ("--training.deepspeed=zero3",))])
def test_the_estimates_of_choosing_are_those_of_the_command(tmp_path, column, gpus, more) -> None:
    words, shape = ("--variant=7b_dora", "--data.train=my.json", "--data.max_tokens=2048"), "llava-1.5-7b"
    config = with_shape(read_run(["--config=image_text/qwen2_5_vl", *words, *more]), shape, tmp_path)
    cells = {row[0]: row for rows in tables_of((DOCS / "choosing.md").read_text(encoding="utf-8")) for row in rows}
    assert cells[shape][column] == f"{plan_run(DecoderPipeline(config)).on(gpus).total / GIB:.1f}"
