"""Settings: what wins, which key an error is about, DeepSpeed's JSON, the page of all, the adapter section."""

import dataclasses
import json
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from dora_vl import trained_parts
from dora_vl.adapters.settings import BY_NAME, OWN_FIELDS
from dora_vl.core import adapted_layers, apply_dora
from dora_vl.core.config import AdaptedPart, AdapterSettings, DoRAConfig
from dora_vl.errors import MissingExtra, SettingError, UserError
from dora_vl.files import shipped_folder
from dora_vl.heads.objectives import FLAGS, OBJECTIVES, PAIRS
from dora_vl.run.arguments import SHIPPED_CONFIGS, check_deepspeed, read_deepspeed, zero_stage
from dora_vl.run.folder import SETTINGS, write_settings
from dora_vl.run.settings import FIELDS, AdapterConfig, ObjectiveConfig, Task
from dora_vl.run.settings_parser import (
    OTHER_TOOLS,
    find_recipe,
    flattened,
    merge_settings,
    read_run,
    read_run_file,
    setting_names,
    variants_of,
)
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.parts import core_config
from tests.run.settings_page import PAGE, page
from tests.training.tiny_run import json_of, write_run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A run with two variants; `small` changes one value of a nested section and names its own folder."""
    path = write_run(tmp_path / "run.yaml", tmp_path / "base", tmp_path / "train.json")
    return changed(
        path,
        adapter={"rank": 5, "alpha": 7.5},
        variants={
            "small": {"adapter": {"rank": 3}, "training": {"output_dir": "runs/small", "max_steps": 11}},
            "lora": {"adapter": {"method": "lora", "targets": ["*.q_proj"]}},
        },
    )


def changed(path: Path, **changes: object) -> Path:
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))
    return path


def test_the_command_line_wins_wherever_it_stands(run_file: Path) -> None:
    before = read_run(["--adapter.rank", "7", "--training.max_steps", "9", "--config", str(run_file)])
    after = read_run(["--local_rank=1", f"--config={run_file}", "--adapter.rank=7", "--training.max_steps=9"])
    assert before == after
    assert (before.adapter.rank, before.training["max_steps"]) == (7, 9)
    assert before.training["learning_rate"] == 5e-3  # the file's other settings stay
    for variant in (["--variant", "small"], ["--variant=small"], ["--variant", "lora", "--variant=small"]):
        config = read_run(["--adapter.rank=9", *variant, "--config", str(run_file), "--training.seed", "4"])
        assert (config.adapter.rank, config.training["max_steps"], config.training["seed"]) == (9, 11, 4)
        assert config.variant == "small"


def test_a_number_is_a_number_a_yaml_no_is_no_and_an_alias_is_read(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run.yaml", tmp_path / "base", tmp_path / "train.json")
    text = path.read_text().replace("learning_rate: 0.005", "learning_rate: 2e-4").replace("'no'", "no")
    path.write_text(
        text.replace("adapter:", "adapter:\n  parts: {one: &part {targets: ['*.a']}, two: *part}", 1)
        + "\nevaluation: {answer_after: '1:30'}\n"
    )
    config = read_run_file(path)
    assert config.training["learning_rate"] == 2e-4
    assert config.training["save_strategy"] == "no"
    assert config.adapter.parts["two"].targets == ("*.a",)
    assert config.evaluation.answer_after == "1:30"


RATES = ("projector_learning_rate", "magnitude_learning_rate", "b_learning_rate_ratio")


@pytest.mark.parametrize(
    ("words", "key", "nearest"),
    [
        ("--adapter.rnk 1", "adapter.rnk", "adapter.rank"),
        *(("--epochs 3", "epochs", "training.num_train_epochs"), ("--adapter.r 8", "adapter.r", "adapter.rank")),
        ("--data.max_steps 4", "data.max_steps", "training.max_steps"),
        ("--training.warmup_ratio 0.03", "training.warmup_ratio", "training.warmup_steps"),
        ("--training.train_sampling_strategy group_by_length", "training.train_sampling_strategy", None),
        ("--training.learning_rate nan", "training.learning_rate", None),
        *(("--xyzzy 1", "xyzzy", None), ("--watch -1", "watch", None), ("--variant smal", "variant", None)),
        *(("--adapter.rank four", "adapter.rank", None), ("--config nope.yaml", "--config", None)),
        ("--objective.loss={}", "objective.loss", None),
        ('--objective.loss={"dpo":1,"sft":-1}', "objective.loss.sft", None),
        ("--objective.loss=dpo --objective.beta=0", "objective.beta", None),
        ("--objective.kl=-1", "objective.kl", None),
        ("--objective.loss=grpo --objective.rewards={}", "objective.rewards", None),
        ('--objective.loss=grpo --objective.rewards={"exact":0}', "objective.rewards", None),
        ('--objective.loss=grpo --objective.rewards={"exact":.inf}', "objective.rewards.exact", None),
        *((f"--objective.loss={loss}", "objective.loss", None) for loss in ('{"grpo":2}', '{"grpo":1,"sft":1}')),
        ("--objective.loss=grpo --objective.group=1", "objective.group", None),
        ("--objective.loss=dpo --objective.group=4", "objective.group", None),
        ("--objective.loss=dpo --objective.kl=0.1", "objective.kl", None),
        ("--objective.loss=dpo --objective.margin=1", "objective.margin", None),
        ("--objective.loss=orpo --objective.exchange_pictures=true", "objective.exchange_pictures", None),
        ("--objective.loss=grpo --objective.beta=0.2", "objective.beta", None),
        ("--objective.loss=grpo --objective.format=.*", "objective.format", None),
        ("--objective.beta=0.2", "objective.beta", None),
        ("--objective.vllm=http://localhost:1", "objective.vllm", None),
        *((f"--optim.{rate}=-1", f"optim.{rate}", None) for rate in RATES),
        ("--optim.projector_learning_rate=.nan", "optim.projector_learning_rate", None),
        ('--optim.rates={"dora":-0.1}', "optim.rates.dora", None),
    ],
)
def test_a_wrong_key_or_value_is_named_with_nearest(run_file: Path, words: str, key: str, nearest: str | None) -> None:
    with pytest.raises(SettingError) as error:
        read_run([f"--config={run_file}", *words.split()])
    assert error.value.key == key
    assert error.value.nearest[:1] == (() if nearest is None else (nearest,))


def test_a_setting_at_its_default_or_with_its_loss_is_taken(run_file: Path) -> None:
    for words in (
        '--objective.loss={"sft":1,"simpo":0.5} --objective.margin=1 --objective.beta=2',
        '--objective.loss=grpo --objective.group=4 --objective.rewards={"format":1} --objective.format=.*',
        "--objective.loss=dpo --objective.group=8 --objective.margin=0.5",
    ):
        read_run([f"--config={run_file}", *words.split()])


def test_settings_and_pages_name_the_losses_that_there_are() -> None:
    """The description of `objective.loss` names each loss; the table "Which loss" says what each takes and needs."""
    (described,) = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `loss`")]
    for name in OBJECTIVES:
        assert ObjectiveConfig(loss=name).kind == OBJECTIVES[name].kind
        assert re.search(rf"\b{name}\b", described.split("|")[-2]), name
    table = (Path(__file__).parents[2] / "docs" / "preferences.md").read_text(encoding="utf-8")
    in_table = set()
    for names, takes, reference in re.findall(r"^\| ((?:`\w+`(?:, )?)+)[^|]*\| ([^|]*) \| (yes|no) \|", table, re.M):
        for name in re.findall(r"`(\w+)`", names):
            row = OBJECTIVES[name]
            assert (PAIRS in row.takes, FLAGS in row.takes) == ("pairs" in takes, "flags" in takes), name
            assert row.needs_reference == (reference == "yes"), name
            in_table.add(name)
    assert in_table == {name for name, row in OBJECTIVES.items() if row.kind == "preference"}


def test_names_of_other_tools_lead_to_settings_of_that_meaning() -> None:
    assert {*OTHER_TOOLS.values()} <= {*setting_names("llava")}
    table = (Path(__file__).parents[2] / "docs" / "other_tools.md").read_text(encoding="utf-8")
    for name in ("cutoff_len", "lora_target", "micro_batch_size", "load_in_4bit"):
        assert any(f"`{OTHER_TOOLS[name]}`" in row and f"`{name}`" in row for row in table.splitlines()), name


MINIMAL: Mapping[Task, tuple[str, ...]] = {
    **dict.fromkeys(FIELDS, ("--model.base=base", "--data.train=t.json", "--training.output_dir=run")),
    "vlbart": ("--model.base=base", '--data.train={"vqav2": "t.jsonl"}', "--training.output_dir=run"),
}


@pytest.mark.parametrize(
    ("task", "word", "key", "nearest"),
    [
        ("image_text", "--evaluation.files.boolq=f", "evaluation.files.boolq", "evaluation.file"),
        ("llava", "--data.train_on=answer", "data.train_on", None),
        ("commonsense", "--evaluation.file=t.json", "evaluation.file", "evaluation.files"),
        ("vlbart", "--model.quantisation=nf4", "model.quantisation", None),
        ("vlbart", "--data.featurs.vqav2=f", "data.featurs.vqav2", "data.features"),
        ("vlbart", '--data.train=["t.jsonl"]', "data.train", None),
        ("llawa", "--adapter.rank=4", "task", "llava"),
    ],
)
def test_a_task_takes_its_own_fields_alone(task: Any, word: str, key: str, nearest: str | None) -> None:
    with pytest.raises(SettingError) as error:
        read_run([f"--task={task}", *MINIMAL.get(task, ()), word])
    assert error.value.key == key
    assert error.value.nearest[:1] == (() if nearest is None else (nearest,))


def test_the_task_is_what_is_named_first_of_option_file_and_default(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {base: b}\ndata: {train: t.json}\n")
    assert read_run_file(file).task == "image_text"
    assert read_run([f"--config={file}"], task="commonsense").data.max_tokens == 256
    file.write_text("task: llava\nmodel: {base: b}\ndata: {train: t.json}\n")
    assert read_run([f"--config={file}"], task="commonsense").task == "llava"
    assert read_run(["--task=commonsense", f"--config={file}"]).task == "commonsense"


@pytest.mark.parametrize("task", FIELDS)
def test_the_settings_that_a_run_leaves_are_read_back(tmp_path: Path, task: Task) -> None:
    config = read_run([f"--task={task}", *MINIMAL[task], "--adapter.rank=3"])
    write_settings(tmp_path, config)
    assert read_run_file(tmp_path / SETTINGS) == config
    written = flattened(json_of(tmp_path / SETTINGS))
    names = set(setting_names(task, training=False)) - {"resume", "overwrite", "test_only"}
    assert names == {next((name for name in names if f"{key}.".startswith(f"{name}.")), key) for key in written}


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ("model: {dtyp: float32}", "model.dtyp"),
        ("config: {secret}", "config"),
        ("model: {base: b}\ndata: {train: {vqav2: t.jsonl}}", "data.train"),
        ("task: [llava]", "task"),
        ("variants:\n  a:\n    config: {secret}\nvariant: a", "config"),
        ("variants: {small: {adapter: {rnk: 3}}}\nvariant: small", "adapter.rnk"),
        ("adapter:\n  alpha: 8\nadapter:\n  rank: 4", None),
        ("training:\n  learning_rate: 1:30", None),
        ("adapter:\n  rank: 010", None),
        ("model:\n\tbase: x\n", None),
        ("model_name_or_path: x\nlora_r: 8\ncutoff_len: 9\nfinetuning_type: lora", "model_name_or_path"),
    ],
)
def test_what_a_file_may_not_hold_is_refused(tmp_path: Path, content: str, key: str | None) -> None:
    (tmp_path / "secret").write_text("word: of honour")
    (tmp_path / "run.yaml").write_text(content.replace("{secret}", str(tmp_path / "secret")))
    started = time.process_time()
    with pytest.raises(UserError) as error:
        read_run_file(tmp_path / "run.yaml")
    assert getattr(error.value, "key", None) == key
    assert "honour" not in repr(error.value)
    assert time.process_time() - started < 5


def test_a_variant_lies_over_the_rest_at_every_depth(run_file: Path) -> None:
    plain, small = read_run([f"--config={run_file}"]), read_run([f"--config={run_file}", "--variant", "small"])
    assert (plain.adapter.rank, plain.adapter.alpha, plain.variant) == (5, 7.5, None)
    assert (small.adapter.rank, small.adapter.alpha, small.variant) == (3, 7.5, "small")
    assert small.training == {**plain.training, "output_dir": "runs/small", "max_steps": 11}
    assert small.model == plain.model
    changed(run_file, variant="small")  # the file's own choice
    assert read_run([f"--config={run_file}"]).adapter.rank == 3
    assert read_run([f"--config={run_file}", "--variant=lora"]).adapter.method == "lora"
    assert read_run([f"--config={run_file}", "--variant=lora"]).adapter.rank == 5


def test_a_printed_run_reads_back(run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"--config={run_file}", "--variant=small"]
    with pytest.raises(SystemExit):
        read_run([*words, "--print_config"])
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert read_run([f"--config={tmp_path / 'printed.yaml'}"]) == read_run(words)


def test_a_recipe_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    llava15 = ROOT / "configs" / "llava" / "llava15.yaml"
    for name in ("llava/llava15", "llava/llava15.yaml", "configs/llava/llava15.yaml"):
        assert find_recipe(name) == llava15
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "llava15").write_text("{}")
    assert find_recipe("llava/llava15") == Path("llava/llava15")  # a file that is there comes first


def test_every_variant_writes_to_a_folder_of_its_own() -> None:
    folders = []
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        variants = [merge_settings(content, content["variants"][name]) for name in variants_of(path)] or [content]
        folders += [variant["training"]["output_dir"] for variant in variants]
    assert len(folders) == len(set(folders)) >= 45


# DeepSpeed JSON and number types that would train something else than the recipe says.


@pytest.mark.parametrize(
    ("block", "key"),
    [
        ({"optimizer": {"enabled": True}}, ".optimizer"),
        ({"fp16": {"enabled": True}}, ".fp16"),
        ({"torch_autocast": {"enabled": True}}, ".torch_autocast"),
        ({"zero_optimization": 3}, ".zero_optimization"),
        ({"bf16": True}, ".bf16"),
        ({"zero_optimization": {"stage": 7}}, ""),
        ({"zero_optimization": {"stag": 2}}, ""),
        ({"communication_data_type": "fp99"}, ""),
    ],
)
def test_what_is_unsafe_or_not_taken_is_refused(block: dict[str, Any], key: str) -> None:
    with pytest.raises(SettingError) as error:
        check_deepspeed({**read_deepspeed("zero2"), **block}, method="dora")
    assert error.value.key == f"training.deepspeed{key}"


def test_what_is_safe_is_taken() -> None:
    shipped = sorted(path.stem for path in (shipped_folder() / "deepspeed").glob("*.json"))
    assert shipped == sorted(SHIPPED_CONFIGS)
    for name in shipped:
        check_deepspeed(read_deepspeed(name), method="dora")
    check_deepspeed({**read_deepspeed("zero2"), "bf16": {"enabled": True}}, method="full")  # with float32 masters


def test_a_config_is_found_by_name_path_and_below_the_repository(tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    assert zero_stage(read_deepspeed(str(own))) == 1
    assert zero_stage(read_deepspeed("zero3")) == 3
    assert read_deepspeed("configs/deepspeed/zero3.json") == read_deepspeed("zero3")
    with pytest.raises(SettingError) as error:
        read_deepspeed("zero4")
    assert error.value.key == "training.deepspeed"
    own.write_text("{")
    with pytest.raises(UserError):
        read_deepspeed(str(own))


OPTIM_ARGS = ("momentum", "momentum=0.9=1", "momentum=much")


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["--training.bf16=true"], "training.bf16"),
        (["--adapter.method=full", "--model.dtype=bfloat16"], "adapter.method"),
        (["--adapter.method=full", "--model.dtype=bfloat16", "--training.bf16=true"], "training.bf16"),
        (["--training.eval_strategy=steps"], "training.eval_strategy"),
        (["--training.train_sampling_strategy=sequential"], "training.train_sampling_strategy"),
        *((["--training.optim=sgd", f"--training.optim_args={text}"], "training.optim_args") for text in OPTIM_ARGS),
        (["--training.deepspeed={folder}/batch"], "training.deepspeed"),
        (["--training.deepspeed={folder}/steps"], "training.deepspeed"),
    ],
)
def test_settings_that_contradict_are_refused(tmp_path: Path, overrides: list[str], key: str) -> None:
    run_file = write_run(tmp_path / "run.yaml", tmp_path / "base", tmp_path / "train.json")
    for name, field in {"batch": "train_batch_size", "steps": "gradient_accumulation_steps"}.items():
        (tmp_path / name).write_text(json.dumps({**read_deepspeed("zero2"), field: 7}))
    with pytest.raises(SettingError) as error:
        DecoderPipeline(read_run_file(run_file, *(word.format(folder=tmp_path) for word in overrides))).arguments()
    assert error.value.key == key


def test_a_run_without_a_folder_is_refused(tmp_path: Path) -> None:
    config = read_run_file(write_run(tmp_path / "run.yaml", tmp_path / "base", tmp_path / "train.json"))
    training = {key: value for key, value in config.training.items() if key != "output_dir"}
    with pytest.raises(SettingError) as error:
        DecoderPipeline(dataclasses.replace(config, training=training)).arguments()
    assert error.value.key == "training.output_dir"


# docs/settings.md is what the dataclasses say, whole.


REMEDY = "python -m tests.run.settings_page writes it anew"


def test_the_page_is_made_of_the_dataclasses() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), REMEDY


def test_every_setting_of_every_task_has_a_row_with_a_sentence() -> None:
    sections = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", page(), re.MULTILINE | re.DOTALL))
    rows = {
        f"{'' if section == 'At the top level' else f'{section}.'}{name}": text
        for section, body in sections.items()
        for name, text in re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", body, re.MULTILINE)
    }
    names = {name for task in get_args(Task) for name in setting_names(task, training=False)}
    assert names - {"training"} <= set(rows)
    assert [name for name, text in rows.items() if len(text) < 12] == []


# A run's adapter section is the core's own settings: each reaches the core and the adapter folder.


OTHER: dict[str, Any] = {
    "method": "lora",
    "rank": 6,
    "alpha": 5.0,
    "dropout": 0.25,
    "dropout_mode": "whole_change",
    "detach_norm": False,
    "rank_scaling": "sqrt",
    "kinds": ("linear", "embedding"),
    "magnitude_targets": ("*.o_proj",),
    "rank_pattern": {"*.v_proj": 4},
    "alpha_pattern": {"*.v_proj": 3.0},
    "parts": {"heads": AdaptedPart(targets=("*.k_proj",), rank=2, alpha=7.0)},
    "init": "gaussian",
    "random_seed": 9,
    "opaque_layers": ("a.B",),
    "also_train": {"norms": ("*layernorm.weight",)},
    "also_keep": ("*.norm.weight",),
}
"""A value of each setting that is not its default."""


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=30, num_hidden_layers=2, **sizes))


def test_every_setting_reaches_the_core() -> None:
    assert OTHER.keys() == {field.name for field in dataclasses.fields(AdapterSettings)}
    defaults = AdapterSettings()
    assert all(getattr(defaults, name) != value for name, value in OTHER.items())
    config = core_config(AdapterConfig(**OTHER), tiny(), targets=("*.q_proj",))
    assert config == DoRAConfig(targets=("*.q_proj",), **OTHER)
    assert core_config(AdapterConfig(targets=("*.up_proj",)), tiny(), targets=("*.q_proj",)).targets == ("*.up_proj",)


def test_every_setting_is_in_the_folder_by_itself_or_by_names() -> None:
    assert set(OWN_FIELDS) | BY_NAME == OTHER.keys()
    assert not set(OWN_FIELDS) & BY_NAME


def test_yaml_gives_parts_with_what_they_leave_out(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(
        "model: {base: b}\ndata: {train: t.json}\n"
        "adapter: {targets: [language], parts: {vision: {targets: [vision], rank: 8}},\n"
        "  also_train: {tokens: ['*embed*']}}\n"
        "optim: {rates: {vision: 1.0e-5, tokens: 2.0e-5}}\n"
    )
    config = read_run([f"--config={tmp_path / 'my.yaml'}"])
    assert config.adapter.parts == {"vision": AdaptedPart(targets=("vision",), rank=8, alpha=None)}
    assert config.adapter.also_train == {"tokens": ("*embed*",)}
    assert config.optim.rates == {"vision": 1e-5, "tokens": 2e-5}


ANY = AdaptedPart(targets=("*",))


@pytest.mark.parametrize(
    "values",
    [
        {"rank": 0},
        {"parts": {"magnitude": ANY}},
        {"parts": {"x": AdaptedPart(targets=())}},
        {"parts": {"x": ANY}, "also_train": {"x": ("*",)}},
        {"parts": {"x": ANY}, "method": "full"},
        {"parts": {"x": AdaptedPart(targets=("*",), rank=3)}, "method": "dvora"},
    ],
)
def test_settings_that_contradict_each_other_are_refused_at_once(values: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        AdapterConfig(**values)


CONFIG = DoRAConfig(
    targets=("*.q_proj", "*.v_proj"),
    rank=6,
    alpha=9.0,
    dropout=0.0,
    rank_pattern={"*.1.self_attn.v_proj": 3},
    parts={"feed": AdaptedPart(targets=("*.0.mlp.*",), rank=2, alpha=8.0), "keys": AdaptedPart(targets=("*.k_proj",))},
    also_train={"tokens": ("model.embed_tokens.weight",)},
)


def test_each_part_has_its_rank_scale_and_name() -> None:
    model = tiny()
    names = apply_dora(model, CONFIG)
    assert len(names) == 4 + 3 + 2
    layers = {name: layer.adapter for name, layer in adapted_layers(model)}
    assert list(layers) == names
    assert {(name.split(".")[-1], adapter.rank, adapter.scale) for name, adapter in layers.items()} == {
        ("q_proj", 6, 1.5), ("v_proj", 6, 1.5), ("v_proj", 3, 3.0), ("k_proj", 6, 1.5),
        ("gate_proj", 2, 4.0), ("up_proj", 2, 4.0), ("down_proj", 2, 4.0),
    }  # fmt: skip
    counts = {part.name: len(part.parameters) for part in trained_parts(model)}
    expected = {f"{part}.{factor}": n for part, n in (("dora", 4), ("feed", 3), ("keys", 2)) for factor in ("A", "B")}
    assert counts == {**expected, "dora.magnitude": 4, "feed.magnitude": 3, "keys.magnitude": 2, "tokens": 1}
    assert {(part.part, part.factor) for part in trained_parts(model) if not part.adapts} == {("tokens", None)}


@pytest.mark.parametrize(
    "parts", [{"x": ("*.qq_proj",)}, {"x": ("*.k_proj",), "y": ("*.layers.0.*",)}, {"x": ("*_proj",)}]
)
def test_parts_that_hit_nothing_or_each_other_are_refused(parts: dict[str, tuple[str, ...]]) -> None:
    model = tiny()
    before = [name for name, _ in model.named_parameters()]
    adapted = {name: AdaptedPart(targets=globs) for name, globs in parts.items()}
    with pytest.raises(UserError):
        apply_dora(model, DoRAConfig(targets=("*.q_proj",), parts=adapted))
    assert [name for name, _ in model.named_parameters()] == before
    apply_dora(model, DoRAConfig(targets=(), parts={"keys": AdaptedPart(targets=("*.k_proj",))}))  # parts alone


def test_without_deepspeed_the_error_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.config", None)
    with pytest.raises(MissingExtra) as refused:
        check_deepspeed(read_deepspeed("zero2"), method="dora")
    assert refused.value.extra == "deepspeed"
