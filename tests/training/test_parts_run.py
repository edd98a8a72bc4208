"""Named parts in a run's YAML, over a mixture of experts with pictures: trained, resumed, merged, or refused."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText

from dora_vl.adapters.folder import load_adapter, read_weights
from dora_vl.core import merge_dora, strip_adapters, trained_parts
from dora_vl.errors import UserError
from dora_vl.evaluation import merge_command
from dora_vl.run.reading import read_run_file
from dora_vl.training.decoder_pipeline import DecoderPipeline
from dora_vl.training.run import run
from tests.backbones.tiny_image_text import write_tiny
from tests.training.tiny_run import write_run, write_tiny_data

PARTS: dict[str, Any] = {
    "targets": ["language"],
    "rank": 3,
    "alpha": 7.0,
    "parts": {
        "experts": {"targets": ["experts"], "rank": 2, "alpha": 5.0},
        "vision": {"targets": ["vision"], "rank": 4},
        "projector": {"targets": ["projector"], "alpha": 1.5},
    },
    "also_train": {"tokens": ["*embed_tokens.weight"]},
}
RATES = {"experts": 2e-3, "vision": 1e-4, "vision.magnitude": 3e-4, "projector": 5e-4, "tokens": 4e-4}
CPU: dict[str, object] = {"use_cpu": True, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    write_tiny("qwen3_vl_moe", folder / "base")
    write_tiny_data(folder / "data", samples=24, text_only_blocks=4)
    return folder


def settings(there: Path, name: str, **changes: Any) -> Path:
    given = {"adapter": PARTS, "optim": {"projector_learning_rate": None, "rates": RATES}, "training": CPU, **changes}
    return write_run(there / f"{name}.yaml", there / "base", there / "data" / "train.json", **given)


@pytest.fixture(scope="module")
def adapter(there: Path) -> Path:
    run(DecoderPipeline(read_run_file(settings(there, "whole"))))
    return there / "whole" / "adapter"


def base(there: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(there / "base").eval()


def test_every_part_trains_at_its_rank(there: Path, adapter: Path) -> None:
    weights = read_weights(adapter)
    short = {name.removeprefix("base_model.model.model."): tensor for name, tensor in weights.items()}
    experts = short["language_model.layers.0.mlp.experts.gate_up_proj.lora_A.weight"]
    assert tuple(experts.shape) == (4, 2, 32)
    assert len(short["visual.blocks.0.attn.qkv.lora_A.weight"]) == 4
    assert len(short["language_model.layers.1.self_attn.q_proj.lora_A.weight"]) == 3
    assert len(short["visual.merger.linear_fc1.lora_A.weight"]) == 3
    assert all(bool(tensor.any()) for name, tensor in weights.items() if "lora_B" in name)
    embedding = base(there).get_input_embeddings().weight
    assert not torch.equal(short["language_model.embed_tokens.weight"], embedding)
    model = base(there)
    load_adapter(model, adapter)
    names = {part.part for part in trained_parts(model)}
    assert names == {"dora", "experts", "vision", "projector", "tokens"}


def test_the_table_says_what_trains_and_what_does_not(there: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    only = {"targets": ["language"], "rank": 3, "parts": {"vision": PARTS["parts"]["vision"]}}
    changes = {"adapter": only, "optim": {"rates": {"vision": 1e-4}}, "training": {**CPU, "max_steps": 1}}
    run(DecoderPipeline(read_run_file(settings(there, "table", **changes))))
    (table,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("what trains")]
    lines = {line.split()[0]: line.split()[1:] for line in table.splitlines()[1:]}
    assert lines["dora.A"][0::3] == ["8", "3"]
    assert lines["vision.B"][-2:] == ["4", "0.0001"]
    assert lines["projector"][-1] == "0.001"
    assert lines["experts"][-1].endswith("experts.gate_up_proj")
    assert lines["linear"][-1] == "lm_head.weight"


def test_a_resumed_run_ends_where_a_whole_one_does(there: Path, adapter: Path) -> None:
    path = settings(there, "half")
    run(DecoderPipeline(read_run_file(path)))
    content = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**content, "resume": str(there / "half" / "checkpoint-2")}))
    run(DecoderPipeline(read_run_file(path)))
    whole, resumed = read_weights(adapter), read_weights(there / "half" / "adapter")
    assert resumed.keys() == whole.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=1e-6)


def test_a_merged_folder_is_the_adapted_model(there: Path, adapter: Path, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    merge_command.add_arguments(parser)
    list(merge_command.run(parser.parse_args(["--adapter", str(adapter), "--to", str(tmp_path / "merged")])))
    model = base(there)
    load_adapter(model, adapter)
    merge_dora(model, keep_base=False)
    strip_adapters(model)
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").state_dict()
    changed = 0
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(
            merged[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
        changed += not torch.equal(tensor, base(there).state_dict()[name]) if "experts." in name else 0
    assert changed == 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optim": {"rates": {"visoin": 1e-4}}}, "set for visoin, but what trains is .*; did you mean vision"),
        ({"adapter": {"parts": {"eyes": {"targets": ["*.eyes.*"]}}}, "optim": {}}, r"parts\.eyes.*matches none"),
        ({"adapter": {"targets": ["langauge"]}, "optim": {}}, "adapter.targets: 'langauge' is neither"),
        ({"adapter": {"also_train": {"norms": ["*.norrm.*"]}}, "optim": {}}, r"also_train\.norms.*matches none"),
    ],
)
def test_parts_that_are_not_there_are_refused_before_weights_are_loaded(
    there: Path, tmp_path: Path, changes: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*positional: object, **named: object) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr("dora_vl.training.decoder_pipeline.load_base", load)
    path = settings(there, f"refused_{tmp_path.name}", **changes)
    with pytest.raises(UserError, match=said):
        run(DecoderPipeline(read_run_file(path)))
    assert not path.with_suffix("").exists(), "the run has no folder yet that would be in a second try's way"
