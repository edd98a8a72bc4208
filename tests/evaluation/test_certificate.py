"""`dora-vl merge --check`: merged and unmerged answer the same questions; what differs is counted and shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_vl.adapters.adapter import content_hash
from dora_vl.cli import main
from dora_vl.evaluation.ask import Assistant
from dora_vl.evaluation.open_model import Wanted, open_model
from dora_vl.evaluation.prompt_inputs import Shown
from tests.adapters.test_hub_names import adapter_on
from tests.evaluation.test_ask_any_model import peft_adapter, spread, write_model
from tests.training.tiny_run import write_tiny_data, write_tiny_llava


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA, a DoRA of PEFT's on it, and ten questions about pictures."""
    folder = tmp_path_factory.mktemp("check")
    peft_adapter(write_model("llava", folder / "base"), folder / "adapter", use_dora=True)
    write_tiny_data(folder / "data", samples=10)
    return folder


def words(folders: Path, to: Path, *more: object) -> list[str]:
    asked = ["--questions", folders / "data" / "train.json", "--images", folders / "data", "--check-tokens", 6]
    return [str(one) for one in ("merge", "--adapter", folders / "adapter", "--to", to, *asked, *more)]


def test_a_merge_that_answers_alike_passes_and_says_so(folders: Path, tmp_path: Path, capsys) -> None:
    main(words(folders, tmp_path / "merged", "--check", 4))
    said = capsys.readouterr().out
    assert "0 of 4 answers differ (0.0%), 0.0% may" in said
    found = json.loads((tmp_path / "merged" / "certificate.json").read_text())
    assert found["passed"] is True
    assert found["n"] == 4
    assert [one["id"] for one in found["answers"]] == ["sample-0", "sample-2", "sample-5", "sample-7"]
    merged = found["models"]["merged"]
    assert merged["different_answers"] == 0
    assert merged["agreeing_tokens"] == merged["tokens"] > 4
    assert 0 < merged["largest_logit_difference"] < 1e-3
    assert found["computed in"] == "float32"
    text = (tmp_path / "merged" / "certificate.md").read_text()
    assert "passed: 0 of 4" in text
    assert "Answers that differ" not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]
    main(words(folders, tmp_path / "merged", "--check", 4))  # an earlier result with its certificate is replaced
    assistant = open_model(Wanted(adapter=folders / "adapter")).adapted
    assert isinstance(assistant, Assistant)
    for one in found["answers"]:
        assert one["unmerged"] == one["merged"]["answer"] == answer(assistant, folders, one["id"])


def answer(assistant: Assistant, folders: Path, name: str) -> str:
    """What the unmerged model says, asked by itself."""
    from dora_vl.data.pictures import open_picture
    from dora_vl.evaluation.questions import read_questions

    questions, _ = read_questions(folders / "data" / "train.json")
    question = next(one for one in questions if one.id == name)
    pictures = [open_picture(folders / "data", path) for path in question.images]
    return assistant.answer(question, Shown(pictures=tuple(pictures)), max_new_tokens=6).strip()


def broken_merge(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Merging that gets the output head wrong."""
    from dora_vl.evaluation import merge_command

    right = merge_command.merge

    def wrong(plan, arguments):
        yield from right(plan, arguments)
        file = arguments.to / "model.safetensors"
        weights = load_file(file)
        key = next(key for key in weights if key.endswith("lm_head.weight"))
        noise = torch.randn(weights[key].shape, generator=torch.Generator().manual_seed(0))
        save_file({**weights, key: weights[key] + factor * noise}, file, metadata={"format": "pt"})

    monkeypatch.setattr(merge_command, "merge", wrong)


def test_a_merge_that_answers_otherwise_fails_with_status_1(
    folders: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_merge(monkeypatch, 30.0)
    with pytest.raises(SystemExit) as stopped:
        main(words(folders, tmp_path / "merged", "--check"))
    assert stopped.value.code == 1
    assert "FAILED: " in capsys.readouterr().out
    found = json.loads((tmp_path / "merged" / "certificate.json").read_text())
    merged = found["models"]["merged"]
    differing = [one for one in found["answers"] if one["unmerged"] != one["merged"]["answer"]]
    assert found["passed"] is False
    assert found["n"] == 10  # as many as the file has
    assert merged["different_answers"] == len(differing) > 5
    assert merged["agreeing_tokens"] < merged["tokens"]
    assert merged["largest_logit_difference"] > 1
    text = (tmp_path / "merged" / "certificate.md").read_text()
    table = text.split("## Answers that differ")[1].split("##")[0]
    assert table.count("\n| sample-") == len(differing)
    main(words(folders, tmp_path / "merged", "--check", "--most-different", 1.0))
    assert "100.0% may" in capsys.readouterr().out


def test_the_runs_own_test_is_asked(folders: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    for path in (folders / "adapter").iterdir():
        if path.is_file():
            (run / "adapter" / path.name).write_bytes(path.read_bytes())
    settings = {
        "evaluation": {"file": str(folders / "data" / "train.json"), "image_folder": None},
        "data": {"image_folder": str(folders / "data")},
    }
    (run / "settings.json").write_text(json.dumps(settings))
    main([str(one) for one in ("merge", "--adapter", run / "adapter", "--to", tmp_path / "m", "--check", 3)])
    assert "0 of 3 answers differ" in capsys.readouterr().out


def test_several_adapters_are_checked_as_their_combination(folders: Path, tmp_path: Path, capsys) -> None:
    other = peft_adapter(folders / "base", tmp_path / "other", use_dora=True, targets=("v_proj", "down_proj"))
    more = ["--adapter", other, "--weight", 0.6, "--weight", 0.5, "--check", 3]
    main(words(folders, tmp_path / "merged", *more))
    assert "0 of 3 answers differ" in capsys.readouterr().out
    found = json.loads((tmp_path / "merged" / "certificate.json").read_text())
    assert list(found["adapters"].values()) == [0.6, 0.5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "other"]


def refused(capsys, *arguments: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(one) for one in arguments])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_what_cannot_be_checked_is_said_before_anything_is_merged(folders: Path, tmp_path: Path, capsys) -> None:
    merge = ("merge", "--adapter", folders / "adapter", "--to", tmp_path / "merged")
    questions = ("--questions", folders / "data" / "train.json")
    assert "lies in no run with a test of its own" in refused(capsys, *merge, "--check")
    assert "add --check" in refused(capsys, *merge, *questions)
    assert "not one of 10 pictures is in" in refused(capsys, *merge, "--check", *questions, "--images", tmp_path)
    assert "it is a share" in refused(capsys, *merge, "--check", *questions, "--most-different", 2)
    language = write_model("language", tmp_path / "language")
    adapter = peft_adapter(language, tmp_path / "words", use_dora=True)
    words = ("merge", "--adapter", adapter, "--to", tmp_path / "merged", "--check", *questions)
    said = refused(capsys, *words, "--images", folders / "data", "--template", "vicuna_v1")
    assert "is a language model, which takes none" in said
    assert not (tmp_path / "merged").exists()


def test_values_that_the_adapter_never_saw_fail(folders: Path, tmp_path: Path, capsys) -> None:
    """A base that was quantised for training merges into its values after that; its stored ones make another model."""
    pytest.importorskip("bitsandbytes", reason="pip install 'dora-vl[quantised]'")
    base = spread(write_tiny_llava(tmp_path / "base", width=64))
    adapter = adapter_on(base, tmp_path / "adapter")
    recipe = json.loads((adapter / "recipe.json").read_text())
    recipe |= {"base": str(base), "base_sha256": content_hash(base), "template": "vicuna_v1"}
    recipe |= {"revision": None, "image_aspect": "pad", "dtype": "float32", "max_tokens": 256, "quantisation": "nf4"}
    (adapter / "recipe.json").write_text(json.dumps(recipe))
    asked = ("--questions", folders / "data" / "train.json", "--images", folders / "data", "--check", 4)
    merge = [str(one) for one in ("merge", "--adapter", adapter, "--to", tmp_path / "merged", *asked)]
    main(merge)
    assert "0 of 4 answers differ" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main([*merge, "--base-values", "stored"])
    assert stopped.value.code == 1
