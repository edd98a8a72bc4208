"""A language model from a GGUF file: written here by GGUF's own package, read back as the model it was made from."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dora_vl.backbones.loading import read_language_model, with_image_token
from dora_vl.errors import UserError

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(chr(code) for code in range(33, 126)), "Ġ", "Ċ", "th", "he"]
LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def gguf_order(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of the rows of q and k: the two halves of each head interleaved."""
    return weight.view(heads, 2, len(weight) // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def write_gguf(model: LlamaForCausalLM, path: Path, *, quantised: bool) -> None:
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, *([1] * (len(TOKENS) - 3))])
    writer.add_token_merges(["t h", "h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    weights = model.state_dict()
    tensors = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    for layer in range(config.num_hidden_layers):
        tensors |= {f"blk.{layer}.{theirs}": f"model.layers.{layer}.{ours}" for theirs, ours in LAYER_NAMES.items()}
    for theirs, ours in tensors.items():
        value = weights[f"{ours}.weight"]
        if theirs.endswith(("attn_q", "attn_k")):
            heads = config.num_attention_heads if theirs.endswith("q") else config.num_key_value_heads
            value = gguf_order(value, heads)
        data = value.contiguous().numpy().astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if quantised and data.ndim == 2 else None
        writer.add_tensor(
            f"{theirs}.weight", data if kind is None else gguf.quants.quantize(data, kind), raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_float_weights_come_back_bit_by_bit(tmp_path):
    model = tiny_llama()
    write_gguf(model, tmp_path / "tiny.gguf", quantised=False)
    language = read_language_model(str(tmp_path), gguf_file="tiny.gguf")
    expected = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    assert language.weights.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(language.weights[name], value), name
    assert "quantization_config" not in language.config.to_dict()
    assert language.config.tie_word_embeddings
    assert language.config.name_or_path == ""
    ids = language.tokenizer("the", add_special_tokens=False).input_ids
    assert language.tokenizer.decode(ids) == "the"


def test_quantised_weights_are_unpacked_and_the_model_computes_with_them(tmp_path):
    model = tiny_llama()
    write_gguf(model, tmp_path / "tiny.gguf", quantised=True)
    language = with_image_token(read_language_model(str(tmp_path), gguf_file="tiny.gguf", dtype=torch.bfloat16))
    assert language.tokenizer.convert_tokens_to_ids("<image>") == len(TOKENS)
    assert all(value.dtype == torch.bfloat16 for value in language.weights.values())
    rows = len(language.weights["model.embed_tokens.weight"])
    assert rows == language.config.vocab_size == 128
    again = LlamaForCausalLM(language.config)
    missing = again.load_state_dict({name: value.float() for name, value in language.weights.items()}, strict=False)
    assert missing.missing_keys == ["lm_head.weight"]
    again.tie_weights()
    ids = torch.tensor([[5, 17, 40, 7]])
    with torch.no_grad():
        expected, logits = model(ids).logits, again.eval()(ids).logits[..., : len(TOKENS)]
    # Eight bits a weight and then bfloat16: near, and not by chance.
    assert float((logits - expected).norm()) < 0.03 * float(expected.norm())


def test_no_such_file_is_one_line(tmp_path):
    with pytest.raises(UserError):
        read_language_model(str(tmp_path), gguf_file="nothing.gguf")
