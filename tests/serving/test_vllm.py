"""Gains of weights however vLLM keeps them, magnitudes taken out of a file, and the plugin inside a real vLLM (slow).

vLLM wants an environment of its own: `VLLM_PYTHON` names its interpreter, where dora_vl is installed too.
"""

import argparse
import importlib.util
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from benchmarks.vllm_dora import CASES, ENVIRONMENT, agrees
from dora_vl.serving.vllm import plugin
from dora_vl.serving.vllm.layer import (
    FrozenLayer,
    Slice,
    UnservableAdapter,
    frozen_layer,
    gains_minus_one,
    take_magnitudes,
)

PYTHON = os.environ.get("VLLM_PYTHON") or (sys.executable if importlib.util.find_spec("vllm") else None)
NO_VLLM = "no vLLM here; VLLM_PYTHON=PATH names an interpreter that has it and dora_vl (docs/export.md)"
HERE = Path(__file__).parent

# -- in vLLM itself ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(PYTHON is None, reason=NO_VLLM)
@pytest.mark.parametrize("case", CASES)
def test_a_mixed_batch_answers_as_peft(case: str, tmp_path: Path) -> None:
    figures = CASES[case](tmp_path, argparse.Namespace(vllm_python=Path(str(PYTHON)), tokens=24))
    assert all(map(agrees, figures.values())), figures
    rows = [row for figure in figures.values() for row in figure["answers"].values()]
    assert all(row["largest_logprob_difference"] < 1e-4 for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(PYTHON is None, reason=NO_VLLM)
@pytest.mark.parametrize("fully_sharded", ["0", "1"])
def test_two_ranks_compute_the_gains_of_their_parts(fully_sharded: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    named = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "VLLM_DIST_IDENT": f"dora_vl_{port}"}
    ranks = [
        subprocess.Popen(
            [str(PYTHON), HERE / "vllm_rank_checks.py", fully_sharded],
            env={**os.environ, **ENVIRONMENT, **named, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    text = [process.communicate(timeout=900)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], text


# -- which vLLM is changed ---------------------------------------------------------------------------------------


WRITTEN = """
class PEFTHelper:
    @classmethod
    def from_dict(cls, config_dict: dict): raise ValueError
    def _validate_features(self): ...
def parse_fine_tuned_lora_name(name, weights_mapper=None): ...
class LoRAModel:
    @staticmethod
    def _should_skip_module(module_name, skip_prefixes): ...
    @classmethod
    def from_lora_tensors(cls, lora_model_id, tensors, peft_helper, device="cuda", dtype=None, model_vocab_size=None,
                          weights_mapper=None, skip_prefixes=None): ...
class PackedLoRALayerWeights:
    @classmethod
    def pack(cls, loras): ...
class LoRAModelManager:
    def activate_adapter(self, lora_id): ...
    def _create_merged_loras_inplace(self, lora_model): ...
    def _get_lora_layer_weights(self, lora_model, module_name): ...
class BaseLinearLayerWithLoRA:
    def create_lora_weights(self, max_loras, lora_config, model_config=None): ...
    def apply(self, x, bias=None): ...
class RowParallelLinearWithLoRA(BaseLinearLayerWithLoRA): ...
_all_lora_classes = (RowParallelLinearWithLoRA, int)
def bgmv_shrink(inputs, lora_b_weights, output_tensor, lora_indices_tensor, scaling=1.0): ...
"""
"""What the plugin changes, with the arguments that it has in vLLM 0.32.0, 0.33.0 and 0.34.0 (vllm/lora)."""


def put_vllm(version: str, source: str, patch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """A vllm whose modules each hold all of `source`."""
    names = ("peft_helper", "lora_model", "lora_weights", "model_manager", "utils", "layers", "layers.base_linear")
    modules = {f"vllm.lora.{name}": ModuleType(name) for name in (*names, "ops.torch_ops.lora_ops")}
    for module in modules.values():
        exec(compile(source, "vllm", "exec"), vars(module))
    modules["vllm"] = ModuleType("vllm")
    vars(modules["vllm"])["__version__"] = version
    shared = vars(modules["vllm.lora.layers.base_linear"])
    vars(modules["vllm.lora.utils"])["_all_lora_classes"] = shared.get("_all_lora_classes", ())
    vars(modules["vllm.lora.layers"])["RowParallelLinearWithLoRA"] = shared["RowParallelLinearWithLoRA"]
    for name in ("vllm.lora", "vllm.lora.ops", "vllm.lora.ops.torch_ops"):
        modules[name] = ModuleType(name)
    for name, module in modules.items():
        patch.setitem(sys.modules, name, module)
    patch.setattr(plugin, "fix_base_rows", lambda: False)
    plugin.register.cache_clear()
    return modules


@pytest.mark.parametrize(("version", "warnings"), [("0.32.0+cpu", 0), ("0.33.0", 0), ("0.34.0", 1), ("0.99.0", 1)])
def test_a_version_is_changed_once_and_one_that_was_never_run_with_a_warning(
    version: str, warnings: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    modules = put_vllm(version, WRITTEN, monkeypatch)
    plugin.register()
    row_parallel, other = modules["vllm.lora.utils"]._all_lora_classes
    plugin.register()
    assert modules["vllm.lora.utils"]._all_lora_classes == (row_parallel, other)
    assert (issubclass(row_parallel, plugin.DoRALayer), other) == (True, int)
    assert row_parallel.shards_inputs
    assert [record.levelname for record in caplog.records if record.name == "vllm.dora_vl"] == ["WARNING"] * warnings


@pytest.mark.parametrize("version", ["0.33.0", "0.34.0"])
@pytest.mark.parametrize(
    ("there", "instead", "point"),
    [
        (
            "def _create_merged_loras_inplace",
            "def _merge",
            "model_manager:LoRAModelManager._create_merged_loras_inplace",
        ),
        (
            "def activate_adapter(self, lora_id)",
            "def activate_adapter(self, slot)",
            "LoRAModelManager.activate_adapter",
        ),
        ("def pack(cls, loras)", "def pack(cls, loras, device)", "PackedLoRALayerWeights.pack"),
        ("_all_lora_classes = ", "_all = ", "utils:_all_lora_classes"),
        ("peft_helper, device", "helper, device", "lora_model:LoRAModel.from_lora_tensors"),
        ("class PackedLoRALayerWeights", "class Packed", "lora_weights:PackedLoRALayerWeights.pack"),
    ],
)
def test_one_without_a_patch_point_is_left_alone_and_the_point_named(
    version: str,
    there: str,
    instead: str,
    point: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = WRITTEN.replace(there, instead)
    assert source != WRITTEN
    modules = put_vllm(version, source, monkeypatch)
    if point == "utils:_all_lora_classes":
        del vars(modules["vllm.lora.utils"])["_all_lora_classes"]
    before = [{**vars(module)} for module in modules.values()]
    plugin.register()
    assert before == [vars(module) for module in modules.values()]
    (record,) = [record for record in caplog.records if record.name == "vllm.dora_vl"]
    assert record.levelname == "WARNING"
    assert point in record.getMessage()
    assert len(plugin.missing_points()) == 1


def test_vllm_finds_it_by_its_entry_point() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '[project.entry-points."vllm.general_plugins"]\ndora_vl = "dora_vl.serving.vllm.plugin:register"' in project
    for entry in entry_points(group="vllm.general_plugins", name="dora_vl"):  # none where another checkout is installed
        assert entry.load() is plugin.register


# -- gains of layers as vLLM keeps them, packed, sharded, unreadable ---------------------------------------------

COLUMNS, ROWS = 300, (12, 5, 7)
CPU = torch.device("cpu")


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


WEIGHT = draw(sum(ROWS), COLUMNS, seed=1)


def adapter(number: int, rank: int) -> Slice:
    size = ROWS[number]
    return Slice(
        draw(rank, COLUMNS, seed=10 + number), draw(size, rank, seed=20 + number), draw(size, seed=30 + number)
    )


SLICES = [adapter(0, 3), None, adapter(2, 2)]


def gains_written_out(weight: Tensor, slices: list[Slice | None]) -> Tensor:
    parts = []
    for rows, lora in zip(weight.split(ROWS), slices, strict=True):
        if lora is None:
            parts.append(torch.zeros(len(rows)))
            continue
        direction = rows.double() + lora.lora_B.double() @ lora.lora_A.double()
        parts.append((lora.magnitude.double() / direction.norm(dim=1)).float() - 1)
    return torch.cat(parts)


def looked_at(weight: Tensor | None, product: Callable[[Tensor], Tensor] = lambda x: x @ WEIGHT.t()) -> FrozenLayer:
    return frozen_layer("layer", product, weight, COLUMNS, torch.float32, CPU)


@pytest.mark.parametrize("kept", [WEIGHT, None, WEIGHT.to(torch.int8), torch.empty(0), WEIGHT.flip(0)])
def test_packed_slices_whatever_the_weight_is_kept_as(kept: Tensor | None) -> None:
    layer = looked_at(kept)
    assert (layer.weight is None) == (kept is not WEIGHT)
    gains = gains_minus_one(layer, SLICES, ROWS)
    torch.testing.assert_close(gains, gains_written_out(WEIGHT, SLICES), rtol=1e-4, atol=1e-5)
    assert gains.abs().max() > 0.1


def in_eight_bits(rows: Tensor) -> Tensor:
    """Each row over its own scale as whole numbers, as W8A8 layers take it."""
    scale = rows.abs().amax(dim=1, keepdim=True) / 127
    return (rows / scale).round() * scale


def test_weights_and_inputs_of_few_bits_are_recovered() -> None:
    steps = (WEIGHT * 4).round()
    gains = gains_minus_one(looked_at(steps.to(torch.int8), lambda x: (x @ steps.t()) / 4), SLICES, ROWS)
    torch.testing.assert_close(gains, gains_written_out(steps / 4, SLICES), rtol=1e-4, atol=1e-5)
    gains = gains_minus_one(looked_at(None, lambda x: in_eight_bits(x) @ WEIGHT.t()), SLICES, ROWS)
    torch.testing.assert_close(gains + 1, gains_written_out(WEIGHT, SLICES) + 1, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("kept", [WEIGHT, None])
def test_rows_that_cancel_come_from_the_dense_direction(kept: Tensor | None) -> None:
    factors = torch.linalg.svd(WEIGHT[: ROWS[0]], full_matrices=False)
    lora_A, lora_B = factors[2], -0.999 * factors[0] * factors[1]
    slices = [Slice(lora_A, lora_B, draw(ROWS[0], seed=3)), None, None]
    gains = gains_minus_one(looked_at(kept), slices, ROWS)
    torch.testing.assert_close(gains, gains_written_out(WEIGHT, slices), rtol=1e-2, atol=1e-3)


def test_a_row_without_a_direction_keeps_gain_one() -> None:
    weight = WEIGHT.clone()
    weight[3] = 0
    slices = [Slice(draw(2, COLUMNS, seed=4), torch.zeros(ROWS[0], 2), torch.full(ROWS[:1], 2.0)), None, None]
    gains = gains_minus_one(looked_at(weight, lambda x: x @ weight.t()), slices, ROWS)
    assert gains[3] == 0
    assert gains.isfinite().all()
    assert (gains[:3] != 0).all()


@pytest.mark.parametrize("kept", [True, False])
def test_ranks_that_hold_columns_sum_their_norms(kept: bool) -> None:
    cut, meeting = 170, threading.Barrier(2)
    parts: dict[int, Tensor] = {}

    def rank(number: int) -> Tensor:
        columns = slice(0, cut) if number == 0 else slice(cut, None)
        weight = WEIGHT[:, columns].contiguous()

        def total(part: Tensor) -> Tensor:
            parts[number] = part
            meeting.wait(20)
            result = parts[0] + parts[1]
            meeting.wait(20)
            return result

        slices = [None if lora is None else lora._replace(lora_A=lora.lora_A[:, columns]) for lora in SLICES]
        layer = frozen_layer(
            "layer", lambda x: x @ weight.t(), weight if kept else None, weight.shape[1], torch.float32, CPU, total
        )
        return gains_minus_one(layer, slices, ROWS)

    with ThreadPoolExecutor(2) as threads:
        for gains in threads.map(rank, range(2)):
            torch.testing.assert_close(gains, gains_written_out(WEIGHT, SLICES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "product",
    [
        lambda x: x.to(torch.float8_e4m3fn).float() @ WEIGHT.t(),
        lambda x: (x * 2).round() / 2 @ WEIGHT.t(),
        lambda x: x.clamp(-0.3, 0.3) @ WEIGHT.t(),  # an input scale that unit vectors exceed
        lambda x: torch.full((len(x), sum(ROWS)), torch.nan),
    ],
)
def test_a_product_of_no_weight_is_refused(product: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - no other is raised there
        looked_at(None, product)


# -- magnitudes taken out of an adapter's tensors ---------------------------------------------------------------

Q, V = "base_model.model.model.layers.0.self_attn.q_proj", "base_model.model.model.layers.0.self_attn.v_proj"


def tensors() -> dict[str, Tensor]:
    return {
        f"{Q}.lora_A.weight": torch.full((4, 6), 1.0),
        f"{Q}.lora_B.weight": torch.full((5, 4), 2.0),
        f"{Q}.lora_magnitude_vector": torch.arange(5).to(torch.bfloat16),
        f"{V}.lora_A.weight": torch.full((2, 6), 3.0),
        f"{V}.lora_B.weight": torch.full((7, 2), 4.0),
        f"{V}.lora_magnitude_vector.weight": torch.arange(7).float().view(7, 1),
    }


def test_magnitudes_go_out_and_factors_stay() -> None:
    file, before = tensors(), tensors()
    magnitudes = take_magnitudes(file, use_dora=True)
    assert magnitudes.keys() == {Q, V}
    assert torch.equal(magnitudes[Q], torch.arange(5.0))
    assert torch.equal(magnitudes[V], torch.arange(7.0))
    assert file.keys() == {name for name in before if "magnitude" not in name}
    assert all(torch.equal(file[name], before[name]) for name in file)


MAGNITUDES = [f"{Q}.lora_magnitude_vector", f"{V}.lora_magnitude_vector.weight"]
BROKEN: dict[str, tuple[bool, list[str], dict[str, Tensor]]] = {
    "a magnitude lost": (True, MAGNITUDES[:1], {}),
    "all magnitudes lost": (True, MAGNITUDES, {}),
    "magnitudes of no DoRA": (False, [], {}),
    "B lost": (True, [f"{Q}.lora_B.weight"], {}),
    "too short": (True, [], {f"{Q}.lora_magnitude_vector": torch.ones(4)}),
    "ranks differ": (True, [], {f"{Q}.lora_A.weight": torch.ones(3, 6)}),
    "no numbers": (True, [], {f"{Q}.lora_magnitude_vector": torch.full((5,), torch.inf)}),
    "an embedding": (True, [], {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 9)}),
}
"""Whether the config says DoRA, what of a file is taken away, and what is put in."""


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_belong_together_is_refused(case: str) -> None:
    use_dora, gone, changed = BROKEN[case]
    file = {name: tensor for name, tensor in {**tensors(), **changed}.items() if name not in gone}
    before = dict(file)
    with pytest.raises(UnservableAdapter):
        take_magnitudes(file, use_dora=use_dora)
    assert file == before


def test_a_magnitude_that_vllm_applies_nowhere_refuses_the_adapter() -> None:
    with pytest.raises(UnservableAdapter):
        plugin.compute_gains({}, {"experts.1.w1": [torch.ones(3)]}, lambda name: None, max_rank=1)
    elsewhere = {"elsewhere": lambda name: True}  # on another rank of a pipeline
    plugin.compute_gains({}, {"experts.1.w1": [torch.ones(3)]}, lambda name: None, max_rank=1, **elsewhere)
