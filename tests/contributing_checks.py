"""Checks what CONTRIBUTING.md's changes bring; `test_contributing.py` runs this in a copy of the code that has them."""

import json
from pathlib import Path

import pytest
import torch

from dora_vl import DoRAConfig, apply_dora, load_adapter, merge_dora, save_adapter, trained_parts
from dora_vl.data.benchmarks.table import SOURCES
from dora_vl.data.columns import Columns
from dora_vl.data.example import Answer, Example
from dora_vl.data.readers import read_row
from dora_vl.data.table import load_rows
from dora_vl.errors import BadSample
from dora_vl.evaluation.benchmarks import BENCHMARKS
from dora_vl.evaluation.scores.scored import intervals
from dora_vl.evaluation.vlbart_tasks import image_subtasks
from tests.training.tiny_run import logged, trained, write_pairs, write_run, write_tiny_llava


def test_the_source_reads_its_files(tmp_path: Path) -> None:
    (tmp_path / "birds_test.json").write_text(json.dumps([{"id": "1", "file": "a.jpg", "species": "wren"}]))
    (split,) = SOURCES["birds"].splits(tmp_path, {}, tmp_path)
    (row,) = split.rows()
    example = split.convert(row)
    assert (split.name, example.images, example.answers[0].text) == ("test", ("a.jpg",), "wren")


def test_the_row_format_is_read_from_files_by_any_name(tmp_path: Path) -> None:
    texts = ["What is it?", "A wren.", "Sure?", "Yes."]
    spoken = [("user", "<image>\nWhat is it?"), ("assistant", "A wren."), ("user", "Sure?"), ("assistant", "Yes.")]
    (tmp_path / "a.jsonl").write_text(json.dumps({"talk": texts, "image": "a.jpg", "topic": "birds"}))
    rows = load_rows(str(tmp_path / "a.jsonl"), columns=Columns({"talk": "dialog"}))
    assert rows.rows["format"][:] == ["dialogs"]
    for example in (rows[0], read_row({"dialog": texts, "image": "a.jpg"})):
        assert isinstance(example, Example)
        assert [(turn.role, turn.text) for turn in example.turns] == spoken
    with pytest.raises(BadSample):
        read_row({"dialog": "Hello."})


def test_the_benchmark_scores_with_an_interval() -> None:
    examples = [Example(id=str(n), answers=(Answer(text="wren"),)) for n in range(10)]
    answers = {str(n): "It is a Wren." if n < 7 else "a crow" for n in range(9)}
    scored = BENCHMARKS["birds"].modes[""](examples, answers)
    assert scored.metrics == {"accuracy": pytest.approx(70.0)}
    assert scored.failed == ("9",)
    low, high = intervals(scored)["accuracy"]
    assert low < 70 < high


def test_the_task_asks_how_many() -> None:
    task = image_subtasks()["counting"]
    assert (task.prompt(Example(id="1", question="How many?")).text, task.target_tokens) == ("count: How many?", 4)


def test_the_loss_trains_pairs(tmp_path: Path) -> None:
    """Before the first step nothing has been gained over the reference: each pair costs max(0, 1 - 0)."""
    base = write_tiny_llava(tmp_path / "base")
    training = {"max_steps": 2, "warmup_steps": 0, "per_device_train_batch_size": 6, "learning_rate": 2e-2}
    objective = {"loss": "hinge", "beta": 0.5}
    run_file = write_run(
        tmp_path / "run.yaml", base, write_pairs(tmp_path / "data"), training=training, objective=objective
    )
    first, second = logged(trained(run_file))
    assert first["loss"] == pytest.approx(1.0, abs=1e-3)
    assert second["loss"] < first["loss"]
    assert second["rewards/margin"] > 0


def test_the_adapter_method_is_a_dora_with_an_inner_scale(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4))
    plain, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    apply_dora(model, DoRAConfig(targets=("*",), method="scaled", rank=2, alpha=6.0, dropout=0.0))
    layer, x = model[0], torch.randn(3, 5)
    weights = [weight for part in trained_parts(model) for weight in part.parameters.values()]
    assert {id(layer.lora_A), id(layer.lora_B), id(layer.inner_scale), id(layer.magnitude)} == set(map(id, weights))
    optimizer = torch.optim.AdamW(weights, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert not torch.allclose(layer.inner_scale, torch.ones(2))
    whole = plain + 3.0 * layer.lora_B @ torch.diag(layer.inner_scale) @ layer.lora_A
    expected = x @ (layer.magnitude.unsqueeze(1) * whole / whole.norm(dim=1, keepdim=True)).T + bias
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    save_adapter(model, tmp_path / "adapter")
    other = torch.nn.Sequential(torch.nn.Linear(5, 4))
    other.load_state_dict({"0.weight": plain, "0.bias": bias})
    load_adapter(other, tmp_path / "adapter")
    torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-5)
    merge_dora(other.eval())
    torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-5)
