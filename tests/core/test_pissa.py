"""PiSSA writes to the frozen weight: only where it can, last of all, and never in silence."""

from __future__ import annotations

import pytest
import torch

from dora_vl.adapters.folder import load_adapter, save_adapter
from dora_vl.core import DoRAConfig, apply_dora, merge_dora, strip_adapters
from dora_vl.errors import UserError
from tests.adapters.test_folder import trained_small
from tests.core.test_inject import Small, Tied, config


def test_strip_refuses_what_pissa_left_of_a_weight():
    model, x = Small(), torch.randn(2, 6)
    base = model(x)
    apply_dora(model, config(init="pissa"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=r"text\.0\.q_proj.*merge_dora"):
        strip_adapters(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    merge_dora(model)
    strip_adapters(model)
    torch.testing.assert_close(model(x), base, rtol=1e-4, atol=1e-5)


def test_a_weight_without_singular_vectors_leaves_the_model_as_it_was():
    model = Small()
    with torch.no_grad():
        model.text[1].v_proj.weight[0, 0] = float("nan")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=r"text\.1\.v_proj"):
        apply_dora(model, config(init="pissa"))
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if n != "text.1.v_proj.weight")


def test_pissa_on_a_shared_weight_is_refused():
    with pytest.raises(UserError, match=r"head.*pissa"):
        apply_dora(Tied(), DoRAConfig(targets=("head",), rank=2, init="pissa"))


@pytest.mark.parametrize("name", ["pissa", "pissa_rslora"])
def test_pissa_as_a_change_of_the_original_weight(name, tmp_path):
    """What `AdapterSet` needs: the same outputs, and no frozen weight changes."""
    model, x = trained_small(name), torch.randn(2, 6)
    save_adapter(model, tmp_path / "a")
    fresh = Small()
    load_adapter(fresh, tmp_path / "a", change_base=False)
    torch.testing.assert_close(fresh.eval()(x), model(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(fresh.text[0].q_proj.weight, Small().text[0].q_proj.weight)
