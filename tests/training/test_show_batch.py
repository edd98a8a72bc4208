"""`dora-vl show batch`: the batch is the one that training sees, its colours are the labels', bad input is one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dora_vl.cli import main
from dora_vl.run.settings_parser import read_run, read_run_file
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.progress import BatchStatistics
from dora_vl.training.run import train
from dora_vl.training.show import BatchView, ShownSequence, TokenPiece, first_batch, shown_settings, terminal_lines
from dora_vl.training.vlbart_pipeline import VlBartPipeline
from tests.training.tiny_run import write_run, write_tiny_data, write_tiny_llava
from tests.training.tiny_vlbart_run import write_vlbart_data, write_vlbart_run


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    base, records = write_tiny_llava(folder / "base"), write_tiny_data(folder / "data")
    return write_run(folder / "run.yaml", base, records, training={"use_cpu": True})


def seen_first(monkeypatch: pytest.MonkeyPatch, pipeline: Any) -> dict[str, Any]:
    """The first micro-batch of a training of one step."""
    seen: list[dict[str, Any]] = []
    take = BatchStatistics.take

    def kept(self: BatchStatistics, batch: dict[str, Any]) -> dict[str, Any]:
        seen.append(dict(batch))
        return take(self, batch)

    monkeypatch.setattr(BatchStatistics, "take", kept)
    train(pipeline)
    monkeypatch.undo()
    return seen[0]


def of_kind(row: Any, kind: str) -> str:
    text = "".join(piece.text for piece in row.lines[0] if piece.kind == kind)
    return text.replace("Ġ", " ")  # the tiny tokenizer has no decoder


def counts(line: Any, kind: str) -> int:
    return sum(piece.count for piece in line if piece.kind == kind)


@pytest.mark.parametrize("grouped", ["true", "false"])
def test_it_is_the_batch_that_training_sees(run_file, tmp_path, monkeypatch, grouped) -> None:
    settings = [
        "--data.packing=plain",
        f"--data.group_by_modality_length={grouped}",
        f"--training.output_dir={tmp_path / 'out'}",
    ]
    config = read_run_file(run_file, *settings, "--training.max_steps=1")
    expected = seen_first(monkeypatch, DecoderPipeline(config))
    view = first_batch(DecoderPipeline(shown_settings(read_run_file(run_file, *settings), tmp_path / "none")))
    records = {row["id"]: row for row in json.loads(Path(str(config.data.train)).read_text())}
    assert len(view.sequences) == 4
    for row, ids, mask, labels in zip(
        view.sequences, expected["input_ids"], expected["attention_mask"], expected["labels"], strict=True
    ):
        (line,) = row.lines
        assert sum(piece.count for piece in line) == len(ids)
        assert counts(line, "trained") == int((labels != -100).sum())
        assert counts(line, "padding") == int((mask == 0).sum())
        human, answer = (turn["value"] for turn in records[row.title]["conversations"])
        assert of_kind(row, "trained").strip() == f"{answer}</s>"
        assert human.removeprefix("<image>\n") in of_kind(row, "context")
        assert [(piece.text, piece.count) for piece in line if piece.kind == "picture-place"] == [("<image>", 4)]


def test_a_vlbarts_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_vlbart_data(tmp_path / "data")
    bart_file = write_vlbart_run(tmp_path / "bart.yaml", data, ("vqav2", "tvqa"), training={"use_cpu": True})
    config = read_run([f"--config={bart_file}", "--training.max_steps=1"])
    expected = seen_first(monkeypatch, VlBartPipeline(config))
    view = first_batch(VlBartPipeline(shown_settings(config, tmp_path / "none")))
    for row, ids, mask, labels in zip(
        view.sequences, expected["input_ids"], expected["attention_mask"], expected["labels"], strict=True
    ):
        prompt, answer = row.lines
        assert [sum(piece.count for piece in line) for line in row.lines] == [len(ids), len(labels)]
        assert counts(prompt, "context") == int(mask.sum())
        assert counts(prompt, "padding") == int((mask == 0).sum())
        assert counts(answer, "trained") == int((labels != -100).sum())


def test_the_command_writes_nothing_and_prints_signs(run_file, tmp_path, capsys) -> None:
    """Of a base whose weights are gone."""
    base = shutil.copytree(read_run_file(run_file).model.base, tmp_path / "base")
    (base / "model.safetensors").unlink()
    before = sorted(run_file.parent.rglob("*"))
    words = ["--data.packing", "plain", "--training.per_device_train_batch_size", "3", "--model.base", str(base)]
    main(["show", "batch", str(run_file), *words])
    assert sorted(run_file.parent.rglob("*")) == before
    output = capsys.readouterr().out
    assert "samples 3, positions 3 sequences of" in output
    assert "<<image> × 4>" in output
    assert "\x1b[" not in output


def test_signs_colours_and_foreign_text() -> None:
    hostile = "<script>alert(1)</script>\x1b[31m\n"
    words = (("a", "context"), (" b", "trained"), (hostile, "trained"))
    pieces = (*(TokenPiece(text, kind) for text, kind in words), TokenPiece("padding", "padding", 3))
    view = BatchView(sequences=(ShownSequence(title="<b>row</b>", lines=(pieces,)),), facts=(("samples", "1"),))
    plain = list(terminal_lines(view, colours=False))
    assert plain[-1] == "  a[ b<script>alert(1)</script>␛[31m⏎]{padding × 3}"
    coloured = list(terminal_lines(view, colours=True))[-1]
    assert coloured.count("\x1b[0m") == 4
    assert "\x1b[31m" not in coloured
