"""The diffs of CONTRIBUTING.md are code that runs: their added lines, put where they say, do what they say."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
import yaml

from dora_vl.core import DoRAConfig
from dora_vl.data.example import Answer, Example
from dora_vl.evaluation.scores.scored import AnswersById, intervals
from tests.backbones.tiny_families.family import Family
from tests.backbones.tiny_families.table import FAMILIES

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
PARTS = re.findall(r"^\+\+\+ (\S+)\n(.*?)(?=^\+\+\+ |^```$)", TEXT, re.MULTILINE | re.DOTALL)


ROW = "        counting_task(prompt_named),\n"
"""The line that makes VL-BART's task known, inside a function."""


def added(path: str) -> str:
    """The lines that a diff adds to a file."""
    (body,) = [body for part, body in PARTS if part == path]
    return "".join(f"{line[1:]}\n" for line in body.splitlines() if line.startswith("+"))


def run(module: str, path: str) -> dict[str, Any]:
    """The lines that a diff adds to a file, run with the names that a module of that kind has."""
    names = dict(vars(importlib.import_module(module)))
    exec(compile("from __future__ import annotations\n" + added(path).replace(ROW, ""), path, "exec"), names)
    return names


def test_the_family_is_a_row_of_the_table() -> None:
    path, head = "tests/backbones/tiny_families/families.yaml", "\nfamilies:\n"
    text = (Path(__file__).parents[1] / path).read_text(encoding="utf-8")
    rows = yaml.safe_load(text.replace(head, head + added(path)))["families"]
    assert (Family(**rows["bridge_vl"]).picture, len(rows)) == ("<img>", len(FAMILIES) + 1)


def test_the_source_reads_its_files(tmp_path: Path) -> None:
    (tmp_path / "birds_test.json").write_text(json.dumps([{"id": "1", "file": "a.jpg", "species": "wren"}]))
    names = run("dora_vl.data.benchmarks.images", "dora_vl/data/benchmarks/birds.py")
    (split,) = names["birds"](tmp_path, {}, tmp_path)
    (row,) = split.rows()
    example = split.convert(row)
    assert (split.name, example.images, example.answers[0].text) == ("test", ("a.jpg",), "wren")


def test_the_benchmark_scores_with_an_interval() -> None:
    names = run("dora_vl.evaluation.scores.exact", "dora_vl/evaluation/scores/birds.py")
    examples = [Example(id=str(n), answers=(Answer(text="wren"),)) for n in range(10)]
    answers = {str(n): "It is a Wren." if n < 7 else "a crow" for n in range(9)}
    assert get_type_hints(names["score"], names)["answers"] == AnswersById
    scored = names["score"](examples, answers)
    assert scored.metrics == {"accuracy": pytest.approx(70.0)}
    assert scored.failed == ("9",)
    low, high = intervals(scored)["accuracy"]
    assert low < 70 < high
    assert names["BENCHMARK"].modes


def test_the_task_is_one() -> None:
    path = "dora_vl/evaluation/vlbart_tasks.py"
    names = run("dora_vl.evaluation.vlbart_tasks", path)
    assert get_type_hints(names["counting_task"], names)["return"] is names["Subtask"]
    assert added(path).endswith(ROW)
    before = "        vqav2,\n"
    exec(inspect.getsource(names["image_subtasks"]).replace(before, before + ROW), names)
    task = names["image_subtasks"]()["counting"]
    question = Example(id="1", question="How many?")
    assert (task.prompt(question).text, task.target_tokens) == ("count: How many?", 4)


def test_the_adapter_method_is_a_dora_with_an_inner_scale() -> None:
    names = run("dora_vl.core.inject", "dora_vl/core/scaled.py")
    torch.manual_seed(0)
    base = torch.nn.Linear(5, 4)
    plain, bias = base.weight.detach().clone(), base.bias.detach().clone()
    layer = names["ScaledLinear"](base, DoRAConfig(targets=("*",), rank=2, alpha=6.0, dropout=0.0))
    with torch.no_grad():
        for tensor in (layer.lora_A, layer.lora_B, layer.inner_scale, layer.magnitude):
            tensor.add_(torch.randn_like(tensor) * 0.3)
    change = layer.lora_B @ torch.diag(layer.inner_scale) @ layer.lora_A
    whole = plain + 3.0 * change
    expected = layer.magnitude.unsqueeze(1) * whole / whole.norm(dim=1, keepdim=True)
    x = torch.randn(3, 5)
    torch.testing.assert_close(layer(x), x @ expected.T + bias, rtol=1e-4, atol=1e-5)
