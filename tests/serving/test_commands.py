"""`dora-vl serve` and `dora-vl demo`: refusals before any weight is read, and a whole life from start to end."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import openai
import pytest
from transformers import AutoModelForImageTextToText

from dora_vl.errors import UserError
from dora_vl.serving import demo_command, serve_command
from dora_vl.serving.options import ServerSettings, adapters_by_name, run_name
from tests.backbones.tiny_image_text import write_tiny
from tests.serving.tiny_served import with_recipe, write_adapter

ROOT = Path(__file__).parents[2]
SETTINGS: Any = {"targets": ("*language_model*.q_proj",), "rank": 2, "alpha": 5.0}


def refused(command: ModuleType, *arguments: object) -> str:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(UserError) as error:
        list(command.run(parser.parse_args([str(word) for word in arguments])))
    return str(error.value)


@pytest.mark.parametrize("command", [serve_command, demo_command])
def test_what_is_wrong_is_told_before_weights_are_read(command: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    base = write_tiny("qwen2_5_vl", tmp_path / "base")
    first = with_recipe(write_adapter(base, tmp_path / "one", seed=1, **SETTINGS), base)
    second = with_recipe(write_adapter(base, tmp_path / "two", seed=2, **SETTINGS), base, base_sha256="f" * 64)
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda *_, **__: pytest.fail("weights"))
    monkeypatch.setattr(demo_command, "find_spec", lambda name: name)  # as where the extra is installed
    refused(command, *(["--no-train"] if command is demo_command else []))
    refused(command, "--adapter", "gone")
    refused(command, "--adapter", f"one={second}", "--adapter", first)
    assert "empty" in refused(command, "--adapter", tmp_path / "empty", "--port", 0)
    assert "f" * 12 in refused(command, "--adapter", first, "--adapter", second, "--port", 0)
    refused(command, "--adapter", first, "--host", "no.such.host.invalid")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused(command, "--adapter", first, "--port", taken.getsockname()[1])
    for words in (["--batch", "0"], ["--port", "70000"]):
        with pytest.raises(SystemExit):
            refused(command, *words)
    if command is serve_command:
        refused(command, "--model", "./gone", "--port", 0)


def test_every_number_of_the_documentation_is_its_options_default() -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    of_rows = [zip(row[1].split(", "), row[2].split(", "), strict=False) for row in rows if len(row) == 4]
    documented = {name: value for pairs in of_rows for name, value in pairs}
    defaults = {f"`--{entry.name.replace('_', '-')}`": entry.default for entry in dataclasses.fields(ServerSettings)}
    shared = documented.keys() & defaults.keys()
    assert len(shared) >= 10
    assert {name: float(documented[name]) for name in shared} == {name: defaults[name] for name in shared}


def test_without_its_packages_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "dora-vl[serve]" in refused(serve_command, "--model", tmp_path)
    monkeypatch.setattr(demo_command, "find_spec", lambda name: None)
    assert "dora-vl[web]" in refused(demo_command, "--adapter", tmp_path)


def test_adapters_are_called_as_their_runs(tmp_path: Path) -> None:
    assert run_name(tmp_path / "runs" / "cats" / "adapter") == "cats"
    assert run_name(tmp_path / "runs" / "cats" / "checkpoint-240" / "adapter") == "cats-240"
    assert run_name(tmp_path / "some" / "peft") == "peft"
    (tmp_path / "a=b").mkdir()
    assert adapters_by_name([f"{tmp_path}/a=b", f"other={tmp_path}"]) == {"a=b": tmp_path / "a=b", "other": tmp_path}


@contextlib.contextmanager
def started(folder: Path, verb: str, adapter: Path) -> Iterator[tuple[Any, str]]:
    (folder / "temporary").mkdir()
    command = [sys.executable, "-m", "dora_vl.cli", verb, "--adapter", str(adapter), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "temporary")}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment, **pipes) as process:
        line = process.stdout.readline()
        assert " at http://127.0.0.1:" in line, process.stderr.read()[-2000:]
        yield process, line
        assert "Traceback" not in process.stderr.read()
    assert not list((folder / "temporary").glob("dora-vl-*"))


def test_the_server_from_start_to_ctrl_c(tmp_path: Path, folders: dict[str, Path]) -> None:
    with started(tmp_path, "serve", folders["one"]) as (process, line):
        client = openai.OpenAI(base_url=line.split()[-3], api_key="none", timeout=60)
        assert [card.id for card in client.models.list().data] == ["model", "one"]
        messages: Any = [{"role": "user", "content": "What colour is it?"}]
        assert client.chat.completions.create(model="one", messages=messages, max_tokens=3).usage
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_page_from_start_to_end(tmp_path: Path, folders: dict[str, Path], number: signal.Signals) -> None:
    pytest.importorskip("gradio", reason="pip install '.[web]'")
    with started(tmp_path, "demo", folders["one"]) as (process, line):
        with urllib.request.urlopen(line.split()[-3], timeout=60) as answer:
            assert b"dora-vl demo" in answer.read()
            assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
        assert list((tmp_path / "temporary").glob("dora-vl-page-*"))
        process.send_signal(number)
        assert process.wait(60) == 128 + number
