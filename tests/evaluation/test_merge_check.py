"""`--check` of merge and export: what was written answers as the unmerged model, or what differs is shown."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from dora_vl import DoRAConfig, apply_dora, save_adapter
from dora_vl.adapters.folder import load_adapter
from dora_vl.cli import main
from dora_vl.evaluation import merging as merging_module
from tests.adapters.test_export import adapter_on
from tests.backbones.tiny_families.family import TEXT
from tests.evaluation.test_ask import root, vlbart
from tests.evaluation.test_ask_any_model import peft_adapter, spread, write_model
from tests.training.test_closed_answers import COLOURS, gqa_folder
from tests.training.tiny_run import write_tiny_data, write_tiny_llava

__all__ = ["gqa_folder", "root", "vlbart"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check")
    peft_adapter(write_model("llava", folder / "base"), folder / "adapter", use_dora=True)
    write_tiny_data(folder / "data", samples=10)
    return folder


def checked(*words: object) -> dict[str, Any]:
    main([str(word) for word in words])
    return check_of(Path(str(words[words.index("--to") + 1])))


def check_of(target: Path) -> dict[str, Any]:
    return json.loads((target / "check.json").read_text())


def exit_status(*words: object) -> object:
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    return stopped.value.code


def asking(folders: Path) -> tuple[object, ...]:
    return "--questions", folders / "data" / "train.json", "--images", folders / "data", "--check-tokens", 6


def merging(folders: Path, to: Path, *more: object) -> tuple[object, ...]:
    return "merge", "--adapter", folders / "adapter", "--to", to, *asking(folders), *more


def test_a_merge_that_answers_alike_passes_and_says_so(folders: Path, tmp_path: Path, capsys: Any) -> None:
    merge = merging(folders, tmp_path / "merged", "--check", 4)
    result = checked(*merge)
    assert "0 of 4 answers differ (0.0%), 0.0% may" in capsys.readouterr().out
    assert (result["passed"], result["n"], result["dtype"]) == (True, 4, "float32")
    assert [answer["id"] for answer in result["answers"]] == ["sample-0", "sample-2", "sample-5", "sample-7"]  # spread
    assert result["different_answers"] == 0
    assert result["agreeing_tokens"] == result["tokens"] > 4
    assert 0 < result["largest_logit_difference"] < 1e-3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]
    checked(*merge)  # an earlier result with its check is replaced


def break_merge(monkeypatch: pytest.MonkeyPatch, head: str) -> None:
    merge = merging_module.write_merged

    def wrong(plan: Any, arguments: Any) -> Iterator[str]:
        yield from merge(plan, arguments)
        file = arguments.to / "model.safetensors"
        weights = load_file(file)
        key = next(key for key in weights if key.endswith(head))
        noise = torch.randn(weights[key].shape, generator=torch.Generator().manual_seed(0))
        save_file({**weights, key: weights[key] + 30 * noise}, file, metadata={"format": "pt"})

    monkeypatch.setattr(merging_module, "write_merged", wrong)


def test_a_merge_that_answers_otherwise_fails_with_status_1(folders: Path, tmp_path: Path, monkeypatch: Any) -> None:
    break_merge(monkeypatch, "lm_head.weight")
    merge = merging(folders, tmp_path / "merged", "--check")
    assert exit_status(*merge) == 1
    result = check_of(tmp_path / "merged")
    differing = [answer for answer in result["answers"] if answer["unmerged"] != answer["written"]]
    assert (result["passed"], result["n"]) == (False, 10)  # as many as the file has
    assert result["different_answers"] == len(differing) > 5
    assert result["agreeing_tokens"] < result["tokens"]
    assert result["largest_logit_difference"] > 1
    assert checked(*merge, "--most-different", 1.0)["passed"] is True


def test_the_runs_own_test_is_asked(folders: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folders / "adapter", run / "adapter", dirs_exist_ok=True)
    evaluation = {"file": str(folders / "data" / "train.json"), "image_folder": None}
    settings = {"evaluation": evaluation, "data": {"image_folder": str(folders / "data")}}
    (run / "settings.json").write_text(json.dumps(settings))
    to = ("--to", tmp_path / "merged", "--check", 3, "--check-tokens", 6)
    result = checked("merge", "--adapter", run / "adapter", *to)
    assert (result["passed"], result["n"]) == (True, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "run"]


@pytest.mark.parametrize(
    "words",
    [
        "merge --adapter {adapter} --check",  # in no run with a test of its own
        "merge --adapter {adapter} --questions {questions}",  # without --check
        "merge --adapter {adapter} --check --questions {questions} --images {tmp}",
        "merge --adapter {adapter} --check --questions {questions} --most-different 2",
        "export --adapter {adapter}",
    ],
)
def test_what_cannot_be_checked_or_exported_leaves_nothing(words: str, folders: Path, tmp_path: Path) -> None:
    paths = {"adapter": folders / "adapter", "questions": folders / "data" / "train.json", "tmp": tmp_path}
    assert exit_status(*words.format(**paths).split(), "--to", tmp_path / "to") == 2
    assert not (tmp_path / "to").exists()


def test_answers_from_a_list_are_those_of_the_adapter(gqa_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    merge = ("merge", "--adapter", gqa_folder / "run" / "adapter", "--to", tmp_path / "merged", "--check", 4)
    merge = (*merge, "--images", gqa_folder / "pictures")  # the run's own test
    result = checked(*merge, "--questions", gqa_folder / "gqa.jsonl")
    assert result["passed"] is True
    assert [answer["id"] for answer in result["answers"]] == [COLOURS[index] for index in (0, 1, 3, 4)]
    assert result["largest_logit_difference"] < 1e-3  # layers so small give the merged ones' bits
    assert all(answer["unmerged"] == answer["written"] for answer in result["answers"])
    assert all(answer["question"] == "what color is it?" for answer in result["answers"])
    break_merge(monkeypatch, "answer_heads.gqa.logit_fc.3.weight")
    assert exit_status(*merge) == 1
    assert check_of(tmp_path / "merged")["largest_logit_difference"] > 1


@pytest.mark.slow
def test_captions_and_choices_about_videos(vlbart: Path, root: Path, tmp_path: Path) -> None:
    merge = ("merge", "--adapter", vlbart, "--to", tmp_path / "merged", "--check", 3)
    captions = checked(*merge)
    assert captions["passed"] is True
    assert captions["questions"].endswith("moving_shapes_caption/test.jsonl")
    assert captions["agreeing_tokens"] == captions["tokens"] > 0
    records = root / "data/records/moving_shapes/test.jsonl"
    choices = checked(*merge, "--questions", records, "--images", root / "data")
    assert choices["passed"] is True
    assert {answer["unmerged"] for answer in choices["answers"]} <= {"a0", "a1", "a2", "a3"}
    assert 0 < choices["largest_logit_difference"] < 1e-3


def test_for_vllm(folders: Path, tmp_path: Path, capsys: Any) -> None:
    projected = adapter_on(spread(write_tiny_llava(tmp_path / "base", width=64)), tmp_path / "adapter")
    target = tmp_path / "served"
    result = checked(
        *("export", "--adapter", projected, "--to", target, "--for", "vllm", *asking(folders)), "--check", 4
    )
    printed = capsys.readouterr().out
    assert "4 tensors and 2 layers folded in" in printed
    assert f"vllm serve {target / 'base'} --enable-lora --max-lora-rank 8 --lora-modules served=" in printed
    assert (result["different_answers"], result["largest_logit_difference"] < 1e-2) == (0, True)
    assert sorted(path.name for path in target.iterdir()) == ["adapter", "base", "check.json"]


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of so many experts in bfloat16 that rounding a merged layer sends some tokens to others."""
    folder, sizes = tmp_path_factory.mktemp("routed"), {"num_hidden_layers": 4, "head_dim": 8, "vocab_size": 200}
    experts = {"num_experts": 256, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "norm_topk_prob": True}
    torch.manual_seed(8)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **{**TEXT, **sizes, **experts}))
    for name, weight in model.named_parameters():
        if "experts" in name or "o_proj" in name or "v_proj" in name:
            weight.data.mul_(20)
    model.to(torch.bfloat16).save_pretrained(folder / "base")
    model = model.float()
    apply_dora(model, DoRAConfig(targets=("*_proj",), rank=2, alpha=5.0))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.3)
    save_adapter(model, folder / "adapter", base_model=str(folder / "base"))
    return folder


@torch.no_grad()
def test_a_merge_whose_rounding_turns_routers_is_right(routed: Path, tmp_path: Path, capsys: Any) -> None:
    result = checked("merge", "--adapter", routed / "adapter", "--to", tmp_path / "merged")
    assert result["passed"]
    assert result["rounding"] == 1e-3
    opened: list[Any] = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (routed / "base", tmp_path / "merged")
    ]
    load_adapter(opened[0], routed / "adapter")
    ids = torch.randint(50, 200, (3, 12), generator=torch.Generator().manual_seed(0))
    trained, written = (model.eval()(ids).logits for model in opened)
    assert (written - trained).abs().max() > 0.1 * trained.abs().max()  # more than rounding without routers gives


@pytest.mark.parametrize("layer", ["q_proj", "o_proj"])
def test_a_wrong_merge_of_routed_experts_is_refused(routed: Path, tmp_path: Path, monkeypatch: Any, layer: str) -> None:
    """One of its layers stays without its adapter."""
    merge, name = merging_module.write_merged, f"model.layers.2.self_attn.{layer}.weight"

    def forgetful(plan: Any, arguments: Any) -> Iterator[str]:
        yield from merge(plan, arguments)
        file = arguments.to / "model.safetensors"
        before = load_file(routed / "base" / "model.safetensors")[name]
        save_file({**load_file(file), name: before}, file, metadata={"format": "pt"})

    monkeypatch.setattr(merging_module, "write_merged", forgetful)
    assert exit_status("merge", "--adapter", routed / "adapter", "--to", tmp_path / "merged") == 1
    assert not check_of(tmp_path / "merged")["passed"]
