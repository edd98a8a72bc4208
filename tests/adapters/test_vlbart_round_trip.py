"""An original VL-BART's file: converted, merged, and converted back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dora_vl.adapters.folder import load_adapter
from dora_vl.backbones.specs import SmallBart, VlBartSpec
from dora_vl.backbones.vlbart import VlBartBackbone, load_vlbart
from dora_vl.backbones.vlbart_compose import compose_vlbart
from dora_vl.cli import main
from tests.adapters.original_vlbart import FEEDFORWARD, LORA_ALPHA, TOKEN_NAMES, WIDTH, original
from tests.training.tiny_vlbart_run import FEATURE_TOKENS, FEATURE_WIDTH, write_vlbart_data

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
        return model.eval()(ids, torch.ones_like(ids), labels, features).logits.detach()


@pytest.fixture(scope="module", params=WIDTHS)
def start(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Start:
    folder, width = tmp_path_factory.mktemp(request.param), WIDTHS[request.param]
    data = write_vlbart_data(folder / "data")
    small = SmallBart(
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
