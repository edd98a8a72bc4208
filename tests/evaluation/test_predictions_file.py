"""predictions.jsonl goes on after a crash, and never mixes answers of two adapters."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_vl.errors import UserError
from dora_vl.evaluation.predictions import Prediction, PredictionsFile, cut_broken_tail, read_predictions

SETTINGS = {"adapter": "a1", "limit": None, "sizes": (1, 2)}


def prediction(name: str, text: str = "rot, grün") -> Prediction:
    return Prediction(id=name, images=["a.png"], question="what?", truth="red", prediction=text, kind="color")


def write(path: Path, *names: str) -> None:
    with PredictionsFile(path, SETTINGS) as file:
        for name in names:
            file.add(prediction(name))


def test_a_second_run_finds_what_the_first_one_finished(tmp_path: Path) -> None:
    path = tmp_path / "run/predictions.jsonl"
    write(path, "1", "2")
    with PredictionsFile(path, SETTINGS) as file:
        assert file.done == {"1": prediction("1"), "2": prediction("2")}
        file.add(prediction("3"))
        file.flush()
        assert list(read_predictions(path)) == ["1", "2", "3"]


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_line_cut_by_a_crash_is_removed_and_asked_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "predictions.jsonl"
    write(path, "1", "2")
    path.write_bytes(path.read_bytes()[:-cut])
    with PredictionsFile(path, SETTINGS) as file:
        assert list(file.done) == ["1"]
        file.add(prediction("2"))
    assert list(read_predictions(path)) == ["1", "2"]


def test_a_long_broken_tail_and_a_file_without_any_newline_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "long"
    path.write_bytes(b"whole\n" + b"x" * 200_000)
    assert cut_broken_tail(path) == 200_000
    assert path.read_bytes() == b"whole\n"
    path.write_bytes(b"x" * 10)
    assert cut_broken_tail(path) == 10
    assert path.read_bytes() == b""
    assert cut_broken_tail(path) == 0


def test_other_settings_start_anew(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    write(path, "1")
    with PredictionsFile(path, {**SETTINGS, "adapter": "b2"}) as file:
        assert file.done == {}
    assert path.read_text() == ""


def test_a_file_without_its_settings_is_not_trusted(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    write(path, "1")
    (tmp_path / "predictions.settings.json").write_text("{")
    with PredictionsFile(path, SETTINGS) as file:
        assert file.done == {}


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    write(path, "1", "2")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], '{"id": 7}', lines[1], ""]))
    with pytest.raises(UserError):
        PredictionsFile(path, SETTINGS)


@pytest.mark.parametrize(
    "line", ['{"id":', "\ud800".encode("utf-8", "surrogatepass"), "[" * 100_000, '{"id": ["a"], "images": []}', "[1]"]
)
def test_any_broken_line_says_what_to_do(tmp_path: Path, line: str | bytes) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_bytes((line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(UserError):
        read_predictions(path)
