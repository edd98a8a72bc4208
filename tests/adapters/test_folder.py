"""The adapter folder: bitwise round trips, strict loading, whole or not at all, and what PEFT makes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from dora_vl.adapters import settings as settings_module
from dora_vl.adapters.adapter import read_adapter
from dora_vl.adapters.folder import CONFIG_FILE, RECIPE_FILE, WEIGHTS_FILE, load_adapter, save_adapter
from dora_vl.core import apply_dora
from dora_vl.errors import UserError
from tests.core.dense_dora import move
from tests.core.test_inject import Small, config

ROOT = Path(__file__).parents[2]

VARIANTS = {
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
    "orthogonal": {"init": "orthogonal"},
    "settings": {"dropout": 0.3, "dropout_mode": "whole_change", "detach_norm": False},
}
PEFT_READS = {"dora", "lora", "rslora", "patterns", "pissa", "pissa_rslora", "orthogonal", "settings"}


def trained_small(name: str) -> Small:
    model = Small()
    torch.manual_seed(1)
    apply_dora(model, config(**VARIANTS[name]))
    torch.manual_seed(2)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    move(model)
    return model.eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip_into_a_fresh_model(name, tmp_path):
    model, x = trained_small(name), torch.randn(2, 6)
    save_adapter(model, tmp_path / "a", base_model="base", recipe={"task": "x"})
    fresh = Small()
    load_adapter(fresh, tmp_path / "a")
    torch.testing.assert_close(fresh.eval()(x), model(x), rtol=0, atol=0)
    assert [p.name for p in _parts(fresh)] == [p.name for p in _parts(model)]
    save_adapter(fresh, tmp_path / "b", base_model="base", recipe={"task": "x"})
    for file in (WEIGHTS_FILE, CONFIG_FILE, RECIPE_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def _parts(model):
    from dora_vl.core import trained_parts

    return trained_parts(model)


@pytest.mark.parametrize("name", VARIANTS)
def test_loading_into_an_adapted_model(name, tmp_path):
    model, x = trained_small(name), torch.randn(2, 6)
    save_adapter(model, tmp_path / "a")
    other = Small()
    apply_dora(other, config(**VARIANTS[name]))
    other.eval()(x)
    load_adapter(other, tmp_path / "a")
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_peft_opens_what_it_can_represent_and_refuses_the_rest(name, tmp_path):
    model, x = trained_small(name), torch.randn(2, 6)
    save_adapter(model, tmp_path / "a")
    if name not in PEFT_READS:
        with pytest.raises((ValueError, KeyError, TypeError)):
            PeftModel.from_pretrained(Small(), tmp_path / "a")
        return
    peft = PeftModel.from_pretrained(Small(), tmp_path / "a").eval()
    torch.testing.assert_close(peft(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_another_process_gives_the_same_answers(tmp_path):
    model, x = trained_small("extras"), torch.randn(2, 6)
    save_adapter(model, tmp_path / "a")
    torch.save({"x": x, "y": model(x)}, tmp_path / "answers.pt")
    code = (
        "import sys, torch\nfrom dora_vl.adapters.folder import load_adapter\n"
        "from tests.core.test_inject import Small\n"
        "folder = sys.argv[1]\nmodel = Small()\nload_adapter(model, folder + '/a')\n"
        "saved = torch.load(folder + '/answers.pt')\n"
        "assert torch.equal(model.eval()(saved['x']), saved['y'])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=ROOT)


# -- foreign spellings ---------------------------------------------------------------------------------------


def rewrite(folder: Path, change) -> None:
    save_file(change(load_file(folder / WEIGHTS_FILE)), folder / WEIGHTS_FILE)


# -- strictness ----------------------------------------------------------------------------------------------


def drop(key: str):
    return lambda tensors: {k: v for k, v in tensors.items() if key not in k}


def replaced(key: str, value):
    return lambda tensors: {k: value(v) if key in k else v for k, v in tensors.items()}


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("text.1.q_proj.lora_magnitude"), r"1 missing \['text\.1\.q_proj\.magnitude'\]"),
        (lambda t: {**t, "base_model.model.text.1.k_proj.lora_A.weight": torch.ones(2, 6)}, "k_proj"),
        (lambda t: {**t, "base_model.model.text.9.norm.weight": torch.ones(6)}, r"text\.9\.norm\.weight"),
        (replaced("text.0.q_proj.lora_A", lambda v: v.t().contiguous()), r"text\.0\.q_proj\.lora_A is \[6, 2\]"),
        (replaced("text.0.q_proj.lora_A", lambda v: torch.ones(3, 6)), r"text\.0\.q_proj\.lora_A is \[3, 6\]"),
        (replaced("text.0.v_proj.lora_B", lambda v: v * float("nan")), r"NaN.*text\.0\.v_proj\.lora_B"),
    ],
)
def test_a_folder_that_does_not_fit_changes_nothing(change, message, adapted, tmp_path):
    save_adapter(trained_small("dora"), tmp_path / "a")
    rewrite(tmp_path / "a", change)
    model = trained_small("dora") if adapted else Small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(UserError, match=message):
        load_adapter(model, tmp_path / "a")
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert flags == [parameter.requires_grad for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("lora_bias", True, "lora_bias is set"),
        ("peft_type", "VERA", "peft_type is 'VERA'"),
        ("use_lorentz", True, "unknown field 'use_lorentz'"),
        ("r", 5, "rank 5 in the configuration"),
        ("rank_pattern", {"(": 3}, r"pattern '\('"),
        ("alpha_pattern", {"((.|.|.|.)+)+[A-Z]": 3}, r"pattern .*0\.2 s"),
        ("init_lora_weights", "pissa_niter_4", "init_lora_weights is 'pissa_niter_4'.*merge_and_unload"),
        ("init_lora_weights", "loftq", "init_lora_weights is 'loftq'"),
    ],
)
def test_a_configuration_that_is_not_ours(field, value, message, tmp_path, monkeypatch):
    monkeypatch.setattr(settings_module, "MATCHING_SECONDS", 0.2)
    save_adapter(trained_small("dora"), tmp_path / "a")
    (tmp_path / "a" / RECIPE_FILE).unlink()
    settings = json.loads((tmp_path / "a" / CONFIG_FILE).read_text())
    (tmp_path / "a" / CONFIG_FILE).write_text(json.dumps({**settings, field: value}))
    with pytest.raises(UserError, match=message):
        load_adapter(Small(), tmp_path / "a")


@pytest.mark.parametrize("file", [CONFIG_FILE, RECIPE_FILE])
@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"r": 1' + "0" * 5_000 + "}", "{", ""], ids=["deep", "digits", "cut", "empty"]
)
def test_what_python_cannot_read_as_json_is_one_line(file, text, tmp_path):
    save_adapter(trained_small("dora"), tmp_path / "a")
    (tmp_path / "a" / file).write_text(text)
    with pytest.raises(UserError, match=file) as error:
        load_adapter(Small(), tmp_path / "a")
    assert len(str(error.value)) < 500


FIELDS = (
    *((CONFIG_FILE, name) for name in ("r", "lora_alpha", "lora_dropout", "rank_pattern", "use_dora")),
    *((RECIPE_FILE, name) for name in ("method", "rank", "kinds", "init", "parts", "detach_norm", "rank_pattern")),
)
OF_ITS_TYPE = {"lora_alpha": 7.5, "lora_dropout": 7.5, "use_dora": True, "detach_norm": True}


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        (file, field, value)
        for file, field in FIELDS
        for value in (7.5, "evil", [1], {"x": [1]}, None, True)
        if type(value) is not type(OF_ITS_TYPE.get(field, ...))
        and (file, field, value) != (CONFIG_FILE, "rank_pattern", None)  # PEFT writes none so
    ],
)
def test_a_value_of_another_type_is_named(file, field, value, tmp_path):
    path = tmp_path / "a" / file
    save_adapter(trained_small("dora"), tmp_path / "a")
    whole = json.loads(path.read_text())
    section = whole if file == CONFIG_FILE else whole["adapter"]
    section[field] = value
    path.write_text(json.dumps(whole))
    for read in (lambda: load_adapter(Small(), tmp_path / "a"), lambda: read_adapter(tmp_path / "a")):
        with pytest.raises(UserError, match=rf"{file}: \S*{field}"):
            read()


def test_broken_files_are_named(tmp_path):
    save_adapter(trained_small("dora"), tmp_path / "a")
    with pytest.raises(UserError, match="nowhere"):
        load_adapter(Small(), tmp_path / "nowhere")
    weights = tmp_path / "a" / WEIGHTS_FILE
    whole = weights.read_bytes()
    for cut in (whole[: len(whole) // 2], whole[:5], b""):
        weights.write_bytes(cut)
        with pytest.raises(UserError, match=WEIGHTS_FILE):
            load_adapter(Small(), tmp_path / "a")
    weights.write_bytes(whole)
    (tmp_path / "a" / CONFIG_FILE).write_text("{")
    with pytest.raises(UserError, match=CONFIG_FILE):
        load_adapter(Small(), tmp_path / "a")
    (tmp_path / "a" / CONFIG_FILE).unlink()
    with pytest.raises(UserError, match=CONFIG_FILE):
        load_adapter(Small(), tmp_path / "a")


def test_saving_replaces_whole_and_leaves_nothing_behind(tmp_path, monkeypatch):
    model, x = trained_small("dora"), torch.randn(2, 6)
    save_adapter(model, tmp_path / "a")
    expected = model(x)
    with torch.no_grad():
        model.text[0].q_proj.lora_B.add_(1)
    from dora_vl.adapters import folder as adapter_file

    def full_disk(*positional, **named):
        raise OSError("no space left")

    monkeypatch.setattr(adapter_file, "write_json", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(model, tmp_path / "a")
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    fresh = Small()
    load_adapter(fresh, tmp_path / "a")
    assert torch.equal(fresh.eval()(x), expected)
    save_adapter(model, tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    fresh = Small()
    load_adapter(fresh, tmp_path / "a")
    assert torch.equal(fresh.eval()(x), model(x))


@pytest.mark.parametrize("inside", ["adapter", "other"])
def test_what_is_no_adapter_is_never_replaced(inside, tmp_path):
    model, target = trained_small("dora"), tmp_path / "a"
    if inside == "adapter":
        save_adapter(model, target)
    target.mkdir(exist_ok=True)
    (target / "thesis.tex").write_text("years of work")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(UserError, match=r"thesis\.tex"):
        save_adapter(model, target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    (target / "thesis.tex").unlink()
    save_adapter(model, target)


def test_neither_a_file_nor_what_a_link_points_to_is_removed(tmp_path):
    model = trained_small("dora")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file"):
        save_adapter(model, tmp_path / "file")
    save_adapter(model, tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    save_adapter(model, tmp_path / "link")
    assert (tmp_path / "a" / WEIGHTS_FILE).is_file()
    assert not (tmp_path / "link").is_symlink()


def changed(folder: Path, file: str, **values: object) -> Path:
    content = json.loads((folder / file).read_text())
    (content["adapter"] if file == RECIPE_FILE else content).update(values)
    (folder / file).write_text(json.dumps(content))
    return folder


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
@pytest.mark.parametrize("read", [read_adapter, lambda folder: load_adapter(Small(), folder)], ids=["read", "load"])
def test_two_files_that_contradict_each_other_are_refused(name, file, values, read, tmp_path):
    save_adapter(trained_small(name), tmp_path / "adapter")
    read(tmp_path / "adapter")
    before = (tmp_path / "adapter" / file).read_text()
    changed(tmp_path / "adapter", file, **values)
    if json.loads(before) != json.loads((tmp_path / "adapter" / file).read_text()):
        with pytest.raises(UserError, match=r"adapter_config\.json.*recipe\.json"):
            read(tmp_path / "adapter")


def test_a_pipe_in_an_adapter_folder_is_no_file(tmp_path):
    save_adapter(trained_small("dora"), tmp_path / "adapter")
    (tmp_path / "adapter" / CONFIG_FILE).unlink()
    os.mkfifo(tmp_path / "adapter" / CONFIG_FILE)
    with pytest.raises(UserError, match=CONFIG_FILE):
        read_adapter(tmp_path / "adapter")


def test_both_spellings_and_shapes_of_the_magnitude(tmp_path):
    model, x = trained_small("dora"), torch.randn(2, 6)
    save_adapter(model, tmp_path / "a")
    for change in (
        lambda t: {k.replace("vector", "vector.weight"): v for k, v in t.items()},
        lambda t: {k: v.unsqueeze(1) if "magnitude" in k else v for k, v in t.items()},
    ):
        rewrite(tmp_path / "a", change)
        fresh = Small()
        load_adapter(fresh, tmp_path / "a")
        assert torch.equal(fresh.eval()(x), model(x))


def test_suffix_targets_and_patterns_of_a_peft_folder(tmp_path):
    model, x = trained_small("patterns"), torch.randn(2, 6)
    save_adapter(model, tmp_path / "a")
    (tmp_path / "a" / RECIPE_FILE).unlink()
    settings = json.loads((tmp_path / "a" / CONFIG_FILE).read_text())
    settings.update(
        target_modules=["q_proj", "v_proj"], rank_pattern={"1.q_proj": 3, "1.v_proj": 3}, alpha_pattern={"v_proj": 5}
    )
    settings["r"], settings["lora_alpha"] = 2, 6
    (tmp_path / "a" / CONFIG_FILE).write_text(json.dumps(settings))
    fresh = Small()
    load_adapter(fresh, tmp_path / "a")
    assert torch.equal(fresh.eval()(x), model(x))
