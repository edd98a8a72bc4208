"""No module of a model that is opened here is replaced by a kernel of the hub's, whatever transformers' default."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import BartConfig, BartForConditionalGeneration
from transformers.modeling_utils import PreTrainedModel

from dora_vl.backbones.feature_encoder import load_pooled
from dora_vl.backbones.loading import read_language_model
from dora_vl.backbones.model import open_backbone
from dora_vl.backbones.specs import TowerSpec, VlBartSpec
from dora_vl.backbones.tower_sources import load_transformers
from dora_vl.backbones.vlbart import _language, load_vlbart
from dora_vl.evaluation.merge_check import _opened
from tests.backbones.conftest import small_clip
from tests.backbones.test_towers import save_clip
from tests.backbones.tiny_language import byte_tokenizer, write_tiny_language
from tests.backbones.tiny_vlbart import tiny

ROOT = Path(__file__).parents[2]
NO_MODELS = ("Config", "Tokenizer", "TokenizerFast", "Processor", "ProcessorPil", "PeftModel")


def loads(file: Path) -> list[str]:
    """The function that each `X.from_pretrained(...)` stands in, but those of configs, tokenizers and processors."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [
        next((made.name for made in reversed(functions) if call in ast.walk(made)), "")
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "from_pretrained"
        if not ast.unparse(call.func.value).endswith(NO_MODELS)
    ]


def test_one_function_opens_models() -> None:
    files = [
        file
        for folder in ("dora_vl", "tasks", "data_prep", "benchmarks")
        for file in sorted((ROOT / folder).rglob("*.py"))
    ]
    found = [(str(file.relative_to(ROOT)), function) for file in files for function in loads(file)]
    assert found == [("dora_vl/backbones/loading.py", "load_pretrained")]


@dataclass(frozen=True)
class Folders:
    language: Path
    clip: Path
    bart: Path
    vlbart: Path


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folder = tmp_path_factory.mktemp("bases")
    write_tiny_language(folder / "language")
    save_clip(small_clip(0), folder / "clip")
    sizes = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    config = BartConfig(vocab_size=300, d_model=16, encoder_ffn_dim=8, decoder_ffn_dim=8, **sizes)
    BartForConditionalGeneration(config).save_pretrained(folder / "bart")
    byte_tokenizer().save_pretrained(folder / "bart")
    tiny().save_pretrained(folder / "vlbart")
    return Folders(*(folder / name for name in ("language", "clip", "bart", "vlbart")))


def tower(folders: Folders) -> TowerSpec:
    return TowerSpec(library="transformers", name=str(folders.clip), weights="pretrained")


OPENED: dict[str, Callable[[Folders], Any]] = {
    "a base": lambda folders: open_backbone(str(folders.language)),
    "a language model": lambda folders: read_language_model(str(folders.language)),
    "a vision tower": lambda folders: load_transformers(tower(folders)),
    "a picture encoder": lambda folders: load_pooled(tower(folders)),
    "a VL-BART": lambda folders: load_vlbart(folders.vlbart),
    "a BART": lambda folders: _language(VlBartSpec(bart=str(folders.bart))),
    "a merge to check": lambda folders: _opened(folders.language),
}


@pytest.mark.parametrize("way", OPENED)
def test_transformers_is_told_not_to_use_kernels(way: str, bases: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    load, asked = PreTrainedModel.from_pretrained.__func__, []

    def from_pretrained(cls: Any, *args: Any, **options: Any) -> Any:
        asked.append(options.get("use_kernels"))
        return load(cls, *args, **options)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
    OPENED[way](bases)
    assert asked == [False]
