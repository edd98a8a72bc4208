"""An original VL-BART's file: converted, merged, trained on, merged again, and converted back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dora_vl.adapters.folder import load_adapter
from dora_vl.backbones.vlbart import VlBartBackbone, load_vlbart
from dora_vl.backbones.vlbart_compose import SmallBart, VlBartSpec, compose_vlbart
from dora_vl.cli import main
from dora_vl.run.reading import read_settings
from dora_vl.run.settings import VlBartRunConfig
from dora_vl.training.run import run
from dora_vl.training.vlbart_pipeline import VlBartPipeline
from tests.adapters.original_vlbart import FEEDFORWARD, LORA_ALPHA, RANK, TOKEN_NAMES, WIDTH, Original, original
from tests.training.tiny_vlbart_run import (
    FEATURE_TOKENS,
    FEATURE_WIDTH,
    FEATURES,
    all_subtasks,
    write_vlbart_data,
    write_vlbart_run,
)

ROWS = "base_model.model.model.shared.weight[-200:]"
WEIGHTS = "adapter_model.safetensors"
VIDEO_WIDTH = 6
TASKS = {"image": "vqav2", "video": "tvqa"}
TASK_LISTS = {"image": ("vqa", "gqa", "nlvr", "caption"), "video": ("tvqa", "how2qa", "tvc", "yc2c")}


@dataclass(frozen=True)
class Start:
    """A base of one medium, and data to train on."""

    base: Path
    data: Path
    medium: str

    @property
    def weights(self) -> dict[str, Tensor]:
        return dict(load_vlbart(self.base).model.state_dict())

    def logits(self, model: VlBartBackbone) -> Tensor:
        width = model.config.feature_width
        generator = torch.Generator().manual_seed(9)
        ids = torch.randint(4, 90, (3, 7), generator=generator)
        labels = torch.randint(4, 90, (3, 4), generator=generator)
        features = torch.randn(3, 1, FEATURE_TOKENS, width, generator=generator)
        return model.eval()(ids, torch.ones_like(ids), labels, features).logits.detach()


@pytest.fixture(scope="module", params=["image", "video"])
def start(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Start:
    folder = tmp_path_factory.mktemp(request.param)
    data = write_vlbart_data(folder / "data")
    width = FEATURE_WIDTH if request.param == "image" else VIDEO_WIDTH
    random = np.random.default_rng(0)
    for number in range(FEATURES):
        values = random.normal(size=(FEATURE_TOKENS, width)).astype(np.float16)
        np.savez(data / "features" / f"p{number}.npz", features=values)
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
    return Start(folder / "base", data, request.param)


@dataclass(frozen=True)
class Case:
    """An original run."""

    method: str

    @property
    def form(self) -> str:
        return "vl-adapter" if self.method == "lora" else "nvlabs-vlbart"

    def norms(self, start: Start) -> bool:
        return self.method == "dora" and start.medium == "image"

    def tasks(self, start: Start) -> tuple[str, ...]:
        return TASK_LISTS[start.medium] if self.method == "lora" else ()

    def saved(self, start: Start, file: Path) -> Original:
        made = original(start.weights, tasks=self.tasks(start), norms=self.norms(start), prefix="module.")
        torch.save(made.file, file)
        return made


every_case = pytest.mark.parametrize("case", [Case("lora"), Case("dora")], ids=["lora", "dora"])


def converted(case: Case, file: Path, folder: Path) -> Path:
    main(["convert", str(file), "--to", str(folder), *(["--alpha", str(LORA_ALPHA)] if case.method == "lora" else [])])
    return folder


def back(case: Case, start: Start, adapter: Path, file: Path) -> dict[str, Tensor]:
    words = ["--task", ",".join(case.tasks(start))] if case.method == "lora" else []
    main(["convert", str(adapter), "--as", case.form, "--base", str(start.base), "--to", str(file), *words])
    return torch.load(file, weights_only=True)


def merged(start: Start, adapter: Path, folder: Path) -> Tensor:
    main(["merge", "--adapter", str(adapter), "--base", str(start.base), "--to", str(folder)])
    return start.logits(load_vlbart(folder))


def unmerged(start: Start, adapter: Path) -> Tensor:
    model = load_vlbart(start.base)
    load_adapter(model.model, adapter)
    return start.logits(model)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name, tensor in found.items() if not torch.equal(tensor, wanted[name])] == []


@every_case
def test_a_converted_file_means_what_the_original_does_and_goes_back(start: Start, case: Case, tmp_path: Path) -> None:
    made = case.saved(start, tmp_path / "LAST.pth")
    adapter = converted(case, tmp_path / "LAST.pth", tmp_path / "adapter")
    tensors = load_file(adapter / WEIGHTS)
    assert torch.equal(tensors[ROWS], made.whole["model.shared.weight"][-200:])
    assert not [name for name in tensors if any(name.endswith(token) for token in TOKEN_NAMES)]
    dense = load_vlbart(start.base)
    dense.model.load_state_dict(made.whole, strict=True)
    expected = start.logits(dense)
    torch.testing.assert_close(unmerged(start, adapter), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merged(start, adapter, tmp_path / "merged"), expected, atol=1e-5, rtol=1e-5)
    plain = {name.removeprefix("module."): tensor for name, tensor in made.file.items()}
    assert_same(back(case, start, adapter, tmp_path / "BACK.pth"), plain)


def trained_on(case: Case, start: Start, initial: Path, folder: Path) -> Path:
    task = TASKS[start.medium]
    settings: dict[str, Any] = {
        "method": case.method,
        "rank": RANK,
        "alpha": LORA_ALPHA if case.method == "lora" else float(RANK),
        "train_norm_weights": case.norms(start),
        "initial": str(initial),
    }
    file = write_vlbart_run(
        folder / "run.yaml",
        start.data,
        (task,),
        model={"base": str(start.base), "compose": None},
        adapter=settings,
        training={"use_cpu": True, "learning_rate": 0.02, "num_train_epochs": 3},
    )
    assert (
        run(VlBartPipeline(read_settings([f"--config={file}"], VlBartRunConfig), all_subtasks(), name="tiny")) is None
    )
    return folder / "run" / "adapter"


@pytest.mark.slow
@every_case
def test_a_converted_file_is_trained_on_merged_and_converted_back(start: Start, case: Case, tmp_path: Path) -> None:
    made = case.saved(start, tmp_path / "LAST.pth")
    initial = converted(case, tmp_path / "LAST.pth", tmp_path / "adapter")
    adapter = trained_on(case, start, initial, tmp_path)
    before, after = load_file(initial / WEIGHTS), load_file(adapter / WEIGHTS)
    left = set(before) - set(after)
    assert all("layer_norm.weight" in name or "layernorm_embedding.weight" in name for name in left)
    assert not left or not case.norms(start)
    changes = {name: (after[name] - before[name].view(after[name].shape)).abs().max() for name in after}
    assert changes.pop(ROWS) == 0  # the file's rows, not the base's
    assert all(change < 0.5 for change in changes.values())  # it began there
    assert sum(bool(change > 0) for change in changes.values()) > len(changes) - 5
    torch.testing.assert_close(
        merged(start, adapter, tmp_path / "merged"), unmerged(start, adapter), atol=1e-5, rtol=1e-5
    )
    returned = back(case, start, adapter, tmp_path / "BACK.pth")
    assert {name: tensor.shape for name, tensor in returned.items()} == {
        name.removeprefix("module."): tensor.shape for name, tensor in made.file.items()
    }
    again = load_file(converted(case, tmp_path / "BACK.pth", tmp_path / "again") / WEIGHTS)
    assert_same({name: tensor for name, tensor in again.items() if name not in left}, after)
    assert all(torch.equal(again[name], before[name]) for name in left)
