"""Every way that a base is opened, beside a package `kernels` that fails when it is asked for a kernel.

Run by test_opening.py in a process of its own: transformers decides when it is imported whether the package is there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import kernels  # pyright: ignore[reportMissingImports]
import pytest
from PIL import Image
from transformers import AutoModel, BartConfig, BartForConditionalGeneration
from transformers.modeling_utils import PreTrainedModel

from dora_vl.backbones.feature_encoder import load_pooled
from dora_vl.backbones.loading import read_language_model
from dora_vl.backbones.model import open_backbone
from dora_vl.backbones.specs import ComposeSpec, TowerSpec, VlBartSpec
from dora_vl.backbones.tower_sources import compose_llava, load_transformers
from dora_vl.backbones.vlbart import _language, load_vlbart
from dora_vl.cli import main
from dora_vl.evaluation.merging import _opened
from dora_vl.serving.model import open_served
from dora_vl.training.extras import replay
from tests.backbones.conftest import small_clip
from tests.backbones.test_towers import save_clip
from tests.backbones.tiny_language import byte_tokenizer, write_tiny_language
from tests.backbones.tiny_vlbart import tiny
from tests.training.tiny_run import merged, trained, write_run, write_tiny_data, write_tiny_llava

OF_BITSANDBYTES = "get_kernel kernels-community/quantization-bitsandbytes"
"""What bitsandbytes itself asks for when it is imported on a CPU with AVX512-BF16: docs/bases.md."""


@dataclass(frozen=True)
class Folders:
    root: Path
    run: Path

    @cached_property
    def adapter(self) -> Path:
        return trained(self.run) / "adapter"

    def __truediv__(self, name: str) -> str:
        return str(self.root / name)


@pytest.fixture(autouse=True, scope="module")
def loads() -> Iterator[list[str]]:
    """The classes that were loaded; kernels are the default in every version, as transformers 5.25 has it."""
    load, classes = PreTrainedModel.from_pretrained.__func__, []

    def from_pretrained(cls: Any, *args: Any, **options: Any) -> Any:
        classes.append(cls.__name__)
        return load(cls, *args, **{"use_kernels": True, **options})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
        yield classes


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("bases")
    write_tiny_language(root / "language")
    save_clip(small_clip(0), root / "clip")
    sizes = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    config = BartConfig(vocab_size=300, d_model=16, encoder_ffn_dim=8, decoder_ffn_dim=8, **sizes)
    BartForConditionalGeneration(config).save_pretrained(root / "bart")
    byte_tokenizer().save_pretrained(root / "bart")
    tiny().save_pretrained(root / "vlbart")
    Image.new("RGB", (12, 10), "red").save(root / "red.png")
    base, data = write_tiny_llava(root / "llava"), write_tiny_data(root / "data", samples=8)
    run = write_run(root / "run.yaml", base, data, training={"max_steps": 1})
    return Folders(root, run)


def tower(folders: Folders) -> TowerSpec:
    return TowerSpec(library="transformers", name=folders / "clip", weights="pretrained")


def compose(folders: Folders) -> None:
    spec = ComposeSpec(vision_library="transformers", vision_name=folders / "clip", language_model=folders / "language")
    compose_llava(spec, folders.root / "composed")


def ask(folders: Folders) -> None:
    question = ["--image", folders / "red.png", "--question", "Say the colour.", "--max-new-tokens", "2"]
    main(["ask", "--adapter", str(folders.adapter), *question, "--compare-base"])


WAYS: dict[str, Callable[[Folders], Any]] = {
    "train": lambda folders: folders.adapter,
    "ask": ask,
    "serve": lambda folders: open_served(None, {"red": folders.adapter}),
    "merge": lambda folders: merged(folders.adapter, folders.root / "merged"),
    "replay": lambda folders: main(["replay", str(folders.run)]),
    "compose": compose,
    "a base": lambda folders: open_backbone(folders / "llava"),
    "a language model": lambda folders: read_language_model(folders / "language"),
    "a vision tower": lambda folders: load_transformers(tower(folders)),
    "a picture encoder": lambda folders: load_pooled(tower(folders)),
    "a VL-BART": lambda folders: load_vlbart(folders / "vlbart"),
    "a BART": lambda folders: _language(VlBartSpec(bart=folders / "bart")),
    "a merge to check": lambda folders: _opened(folders.root / "language"),
}


def test_transformers_alone_asks(folders: Folders) -> None:
    with pytest.raises(kernels.KernelRequested, match="kernelize CLIPModel"):
        AutoModel.from_pretrained(folders / "clip")
    assert kernels.REQUESTS.pop() == "kernelize CLIPModel"


@pytest.mark.parametrize("way", WAYS)
def test_no_kernel_is_asked_for(way, folders, loads, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(replay, "write_chats", lambda path, *_: loads.append(path.name))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    before = len(loads)
    WAYS[way](folders)
    assert len(loads) > before
    assert {*kernels.REQUESTS} <= {OF_BITSANDBYTES}
