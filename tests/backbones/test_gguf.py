"""A language model from a GGUF file that llama.cpp's own package wrote: its weights, its tokenizer, its logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from dora_vl.backbones.loading import read_language_model, with_image_token
from dora_vl.errors import UserError
from tests.backbones.tiny_language import SIZES, byte_tokenizer

FILE = "model.gguf"


def written(folder: Path, kind: str) -> tuple[Any, PreTrainedTokenizerFast]:
    """Writes a Qwen2 whose head is its table, its matrices as `kind`; returns the model and its tokenizer."""
    tokenizer = byte_tokenizer()
    sizes = {**SIZES, "intermediate_size": 64, "tie_word_embeddings": True, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **sizes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6) if weight.dim() > 1 else weight.add_(0.2 * torch.randn_like(weight))
    writer = gguf.GGUFWriter(folder / FILE, "qwen2")
    writer.add_block_count(2)
    writer.add_context_length(1024)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(model.config.rope_parameters["rope_theta"])
    writer.add_vocab_size(len(tokenizer))
    words = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(words["vocab"], key=words["vocab"].get))
    writer.add_token_types([3] * 3 + [1] * (len(tokenizer) - 3))
    writer.add_token_merges([" ".join(pair) for pair in words["merges"]])
    for name, number in (("bos", 1), ("eos", 2), ("unk", 0)):
        getattr(writer, f"add_{name}_token_id")(number)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 2)
    for name, value in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        raw = gguf.GGMLQuantizationType["F32" if value.dim() == 1 else kind]
        data = gguf.quants.quantize(value.detach().numpy(), raw)
        writer.add_tensor(f"{names.get_name(owner)}.{leaf}", data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, tokenizer


def test_float_weights_come_back_bit_by_bit(tmp_path: Path) -> None:
    model, tokenizer = written(tmp_path, "F32")
    language = read_language_model(str(tmp_path), gguf_file=FILE)
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
    model, _ = written(tmp_path, "Q8_0")
    language = with_image_token(read_language_model(str(tmp_path), gguf_file=FILE, dtype=torch.bfloat16))
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
