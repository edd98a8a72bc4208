"""`dora-vl push`: what is written, what the hub's client is told, and what a refusal says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub.constants
import pytest
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HTTPError

from dora_vl.cli import main
from tests.report.conftest import HOSTILE

REPOSITORY = "someone/shapes"


@pytest.fixture
def hub() -> Iterator[dict[str, Any]]:
    """The two calls of the hub's client, by its own signatures."""
    calls = dict.fromkeys(("create_repo", "upload_folder"), mock.DEFAULT)
    with mock.patch.multiple(HfApi, autospec=True, **calls) as patched:
        patched["upload_folder"].return_value.commit_url = "https://hub.example/commit/1"
        yield patched


def card_of(folder: Path) -> ModelCard:
    return ModelCard((folder / "hub" / "README.md").read_text(encoding="utf-8"))


def test_the_hub_gets_the_adapter_and_its_card(copied: Path, hub: dict[str, Any], capsys: Any) -> None:
    main(["push", str(copied), REPOSITORY, "--license", "mit"])
    assert "https://hub.example/commit/1" in capsys.readouterr().out
    hub["create_repo"].assert_called_once_with(mock.ANY, REPOSITORY, private=True, exist_ok=True)
    upload = hub["upload_folder"].call_args.kwargs
    assert (upload["repo_id"], upload["folder_path"]) == (REPOSITORY, copied / "hub")
    adapter = {name: copied / "adapter" / name for name in ("adapter_model.safetensors", "adapter_config.json")}
    adapter |= {"recipe.json": copied / "adapter" / "recipe.json", "contact_sheet.png": copied / "contact_sheet.png"}
    for name, own in adapter.items():
        assert (copied / "hub" / name).read_bytes() == own.read_bytes()
    main(["push", str(copied), REPOSITORY, "--public", "--no-pictures"])
    assert hub["create_repo"].call_args.kwargs["private"] is False
    assert not (copied / "hub" / "contact_sheet.png").exists()


def test_the_card_says_what_the_run_scored(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = json.loads((copied / "metrics.json").read_text())
    entry = metrics["sets"]["train"]
    entry["baselines"]["warning"] = "the answers do not look"
    answers = {"kept": 3, "n": 16, "nats": {"base": 1.25, "adapted": 2.5}}
    metrics["forgetting"] = {"perplexity": {"base": 22.0, "adapted": 30.5}, "answers": answers}
    (copied / "metrics.json").write_text(json.dumps(metrics))
    main(["push", str(copied), REPOSITORY, "--dry-run"])
    card, accuracy = card_of(copied), entry["metrics"]["accuracy"]
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type) == ("train", entry["headline"])
    assert result.metric_value == pytest.approx(entry["metrics"][entry["headline"]]["value"])
    assert card.data.base_model is None  # it is a folder of this machine
    low, high = accuracy["interval_95"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.text.splitlines() if "|" in line]
    assert ["train", "accuracy", f"{accuracy['value']:.2f}", f"{low:.2f} to {high:.2f}", str(accuracy["n"])] in rows
    assert any(row[1] == "with pictures exchanged" for row in rows if len(row) == 5)
    assert ["perplexity of other text", "22.0 before, 30.5 after (1.39 times)"] in rows
    assert any(row[0] == "answers to other questions" and row[1].startswith("3 of 16") for row in rows)
    assert "the answers do not look" in card.text
    settings = {row[0]: row[1] for row in rows if len(row) == 2}
    assert settings["`training.learning_rate`"] == "`0.005`"
    assert settings["`data.train`"] == "`train.json`"
    assert str(Path(json.loads((copied / "settings.json").read_text())["model"]["base"]).parent) not in str(card)


def test_a_hub_that_refuses_or_is_not_there_is_one_line(copied: Path, monkeypatch: Any, capsys: Any) -> None:
    def fails(repository: str) -> None:
        with pytest.raises(SystemExit) as stopped:
            main(["push", str(copied), repository])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "hf_secret" not in error

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fails(REPOSITORY)
    fails("no/such/name")
    with mock.patch.object(HfApi, "create_repo", autospec=True, side_effect=HTTPError("403: no rights here")):
        fails(REPOSITORY)


def test_a_run_without_an_adapter_has_nothing_to_push(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "adapter").rename(copied / "elsewhere")
    with pytest.raises(SystemExit) as stopped:
        main(["push", str(copied), REPOSITORY, "--dry-run"])
    assert stopped.value.code == 2
    assert not (copied / "hub").exists()


def test_a_label_of_the_data_stays_in_its_cell(copied: Path) -> None:
    metrics = json.loads((copied / "metrics.json").read_text())
    metrics["sets"][f"a|b{HOSTILE}\nc"] = metrics["sets"]["train"]
    (copied / "metrics.json").write_text(json.dumps(metrics))
    main(["push", str(copied), REPOSITORY, "--dry-run"])
    rows = [line for line in card_of(copied).text.splitlines() if line.startswith("| a\\")]
    assert len(rows) == len(metrics["sets"]["train"]["metrics"]) + 3  # the baselines
    assert all(line.count("|") - line.count("\\|") == 6 for line in rows)
    assert "<script>" not in card_of(copied).text
