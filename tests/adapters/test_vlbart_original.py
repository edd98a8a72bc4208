"""The originals' dictionaries of a VL-BART: converted, merged and back; scales, and what they cannot hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dora_vl.adapters.adapter import read_adapter
from dora_vl.adapters.base_weights import BaseWeights
from dora_vl.adapters.exports import original_dictionary
from dora_vl.adapters.folder import load_adapter, save_adapter
from dora_vl.adapters.read import ReadOptions, read_any
from dora_vl.backbones.specs import SmallLanguageModel, VlBartSpec
from dora_vl.backbones.vlbart import VlBartBackbone, compose_vlbart, load_vlbart
from dora_vl.cli import main
from dora_vl.core import DoRAConfig, apply_dora
from dora_vl.errors import UserError
from tests.adapters.original_vlbart import FEEDFORWARD, LORA_ALPHA, TOKEN_NAMES, WIDTH, original
from tests.backbones.tiny_vlbart import tiny
from tests.core.dense_dora import move_trained
from tests.training.tiny_vlbart_run import FEATURE_TOKENS, FEATURE_WIDTH, write_vlbart_data

Q = "model.decoder.layers.1.encoder_attn.q_proj"
V = "model.encoder.layers.0.self_attn.v_proj"
CONFIG = DoRAConfig(targets=(Q, V), rank=3, alpha=4.0, also_keep=("model.shared.weight[-200:]",))
ALIAS = "model.encoder.visual_embedding.obj_order_embedding.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny(seed=2).save_pretrained(folder)
    return folder


def adapter(folder: Path, **changes: Any) -> Path:
    model = tiny(seed=2)
    apply_dora(model, DoRAConfig(**{**vars(CONFIG), **changes}))
    move_trained(model)
    save_adapter(model, folder)
    return folder


def written(folder: Path, base: Path, form: str, **options: Any) -> dict[str, Tensor]:
    with BaseWeights(base) as opened:
        return original_dictionary(read_adapter(folder), opened, form, **options)[0]


def test_b_takes_a_scale_that_the_form_does_not_have(tmp_path: Path, base: Path) -> None:
    source, own = read_adapter(adapter(tmp_path / "a")), tiny(seed=2).get_parameter(f"{Q}.weight").detach()
    state = written(tmp_path / "a", base, "nvlabs-vlbart")
    factors = source.factors[Q]
    assert factors.magnitude is not None
    assert factors.lora_A is not None
    assert factors.lora_B is not None
    direction = state[f"{Q}.weight_v"] + state[f"{Q}.lora_B"] @ state[f"{Q}.lora_A"]
    torch.testing.assert_close(direction, own + 4.0 / 3 * factors.lora_B @ factors.lora_A, atol=1e-6, rtol=1e-6)
    assert torch.equal(state[f"{Q}.weight_m"][:, 0], factors.magnitude)
    assert f"{Q}.weight" not in state


def test_alpha_is_the_result_s_where_the_adapter_states_its_own(tmp_path: Path, base: Path) -> None:
    words = ["convert", str(adapter(tmp_path / "a", method="lora", alpha_pattern={V: 9.0})), "--base", str(base)]
    words += ["--any-base", "--alpha", "4", "--to"]
    main([*words, str(tmp_path / "LAST.pth"), "--as", "vl-adapter", "--task", "vqa"])
    state, layers = torch.load(tmp_path / "LAST.pth", weights_only=True), read_adapter(tmp_path / "a").factors
    for name, scale in ((Q, 4 / 3), (V, 9 / 3)):
        change = state[f"{name}.lora_Bs.vqa"] @ state[f"{name}.lora_As.vqa"] * 4 / 3
        torch.testing.assert_close(change, scale * layers[name].lora_B @ layers[name].lora_A)  # type: ignore[operator]
    read_any(tmp_path / "a", ReadOptions())
    with pytest.raises(UserError):
        read_any(tmp_path / "a", ReadOptions(alpha=4.0))


@pytest.mark.parametrize(
    ("changes", "form", "tasks"),
    [
        ({}, "vl-adapter", ("vqa",)),
        ({"method": "lora"}, "nvlabs-vlbart", ()),
        ({"method": "lora"}, "vl-adapter", ()),
        ({"rank_pattern": {V: 2}}, "nvlabs-vlbart", ()),
        ({"magnitude_targets": ("model.encoder.layers.1.fc1",)}, "nvlabs-vlbart", ()),
    ],
)
def test_what_the_form_cannot_hold_is_refused(
    tmp_path: Path, base: Path, changes: Any, form: str, tasks: tuple[str, ...]
) -> None:
    folder = adapter(tmp_path / "a", **changes)
    with pytest.raises(UserError):
        written(folder, base, form, tasks=tasks)


def test_the_token_embeddings_names_must_agree_and_one_be_there(tmp_path: Path, base: Path) -> None:
    state = written(adapter(tmp_path / "a"), base, "nvlabs-vlbart")
    torch.save({**state, ALIAS: state[ALIAS] + 1}, tmp_path / "other.pth")
    with pytest.raises(UserError):
        read_any(tmp_path / "other.pth", ReadOptions())
    names = [name for name in state if state[name].shape == state[ALIAS].shape]
    assert len(names) == 5
    for name in names:
        del state[name]
    torch.save(state, tmp_path / "none.pth")
    with pytest.raises(UserError):
        read_any(tmp_path / "none.pth", ReadOptions())


def test_a_scale_gives_back_the_alpha_that_it_came_from(tmp_path: Path) -> None:
    assert 16 / 49 * 49 != 16
    file = {"q_proj.lora_As.vqa": torch.randn(49, 60), "q_proj.lora_Bs.vqa": torch.randn(60, 49)}
    torch.save(file, tmp_path / "LAST.pth")
    assert read_any(tmp_path / "LAST.pth", ReadOptions(alpha=16.0)).config["lora_alpha"] == 16.0


ROWS = "base_model.model.model.shared.weight[-200:]"
WIDTHS = {"image": FEATURE_WIDTH, "video": 6}
TASKS = {"image": ("vqa", "gqa", "nlvr", "caption"), "video": ("tvqa", "how2qa", "tvc", "yc2c")}


@dataclass(frozen=True)
class Start:
    """A base of one medium."""

    base: Path
    medium: str

    def logits(self, model: VlBartBackbone) -> Tensor:
        width = model.config.feature_width
        generator = torch.Generator().manual_seed(9)
        ids = torch.randint(4, 90, (3, 7), generator=generator)
        labels = torch.randint(4, 90, (3, 4), generator=generator)
        features = torch.randn(3, 1, FEATURE_TOKENS, width, generator=generator)
        return model.eval()(ids, torch.ones_like(ids), labels, features, keep_logits=True).logits.detach()


@pytest.fixture(scope="module", params=WIDTHS)
def start(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Start:
    folder, width = tmp_path_factory.mktemp(request.param), WIDTHS[request.param]
    data = write_vlbart_data(folder / "data")
    small = SmallLanguageModel(
        texts=tuple(str(file) for file in sorted((data / "records").glob("*.jsonl"))),
        vocabulary=300,
        width=WIDTH,
        layers=1,
        heads=2,
        feedforward=FEEDFORWARD,
        init_std=0.2,
    )
    spec = VlBartSpec(small=small, feature_width=width, pooled_side=2 if width == 8 else None, dropout=0.0)
    compose_vlbart(spec, folder / "base")
    return Start(folder / "base", request.param)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_converted_file_means_what_the_original_does_and_goes_back(start: Start, method: str, tmp_path: Path) -> None:
    tasks = TASKS[start.medium] if method == "lora" else ()
    norms = method == "dora" and start.medium == "image"
    weights = dict(load_vlbart(start.base).model.state_dict())
    run = original(weights, tasks=tasks, norms=norms, prefix="module.")
    torch.save(run.file, tmp_path / "LAST.pth")
    adapter, base = str(tmp_path / "adapter"), ["--base", str(start.base), "--to"]
    scale = ["--alpha", str(LORA_ALPHA)] if method == "lora" else []
    main(["convert", str(tmp_path / "LAST.pth"), "--to", adapter, *scale])
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(tensors[ROWS], run.whole["model.shared.weight"][-200:])
    assert not [name for name in tensors if any(name.endswith(token) for token in TOKEN_NAMES)]

    dense, adapted = load_vlbart(start.base), load_vlbart(start.base)
    dense.model.load_state_dict(run.whole, strict=True)
    expected = start.logits(dense)
    load_adapter(adapted.model, tmp_path / "adapter")
    torch.testing.assert_close(start.logits(adapted), expected, atol=1e-5, rtol=1e-5)
    main(["merge", "--adapter", adapter, *base, str(tmp_path / "merged")])
    torch.testing.assert_close(start.logits(load_vlbart(tmp_path / "merged")), expected, atol=1e-5, rtol=1e-5)

    form = ["--as", "vl-adapter", "--task", ",".join(tasks)] if method == "lora" else ["--as", "nvlabs-vlbart"]
    main(["convert", adapter, *form, *base, str(tmp_path / "BACK.pth")])
    back = torch.load(tmp_path / "BACK.pth", weights_only=True)
    plain = {name.removeprefix("module."): tensor for name, tensor in run.file.items()}
    assert back.keys() == plain.keys()
    assert [name for name, tensor in back.items() if not torch.equal(tensor, plain[name])] == []
