"""`dora-vl serve` itself: its help, its refusals before any weight is read, and a whole life from start to Ctrl-C."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from dora_vl.cli import main
from tests.app.tiny_served import spread, write_adapter
from tests.backbones.tiny_image_text import write_tiny

ROOT = Path(__file__).parents[2]


def refused(capsys: Any, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["serve", *map(str, arguments)])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_what_is_wrong_is_one_line_before_weights_are_read(tmp_path: Path, capsys: Any) -> None:
    base = write_tiny("qwen2_5_vl", tmp_path / "base")
    (base / "model.safetensors").unlink()
    assert "--adapter" in refused(capsys)
    assert "is not a folder" in refused(capsys, "--adapter", "a=gone")
    assert "two adapters are called 'a'" in refused(capsys, "--adapter", f"a={base}", "--adapter", f"a={base}")
    assert "--adapter-root" in refused(capsys, "--model", base, "--adapter-root", tmp_path / "gone")
    assert "no such folder" in refused(capsys, "--model", "./gone", "--port", 0)
    assert "has no adapter_model.safetensors" in refused(capsys, "--adapter", f"a={tmp_path}", "--port", 0)
    assert "--batch" in refused(capsys, "--model", base, "--batch", 0)
    assert "--port" in refused(capsys, "--model", base, "--port", 70000)
    assert "--host no.such.host.invalid" in refused(capsys, "--model", base, "--host", "no.such.host.invalid")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "choose others" in refused(capsys, "--model", base, "--port", taken.getsockname()[1])


def test_without_its_packages_it_says_what_to_install(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "pip install 'dora-vl[serve]'" in refused(capsys, "--model", tmp_path)


def test_from_start_to_ctrl_c(tmp_path: Path) -> None:
    base = spread(write_tiny("qwen2_5_vl", tmp_path / "base"))
    adapter = write_adapter(base, tmp_path / "one", seed=1, targets=("*language_model*.q_proj",), rank=2, alpha=5.0)
    command = [sys.executable, "-m", "dora_vl.cli", "serve", "--adapter", f"one={adapter}", "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        said = process.stdout.readline()
        assert said.startswith("serving base, one at http://127.0.0.1:"), process.stderr.read()[-2000:]
        client = openai.OpenAI(base_url=said.split()[4], api_key="none", timeout=60)
        assert [card.id for card in client.models.list().data] == ["base", "one"]
        messages: Any = [{"role": "user", "content": "What colour is it?"}]
        assert client.chat.completions.create(model="one", messages=messages, max_tokens=3).usage
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert "Traceback" not in process.stderr.read()
