"""`dora-vl translate`: other tools' settings load as a run and mean the same; what has no counterpart is named."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dora_vl.cli import main
from dora_vl.errors import UserError
from dora_vl.run.reading import read_run, read_run_file
from dora_vl.run.settings import RunConfig
from dora_vl.start import translate
from tests.translation import peer_files


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def translated(
    capsys: pytest.CaptureFixture[str], name: str, text: str, *more: str
) -> tuple[RunConfig, dict[str, str]]:
    """The run that a file becomes, and each row of the table by its name there; every setting has one."""
    Path(name).write_text(text, encoding="utf-8")
    main(["translate", name, "--write", "run.yaml", *more])
    printed = capsys.readouterr().out
    rows = dict(re.findall(r"^(\(not said\)|\S+) +(.*)$", printed.split("\nnext:")[0], re.MULTILINE))
    keys = set(yaml.safe_load(text)) if name.endswith(("yaml", "json")) else set(re.findall(r"--(\w+)", text))
    for key in keys - {"config_file", "num_processes", "nproc_per_node", "use_deepspeed", "zero_stage"}:
        assert re.search(r"(: |as here|NO COUNTERPART: \S)", rows[key]), key
    return read_run_file("run.yaml"), rows


def refused(*words: str) -> str:
    parser = argparse.ArgumentParser()
    translate.add_arguments(parser)
    with pytest.raises(UserError) as error:
        list(translate.run(parser.parse_args(words)))
    return str(error.value)


def step_samples(config: RunConfig) -> int:
    """Samples of a step on one GPU."""
    return config.training["per_device_train_batch_size"] * config.training["gradient_accumulation_steps"]


# -- each tool ---------------------------------------------------------------------------------------------------


def test_llama_factory(capsys: pytest.CaptureFixture[str]) -> None:
    Path("sets").mkdir()
    Path("sets/dataset_info.json").write_text(peer_files.DATASET_INFO, encoding="utf-8")
    config, rows = translated(capsys, "sft.yaml", peer_files.LLAMA_FACTORY)
    adapter, data, training = config.adapter, config.data, config.training
    assert (adapter.method, adapter.rank, adapter.alpha, adapter.rank_scaling) == ("dora", 12, 36.0, "sqrt")
    assert (adapter.dropout, adapter.targets, adapter.train_projector) == (0.0, ("language",), False)
    assert config.model.base == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert (config.model.dtype, config.model.attn_implementation) == ("bfloat16", "flash_attention_2")
    assert data.train == ("sets/mine.json", "hub:OWNER/NAME")
    assert (data.image_folder, data.max_tokens, data.limit, data.workers) == ("sets/pictures", 3072, 1000, 3)
    assert (data.validation_share, data.group_by_modality_length) == (0.1, False)
    assert step_samples(config) == 16
    assert (training["learning_rate"], training["num_train_epochs"], training["warmup_steps"]) == (2e-4, 2.0, 0.1)
    assert (training["lr_scheduler_type"], training["weight_decay"], training["deepspeed"]) == ("cosine", 0.05, "zero3")
    assert (training["eval_strategy"], training["eval_steps"], training["gradient_checkpointing"]) == (
        "steps",
        250,
        True,
    )
    assert (config.optim.weight_decay_on, config.optim.loss_normalisation) == ("all_but_biases", "micro_batch")
    assert dict(data.columns) == {"talk": "conversations"}
    assert "NO COUNTERPART" in rows["image_max_pixels"]
    assert "as here" in rows["do_train"]


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
        ({"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": ROLE_TAGS}, {}),
        ({"formatting": "sharegpt", "columns": {"messages": "messages"}}, {"messages": "conversations"}),
    ],
)
def test_columns_of_llama_factory_get_their_roles(
    capsys: pytest.CaptureFixture[str], entry: dict[str, Any], columns: dict[str, str]
) -> None:
    Path("data").mkdir()
    info = {"mine": {"file_name": "mine.json", **entry}}
    Path("data/dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    config, rows = translated(capsys, "sft.yaml", "stage: sft\nmodel_name_or_path: base\ndataset: mine\n")
    assert config.data.train == "data/mine.json"
    assert dict(config.data.columns) == columns
    assert "IN PART" not in rows["dataset"]


def test_llama_factory_takes_its_own_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    config, rows = translated(
        capsys, "sft.yaml", "stage: sft\nmodel_name_or_path: base\noutput_dir: out\ntemplate: gemma3\n"
    )
    assert (config.adapter.rank, config.adapter.alpha, config.adapter.method) == (8, 16.0, "lora")
    assert "twice the rank" in rows["(lora_alpha)"]
    assert "put yours here" in rows["(not said)"]


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("lora_target: q_proj\n", ("*language_model*.q_proj",)),
        ("freeze_vision_tower: false\nlora_target: all\n", ("language", "vision")),
        ("freeze_vision_tower: false\nlora_target: q_proj, fc1\n", ("*.q_proj", "*.fc1")),
        (
            "finetuning_type: full\nfreeze_multi_modal_projector: false\nbf16: true\ndeepspeed: ds_z3.json\n",
            ("model.language_model*", "lm_head", "projector"),
        ),
    ],
)
def test_llama_factory_parts_that_are_not_frozen(
    capsys: pytest.CaptureFixture[str], text: str, targets: tuple[str, ...]
) -> None:
    config, _ = translated(capsys, "sft.yaml", f"stage: sft\nmodel_name_or_path: b\n{text}")
    assert config.adapter.targets == targets
    assert config.adapter.method == ("full" if "full" in text else "lora")
    assert config.training.get("bf16", False) is ("bf16" in text)


def test_trl(capsys: pytest.CaptureFixture[str]) -> None:
    config, rows = translated(capsys, "sft.yaml", peer_files.TRL)
    adapter, training = config.adapter, config.training
    assert (adapter.method, adapter.rank, adapter.alpha, adapter.dropout) == ("dora", 24, 48.0, 0.1)
    assert (adapter.dropout_mode, adapter.targets) == ("whole_change", ("*.q_proj", "*.v_proj"))
    assert adapter.also_train == {"embed_tokens": ("*embed_tokens.*",)}
    assert adapter.train_projector is False
    assert (config.model.quantisation, config.model.dtype) == ("nf4", "bfloat16")
    assert config.data.train == "hub:OWNER/NAME:part"
    assert step_samples(config) == 8
    assert (training["max_steps"], training["warmup_steps"], training["learning_rate"]) == (700, 20, 1e-4)
    assert config.optim.loss_normalisation == "step_tokens"
    assert "as here" in rows["assistant_only_loss"]


def test_a_script_of_trl(capsys: pytest.CaptureFixture[str]) -> None:
    config, rows = translated(capsys, "sft.sh", peer_files.TRL_SCRIPT)
    assert config.model.base == "llava-hf/llava-1.5-7b-hf"
    assert (config.adapter.method, config.adapter.rank, config.adapter.alpha) == ("dora", 48, 32.0)
    assert config.adapter.targets == ("*.q_proj", "*.up_proj", "*.v_proj")
    assert step_samples(config) == 64
    assert "accelerate launch" in rows["(launcher)"]
    assert config.training["deepspeed"] == "zero3"  # by the name of accelerate's file
    assert "NO COUNTERPART" in rows["(assistant_only_loss)"]
    assert "(assistant_only_loss)" in Path("run.yaml").read_text(encoding="utf-8").splitlines()[0]


ACCELERATE = "distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 3, offload_optimizer_device: cpu}\n"


@pytest.mark.parametrize(
    ("launcher", "content", "deepspeed"),
    [
        ("accelerate launch --num_processes 2", "", None),
        ("accelerate launch --config_file there.yaml", ACCELERATE, "zero3_offload"),
        ("accelerate launch --use_deepspeed --zero_stage 2 --num_processes 2", "", "zero2"),
        ("accelerate launch --config_file there.yaml", "distributed_type: MULTI_GPU\n", None),
        ("torchrun --nproc_per_node 2", "", None),
    ],
)
def test_the_launchers_zero_stage(
    capsys: pytest.CaptureFixture[str], launcher: str, content: str, deepspeed: str | None
) -> None:
    Path("there.yaml").write_text(content, encoding="utf-8")
    text = f"{launcher} sft.py --dataset_name d --model_name_or_path m --torch_dtype float16\n"
    config, rows = translated(capsys, "sft.sh", text)
    assert config.training.get("deepspeed") == deepspeed
    assert config.model.dtype == "float16"
    assert "(dtype)" not in rows


def test_ms_swift(capsys: pytest.CaptureFixture[str]) -> None:
    config, rows = translated(capsys, "train.sh", peer_files.MS_SWIFT)
    assert (config.adapter.method, config.adapter.rank, config.adapter.alpha) == ("dora", 10, 40.0)
    assert (config.adapter.dropout, config.adapter.targets) == (0.05, ("language", "vision"))
    assert config.data.train == "hub:AI-ModelScope/LaTeX_OCR"
    assert step_samples(config) == 48
    assert (config.training["weight_decay"], config.training["adam_beta2"]) == (0.1, 0.95)
    assert (config.training["lr_scheduler_type"], config.training["warmup_steps"]) == ("cosine", 0.05)
    assert "NO COUNTERPART" in rows["MAX_PIXELS"]
    assert "data.limit" in rows["dataset"]


def test_ms_swift_makes_steps_of_sixteen(capsys: pytest.CaptureFixture[str]) -> None:
    text = "NPROC_PER_NODE=4 swift sft --model b --dataset a.jsonl --per_device_train_batch_size 3 --freeze_vit true\n"
    config, _ = translated(capsys, "train.sh", text)
    assert config.training["gradient_accumulation_steps"] == 2  # 3 x 2 x 4 = 24, the first above 16


def test_a_script_s_own_sums_and_open_quotes(capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        "ranks=4\nswift sft --model b --dataset a.jsonl \\\n  --gradient_accumulation_steps $(expr 32 / $ranks) \\\n"
        "  --lr_scheduler_kwargs '{\"min_lr\":\n    1e-6}' --max_steps $((10 * $ranks))  # enough\n"
    )
    config, _ = translated(capsys, "train.sh", text)
    assert (config.training["gradient_accumulation_steps"], config.training["max_steps"]) == (8, 40)
    assert config.training["lr_scheduler_kwargs"] == {"min_lr": 1e-6}


def test_llava(capsys: pytest.CaptureFixture[str]) -> None:
    config, rows = translated(capsys, "finetune_lora.sh", peer_files.LLAVA)
    published = read_run(["--config=llava/llava15", "--variant=13b_lora"])
    for name in ("method", "rank", "alpha", "dropout", "targets", "train_projector"):
        assert getattr(config.adapter, name) == getattr(published.adapter, name), name
    assert config.optim == published.optim
    assert config.data.max_tokens == published.data.max_tokens
    assert config.data.group_by_modality_length is True
    assert (config.model.template, config.model.image_aspect) == ("vicuna_v1", "pad")
    assert config.model.compose is not None
    assert published.model.compose is not None
    for name in ("vision_name", "vision_layer", "language_model"):
        assert getattr(config.model.compose, name) == getattr(published.model.compose, name), name
    left_out = {"output_dir", "save_steps", "report_to", "eval_strategy", "seed", "adam_beta1", "adam_beta2",
                "adam_epsilon", "max_grad_norm"}  # fmt: skip
    for name in sorted(published.training.keys() - left_out):
        assert config.training[name] == published.training[name], name
    assert "NO COUNTERPART" in rows["pretrain_mm_mlp_adapter"]


def test_nvlabs_program_is_a_dora(capsys: pytest.CaptureFixture[str]) -> None:
    config, _ = translated(capsys, "Dora_7b.sh", peer_files.LLAVA.replace("train_mem.py", "train_mem_dora.py"))
    assert config.adapter.method == "dora"


def test_llava_s_stage_one(capsys: pytest.CaptureFixture[str]) -> None:
    text = peer_files.LLAVA.replace(
        "--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5", "--tune_mm_mlp_adapter True"
    )
    config, _ = translated(capsys, "pretrain.sh", text.replace("--version v1", "--version plain"))
    published = read_run(["--config=llava/llava15", "--variant=13b_pretrain"])
    assert (config.adapter.method, config.adapter.targets) == (published.adapter.method, published.adapter.targets)
    assert (config.model.template, config.training["bf16"]) == ("plain", True)


def test_a_task_on_the_published_llava(capsys: pytest.CaptureFixture[str]) -> None:
    text = peer_files.LLAVA.replace("lmsys/vicuna-13b-v1.5", "liuhaotian/llava-v1.5-13b")
    config, _ = translated(capsys, "finetune_task_lora.sh", text)
    assert (config.model.base, config.model.compose) == ("llava-hf/llava-1.5-13b-hf", None)


def test_peft(capsys: pytest.CaptureFixture[str]) -> None:
    from peft import LoraConfig

    written = LoraConfig(
        r=6,
        lora_alpha=18,
        lora_dropout=0.2,
        use_dora=True,
        use_rslora=True,
        target_modules=r".*language_model.*\.(q_proj|v_proj)",
        modules_to_save=["multi_modal_projector"],
        rank_pattern={"v_proj": 3},
        base_model_name_or_path="llava-hf/llava-1.5-7b-hf",
        layers_to_transform=None,
    )
    written.save_pretrained(".")
    config, _ = translated(capsys, "adapter_config.json", Path("adapter_config.json").read_text(encoding="utf-8"))
    adapter = config.adapter
    assert (adapter.method, adapter.rank, adapter.alpha, adapter.rank_scaling) == ("dora", 6, 18.0, "sqrt")
    assert (adapter.dropout, adapter.dropout_mode) == (0.2, "whole_change")
    assert adapter.targets == ("*language_model*.q_proj", "*language_model*.v_proj")
    assert adapter.rank_pattern == {"*.v_proj": 3}
    assert adapter.train_projector is True
    assert config.model.base == "llava-hf/llava-1.5-7b-hf"


# -- nothing in silence --------------------------------------------------------------------------------------------


def test_the_file_holds_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    translated(capsys, "sft.yaml", peer_files.TRL)
    text = Path("run.yaml").read_text(encoding="utf-8")
    assert text.startswith("# TRL's settings of sft.yaml: 23 settings, each has its counterpart")
    assert "# lora_r " in text
    main(["translate", "sft.yaml"])
    assert capsys.readouterr().out == text


def test_the_table_in_the_documentation_is_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(__file__).parents[2] / "docs" / "other_tools.md"
    shown = re.findall(r"^# (\S+ .*)$", page.read_text(encoding="utf-8"), re.MULTILINE)[1:]
    said = [line.split()[:2] for line in shown if not line.startswith("(")]
    Path("sft.yaml").write_text("stage: sft\n" + "".join(f"{key}: {value}\n" for key, value in said), encoding="utf-8")
    main(["translate", "sft.yaml"])
    printed = {" ".join(line.removeprefix("# ").split()) for line in capsys.readouterr().out.splitlines()}
    assert len(shown) >= 4
    for line in shown:
        assert " ".join(line.split()) in printed


# -- refused in one line, which names the file and what is wrong in it -----------------------------------------------


REFUSED = {
    "none.yaml": (None, ""),
    "syntax.yaml": ("a: [", "YAML"),
    "unknown.yaml": ("colour: red\nsize: 3\n", "--from"),
    "syntax.json": ("{", "JSON"),
    "no_training.sh": ("echo hello\n", ""),
    "quotes.sh": ('swift sft --model "a\n', ""),
    "variable.sh": ("swift sft --model $MODEL\n", "--model"),
    "two.sh": ("swift sft --model a\ntrl sft --model_name_or_path b\n", "trl"),
    "stage.yaml": ("stage: dpo\nfinetuning_type: lora\n", "stage is 'dpo'"),
    "method.yaml": ("stage: sft\nfinetuning_type: oft\n", "finetuning_type is 'oft'"),
    "word.yaml": ("stage: sft\nlora_rank: many\n", "lora_rank is 'many'"),
    "fraction.yaml": ("stage: sft\nlora_rank: 8.5\n", "adapter.rank"),
    "zero.yaml": ("stage: sft\nlora_rank: 0\n", "rank"),
    "rate.yaml": ("stage: sft\nlearning_rate: fast\n", "learning_rate"),
    "loha.json": (json.dumps({"peft_type": "LOHA", "r": 8}), "peft_type is 'LOHA'"),
    "ours.yaml": ("model: {base: a}\ndata: {train: b}\n", "dora_vl"),
    "axolotl.yaml": ("base_model: a\nmicro_batch_size: 2\ndatasets: [{path: b}]\nsequence_len: 1\n", "base_model"),
    "rlhf.yaml": ("rlhf_type: grpo\ntuner_type: lora\n", "rlhf_type is 'grpo'"),
    "config.sh": ("trl sft --config nowhere.yaml\n", "nowhere.yaml"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(name: str) -> None:
    text, named = REFUSED[name]
    if text is not None:
        Path(name).write_text(text, encoding="utf-8")
    message = refused(name, "--write", "run.yaml")
    assert name in message
    assert named in message
    assert not Path("run.yaml").exists()


def test_a_name_of_no_data_set() -> None:
    Path("sets").mkdir()
    Path("sets/dataset_info.json").write_text("{}", encoding="utf-8")
    Path("a.yaml").write_text(peer_files.LLAMA_FACTORY, encoding="utf-8")
    refused("a.yaml")


def test_a_file_that_is_there_is_left() -> None:
    Path("a.yaml").write_text(peer_files.TRL, encoding="utf-8")
    refused("a.yaml", "--write", "a.yaml")
    assert Path("a.yaml").read_text(encoding="utf-8") == peer_files.TRL
