"""What a run saves opens in PEFT with the same logits, or PEFT refuses it: every family, by each method."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dora_vl import save_adapter
from dora_vl.adapters.files import CONFIG_FILE
from dora_vl.backbones.model import open_backbone
from tests.backbones.conversations import TALKS, adapt, batch_of, encoder_of, talks_of
from tests.backbones.tiny_families.table import FAMILIES, LANGUAGE_MODELS_IN_TURN, families_in_turn
from tests.backbones.tiny_image_text import write_tiny_language

methods = pytest.mark.parametrize("method", ["dora", "lora"])


@torch.no_grad()
def opens(open_base: Callable[[], Any], batch: Mapping[str, Any], folder: Path, method: Any) -> bool:
    """Returns True if PEFT opens a moved adapter of all that trains by default; its logits are then the same."""
    model, base = open_base(), open_base()
    adapt(model, method=method)
    save_adapter(model, folder)
    expected = model.eval()(**batch).logits
    assert float((base(**batch).logits - expected).abs().max()) > 0.01
    if json.loads((folder / CONFIG_FILE).read_text())["peft_type"] != "LORA":
        with pytest.raises(KeyError, match="DORA_VL"):
            PeftModel.from_pretrained(base, folder)
        return False
    torch.testing.assert_close(
        PeftModel.from_pretrained(base, folder).eval()(**batch).logits, expected, rtol=0, atol=1e-4
    )
    return True


@methods
@families_in_turn
def test_a_family_opens_or_is_refused(folders: Mapping[str, Path], tmp_path: Path, family: str, method: str) -> None:
    batch = batch_of(encoder_of(folders[family]), [TALKS[conversation] for conversation in talks_of(family)])
    outcome = opens(lambda: open_backbone(str(folders[family])).model.eval(), batch, tmp_path / "adapter", method)
    assert outcome == FAMILIES[family].peft


@methods
@pytest.mark.parametrize("family", LANGUAGE_MODELS_IN_TURN)
def test_a_language_model_opens(tmp_path: Path, family: str, method: str) -> None:
    base = write_tiny_language(family, tmp_path / "base")
    batch = {"input_ids": torch.arange(9).unsqueeze(0) + 300}

    def open_base() -> Any:
        return AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()

    assert opens(open_base, batch, tmp_path / "adapter", method)
