"""`dora-vl translate`: other tools' settings load as a run and mean the same; what has no counterpart is named.

Golden files hold what people's files in `files/` become; DORA_VL_WRITE_GOLDEN=1 writes them anew.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig

from dora_vl.cli import main
from dora_vl.errors import UserError
from dora_vl.run.reading import read_run, read_run_file
from dora_vl.start import translate as command
from dora_vl.start.rules import COMPUTED, Translation, as_yaml, translate
from dora_vl.start.settings_file import read_settings
from dora_vl.start.tools import TOOLS

FILES = Path(__file__).parent / "files"
LLAVA = (FILES / "llava.sh").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def translated(path: Path) -> Translation:
    """What a file becomes: a run that can be read, and a row for every setting."""
    tool, settings = read_settings(path)
    translation = translate(TOOLS[tool], settings, path)
    assert {row.key for row in translation.rows} >= settings.keys()
    Path("run.yaml").write_text(as_yaml(translation.settings), encoding="utf-8")
    read_run_file("run.yaml")
    return translation


def of_text(name: str, text: str) -> Mapping[str, Any]:
    """The settings, by dotted names, that a file of this text becomes."""
    Path(name).write_text(text, encoding="utf-8")
    return json.loads(json.dumps(translated(Path(name)).settings))


def lost(translation: Translation) -> dict[str, str]:
    """What has no counterpart, wholly or in part."""
    rows = [row for row in translation.rows if row.counterpart.is_lost]
    return {row.name: "in part" if row.counterpart.settings else "wholly" for row in rows}


# -- each tool ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(path for path in FILES.iterdir() if path.is_file()), ids=lambda path: path.name)
def test_a_file_as_people_have_it(path: Path) -> None:
    translation = translated(path)
    result = {"settings": json.loads(json.dumps(translation.settings)), "lost": lost(translation)}
    golden = FILES / "golden" / f"{path.name}.yaml"
    if os.environ.get("DORA_VL_WRITE_GOLDEN") == "1":
        golden.write_text(yaml.safe_dump(result, sort_keys=True), encoding="utf-8")
    assert result == yaml.safe_load(golden.read_text(encoding="utf-8"))


SHAREGPT = {"formatting": "sharegpt", "columns": {"messages": "messages"}}
ROLE_TAGS = {"role_tag": "role", "content_tag": "content"}


@pytest.mark.parametrize(
    ("entry", "columns"),
    [
        ({}, {}),
        ({"columns": {"prompt": "instruction", "query": "input", "response": "output", "system": "system"}}, {}),
        (
            {"columns": {"prompt": "question", "query": "context", "response": "answer", "images": "photo"}},
            {"question": "instruction", "context": "input", "answer": "output", "photo": "images"},
        ),
        ({"formatting": "sharegpt"}, {}),
        (
            {"formatting": "sharegpt", "columns": {"messages": "talk", "system": "role"}},
            {"talk": "conversations", "role": "system"},
        ),
        ({**SHAREGPT, "tags": ROLE_TAGS}, {}),
        (SHAREGPT, {"messages": "conversations"}),
    ],
)
def test_columns_of_llama_factory_get_their_roles(entry: dict[str, Any], columns: dict[str, str]) -> None:
    Path("data").mkdir()
    info = {"mine": {"file_name": "mine.json", **entry}}
    Path("data/dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    Path("sft.yaml").write_text("stage: sft\nmodel_name_or_path: base\ndataset: mine\n", encoding="utf-8")
    translation = translated(Path("sft.yaml"))
    assert translation.settings["data.train"] == "data/mine.json"
    assert translation.settings.get("data.columns", {}) == columns
    assert "dataset" not in lost(translation)


STAGE = "stage: sft\nmodel_name_or_path: b\n"
ACCELERATE = "distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 3, offload_optimizer_device: cpu}\n"
SFT = "sft.py --dataset_name d --model_name_or_path m --torch_dtype float16\n"
ZERO, SWIFT = "training.deepspeed", "swift sft --model b --dataset a.jsonl"
LANGUAGE = ["model.language_model*", "lm_head"]
TEXTS: list[tuple[str, str, dict[str, Any]]] = [
    # LLaMA-Factory's own defaults, and the parts that are not frozen
    (
        "sft.yaml",
        STAGE,
        {"adapter.rank": 8, "adapter.alpha": 16.0, "adapter.method": "lora", "data.train": "train.json"},
    ),
    ("sft.yaml", f"{STAGE}lora_target: q_proj\n", {"adapter.targets": ["*language_model*.q_proj"]}),
    ("sft.yaml", f"{STAGE}freeze_vision_tower: false\n", {"adapter.targets": ["language", "vision"]}),
    (
        "sft.yaml",
        f"{STAGE}freeze_vision_tower: false\nlora_target: q_proj, fc1\n",
        {"adapter.targets": ["*.q_proj", "*.fc1"]},
    ),
    (
        "sft.yaml",
        f"{STAGE}finetuning_type: full\nfreeze_multi_modal_projector: false\nbf16: true\ndeepspeed: ds_z3.json\n",
        {"adapter.method": "full", "adapter.targets": [*LANGUAGE, "projector"], "training.bf16": True, ZERO: "zero3"},
    ),
    # what starts TRL, and its own name of a number type
    ("sft.sh", f"accelerate launch --num_processes 2 {SFT}", {ZERO: None, "model.dtype": "float16"}),
    ("sft.sh", f"accelerate launch --config_file deepspeed.yaml {SFT}", {ZERO: "zero3_offload"}),
    ("sft.sh", f"accelerate launch --use_deepspeed --zero_stage 2 --num_processes 2 {SFT}", {ZERO: "zero2"}),
    ("sft.sh", f"accelerate launch --config_file gpus.yaml {SFT}", {ZERO: None}),
    ("sft.sh", f"torchrun --nproc_per_node 2 {SFT}", {ZERO: None}),
    # steps of ms-swift: 3 x 2 x 4 = 24 samples, the first above 16; a script's own sums and open quotes
    (
        "train.sh",
        f"NPROC_PER_NODE=4 {SWIFT} --per_device_train_batch_size 3 --freeze_vit true\n",
        {"training.gradient_accumulation_steps": 2},
    ),
    (
        "train.sh",
        f"""ranks=4
{SWIFT} \\
  --gradient_accumulation_steps $(expr 32 / $ranks) \\
  --lr_scheduler_kwargs '{{"min_lr":
    0.5}}' --max_steps $((10 * $ranks))  # enough
""",
        {
            "training.gradient_accumulation_steps": 8,
            "training.max_steps": 40,
            "training.lr_scheduler_kwargs": {"min_lr": 0.5},
        },
    ),
    # LLaVA: NVlabs' program, a task on the published model
    ("Dora_7b.sh", LLAVA.replace("train_mem.py", "train_mem_dora.py"), {"adapter.method": "dora"}),
    (
        "finetune_task_lora.sh",
        LLAVA.replace("lmsys/vicuna-13b-v1.5", "liuhaotian/llava-v1.5-13b"),
        {"model.base": "llava-hf/llava-1.5-13b-hf", "model.compose.language_model": None},
    ),
]


@pytest.mark.parametrize(("name", "text", "expected"), TEXTS)
def test_a_text(name: str, text: str, expected: dict[str, Any]) -> None:
    """None: it is not set."""
    Path("deepspeed.yaml").write_text(ACCELERATE, encoding="utf-8")
    Path("gpus.yaml").write_text("distributed_type: MULTI_GPU\n", encoding="utf-8")
    settings = of_text(name, text)
    assert {key: settings.get(key) for key in expected} == expected


def test_llavas_script_is_the_published_recipe() -> None:
    translated(FILES / "llava.sh")
    run, published = read_run_file("run.yaml"), read_run(["--config=llava/llava15", "--variant=13b_lora"])
    for name in ("method", "rank", "alpha", "dropout", "targets", "train_projector"):
        assert getattr(run.adapter, name) == getattr(published.adapter, name), name
    assert run.optim == published.optim
    for name in ("vision_name", "vision_layer", "language_model"):
        assert getattr(run.model.compose, name) == getattr(published.model.compose, name), name
    left_out = {"output_dir", "save_steps", "report_to", "eval_strategy", "seed", "adam_beta1", "adam_beta2",
                "adam_epsilon", "max_grad_norm"}  # fmt: skip
    for name in sorted(published.training.keys() - left_out):
        assert run.training[name] == published.training[name], name


def test_llavas_stage_one_is_the_published_recipe() -> None:
    lora = "--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5"
    text = LLAVA.replace(lora, "--tune_mm_mlp_adapter True").replace("--version v1", "--version plain")
    settings = of_text("pretrain.sh", text)
    published = read_run(["--config=llava/llava15", "--variant=13b_pretrain"]).adapter
    assert (settings["adapter.method"], tuple(settings["adapter.targets"])) == (published.method, published.targets)
    assert (settings["model.template"], settings["training.bf16"]) == ("plain", True)


def test_what_peft_writes_of_a_plain_config_has_its_counterpart() -> None:
    LoraConfig(base_model_name_or_path="b", target_modules=["q_proj"]).save_pretrained(".")
    assert not lost(translated(Path("adapter_config.json")))


def test_every_rule_that_the_tables_name_is_there() -> None:
    text = Path(command.__file__).with_name("tables.yaml").read_text(encoding="utf-8")
    assert set(re.findall(r"rule: ([a-z_]+)", text)) == set(COMPUTED)


# -- nothing in silence --------------------------------------------------------------------------------------------


def test_the_file_holds_the_table_and_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    main(["translate", str(FILES / "trl.yaml"), "--write", "run.yaml"])
    capsys.readouterr()
    main(["translate", str(FILES / "trl.yaml")])
    text = Path("run.yaml").read_text(encoding="utf-8")
    assert capsys.readouterr().out == text
    assert "\n# lora_r " in text
    assert read_run_file("run.yaml").adapter.rank == 24


def test_the_table_in_the_documentation_is_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).parents[2] / "docs" / "other_tools.md"
    shown = re.findall(r"^# (\S+ .*)$", page.read_text(encoding="utf-8"), re.MULTILINE)[1:]
    stated = [line.split()[:2] for line in shown if not line.startswith("(")]
    Path("sft.yaml").write_text(
        "stage: sft\n" + "".join(f"{key}: {value}\n" for key, value in stated), encoding="utf-8"
    )
    main(["translate", "sft.yaml"])
    printed = {" ".join(line.removeprefix("# ").split()) for line in capsys.readouterr().out.splitlines()}
    assert len(shown) >= 4
    assert {" ".join(line.split()) for line in shown} <= printed


# -- refused in one line -------------------------------------------------------------------------------------------

REFUSED: dict[str, str | None] = {
    "none.yaml": None,
    "syntax.yaml": "a: [",
    "unknown.yaml": "colour: red\nsize: 3\n",
    "syntax.json": "{",
    "no_training.sh": "echo hello\n",
    "quotes.sh": 'swift sft --model "a\n',
    "variable.sh": "swift sft --model $MODEL\n",
    "two.sh": "swift sft --model a\ntrl sft --model_name_or_path b\n",
    "stage.yaml": "stage: dpo\nfinetuning_type: lora\n",
    "method.yaml": "stage: sft\nfinetuning_type: oft\n",
    "word.yaml": "stage: sft\nlora_rank: many\n",
    "fraction.yaml": "stage: sft\nlora_rank: 8.5\n",
    "zero.yaml": "stage: sft\nlora_rank: 0\n",
    "rate.yaml": "stage: sft\nlearning_rate: fast\n",
    "loha.json": json.dumps({"peft_type": "LOHA", "r": 8}),
    "ours.yaml": "model: {base: a}\ndata: {train: b}\n",
    "axolotl.yaml": "base_model: a\nmicro_batch_size: 2\ndatasets: [{path: b}]\nsequence_len: 1\n",
    "rlhf.yaml": "rlhf_type: grpo\ntuner_type: lora\n",
    "config.sh": "trl sft --config nowhere.yaml\n",
    "data_set.yaml": "stage: sft\ndataset: other\ndataset_dir: sets\n",
}


def refused(*words: str) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(UserError):
        list(command.run(parser.parse_args(words)))


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(name: str) -> None:
    Path("sets").mkdir()
    Path("sets/dataset_info.json").write_text("{}", encoding="utf-8")
    if (text := REFUSED[name]) is not None:
        Path(name).write_text(text, encoding="utf-8")
    refused(name, "--write", "run.yaml")
    assert not Path("run.yaml").exists()


def test_a_file_that_is_there_is_left() -> None:
    Path("a.yaml").write_text(STAGE, encoding="utf-8")
    refused("a.yaml", "--write", "a.yaml")
    assert Path("a.yaml").read_text(encoding="utf-8") == STAGE
