"""The adapter folder and checkpoints: bitwise round trips, PEFT's own too, whole or not at all, and strict loading."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from dora_vl.adapters import folder as folder_module
from dora_vl.adapters import settings as settings_module
from dora_vl.adapters.adapter import content_hash, read_adapter, write_adapter
from dora_vl.adapters.files import (
    CONFIG_FILE,
    FILES,
    RECIPE_FILE,
    WEIGHTS_FILE,
    checkpoint_to_resume,
    complete_checkpoints,
    drop_old_checkpoints,
    step_of,
)
from dora_vl.adapters.folder import load_adapter, save_adapter
from dora_vl.core import DoRAConfig, apply_dora, trained_parts
from dora_vl.errors import UserError
from dora_vl.files import weight_files
from dora_vl.run.folder import prepare_run_folder
from tests.adapters.foreign_files import tiny_llama
from tests.adapters.peft_folders import moved_peft
from tests.backbones.tiny_language import tiny_language
from tests.core.dense_dora import move, move_trained, unchanged
from tests.core.test_inject import Small, config

ROOT = Path(__file__).parents[2]

VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {},
    "lora": {"method": "lora"},
    "magnitude": {"method": "magnitude"},
    "full": {"method": "full", "targets": ("text.0.*", "projector.2")},
    "dvora": {"method": "dvora"},
    "rslora": {"rank_scaling": "sqrt"},
    "patterns": {"rank_pattern": {"text.1.*": 3}, "alpha_pattern": {"*.v_proj": 5.0}},
    "beside": {"magnitude_targets": ("vision.*_proj",)},
    "dvora_beside": {"method": "dvora", "magnitude_targets": ("vision.*_proj",)},
    "extras": {
        "also_train": {"projector": ("projector.*",), "bias": ("text.0.q_proj.bias",)},
        "also_keep": ("scale*",),
    },
    "pissa": {"init": "pissa"},
    "pissa_rslora": {"init": "pissa", "rank_scaling": "sqrt"},
    "settings": {"dropout": 0.3, "dropout_mode": "whole_change", "detach_norm": False},
}
PEFT_READS = {"dora", "lora", "rslora", "patterns", "pissa", "pissa_rslora", "settings"}


def trained_small(name: str) -> Small:
    model = Small()
    torch.manual_seed(1)
    apply_dora(model, config(**VARIANTS[name]))
    move_trained(model)
    return model.eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_folder_gives_back_its_model_fresh_adapted_and_in_peft(name: str, tmp_path: Path) -> None:
    model, x = trained_small(name), torch.randn(2, 6)
    save_adapter(model, tmp_path / "a", base_model="base", recipe={"task": "x"})
    fresh, adapted = Small(), Small()
    apply_dora(adapted, config(**VARIANTS[name]))
    adapted.eval()(x)  # keeps norms that loading must forget
    for other in (fresh, adapted):
        load_adapter(other, tmp_path / "a")
        assert torch.equal(other.eval()(x), model(x))
        assert [part.name for part in trained_parts(other)] == [part.name for part in trained_parts(model)]
    save_adapter(fresh, tmp_path / "b", base_model="base", recipe={"task": "x"})
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in FILES)
    if name in PEFT_READS:
        torch.testing.assert_close(PeftModel.from_pretrained(Small(), tmp_path / "a").eval()(x), model(x))
    else:
        with pytest.raises((ValueError, KeyError, TypeError)):
            PeftModel.from_pretrained(Small(), tmp_path / "a")


# -- damage: one change of a folder that loads ---------------------------------------------------------------

Damage = Callable[[Path], object]


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Damage:
    return lambda folder: save_file(change(load_file(folder / WEIGHTS_FILE)), folder / WEIGHTS_FILE)


def replaced(key: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return tensors(lambda file: {name: value(tensor) if key in name else tensor for name, tensor in file.items()})


def content(file: str, change: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


def fields(file: str, **values: object) -> Damage:
    """Values in `adapter_config.json`, in `recipe.json`, or in what the latter has under `adapter`."""

    def change(text: bytes) -> bytes:
        whole = json.loads(text)
        section = whole["adapter"] if file == RECIPE_FILE and "base" not in values else whole
        section.update(values)
        return json.dumps(whole).encode()

    return content(file, change)


def of_peft(**values: object) -> Damage:
    """Fields of a folder without our recipe, which is read as PEFT's."""

    def damage(folder: Path) -> None:
        (folder / RECIPE_FILE).unlink()
        fields(CONFIG_FILE, **values)(folder)

    return damage


def as_pipe(folder: Path) -> None:
    (folder / CONFIG_FILE).unlink()
    os.mkfifo(folder / CONFIG_FILE)


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS_FILE), folder / "adapter_model.bin")
    (folder / WEIGHTS_FILE).unlink()


A, B, M = "text.0.q_proj.lora_A", "text.0.v_proj.lora_B", "text.1.q_proj.lora_magnitude"
UNREADABLE = {
    "deep": b"[" * 100_000,
    "digits": b'{"r": 1' + b"0" * 5_000 + b"}",
    "cut": b"{",
    "empty": b"",
    "list": b"[]",
}
DAMAGES: dict[str, Damage] = {
    "magnitude missing": tensors(lambda file: {name: tensor for name, tensor in file.items() if M not in name}),
    "A without B": tensors(lambda file: {**file, "base_model.model.text.1.k_proj.lora_A.weight": torch.ones(2, 6)}),
    "another rank": replaced(A, lambda tensor: torch.ones(3, 6)),
    "NaN": replaced(B, lambda tensor: tensor * float("nan")),
    "infinity": replaced(M, lambda tensor: tensor * float("inf")),
    **{str(kind): replaced(B, lambda tensor, kind=kind: tensor.to(kind)) for kind in (
        torch.float8_e4m3fn, torch.int8, torch.complex64
    )},
    "text for a number": fields(CONFIG_FILE, r="2"),
    "a number for a list": fields(RECIPE_FILE, kinds=7.5),
    "half a file": content(WEIGHTS_FILE, lambda file: file[: len(file) // 2]),
    "five bytes": content(WEIGHTS_FILE, lambda file: file[:5]),
    "no bytes": content(WEIGHTS_FILE, lambda file: b""),
    "no weights": lambda folder: (folder / WEIGHTS_FILE).unlink(),
    "no configuration": lambda folder: (folder / CONFIG_FILE).unlink(),
    "a pipe": as_pipe,
    **{f"{file}, {name}": content(file, lambda _, text=text: text) for file in (CONFIG_FILE, RECIPE_FILE)
       for name, text in UNREADABLE.items()},
    "NUL in the recipe's base": fields(RECIPE_FILE, base="a\0b"),
    "NUL in PEFT's base": fields(CONFIG_FILE, base_model_name_or_path="a\0b"),
    "another method's type": of_peft(peft_type="VERA"),
    "a field that nobody knows": of_peft(lora_alhpa=3),
    "use_qalora": of_peft(use_qalora=True),
    "lora_bias": fields(CONFIG_FILE, lora_bias=True),
    "r": of_peft(r=5),
    "a pattern that is none": of_peft(rank_pattern={"(": 3}),
    "a pattern that takes years": of_peft(alpha_pattern={"((.|.|.|.)+)+[A-Z]": 3}),
    **{f"starts by {init}": of_peft(init_lora_weights=init) for init in ("pissa_niter_4", "olora", "loftq")},
}  # fmt: skip
OF_A_MODEL: dict[str, Damage] = {
    "a layer that is not there": tensors(lambda file: {**file, "base_model.model.text.9.norm.weight": torch.ones(6)}),
    "another width": replaced(A, lambda tensor: torch.ones(2, 7)),
    "a pickle": as_pickle,
}
"""What `read_adapter`, which has no model, reads."""


@pytest.mark.parametrize("damage", [*DAMAGES, *OF_A_MODEL])
def test_a_damaged_folder_is_refused_and_changes_nothing(damage, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(settings_module, "MATCHING_SECONDS", 0.2)
    save_adapter(trained_small("dora"), tmp_path)
    {**DAMAGES, **OF_A_MODEL}[damage](tmp_path)
    if damage in DAMAGES:
        with pytest.raises(UserError):
            read_adapter(tmp_path)
    for model in (Small(), trained_small("dora")):
        with unchanged(model), pytest.raises(UserError):
            load_adapter(model, tmp_path)


@pytest.mark.parametrize("name", ["dora", "pissa_rslora", "patterns"])
@pytest.mark.parametrize(
    ("file", "values"),
    [
        (CONFIG_FILE, {"r": 10**9}),
        (CONFIG_FILE, {"lora_alpha": 77.0}),
        (RECIPE_FILE, {"alpha": 77.0}),
        (RECIPE_FILE, {"method": "full"}),
        (RECIPE_FILE, {"rank_scaling": "linear"}),
        (RECIPE_FILE, {"rank_scaling": "sqrt"}),
    ],
)
def test_two_files_that_contradict_each_other_are_refused(name, file, values, tmp_path) -> None:
    save_adapter(trained_small(name), tmp_path)
    before = json.loads((tmp_path / file).read_text())
    fields(file, **values)(tmp_path)
    for read in (read_adapter, lambda folder: load_adapter(Small(), folder)):
        if before == json.loads((tmp_path / file).read_text()):
            read(tmp_path)
        else:
            with pytest.raises(UserError):
                read(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"alpha": 64.0},
        {"alpha_pattern": {"text.1.v*": 5.0}},
        {"rank": 3},
        {"rank_scaling": "sqrt"},
        {"method": "lora"},
        {"init": "pissa"},
        {"method": "full", "targets": ("text.*_proj",)},
        {"dropout": 0.2, "dropout_mode": "whole_change"},
    ],
)
def test_a_model_adapted_otherwise_is_refused_and_stays(changes: dict[str, Any], tmp_path: Path) -> None:
    source, model = Small(), Small()
    apply_dora(source, config(dropout=0.1))
    save_adapter(source, tmp_path)
    apply_dora(model, config(**changes))
    with unchanged(model), pytest.raises(UserError):
        load_adapter(model, tmp_path)
    apply_dora(other := Small(), config(dropout=0.3))  # whose probability is its own
    load_adapter(other, tmp_path)
    assert other.text[0].q_proj.adapter.dropout == 0.3


# -- writing -------------------------------------------------------------------------------------------------


def test_saving_replaces_whole_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = trained_small("dora"), torch.randn(2, 6)
    save_adapter(model, tmp_path / "a")
    expected = model(x)
    with torch.no_grad():
        model.text[0].q_proj.lora_B.add_(1)

    def full_disk(*positional: object, **named: object) -> None:
        raise BlockingIOError

    with monkeypatch.context() as patched:
        patched.setattr(folder_module, "write_json", full_disk)
        with pytest.raises(BlockingIOError):
            save_adapter(model, tmp_path / "a")
    for answer in (expected, model(x)):
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
        load_adapter(fresh := Small(), tmp_path / "a")
        assert torch.equal(fresh.eval()(x), answer)
        save_adapter(model, tmp_path / "a")


@pytest.mark.parametrize("inside", ["adapter", "other"])
def test_what_is_no_adapter_is_never_replaced(inside: str, tmp_path: Path) -> None:
    model, target = trained_small("dora"), tmp_path / "a"
    save_adapter(model, tmp_path / "b")
    if inside == "adapter":
        save_adapter(model, target)
    target.mkdir(exist_ok=True)
    (target / "thesis.tex").write_text("years of work")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    for write in (lambda: save_adapter(model, target), lambda: write_adapter(read_adapter(tmp_path / "b"), target)):
        with pytest.raises(UserError):
            write()
        assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    (target / "thesis.tex").unlink()
    save_adapter(model, target)


def test_neither_a_file_nor_what_a_link_points_to_is_removed(tmp_path: Path) -> None:
    model = trained_small("dora")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError):
        save_adapter(model, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"
    save_adapter(model, tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    save_adapter(model, tmp_path / "link")
    assert (tmp_path / "a" / WEIGHTS_FILE).is_file()
    assert not (tmp_path / "link").is_symlink()


def test_both_spellings_and_shapes_of_the_magnitude(tmp_path: Path) -> None:
    model, x = trained_small("dora"), torch.randn(2, 6)
    save_adapter(model, tmp_path)
    for change in (
        lambda file: {name.replace("vector", "vector.weight"): tensor for name, tensor in file.items()},
        lambda file: {name: tensor.unsqueeze(1) if "magnitude" in name else tensor for name, tensor in file.items()},
    ):
        tensors(change)(tmp_path)
        load_adapter(fresh := Small(), tmp_path)
        assert torch.equal(fresh.eval()(x), model(x))


def test_suffix_targets_and_patterns_of_a_peft_folder(tmp_path: Path) -> None:
    model, x = trained_small("patterns"), torch.randn(2, 6)
    save_adapter(model, tmp_path)
    of_peft(
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"1.q_proj": 3, "1.v_proj": 3},
        alpha_pattern={"v_proj": 5},
        r=2,
        lora_alpha=6,
    )(tmp_path)
    load_adapter(fresh := Small(), tmp_path)
    assert torch.equal(fresh.eval()(x), model(x))


IDS = torch.randint(32, (2, 7), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bitwise_and_keeps_every_field(tmp_path, dtype):
    wrapped = moved_peft(
        tiny_llama(), rank_pattern={"down_proj": 2}, alpha_pattern={"down_proj": 5}, init_lora_weights=True
    )
    wrapped.to(dtype).save_pretrained(tmp_path / "peft")
    write_adapter(read_adapter(tmp_path / "peft"), tmp_path / "back")
    before, after = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("peft", "back"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert torch.equal(tensor.view(torch.uint8), after[key].view(torch.uint8)), key
    configs = [json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("peft", "back")]
    assert configs[0] == configs[1]


def test_the_way_that_the_refusal_names_works(tmp_path):
    """Saved before training and again after it with the conversion, PEFT's PiSSA loads over the original base."""
    wrapped = get_peft_model(
        tiny_llama(), LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj"], init_lora_weights="pissa")
    )
    wrapped.save_pretrained(tmp_path / "before")
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
        expected = wrapped.eval()(IDS).logits
    wrapped.save_pretrained(tmp_path / "after", path_initial_model_for_weight_conversion=str(tmp_path / "before"))
    model = tiny_llama()
    load_adapter(model, tmp_path / "after")
    torch.testing.assert_close(model.eval()(IDS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_our_folders_are_read_whatever_stands_first(tmp_path, init):
    """The model's first layer has only a magnitude; the folder's method is that of the others."""
    model = tiny_llama()
    settings = {"targets": ("*.down_proj",), "magnitude_targets": ("*.q_proj",), "rank": 2, "init": init}
    names = apply_dora(model, DoRAConfig(**settings))
    assert names[0].endswith("q_proj")
    move(model)
    save_adapter(model, tmp_path)
    adapter = read_adapter(tmp_path)
    assert (adapter.config["use_dora"], adapter.config["lora_dropout"], adapter.method) == (True, 0.05, "dora")
    assert {name: layer.rank > 0 for name, layer in adapter.factors.items()} == {n: "down" in n for n in names}
    fresh = tiny_llama()
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh.eval()(IDS).logits, model.eval()(IDS).logits)


def test_half_a_dvora_folder_is_refused(tmp_path):
    model = tiny_llama()
    apply_dora(model, DoRAConfig(targets=("*.q_proj", "*.down_proj"), rank=3, method="dvora"))
    save_adapter(model, tmp_path)
    assert read_adapter(tmp_path).factors
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if "random_A" not in key}, file)
    with pytest.raises(UserError):
        read_adapter(tmp_path)


def base(folder: Path, **options: str) -> Path:
    tiny_language().save_pretrained(folder, **options)
    return folder


def test_the_hash_of_a_folder_of_one_kind_is_over_its_config_and_weights(tmp_path: Path) -> None:
    folder = base(tmp_path / "base")
    lines = [
        f"{name} {hashlib.sha256((folder / name).read_bytes()).hexdigest()}\n"
        for name in ("config.json", "model.safetensors")
    ]
    assert content_hash(folder) == hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "30KB"}])
def test_files_that_are_not_loaded_do_not_count_and_those_that_are_do(tmp_path: Path, shards: dict[str, str]) -> None:
    folder = base(tmp_path / "base", **shards)
    before = content_hash(folder)
    torch.save({"lm_head.weight": torch.ones(2, 3)}, folder / "pytorch_model.bin")
    torch.save({"rate": torch.ones(1)}, folder / "training_args.bin")
    assert content_hash(folder) == before
    loaded = weight_files(folder)
    assert len(loaded) == 1 if not shards else len(loaded) > 2
    assert all(path.name.startswith("model") and path.suffix == ".safetensors" for path in loaded)
    content = bytearray(loaded[-1].read_bytes())
    content[-1] ^= 1
    loaded[-1].write_bytes(content)
    assert content_hash(folder) != before


def test_a_folder_of_pickles_alone_is_hashed_by_them(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"one")
    before = content_hash(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"two")
    assert content_hash(tmp_path) != before
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "unknown.bin")
    (tmp_path / "folder.safetensors").mkdir()
    assert weight_files(tmp_path) == (tmp_path / "unknown.bin",)


@pytest.mark.parametrize("weight_map", ['{"a": "model-1.safetensors"}', "3", '{"a": "../other.safetensors"}'])
def test_a_broken_list_of_shards_is_refused(tmp_path: Path, weight_map: str) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    (tmp_path / "other.safetensors").write_bytes(b"of somebody else")
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {weight_map}}}')
    with pytest.raises(UserError):
        content_hash(folder)


def whole(folder: Path, step: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    return checkpoint


def test_checkpoints_are_ordered_by_step_and_must_be_whole(tmp_path: Path) -> None:
    for step in (100, 20, 3):
        whole(tmp_path, step)
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "checkpoint-abc").mkdir()
    assert [step_of(path) for path in complete_checkpoints(tmp_path)] == [3, 20, 100]
    assert checkpoint_to_resume("last", tmp_path) == tmp_path / "checkpoint-100"
    assert checkpoint_to_resume(str(tmp_path / "checkpoint-3"), tmp_path) == tmp_path / "checkpoint-3"
    assert checkpoint_to_resume(None, tmp_path) is None
    with pytest.raises(UserError):
        checkpoint_to_resume(str(tmp_path / "checkpoint-500"), tmp_path)


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    folders = [whole(tmp_path, step) for step in (1, 2, 3, 4)]
    drop_old_checkpoints(tmp_path, keep=2, also_keep=[folders[0]])
    assert [step_of(path) for path in complete_checkpoints(tmp_path)] == [1, 3, 4]
    drop_old_checkpoints(tmp_path, keep=None)
    assert len(complete_checkpoints(tmp_path)) == 3


def test_overwriting_removes_results_and_keeps_the_rest(tmp_path: Path) -> None:
    whole(tmp_path, 5)
    (tmp_path / "log.jsonl").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "features").mkdir()
    with pytest.raises(UserError):
        prepare_run_folder(tmp_path, checkpoint=None, overwrite=False)
    with pytest.raises(UserError):
        prepare_run_folder(tmp_path, checkpoint=tmp_path / "checkpoint-5", overwrite=True)
    prepare_run_folder(tmp_path, checkpoint=None, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features", "notes.txt"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_checkpoints_after_the_one_that_a_run_starts_from_count_no_more(tmp_path: Path) -> None:
    """Else the run's own are removed as the oldest, and `last` is one of the run that was left."""
    run, steps = tmp_path / "run", (300, 400, 500, 600)
    checkpoints = {step: whole(run, step) for step in steps}
    (run / "superseded-checkpoint-500").mkdir()  # of an earlier resume
    prepare_run_folder(run, checkpoint=checkpoints[400], overwrite=False)
    left_behind = ["superseded-checkpoint-500", "superseded-checkpoint-500-2", "superseded-checkpoint-600"]
    assert names(run) == ["checkpoint-300", "checkpoint-400", *left_behind]
    assert (run / "superseded-checkpoint-500-2" / "trainer_state.json").is_file()
    whole(run, 420)
    drop_old_checkpoints(run, keep=2)
    assert names(run) == ["checkpoint-400", "checkpoint-420", *left_behind]
    assert checkpoint_to_resume("last", run) == run / "checkpoint-420"


def test_a_run_from_another_folders_checkpoint_keeps_none_of_its_own_folders(tmp_path: Path) -> None:
    other, run = whole(tmp_path / "other", 400), tmp_path / "run"
    whole(run, 300)
    whole(run, 500)
    prepare_run_folder(run, checkpoint=other, overwrite=False)
    assert names(run) == ["superseded-checkpoint-300", "superseded-checkpoint-500"]
    assert names(other.parent) == ["checkpoint-400"]


def test_the_checkpoint_itself_stays_whatever_it_is_called_by(tmp_path: Path) -> None:
    here = whole(tmp_path / "run", 400)
    whole(tmp_path / "run", 500)
    (tmp_path / "links").mkdir()
    (link := tmp_path / "links" / "checkpoint-9").symlink_to(here)
    prepare_run_folder(tmp_path / "run", checkpoint=link, overwrite=False)
    assert names(tmp_path / "run") == ["checkpoint-400", "superseded-checkpoint-500"]
