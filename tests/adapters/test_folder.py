"""The adapter folder: bitwise round trips, whole or not at all, and strict loading that leaves the model alone.

A refusal's reason is the one thing that was changed about a folder that loads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from dora_vl.adapters import folder as folder_module
from dora_vl.adapters import settings as settings_module
from dora_vl.adapters.adapter import read_adapter, write_adapter
from dora_vl.adapters.files import CONFIG_FILE, FILES, RECIPE_FILE, WEIGHTS_FILE
from dora_vl.adapters.folder import load_adapter, save_adapter
from dora_vl.core import apply_dora, trained_parts
from dora_vl.errors import UserError
from tests.core.dense_dora import move_trained, unchanged
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
def test_a_damaged_folder_is_refused_and_changes_nothing(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_two_files_that_contradict_each_other_are_refused(
    name: str, file: str, values: dict[str, object], tmp_path: Path
) -> None:
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
