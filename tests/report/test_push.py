"""`dora-vl push`: what is written, what the hub gets by its own client, and what a refusal says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import huggingface_hub
import pytest
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError

from dora_vl.cli import main
from tests.report.conftest import HOSTILE

REPOSITORY = "someone/shapes"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The hub's client, which sends nothing; a folder that it uploads lies in `uploaded` afterwards."""
    api = create_autospec(HfApi, instance=True)

    def upload(*, folder_path: Path, **_: object) -> SimpleNamespace:
        shutil.copytree(folder_path, tmp_path / "uploaded", dirs_exist_ok=True)
        return SimpleNamespace(commit_url="https://hub.example/commit/1")

    api.upload_folder.side_effect = upload
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **_: api)
    return api


def card_of(folder: Path) -> ModelCard:
    return ModelCard((folder / "hub" / "README.md").read_text(encoding="utf-8"))


def test_the_hub_gets_the_adapter_and_its_card(copied: Path, hub: Any, tmp_path: Path, capsys: Any) -> None:
    main(["push", str(copied), REPOSITORY, "--license", "mit"])
    assert "https://hub.example/commit/1" in capsys.readouterr().out
    hub.create_repo.assert_called_once_with(REPOSITORY, private=True, exist_ok=True)
    assert hub.upload_folder.call_args.kwargs["repo_id"] == REPOSITORY
    uploaded = {path.name: path.read_bytes() for path in (tmp_path / "uploaded").iterdir()}
    names = ("adapter_model.safetensors", "adapter_config.json", "recipe.json")
    sources = [*(copied / "adapter" / name for name in names), copied / "metrics.json", copied / "contact_sheet.png"]
    assert uploaded.pop("README.md").startswith(b"---\n")
    assert uploaded == {path.name: path.read_bytes() for path in sources}
    main(["push", str(copied), REPOSITORY, "--public", "--no-pictures"])
    assert hub.create_repo.call_args.kwargs["private"] is False
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
    kept = "3 of 16 word for word as before; the old ones take 1.25 nats a token before, 2.50 after"
    assert ["answers to other questions", kept] in rows
    assert "the answers do not look" in card.text
    settings = {row[0]: row[1] for row in rows if len(row) == 2}
    assert settings["`training.learning_rate`"] == "`0.005`"
    assert settings["`data.train`"] == "`train.json`"
    assert str(Path(json.loads((copied / "settings.json").read_text())["model"]["base"]).parent) not in str(card)


@pytest.mark.parametrize(
    ("repository", "error"),
    [("no/such/name", None), (REPOSITORY, LocalTokenNotFoundError("no token")), (REPOSITORY, OSError("no\nroute"))],
)
def test_a_hub_that_refuses_or_is_not_there_is_one_line(
    copied: Path, hub: Any, capsys: Any, repository: str, error: Exception | None
) -> None:
    hub.create_repo.side_effect = error
    with pytest.raises(SystemExit, match="2"):
        main(["push", str(copied), repository])
    assert capsys.readouterr().err.count("\n") == 1
    hub.upload_folder.assert_not_called()


def test_a_run_without_an_adapter_has_nothing_to_push(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "adapter").rename(copied / "elsewhere")
    with pytest.raises(SystemExit, match="2"):
        main(["push", str(copied), REPOSITORY, "--dry-run"])
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
