"""Every family through the scripts, by every method, alone and on two ranks: trained, resumed, merged, asked."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dora_vl import cli
from dora_vl.adapters.folder import load_adapter, read_weights
from dora_vl.backbones.base import attention_of
from dora_vl.backbones.model import open_backbone
from dora_vl.core import adapted_layers
from dora_vl.core.other_layers import ExpertsProjection
from dora_vl.data.turns import Turn
from dora_vl.evaluation.predictions import read_predictions
from dora_vl.evaluation.predictor import PromptMedia
from dora_vl.serving.engine import Engine
from dora_vl.training.run import run
from tasks import image_qa, llava_instruct
from tests.backbones.conversations import TWO_QUESTIONS, encoder_of, talks_of
from tests.backbones.tiny_families.table import FAMILIES, LANGUAGE_MODELS, param
from tests.backbones.tiny_image_text import write_tiny, write_tiny_language, write_tiny_video
from tests.serving.tiny_served import alone, answer_alone, answers, served
from tests.training.launched import ROOT, launch
from tests.training.tiny_run import (
    assert_same_weights,
    check_resume,
    decoder_run,
    json_of,
    logged_losses,
    losses_of,
    merged,
    write_run,
    write_tiny_data,
)

TRAINING = {
    **{"use_cpu": True, "max_steps": 3, "save_strategy": "steps", "save_steps": 2},
    **{"per_device_train_batch_size": 2, "learning_rate": 2e-2, "warmup_steps": 0},
}


def write_talks(folder: Path, *, pictures: tuple[int, ...], rounds: int) -> Path:
    """Six conversations, of so many pictures in turn."""
    folder.mkdir()
    records = []
    for index in range(6):
        shown = pictures[index % len(pictures)]
        names = [f"{index}-{number}.png" for number in range(shown)]
        for number, name in enumerate(names):
            Image.new("RGB", (30 + 4 * number, 22 + index), (200, 30 * number, 40)).save(folder / name)
        turns = [("human", "<image>\n" * shown + "Say the colour."), ("gpt", "It is red.")]
        turns += [("human", "Sure?"), ("gpt", "Yes")] if rounds > 1 and index % 2 else []
        conversation = [{"from": who, "value": text} for who, text in turns]
        records.append({"id": str(index), **({"image": names} if names else {}), "conversations": conversation})
    (folder / "train.json").write_text(json.dumps(records))
    return folder / "train.json"


def started(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr("sys.argv", ["llava_instruct.py", *options])
    llava_instruct.main()


def trained(base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, records: Path, **model: Any) -> Path:
    """The adapter of three steps; the third was taken twice, by the run and by one that resumed it."""
    rate = 1e-3 if model.pop("projector", False) else None
    data, optim = {"max_tokens": 1024}, {"projector_learning_rate": rate}
    path = write_run(folder / "run.yaml", base, records, training=TRAINING, model=model, data=data, optim=optim)
    adapter = folder / "run" / "adapter"
    started(monkeypatch, "--config", str(path))
    whole = logged_losses(folder / "run"), read_weights(adapter)
    shutil.rmtree(adapter)
    started(monkeypatch, "--config", str(path), "--resume", str(folder / "run" / "checkpoint-2"))
    resumed = logged_losses(folder / "run"), read_weights(adapter)
    assert len(whole[0]) == 3
    assert resumed[0] == pytest.approx(whole[0], abs=1e-6)
    torch.testing.assert_close(resumed[1], whole[1], rtol=0, atol=1e-6)
    return adapter


def check_adapter(base: Path, adapter: Path, prompt: dict[str, Any], to: Path, *, merges: bool = True) -> None:
    """The adapted model, opened again, differs from the base and is what merging gives; it answers."""
    plain, adapted = open_backbone(str(base)), open_backbone(str(base))
    inputs = {**prompt, "keep_logits": True}
    load_adapter(adapted.model, adapter)
    with torch.no_grad():
        before, ours = plain.eval()(**inputs).logits, adapted.eval()(**inputs).logits
        if merges:
            theirs = open_backbone(str(merged(adapter, to))).eval()(**inputs).logits
            torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
        else:
            with pytest.raises(SystemExit):
                merged(adapter, to)
    assert (ours - before).abs().max() > 1e-3
    answer = adapted.generate(**prompt, max_new_tokens=3)
    assert 1 <= answer.shape[1] <= 3


QUICK = ("qwen3_vl", "qwen3_5_moe", "mllama")
"""Pictures by their positions, experts, and pictures beside the text's attention."""


@pytest.mark.parametrize("family", [param(name, is_slow=name not in QUICK) for name in FAMILIES])
def test_a_family_trains_resumes_opens_merges_and_answers(tmp_path, monkeypatch, capsys, family) -> None:
    base = write_tiny(family, tmp_path / family)
    row, taken = FAMILIES[family], talks_of(family)
    pictures = (0, 1, 2) if "no picture" in taken else (1, 2)
    records = write_talks(tmp_path / "data", pictures=pictures, rounds=2 if TWO_QUESTIONS in taken else 1)
    template = {"template": row.format} if row.format else {}
    adapter = trained(base, tmp_path, monkeypatch, records, projector=row.projector, **template)
    encoder = encoder_of(base)
    picture = Image.new("RGB", (33, 21), (10, 200, 30))
    prompt = encoder.encode_prompt([Turn("user", "<image>\nSay the colour.")], [picture])
    inputs = {"input_ids": prompt.input_ids[None], **prompt.inputs}
    check_adapter(base, adapter, inputs, tmp_path / "merged", merges=row.merges)
    picture.save(tmp_path / "asked.png")
    options = ["--image", str(tmp_path / "asked.png"), "--question", "Say the colour.", "--max-new-tokens", "3"]
    capsys.readouterr()
    image_qa.main(["--adapter", str(adapter), *options])
    assert "Say the colour." in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("family", [param(name) for name in FAMILIES])
def test_a_family_trains_resumes_answers_and_merges_in_bfloat16(tmp_path, family) -> None:
    """In the default number type, over weights that are stored in it; a merge checks itself."""
    base, row = write_tiny(family, tmp_path / "base", dtype=torch.bfloat16), FAMILIES[family]
    data = write_tiny_data(tmp_path / "data", samples=8)
    changes: dict[str, dict[str, Any]] = {
        "training": {**TRAINING, "max_steps": 2, "save_steps": 1},
        "model": {"dtype": "bfloat16", **({"template": row.format} if row.format else {})},
        "optim": {"projector_learning_rate": 1e-3 if row.projector else None},
        "evaluation": {"file": str(data), "max_new_tokens": 3, "batch_size": 2, "forgetting": False},
        "data": {"max_tokens": 1024},
    }
    _, stopped = check_resume(write_run(tmp_path / "run.yaml", base, data, **changes), step=1)
    run(decoder_run(tmp_path / "run.yaml", f"--training.output_dir={stopped}", "--test_only=true"))
    assert len(read_predictions(stopped / "predictions.jsonl")[data.stem]) == 8
    if row.merges:
        merged(stopped / "adapter", tmp_path / "merged")
        check = tmp_path / "merged" / "check.json"
        assert not check.exists() or json_of(check)["passed"]


def test_where_sdpa_cannot_be_it_trains_answers_and_is_served_without_an_option(tmp_path, monkeypatch, capsys) -> None:
    attention = {"": "eager", "text_config": "eager", "vision_config": "sdpa"}
    base = write_tiny("hy_v4_vl", tmp_path / "base")
    records = write_talks(tmp_path / "data", pictures=(1,), rounds=1)
    training, optim = {**TRAINING, "save_strategy": "no"}, {"projector_learning_rate": None}
    started(
        monkeypatch, "--config", str(write_run(tmp_path / "run.yaml", base, records, training=training, optim=optim))
    )
    adapter, picture = tmp_path / "run" / "adapter", tmp_path / "data" / "0-0.png"
    assert json_of(adapter / "recipe.json")["attn_implementation"] == attention
    turns, shown = (
        [Turn("user", "<image>\nSay the colour.")],
        PromptMedia(pictures=(Image.open(picture).convert("RGB"),)),
    )
    opened = [alone(base, adapter), alone(base, None)]
    assert [attention_of(assistant.backbone.model) for assistant in opened] == [attention, attention]
    expected = answer_alone(opened[0], turns, shown, tokens=8)
    capsys.readouterr()
    options = ["--image", str(picture), "--question", "Say the colour.", "--max-new-tokens", "8"]
    image_qa.main(["--adapter", str(adapter), *options])
    assert expected in capsys.readouterr().out
    with Engine(served(base, {"mine": adapter})) as engine:
        assert answers(engine, [("mine", turns, shown)]) == [expected]


@pytest.mark.parametrize(
    "model_type", ["qwen3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma", "lfm2"))]
)
def test_a_language_model_trains_resumes_opens_merges_and_answers(tmp_path, monkeypatch, model_type) -> None:
    base = write_tiny_language(model_type, tmp_path / model_type)
    adapter = trained(base, tmp_path, monkeypatch, write_talks(tmp_path / "data", pictures=(0,), rounds=2))
    prompt = encoder_of(base).encode_prompt([Turn("user", "Say the colour.")], [])
    inputs = {"input_ids": prompt.input_ids[None], **prompt.inputs}
    check_adapter(base, adapter, inputs, tmp_path / "merged")


def test_evaluate_gives_the_answers_of_the_run_s_own_test(tmp_path: Path) -> None:
    data = write_tiny_data(tmp_path / "data", samples=24, text_only_blocks=4)
    evaluation = {"file": str(data), "batch_size": 5, "max_new_tokens": 4, "forgetting": False}
    base, training = write_tiny("qwen2_5_vl", tmp_path / "base"), {"use_cpu": True, "max_steps": 4}
    run(decoder_run(write_run(tmp_path / "run.yaml", base, data, training=training, evaluation=evaluation)))
    options = ["--adapter", tmp_path / "run" / "adapter", "--benchmarks", f"exact_match={data}"]
    options += ["--images", data.parent, "--max-new-tokens", "4", "--batch-size", "7", "--to", tmp_path / "to"]
    cli.main(["evaluate", *map(str, options)])
    theirs = read_predictions(tmp_path / "to" / "predictions.jsonl")["exact_match"]
    own = read_predictions(tmp_path / "run" / "predictions.jsonl")[data.stem]
    assert {name: row.prediction for name, row in theirs.items()} == {n: row.prediction for n, row in own.items()}
    entry = json_of(tmp_path / "to" / "metrics.json")["sets"]["exact_match"]
    assert entry["metrics"] == json_of(tmp_path / "run" / "metrics.json")["sets"][data.stem]["metrics"]


METHODS = ("dora", "lora", "qdora", "full")
CASES = [
    ("smolvlm", "256m", "smolvlm"),
    ("qwen2_5_vl", "3b", "qwen2_5_vl"),
    ("internvl3", "2b", "internvl"),
    ("qwen3_vl", "2b", "qwen3_vl"),
    ("gemma3", "4b", "gemma3"),
    ("llava_onevision", "7b", "llava_onevision"),
]
ONE_AFTER_ANOTHER = """
import json, os, sys
import deepspeed
from dora_vl.training import decoder_pipeline, run
from tasks import llava_instruct
for arguments in json.loads(sys.argv[1]):
    child = os.fork()  # DeepSpeed's groups and accelerate's settings are a process's, once for all
    if not child:
        sys.argv = ["llava_instruct.py", *arguments]
        llava_instruct.main()
        sys.stderr.flush()
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"failed: {arguments}")
"""
"""A process for all methods of a recipe: to import everything takes longer than two steps."""


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "size", "family"), CASES)
def test_the_recipe_runs_with_every_method(tmp_path: Path, recipe: str, size: str, family: str) -> None:
    methods = [name for name in METHODS if name != "qdora" or importlib.util.find_spec("bitsandbytes")]
    write_tiny(family, tmp_path / "base", width=64)
    write_tiny_data(tmp_path / "data", samples=8, text_only_blocks=4)
    options: dict[str, object] = {
        "config": f"image_text/{recipe}",
        "model.base": tmp_path / "base",
        "data.train": tmp_path / "data" / "train.json",
        "data.image_folder": tmp_path / "data",
        "data.workers": 0,
        "training.max_steps": 2,
        "training.per_device_train_batch_size": 2,
        "training.gradient_accumulation_steps": 1,
        "training.logging_steps": 1,
    }
    own = {name: {"variant": f"{size}_{name}", "training.output_dir": tmp_path / name} for name in methods}
    runs = [[f"--{name}={value}" for name, value in {**options, **changes}.items()] for changes in own.values()]
    command = [sys.executable, "-c", ONE_AFTER_ANOTHER, json.dumps(runs)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr[-3000:]
    for method in methods:
        adapter = tmp_path / method / "adapter"
        recorded = json.loads((adapter / "recipe.json").read_text())
        expected = {"qdora": ("dora", "nf4")}.get(method, (method, None))
        assert (recorded["adapter"]["method"], recorded["quantisation"], recorded["dtype"]) == (*expected, "bfloat16")
        weights = read_weights(adapter)
        assert any("magnitude" in name for name in weights) == (expected[0] == "dora")
        assert all(bool(tensor.any()) for name, tensor in weights.items() if "lora_B" in name)
        assert json.loads((tmp_path / method / "metrics.json").read_text())["train_steps"] == 2


EXPERTS = ("glm4v_moe", "gpt_oss")
"""Stored an expert at a time, and as one tensor with biases, input before output."""


def write_blocks(folder: Path, *, words_alone: bool = False) -> Path:
    """Blocks of two samples without and with pictures, of which some have two: a rank's batch is one block."""
    data = write_tiny_data(folder, samples=48, text_only_blocks=2)
    records = json.loads(data.read_text())
    if words_alone:
        for record in records:
            record.pop("image", None)
            record["conversations"][0]["value"] = record["conversations"][0]["value"].replace("<image>", "")
        data.write_text(json.dumps(records))
        return data
    for record in records[2::8]:
        record["image"] = [record["image"], record["image"]]
        record["conversations"][0]["value"] = "<image> and <image>\nSay the colour."
    data.write_text(json.dumps(records))
    return data


def check_ranks_agree(folder: Path, base: Path, records: Path, *, steps: int, **changes: dict[str, object]) -> None:
    """A run of two ranks under ZeRO-3 against one of one rank with twice the batch, both by the script."""
    training = {"max_steps": steps, "per_device_train_batch_size": 2, "train_sampling_strategy": "sequential"}
    shapes = {"group_by_modality_length": False, "max_tokens": 512, **changes.pop("data", {})}
    run = write_run(folder / "run.yaml", base, records, data=shapes, training=training, **changes)
    single = (f"--training.output_dir={folder / 'one'}", "--training.deepspeed=zero0")
    two = (f"--training.output_dir={folder / 'two'}", "--training.deepspeed=zero3")
    launch(run, *single, "--training.gradient_accumulation_steps=2", ranks=1)
    launch(run, *two, ranks=2)
    assert len(losses_of(folder / "one")) == steps
    torch.testing.assert_close(losses_of(folder / "two"), losses_of(folder / "one"), rtol=0, atol=1e-4)
    assert_same_weights(folder / "two", folder / "one", atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm", "internvl"])
def test_two_ranks_of_zero3_train_what_one_rank_trains(tmp_path: Path, family: str) -> None:
    base = write_tiny(family, tmp_path / "base")
    check_ranks_agree(tmp_path, base, write_blocks(tmp_path / "data"), steps=8)


@pytest.mark.slow
@pytest.mark.parametrize("family", EXPERTS)
def test_experts_of_two_ranks_that_get_other_rows(tmp_path: Path, family: str) -> None:
    """Each rank sends its own rows to each expert; the adapter of all experts is whole, and loads into the base."""
    words_alone = family in LANGUAGE_MODELS
    base = (write_tiny_language if words_alone else write_tiny)(family, tmp_path / "base")
    changes: dict[str, dict[str, object]] = {"adapter": {"targets": ["language", "experts"], "rank": 3, "alpha": 7.0}}
    if words_alone:
        changes |= {"optim": {"projector_learning_rate": None}, "model": {"attn_implementation": "eager"}}
    data = write_blocks(tmp_path / "data", words_alone=words_alone)
    check_ranks_agree(tmp_path, base, data, steps=8, **changes)
    loaded = open_backbone(str(base), attn_implementation="eager")
    names = load_adapter(loaded.model, tmp_path / "two" / "adapter")
    experts = [name for name, layer in adapted_layers(loaded.model) if isinstance(layer, ExpertsProjection)]
    assert set(experts) < set(names)
    weights = read_weights(tmp_path / "two" / "adapter")
    for name in experts:
        moved = weights[f"base_model.model.{name}.lora_B.weight"]
        assert len(moved) == 4
        assert all(bool(expert.any()) for expert in moved)  # every expert was trained


MIXED = (0, 4, 2, 6, 1, 5, 3, 7, 2, 6, 1, 5, 8, 3, 9, 10)
"""A micro-batch of two each: words | videos, pictures | both, videos | pictures, words and both | picture and video."""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next_video"])
def test_ranks_that_have_videos_words_or_pictures_in_turn(tmp_path: Path, family: str) -> None:
    pytest.importorskip("av")
    from tests.training.video_run import write_video_data

    base = write_tiny_video(family, tmp_path / "base")
    data = write_video_data(tmp_path / "data")
    records = json.loads(data.read_text())
    data.write_text(json.dumps([{**records[row], "id": str(number)} for number, row in enumerate(MIXED)]))
    check_ranks_agree(tmp_path, base, data, steps=4, data={"video_frames": 4, "max_bad_share": 0.0})
