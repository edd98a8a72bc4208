"""A language model from a GGUF file: `export_gguf`, which llama.cpp and transformers hold, writes it; it comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dora_vl.adapters.adapter import Adapter
from dora_vl.adapters.gguf import MODEL_FILE, export_gguf
from dora_vl.backbones.loading import read_language_model, with_image_token
from dora_vl.errors import UserError
from tests.adapters.gguf_models import language
from tests.backbones.tiny_language import byte_tokenizer


def written(folder: Path, kind: str) -> tuple[Any, PreTrainedTokenizerFast]:
    """Writes `model.gguf` of a LLaMA whose head is its table; returns the model and its tokenizer."""
    tokenizer = byte_tokenizer()
    base = language(folder / "base", "llama, tied", tokenizer)
    export_gguf(Adapter({}, {"peft_type": "LORA"}, {}, "nothing"), base, folder / "to", tokenizer, kind=kind)
    return AutoModelForCausalLM.from_pretrained(base).eval(), tokenizer


def test_float_weights_come_back_bit_by_bit(tmp_path: Path) -> None:
    model, tokenizer = written(tmp_path, "f32")
    language = read_language_model(str(tmp_path / "to"), gguf_file=MODEL_FILE)
    expected = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    assert language.weights.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(language.weights[name], value), name
    assert "quantization_config" not in language.config.to_dict()
    assert language.config.tie_word_embeddings
    assert language.config.name_or_path == ""
    text = "the correct answer"
    assert language.tokenizer(text, add_special_tokens=False).input_ids == tokenizer(text).input_ids[1:]


def test_quantised_weights_are_unpacked_and_the_model_computes_with_them(tmp_path: Path) -> None:
    model, _ = written(tmp_path, "q8_0")
    language = with_image_token(read_language_model(str(tmp_path / "to"), gguf_file=MODEL_FILE, dtype=torch.bfloat16))
    words = model.config.vocab_size
    assert language.tokenizer.convert_tokens_to_ids("<image>") == len(language.tokenizer) - 1
    assert all(value.dtype == torch.bfloat16 for value in language.weights.values())
    assert len(language.weights["model.embed_tokens.weight"]) == language.config.vocab_size >= words
    again = type(model)(language.config)
    missing = again.load_state_dict({name: value.float() for name, value in language.weights.items()}, strict=False)
    assert missing.missing_keys == ["lm_head.weight"]
    again.tie_weights()
    ids = torch.tensor([[5, 17, 40, 7]])
    with torch.no_grad():
        expected, logits = model(ids).logits, again.eval()(ids).logits[..., :words]
    # Eight bits a weight and then bfloat16: near, and not by chance.
    assert float((logits - expected).norm()) < 0.03 * float(expected.norm())


def test_no_such_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        read_language_model(str(tmp_path), gguf_file="nothing.gguf")
