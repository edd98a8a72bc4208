"""`dora-vl export`: what is typed, written and printed, the certificate, and one line for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dora_vl.cli import main
from tests.adapters.test_hub_names import adapter_on
from tests.evaluation.test_ask_any_model import peft_adapter, spread, write_model
from tests.evaluation.test_certificate import refused
from tests.training.tiny_run import write_tiny_data, write_tiny_llava


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA, an adapter with a trained projector, and questions."""
    folder = tmp_path_factory.mktemp("export")
    adapter_on(spread(write_tiny_llava(folder / "base", width=64)), folder / "adapter")
    write_tiny_data(folder / "data", samples=6)
    return folder


def words(folders: Path, to: Path, *more: object) -> list[str]:
    asked = ("--check", 4, "--questions", folders / "data" / "train.json", "--images", folders / "data")
    found = ("export", "--adapter", folders / "adapter", "--to", to, "--check-tokens", 6, *asked, *more)
    return [str(one) for one in found]


def test_for_vllm(folders: Path, tmp_path: Path, capsys) -> None:
    main(words(folders, tmp_path / "served", "--for", "vllm"))
    said = capsys.readouterr().out
    assert "4 tensors and 2 layers folded in" in said
    assert f"vllm serve {tmp_path / 'served' / 'base'} --enable-lora --max-lora-rank 8 --lora-modules served=" in said
    assert "0 of 4 answers differ" in said
    found = json.loads((tmp_path / "served" / "certificate.json").read_text())
    assert found["models"]["exported"]["largest_logit_difference"] < 1e-2
    assert sorted(path.name for path in (tmp_path / "served").iterdir()) == [
        "adapter",
        "base",
        "certificate.json",
        "certificate.md",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["served"]


@pytest.mark.parametrize("kind", [[], ["q8_0"]])
def test_gguf(folders: Path, tmp_path: Path, capsys, kind: list[str]) -> None:
    pytest.importorskip("gguf", reason="pip install 'dora-vl[gguf]'")
    main(words(folders, tmp_path / "files", "--gguf", *kind, "--most-different", 1))
    said = capsys.readouterr().out
    assert "model.gguf: llama, " in said
    assert "mmproj.gguf: clip, " in said
    found = json.loads((tmp_path / "files" / "certificate.json").read_text())
    assert found["weights"] == f"GGUF {(kind or ['f16'])[0]}"
    assert found["passed"] is True
    gguf = found["models"]["gguf"]
    assert gguf["agreeing_tokens"] > 0.7 * gguf["tokens"] > 0
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == [
        "certificate.json",
        "certificate.md",
        "mmproj.gguf",
        "model.gguf",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["files"]


def test_a_language_model_as_gguf(tmp_path: Path, capsys) -> None:
    pytest.importorskip("gguf", reason="pip install 'dora-vl[gguf]'")
    base = write_model("language", tmp_path / "base")
    adapter = peft_adapter(base, tmp_path / "adapter", use_dora=True)
    rows = [{"id": str(n), "question": f"What is {n} and {n}?", "answer": str(2 * n)} for n in range(5)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ("--check", 5, "--questions", tmp_path / "questions.jsonl", "--template", "vicuna_v1")
    command = ("export", "--gguf", "f32", "--adapter", adapter, "--to", tmp_path / "files", *asked)
    main([str(one) for one in command])
    assert "0 of 5 answers differ" in capsys.readouterr().out


def test_what_cannot_be_exported_is_one_line(folders: Path, tmp_path: Path, capsys) -> None:
    export = ("export", "--adapter", folders / "adapter", "--to", tmp_path / "to")
    assert "one of the arguments --for --gguf is required" in refused_by_argparse(capsys, *export)
    assert "--dtype is of --for vllm" in refused(capsys, *export, "--gguf", "--dtype", "float16")
    twice = ("--adapter", folders / "adapter", "--for", "vllm")
    assert "one adapter is exported at a time" in refused(capsys, *export, *twice)
    base = write_model("qwen2_5_vl", tmp_path / "qwen")
    adapter = peft_adapter(base, tmp_path / "adapter", use_dora=True)
    (base / "model.safetensors").unlink()  # its configuration is enough
    said = refused(capsys, "export", "--adapter", adapter, "--to", tmp_path / "to", "--gguf")
    assert "LLaVA is written" in said
    assert not (tmp_path / "to").exists()


def refused_by_argparse(capsys, *arguments: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(one) for one in arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err
