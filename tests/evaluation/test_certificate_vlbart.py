"""`dora-vl merge --check` of a VL-BART: closed answers about pictures, captions and choices about videos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dora_vl.cli import main
from tests.evaluation.test_certificate import refused
from tests.tasks.test_closed_answers import COLOURS, asked
from tests.tasks.test_video_qa import place, vlbart

__all__ = ["asked", "place", "vlbart"]


def certificate(capsys: Any, *arguments: object) -> dict[str, Any]:
    """Of a merge with these options."""
    main(["merge", *map(str, arguments)])
    capsys.readouterr()
    target = Path(str(arguments[arguments.index("--to") + 1]))
    return json.loads((target / "certificate.json").read_text())


def test_answers_from_a_list_are_those_of_the_adapter(asked: Path, tmp_path: Path, capsys: Any) -> None:
    merge = ("--adapter", asked / "run" / "adapter", "--to", tmp_path / "merged", "--images", asked / "pictures")
    found = certificate(capsys, *merge, "--questions", asked / "gqa.jsonl", "--check", 4)
    assert found["passed"] is True
    assert [one["id"] for one in found["answers"]] == [COLOURS[place] for place in (0, 1, 3, 4)]
    assert found["models"]["merged"]["different_answers"] == 0
    assert 0 < found["models"]["merged"]["largest_logit_difference"] < 1e-3
    assert all(one["unmerged"] == one["merged"]["answer"] for one in found["answers"])
    assert all(one["question"] == "what color is it?" for one in found["answers"])


def test_a_merge_that_answers_otherwise_fails(
    asked: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dora_vl.evaluation import merge_command

    right = merge_command.merge

    def wrong(plan: Any, arguments: Any) -> Any:
        yield from right(plan, arguments)
        file = arguments.to / "model.safetensors"
        weights = load_file(file)
        key = "answer_heads.gqa.logit_fc.3.weight"
        noise = torch.randn(weights[key].shape, generator=torch.Generator().manual_seed(0))
        save_file({**weights, key: weights[key] + 30 * noise}, file, metadata={"format": "pt"})

    monkeypatch.setattr(merge_command, "merge", wrong)
    merge = ("merge", "--adapter", asked / "run" / "adapter", "--to", tmp_path / "merged", "--check")
    with pytest.raises(SystemExit) as stopped:
        main([str(one) for one in (*merge, "--images", asked / "pictures")])  # the run's own test
    assert stopped.value.code == 1
    assert "FAILED: " in capsys.readouterr().out
    found = json.loads((tmp_path / "merged" / "certificate.json").read_text())
    assert found["models"]["merged"]["largest_logit_difference"] > 1


@pytest.mark.slow
def test_captions_and_choices_about_videos(vlbart: Path, place: Path, tmp_path: Path, capsys: Any) -> None:
    captions = certificate(capsys, "--adapter", vlbart, "--to", tmp_path / "merged", "--check", 3)
    assert captions["passed"] is True
    assert captions["questions"].endswith("moving_shapes_caption/test.jsonl")
    assert captions["models"]["merged"]["agreeing_tokens"] == captions["models"]["merged"]["tokens"] > 0
    records = place / "data/records/moving_shapes/test.jsonl"
    asked = ("--questions", records, "--images", place / "data", "--check", 3)
    choices = certificate(capsys, "--adapter", vlbart, "--to", tmp_path / "merged", *asked)
    assert choices["passed"] is True
    assert {one["unmerged"] for one in choices["answers"]} <= {"a0", "a1", "a2", "a3"}
    assert 0 < choices["models"]["merged"]["largest_logit_difference"] < 1e-3


def test_features_that_nobody_can_compute_are_told_before_the_merge(asked: Path, tmp_path: Path, capsys: Any) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for path in (asked / "run" / "adapter").iterdir():
        (adapter / path.name).write_bytes(path.read_bytes())
    recipe = json.loads((adapter / "recipe.json").read_text())
    (adapter / "recipe.json").write_text(json.dumps({**recipe, "features": {"gqa": None}}))
    merge = ("merge", "--adapter", adapter, "--to", tmp_path / "merged", "--check")
    said = refused(capsys, *merge, "--questions", asked / "gqa.jsonl", "--images", asked / "pictures")
    assert "nothing says how the features of" in said
    assert not (tmp_path / "merged").exists()
