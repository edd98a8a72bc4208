"""`accelerate_peft` under `torch.compile`: one graph, and PEFT's eager numbers and gradients.

Run by tests/core/fast/test_compiled.py. PEFT's own DoRA needs several graphs (it asks a parameter's class for its
module's name), its LoRA one.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import nn

from dora_vl.adapters.peft_model import accelerate_peft
from tests.adapters.peft_folders import moved_peft
from tests.core.dense_dora import passed

FORMS = {"dora": {}, "lora": {"use_dora": False}, "rslora": {"use_rslora": True}}
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


class Pair(nn.Module):
    """A layer with a bias and one without, a third that stays frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 9), nn.Linear(9, 4, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(torch.tanh(self.first(x))))


def peft_pair(**settings) -> nn.Module:
    return moved_peft(Pair(), target_modules=["first", "second"], **settings)


def twins(**settings) -> tuple[nn.Module, nn.Module]:
    """PEFT's model and the same one accelerated."""
    plain = peft_pair(**settings)
    fast = copy.deepcopy(plain)
    assert len(accelerate_peft(fast).layers) == 2
    return plain, fast


def compiled(model: nn.Module):
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def assert_equal_to_peft(plain: nn.Module, fast: nn.Module, graph) -> None:
    torch.testing.assert_close(passed(fast, X, run=graph), passed(plain, X), rtol=1e-4, atol=1e-5)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("eager_first", [True, False])
def test_one_graph_equals_peft(form, training, eager_first):
    plain, fast = twins(**FORMS[form])
    plain.train(training)
    fast.train(training)
    if eager_first:
        fast(X)
    assert_equal_to_peft(plain, fast, compiled(fast))


def test_adapters_switch_scale_disable_and_merge_after_compiling():
    plain = peft_pair()
    plain.add_adapter("other", LoraConfig(r=2, lora_alpha=5, use_dora=True, target_modules=["first", "second"]))
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "other" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    fast = copy.deepcopy(plain)
    accelerate_peft(fast)

    def scenes(model: nn.Module, run: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        outputs = [run(X)]
        model.set_adapter("other")
        outputs.append(run(X))
        with model.disable_adapter():
            outputs.append(run(X))
        model.set_adapter("default")
        for module in model.modules():
            if isinstance(module, PeftLinear):
                module.set_scale("default", 0.5)
        outputs.append(run(X))
        model.base_model.set_adapter(["default", "other"])
        outputs.append(run(X))
        model.merge_adapter()
        return [output.detach() for output in (*outputs, run(X))]

    expected = scenes(plain, plain)
    for output, pefts in zip(scenes(fast, torch.compile(fast, backend="aot_eager")), expected, strict=True):
        torch.testing.assert_close(output, pefts, rtol=1e-5, atol=1e-6)
    first = expected[:-1]  # merging changes nothing
    assert all((first[i] - other).abs().max() > 1e-3 for i in range(len(first)) for other in first[:i])


def test_an_adapter_added_after_compiling():
    plain, fast = twins()
    graph = torch.compile(fast, backend="aot_eager")
    graph(X)
    for model in (plain, fast):
        torch.manual_seed(3)
        settings = {"init_lora_weights": False, "use_dora": True, "target_modules": ["first", "second"]}
        model.add_adapter("late", LoraConfig(r=4, lora_alpha=3, **settings))
        model.set_adapter("late")
    torch.testing.assert_close(graph(X), plain(X), rtol=1e-5, atol=1e-6)
    fast(X)
    assert_equal_to_peft(plain, fast, graph)
