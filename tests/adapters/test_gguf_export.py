"""GGUF as it is written here: transformers reads the same model back, and text splits as before."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.quantization_config import GgufConfig

from dora_vl.adapters.adapter import Adapter, read_adapter
from dora_vl.adapters.gguf import MODEL_FILE, VISION_FILE, export_gguf, frequency_factors, in_pairs, vocabulary_of
from dora_vl.errors import UserError
from dora_vl.evaluation.open_model import folder_of_gguf
from tests.adapters.gguf_models import MODELS, SIZES, TEXTS, TOKENIZERS, byte_level, dora_on, language, sentencepiece
from tests.adapters.test_hub_names import adapter_on
from tests.backbones.tiny_image_text import write_tiny
from tests.backbones.tiny_language import byte_tokenizer
from tests.training.tiny_run import write_tiny_llava

gguf = pytest.importorskip("gguf", reason="pip install 'dora-vl[gguf]'")


def read_back(folder: Path) -> Any:
    quantised = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=MODEL_FILE, dtype=torch.float32, quantization_config=quantised
    )
    return model.eval()


KINDS = [(name, "f32") for name in MODELS] + [(name, kind) for name in ("llama", "gemma2") for kind in ("f16", "q8_0")]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_transformers_reads_the_adapted_model_back(tmp_path: Path, name: str, kind: str) -> None:
    tokenizer = byte_tokenizer()
    base = language(tmp_path / "base", name, tokenizer)
    adapter, model = dora_on(base, tmp_path / "adapter")
    exported = export_gguf(adapter, base, tmp_path / "to", tokenizer, kind=kind)
    assert list(exported.files) == [MODEL_FILE]
    again = read_back(tmp_path / "to")
    ids = torch.arange(7).unsqueeze(0) * 11 % len(tokenizer)
    with torch.no_grad():
        expected, found = model(ids).logits, again(ids).logits
    assert again.config.model_type == model.config.model_type.replace("mistral", "llama")
    scale = float(expected.abs().max())
    tolerance = {"f32": 1e-5, "f16": 2e-3, "q8_0": 5e-2}[kind]
    assert float((found - expected).abs().max()) < tolerance * scale
    assert scale > 0.1
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base)(ids).logits
    assert float((plain - expected).abs().max()) > tolerance * scale  # the adapter is in it
    types = {one.name: one.tensor_type.name for one in gguf.GGUFReader(tmp_path / "to" / MODEL_FILE).tensors}
    assert types["blk.0.ffn_up.weight"] == kind.upper()
    assert types["output_norm.weight"] == "F32"


def test_biases_are_turned_with_their_rows(tmp_path: Path) -> None:
    """transformers' reader of LLaMA files knows no biases; llama.cpp does."""
    tokenizer = byte_tokenizer()
    base = changed(language(tmp_path / "base", "llama", tokenizer), attention_bias=True, mlp_bias=True)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_()
    model.save_pretrained(base)
    export_gguf(empty(), base, tmp_path / "to", tokenizer, kind="f16")
    held = {
        one.name: torch.from_numpy(one.data.copy()) for one in gguf.GGUFReader(tmp_path / "to" / MODEL_FILE).tensors
    }
    weights = model.state_dict()
    assert torch.equal(held["blk.1.attn_q.bias"], in_pairs(weights["model.layers.1.self_attn.q_proj.bias"], 4))
    assert torch.equal(held["blk.1.attn_k.bias"], in_pairs(weights["model.layers.1.self_attn.k_proj.bias"], 2))
    assert torch.equal(held["blk.1.attn_v.bias"], weights["model.layers.1.self_attn.v_proj.bias"])
    assert torch.equal(held["blk.0.ffn_down.bias"], weights["model.layers.0.mlp.down_proj.bias"])


def fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def empty() -> Adapter:
    return Adapter({}, {"peft_type": "LORA"}, {}, "nothing")


def test_fields_of_settings_and_tokenizer(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.add_tokens(["wholeword"])
    base = language(tmp_path / "base", "qwen2", tokenizer)
    export_gguf(empty(), base, tmp_path / "to", tokenizer, kind="f16")
    found = fields(tmp_path / "to" / MODEL_FILE)
    assert found["general.architecture"] == "qwen2"
    assert found["qwen2.rope.freq_base"] == 1e6
    assert found["qwen2.context_length"] == 256
    assert found["qwen2.attention.head_count_kv"] == 2
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    assert found["tokenizer.chat_template"] == "{{ messages }}"
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == (True, False)
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(tokenizer) + 3
    assert tokens[:3] == ["<unk>", "<s>", "</s>"]
    assert kinds[:3] == [3, 3, 3]
    assert (tokens[len(tokenizer) - 1], kinds[len(tokenizer) - 1]) == ("wholeword", 4)
    assert (tokens[-1], kinds[-1]) == (f"[PAD{len(tokenizer) + 2}]", 5)


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name not in ("smollm", "gemma")])
def test_text_splits_as_before(tmp_path: Path, name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    base = language(tmp_path / "base", "llama", tokenizer)
    export_gguf(empty(), base, tmp_path / "to", tokenizer, kind="f32")
    again = AutoTokenizer.from_pretrained(tmp_path / "to", gguf_file=MODEL_FILE)
    for text in TEXTS:
        if name == "spm" and (text.startswith(" ") or "<s>" in text):
            continue  # transformers' reader puts no space mark there, as llama.cpp does
        expected = tokenizer(text, add_special_tokens=False).input_ids
        assert again(text, add_special_tokens=False).input_ids == expected, text
        assert len(expected) < len(text.encode())


def test_scores_order_sentencepieces_as_merges_do() -> None:
    """llama.cpp joins the neighbours whose token scores highest; done by hand here, as ids."""
    for prefix in (True, False):
        tokenizer = sentencepiece(prefix=prefix)
        found = vocabulary_of(tokenizer, len(tokenizer), "here")
        assert (found.model, found.space_prefix) == ("llama", prefix)
        assert (found.kinds[0], found.kinds[1], found.kinds[3]) == (2, 3, 6)
        score = dict(zip(found.tokens, found.scores, strict=True))
        for text in TEXTS:
            if "<s>" in text:
                continue
            pieces = [*(("▁" if prefix else "") + text.replace(" ", "▁"))]
            while True:
                pairs = {i: score[a + b] for i, (a, b) in enumerate(pairwise(pieces)) if a + b in score}
                if not pairs:
                    break
                best = max(pairs, key=lambda i: (pairs[i], -i))
                pieces[best : best + 2] = [pieces[best] + pieces[best + 1]]
            ids = tokenizer(text, add_special_tokens=False).tokens()
            assert [one for piece in pieces for one in ([piece] if piece in score else
                    [f"<0x{byte:02X}>" for byte in piece.encode()])] == ids  # fmt: skip


def test_factors_of_llama_3s_positions() -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    config = AutoConfig.for_model("llama", **{**SIZES, "vocab_size": 300, "rope_parameters": rope})
    model = AutoModelForCausalLM.from_config(config)
    factors = frequency_factors(model.config)
    assert factors is not None
    plain = 500000.0 ** -(np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(plain / factors.numpy(), model.model.rotary_emb.inv_freq.numpy(), rtol=1e-6)
    assert float(factors.min()) == 1.0
    assert float(factors.max()) == 8.0
    assert frequency_factors(AutoConfig.for_model("llama", **SIZES)) is None


@pytest.mark.parametrize("kind", [pytest.param("f32", marks=pytest.mark.slow), "f16"])
def test_a_llava_comes_back_from_both_files(tmp_path: Path, kind: str) -> None:
    """The language model by transformers, tower and projector by gguf's names; the projector was trained."""
    base = write_tiny_llava(tmp_path / "base", width=64)
    adapter = adapter_on(base, tmp_path / "adapter")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    exported = export_gguf(read_adapter(adapter), base, tmp_path / "to", tokenizer, kind=kind)
    assert list(exported.files) == [MODEL_FILE, VISION_FILE]
    folder = folder_of_gguf(tmp_path / "to", base, tmp_path / "again")
    image = json.loads((base / "config.json").read_text())["image_token_index"]
    expected, found = (llava_logits(*one, image=image) for one in ((base, adapter), (folder, None)))
    tolerance = {"f32": 1e-5, "f16": 3e-3}[kind]
    assert float((found - expected).abs().max()) < tolerance * float(expected.abs().max())
    assert float((llava_logits(base, None, image=image) - expected).abs().max()) > 0.05 * float(expected.abs().max())


def llava_logits(folder: Path, adapter: Path | None, *, image: int) -> torch.Tensor:
    from transformers import LlavaForConditionalGeneration

    from dora_vl.adapters.folder import load_adapter

    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    if adapter is not None:
        load_adapter(model, adapter)
    ids = torch.cat([torch.full((1, 4), image), torch.arange(5, 12).unsqueeze(0)], dim=1)
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits


def test_what_an_mmproj_file_says(tmp_path: Path) -> None:
    base = write_tiny_llava(tmp_path / "base", width=64)
    export_gguf(empty(), base, tmp_path / "to", PreTrainedTokenizerFast.from_pretrained(base), kind="f32")
    file = tmp_path / "to" / VISION_FILE
    found = fields(file)
    assert found["general.architecture"] == "clip"
    assert found["clip.projector_type"] == "mlp"
    assert found["clip.has_vision_encoder"] is True
    assert found["clip.use_gelu"] is False  # quick_gelu
    assert (found["clip.vision.image_size"], found["clip.vision.patch_size"]) == (8, 4)
    assert found["clip.vision.projection_dim"] == 64
    assert found["clip.vision.block_count"] == 1  # of two: the features are the last block's input
    assert found["clip.vision.feature_layer"] == [1]
    assert found["clip.vision.image_mean"] == [0.5, 0.5, 0.5]
    names = {one.name: tuple(map(int, one.shape)) for one in gguf.GGUFReader(file).tensors}
    assert names["v.patch_embd.weight"] == (4, 4, 3, 16)
    assert names["v.blk.0.ffn_up.weight"] == (16, 32)
    assert names["mm.0.weight"] == (16, 64)
    assert names["mm.2.bias"] == (64,)
    assert "v.pre_ln.weight" in names
    assert not [name for name in names if name.startswith(("v.blk.1.", "v.post_ln"))]


def refused(base: Path, tmp_path: Path, tokenizer: Any = None) -> str:
    with pytest.raises(UserError) as raised:
        export_gguf(empty(), base, tmp_path / "to", tokenizer or byte_tokenizer(), kind="f16")
    assert not (tmp_path / "to").exists()
    assert len(str(raised.value)) < 500
    return str(raised.value)


def changed(base: Path, **settings: Any) -> Path:
    config = json.loads((base / "config.json").read_text())
    for name, value in settings.items():
        part = config[name] if isinstance(value, dict) else config
        part.update(value if isinstance(value, dict) else {name: value})
    (base / "config.json").write_text(json.dumps(config))
    return base


def test_what_llama_cpp_does_not_have_is_one_line(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    granite = write_granite(tmp_path / "granite", tokenizer)
    assert "its language model is a 'granite'; as GGUF are written llama" in refused(granite, tmp_path)
    smolvlm = write_tiny("smolvlm", tmp_path / "smolvlm")
    assert "is a 'smolvlm'" in refused(smolvlm, tmp_path)
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    base = changed(language(tmp_path / "yarn", "llama", tokenizer), rope_parameters=yarn)
    assert "rotary positions are of type 'yarn'" in refused(base, tmp_path)
    base = changed(language(tmp_path / "relu", "llama", tokenizer), hidden_act="relu")
    assert "hidden_act is 'relu', and llama.cpp's llama has silu" in refused(base, tmp_path)
    base = changed(language(tmp_path / "scalar", "gemma2", tokenizer), query_pre_attn_scalar=100)
    assert "query_pre_attn_scalar is 100" in refused(base, tmp_path)
    other = byte_level(pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False))
    base = language(tmp_path / "split", "llama", other)
    assert "splits text by Whitespace and ByteLevel" in refused(base, tmp_path, other)
    llava = write_tiny_llava(tmp_path / "llava", width=64)
    fast = PreTrainedTokenizerFast.from_pretrained(llava)
    assert "selected by 'full'" in refused(changed(llava, vision_feature_select_strategy="full"), tmp_path, fast)
    changed(llava, vision_feature_select_strategy="default", vision_config={"hidden_act": "relu"})
    assert "its tower computes relu" in refused(llava, tmp_path, fast)


def write_granite(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    from tests.backbones.tiny_language import tiny_language

    tiny_language("granite", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_sliding_window_that_is_not_kept_is_told(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    base = changed(language(tmp_path / "base", "mistral", tokenizer), sliding_window=64)
    exported = export_gguf(empty(), base, tmp_path / "to", tokenizer, kind="f16")
    assert ["attention slides over 64 tokens" in one for one in exported.warnings] == [True]
    assert fields(tmp_path / "to" / MODEL_FILE)["llama.context_length"] == 64


def test_only_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    base = language(tmp_path / "base", "llama", tokenizer)
    export_gguf(empty(), base, tmp_path / "to", tokenizer, kind="f16")
    small = (tmp_path / "to" / MODEL_FILE).stat().st_size
    export_gguf(empty(), base, tmp_path / "to", tokenizer, kind="f32")
    assert (tmp_path / "to" / MODEL_FILE).stat().st_size > small
    (tmp_path / "to" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt"):
        export_gguf(empty(), base, tmp_path / "to", tokenizer, kind="f16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "to"]
