"""A person's own pictures train by one command, whatever file they are in, and all files train the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from dora_vl.run.folder import read_log
from tasks import llava_instruct
from tests.training.own_data import HOLD_PICTURES, WRITERS, items, lines, write_llava, write_pictures
from tests.training.tiny_run import write_run, write_tiny_llava

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("own") / "llava")


@pytest.fixture(autouse=True)
def a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    caplog.set_level("INFO")


def run_file(tmp_path: Path, base: Path, records: Path, name: str = "run", **data: object) -> Path:
    return write_run(tmp_path / f"{name}.yaml", base, records, data=data, training={"use_cpu": True, "max_steps": 2})


def losses_of(settings: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Trains by the script and returns what it logged."""
    monkeypatch.setattr(sys, "argv", ["llava_instruct.py", "--config", str(settings)])
    llava_instruct.main()
    return [line["loss"] for line in read_log(settings.with_suffix("") / "log.jsonl") if "loss" in line]


@pytest.mark.slow
def test_every_file_trains_by_one_command_and_gives_the_same_losses(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, found = items(16), {}
    for name, write in WRITERS.items():
        folder = tmp_path / f"data-{name}"
        folder.mkdir()
        if name not in HOLD_PICTURES:
            write_pictures(folder, made)
        settings = run_file(tmp_path, base, write(folder, made), name, image_folder=str(folder))
        found[name] = losses_of(settings, monkeypatch)
    assert len(found["llava"]) == 2
    assert found["llava"][0] != found["llava"][1]
    assert {name: losses == found["llava"] for name, losses in found.items()} == dict.fromkeys(WRITERS, True)


def test_cached_features_of_pictures_in_the_file_give_the_same_losses(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = items(8)
    stored = WRITERS["parquet"](tmp_path, made)
    plain = losses_of(run_file(tmp_path, base, stored, "plain"), monkeypatch)
    cached = losses_of(run_file(tmp_path, base, stored, "cached", cache_features=True, workers=1), monkeypatch)
    assert cached == pytest.approx(plain, abs=1e-5)


def test_a_picture_in_the_file_that_is_none_is_a_bad_sample_of_its_own(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = items(8)
    made[3] = type(made[3])(**{**vars(made[3]), "content": made[3].content[:40]})
    settings = run_file(tmp_path, base, WRITERS["webdataset"](tmp_path, made), max_bad_share=0.2)
    assert len(losses_of(settings, monkeypatch)) == 2
    skipped = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert [one["id"] for one in skipped] == ["n3"]
    assert "in the data file begins as a PNG and is cut" in skipped[0]["reason"]


def test_what_the_test_asks_again_is_counted_and_named(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = items(8)
    write_pictures(tmp_path, made)
    settings = run_file(tmp_path, base, WRITERS["csv"](tmp_path, made))
    again = [{**row, "id": f"t{row['id']}"} for row in json.loads(write_llava(tmp_path, made[2:4]).read_text())]
    other = {**again[0], "id": "other", "image": made[5].picture}
    told = yaml.safe_load(settings.read_text())
    told["evaluation"] = {"file": str(lines(tmp_path / "test.jsonl", [*again, other])), "max_new_tokens": 2}
    settings.write_text(yaml.safe_dump(told))
    losses_of(settings, monkeypatch)
    said = caplog.text
    assert "2 training samples of" in said
    assert "are asked again in" in said
    assert "n2 is tn2 there; n3 is tn3 there" in said
