"""predictions.jsonl goes on after a crash, and never mixes answers of two adapters."""

from __future__ import annotations

from pathlib import Path

import pytest

from dora_vl.errors import UserError
from dora_vl.evaluation.predictions import Prediction, PredictionsFile, cut_broken_tail, read_predictions

SETTINGS = {"adapter": "a1", "limit": None, "sizes": (1, 2)}


def prediction(name: str) -> Prediction:
    return Prediction(id=name, images=["a.png"], question="what?", truth="red", prediction="rot, grün", kind="color")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of a run that finished two questions."""
    path = tmp_path / "run/predictions.jsonl"
    with PredictionsFile(path, SETTINGS) as file:
        for name in "12":
            file.add(prediction(name))
    return path


def test_a_second_run_finds_what_the_first_one_finished(path: Path) -> None:
    with PredictionsFile(path, SETTINGS) as file:
        assert file.done == {"1": prediction("1"), "2": prediction("2")}
        file.add(prediction("3"))
        file.flush()
        assert list(read_predictions(path)) == ["1", "2", "3"]


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_line_cut_by_a_crash_is_removed_and_asked_again(path: Path, cut: int) -> None:
    path.write_bytes(path.read_bytes()[:-cut])
    with PredictionsFile(path, SETTINGS) as file:
        assert list(file.done) == ["1"]
        file.add(prediction("2"))
    assert list(read_predictions(path)) == ["1", "2"]


@pytest.mark.parametrize(("whole", "tail"), [(b"whole\n", b"x" * 200_000), (b"", b"x" * 10), (b"whole\n", b"")])
def test_a_broken_tail_is_cut(tmp_path: Path, whole: bytes, tail: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(whole + tail)
    assert cut_broken_tail(path) == len(tail)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("stated", [None, "{"])
def test_other_settings_and_none_start_anew(path: Path, stated: str | None) -> None:
    if stated is not None:
        path.with_name("predictions.settings.json").write_text(stated)
    with PredictionsFile(path, SETTINGS if stated else {**SETTINGS, "adapter": "b2"}) as file:
        assert file.done == {}
    assert path.read_text() == ""


@pytest.mark.parametrize(
    "line",
    [
        *(b'{"id": 7}', b'{"id":', "\ud800".encode("utf-8", "surrogatepass"), b"[" * 100_000, b"[1]"),
        *(b'{"id": ["a"], "images": []}', b'{"id": "a", "prediction": "b", "ids": {}}'),
    ],
)
def test_any_broken_line_but_the_last_is_refused(path: Path, line: bytes) -> None:
    path.write_bytes(line + b"\n" + path.read_bytes())
    for read in (read_predictions, lambda path: PredictionsFile(path, SETTINGS)):
        with pytest.raises(UserError):
            read(path)
