"""`dora-vl demo` itself: its help, its refusals before any weight is read, and a whole life from start to its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForImageTextToText

from dora_vl.adapters.adapter import content_hash
from dora_vl.cli import main
from dora_vl.serving import demo_command
from dora_vl.serving.options import run_name
from tests.app.tiny_served import spread, write_adapter
from tests.backbones.tiny_image_text import write_tiny
from tests.tasks.test_start_of_tasks import in_a_process

ROOT = Path(__file__).parents[2]


def refused(capsys: Any, *arguments: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["demo", *map(str, arguments)])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(("error: ", "usage: "))
    return said


def with_recipe(adapter: Path, base: Path, **changed: Any) -> Path:
    """The recipe that training writes."""
    import json

    recipe = {"base": str(base), "revision": None, "base_sha256": content_hash(base), "dtype": "float32"}
    recipe |= {"template": "tokenizer", "image_aspect": None, "quantisation": None, "max_tokens": 256, **changed}
    (adapter / "recipe.json").write_text(json.dumps(recipe))
    return adapter


def test_what_is_wrong_is_one_line_before_weights_are_read(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    base = write_tiny("qwen2_5_vl", tmp_path / "base")
    settings = {"targets": ("*language_model*.q_proj",), "rank": 2, "alpha": 5.0}
    one = with_recipe(write_adapter(base, tmp_path / "one", seed=1, **settings), base)
    two = with_recipe(write_adapter(base, tmp_path / "two", seed=2, **settings), base, base_sha256="f" * 64)
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda *_, **__: pytest.fail("weights"))
    monkeypatch.setattr(demo_command, "find_spec", lambda name: name)  # as where the extra is installed
    assert "give --adapter DIR" in refused(capsys)
    assert "gone is not a folder" in refused(capsys, "--adapter", "gone")
    assert "gone is not a folder" in refused(capsys, "--adapter", "a=gone")
    assert "two adapters are called 'one'" in refused(capsys, "--adapter", one, "--adapter", f"one={two}")
    (tmp_path / "empty").mkdir()
    assert "has no adapter_model.safetensors" in refused(capsys, "--adapter", tmp_path / "empty", "--port", 0)
    assert "two was trained on a base with sha256 fffff" in refused(
        capsys, "--adapter", one, "--adapter", two, "--port", 0
    )
    monkeypatch.setattr(demo_command, "find_spec", lambda name: None)
    assert "the page needs gradio and uvicorn: pip install 'dora-vl[web]'" in refused(capsys, "--adapter", one)


def test_adapters_are_called_as_their_runs(tmp_path: Path) -> None:
    assert run_name(tmp_path / "runs" / "cats" / "adapter") == "cats"
    assert run_name(tmp_path / "runs" / "cats" / "checkpoint-240" / "adapter") == "cats-240"
    assert run_name(tmp_path / "some" / "peft") == "peft"


def test_help_comes_soon() -> None:
    code = "import sys; from dora_vl.cli import main\ntry: main(['demo', '--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'gradio', 'transformers'} & set(sys.modules)"
    assert "--frames" in in_a_process("-c", code)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_from_start_to_end_without_a_file_left(tmp_path: Path, number: int) -> None:
    pytest.importorskip("gradio", reason="pip install 'dora-vl[web]'")
    base = spread(write_tiny("qwen2_5_vl", tmp_path / "base"))
    settings = {"targets": ("*language_model*.q_proj",), "rank": 2, "alpha": 5.0}
    adapter = write_adapter(base, tmp_path / "runs" / "cats" / "adapter", seed=1, **settings)
    (tmp_path / "temporary").mkdir()
    command = [sys.executable, "-m", "dora_vl.cli", "demo", "--adapter", str(adapter), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "temporary")}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        said = process.stdout.readline()
        assert said.startswith("the base, cats at http://127.0.0.1:"), process.stderr.read()[-2000:]
        with urllib.request.urlopen(said.split()[4], timeout=60) as answer:
            assert b"dora-vl demo" in answer.read()
            assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
        assert list((tmp_path / "temporary").glob("dora-vl-page-*"))
        process.send_signal(number)
        assert process.wait(60) == (0 if number == signal.SIGINT else 128 + number)
        assert "Traceback" not in process.stderr.read()
    assert not list((tmp_path / "temporary").glob("dora-vl-*"))
