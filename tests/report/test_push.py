"""`dora-vl push`: what is written, what the hub gets by its own client, and what a refusal says; against a stand-in."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub import ModelCard

from dora_vl.cli import main
from dora_vl.report.push import without_folder
from tests.report.conftest import HOSTILE

REPOSITORY = "someone/shapes"


class Hub(ThreadingHTTPServer):
    """Answers as the hub does to one commit: weights go to a storage of their own, small files into the commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.refuses = False


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def do_PUT(self) -> None:
        content = self.body()
        name = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == name
        self.server.stored[name] = content
        self.reply({})

    def do_POST(self) -> None:
        hub, content = self.server, self.body()
        hub.tokens.add(self.headers.get("Authorization"))
        if hub.refuses:
            self.reply({"error": "You don't have the rights to create a model under this namespace"}, 403)
        elif self.path == "/api/repos/create":
            hub.created.append(json.loads(content))
            self.reply({"url": f"{hub.address}/{REPOSITORY}", "name": REPOSITORY})
        elif self.path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif self.path == f"/api/models/{REPOSITORY}/preupload/main":
            modes = [
                {"path": file["path"], "shouldIgnore": False, "oid": None}
                | {"uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular"}
                for file in json.loads(content)["files"]
            ]
            self.reply({"files": modes})
        elif self.path == f"/{REPOSITORY}.git/info/lfs/objects/batch":
            objects = [
                {**item, "actions": {"upload": {"href": f"{hub.address}/storage/{item['oid']}"}}}
                for item in json.loads(content)["objects"]
            ]
            self.reply({"transfer": "basic", "objects": objects})
        else:
            assert self.path == f"/api/models/{REPOSITORY}/commit/main"
            for line in map(json.loads, content.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    assert value["encoding"] == "base64"
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.stored[value["oid"]]
            self.reply({"commitUrl": f"{hub.address}/{REPOSITORY}/commit/1", "commitOid": "1", "success": True})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # the stand-in speaks LFS
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def card_of(folder: Path) -> ModelCard:
    return ModelCard((folder / "hub" / "README.md").read_text(encoding="utf-8"))


def test_the_hub_holds_the_adapter_and_its_card(copied: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    main(["push", str(copied), REPOSITORY, "--license", "mit"])
    assert hub.address in capsys.readouterr().out
    ((created),) = hub.created
    assert (created["name"], created["organization"], created["visibility"]) == ("shapes", "someone", "private")
    assert hub.tokens == {"Bearer hf_secret"}
    adapter = copied / "adapter"
    for name in ("adapter_model.safetensors", "adapter_config.json", "recipe.json"):
        assert hub.files[name] == (adapter / name).read_bytes()
    assert hub.files["contact_sheet.png"] == (copied / "contact_sheet.png").read_bytes()
    assert hub.files["README.md"] == (copied / "hub" / "README.md").read_bytes()
    assert set(hub.files) == {path.name for path in (copied / "hub").iterdir()}
    main(["push", str(copied), REPOSITORY, "--public", "--no-pictures"])
    assert hub.created[1]["visibility"] == "public"
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
    assert ["perplexity of other text", "22.0 before, 30.5 after (1.39 times; up to 1.3 is small)"] in rows
    kept = "3 of 16 unchanged word for word; negative log-likelihood of the old answers "
    kept += "1.25 nats per token before, 2.50 after; it forgets: train fewer epochs, or raise data.replay"
    assert ["answers to other questions", kept] in rows
    assert "the answers do not look" in card.text
    settings = {row[0]: row[1] for row in rows if len(row) == 2}
    assert settings["`training.learning_rate`"] == "`0.005`"
    assert settings["`data.train`"] == "`train.json`"
    assert (
        without_folder('["/home/a/b.json", {"path": "/c.json"}, "d/e.json"]')
        == '["b.json", {"path": "c.json"}, "d/e.json"]'
    )
    assert str(Path(json.loads((copied / "settings.json").read_text())["model"]["base"]).parent) not in str(card)


def test_nothing_is_uploaded_where_the_hub_refuses(copied: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.refuses = True
    for words in ([REPOSITORY], ["no/such/name"]):
        with pytest.raises(SystemExit) as stopped:
            main(["push", str(copied), *words])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert "hf_secret" not in error
        assert words[0] in error
    assert hub.files == {}


def test_a_hub_that_is_not_there_is_one_line(copied: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SystemExit) as stopped:
        main(["push", str(copied), REPOSITORY])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


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
