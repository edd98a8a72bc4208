"""GGUF as it is written here: transformers reads the same model back, and what the files say.

Text, biases, scores, rotary positions and all models in float32 are compared with llama.cpp itself, in
test_gguf_in_llama_cpp.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration, PreTrainedTokenizerFast
from transformers.utils.quantization_config import GgufConfig

from dora_vl.adapters.adapter import Adapter, read_adapter
from dora_vl.adapters.folder import load_adapter
from dora_vl.adapters.gguf import MODEL_FILE, VISION_FILE, export_gguf, refuse_gguf_base
from dora_vl.cli import main
from dora_vl.errors import UserError
from dora_vl.evaluation.open_model import folder_of_gguf
from tests.adapters.gguf_models import byte_level, dora_on, language
from tests.adapters.test_hub_names import adapter_on, logits
from tests.backbones.tiny_image_text import write_tiny
from tests.backbones.tiny_language import byte_tokenizer, tiny_language
from tests.training.tiny_run import write_tiny_llava


def read_back(folder: Path) -> Any:
    quantised = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=MODEL_FILE, dtype=torch.float32, quantization_config=quantised
    )
    return model.eval()


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_transformers_reads_the_adapted_model_back(tmp_path: Path, name: str, kind: str) -> None:
    tokenizer = byte_tokenizer()
    base = language(tmp_path / "base", name, tokenizer)
    adapter, model = dora_on(base, tmp_path / "adapter")
    exported = export_gguf(adapter, base, tmp_path / "to", tokenizer, kind=kind)
    assert list(exported.files) == [MODEL_FILE]
    again = read_back(tmp_path / "to")
    ids = torch.arange(7).unsqueeze(0) * 11 % len(tokenizer)
    with torch.no_grad():
        expected, written = model(ids).logits, again(ids).logits
    assert again.config.model_type == model.config.model_type.replace("mistral", "llama")
    scale = float(expected.abs().max())
    tolerance = {"f16": 2e-3, "q8_0": 5e-2}[kind]
    assert float((written - expected).abs().max()) < tolerance * scale
    assert scale > 0.1
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base)(ids).logits
    assert float((plain - expected).abs().max()) > tolerance * scale  # the adapter is in it
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "to" / MODEL_FILE).tensors}
    assert types["blk.0.ffn_up.weight"] == kind.upper()
    assert types["output_norm.weight"] == "F32"


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
    written = fields(tmp_path / "to" / MODEL_FILE)
    stated = {
        "general.architecture": "qwen2",
        "qwen2.rope.freq_base": 1e6,
        "qwen2.context_length": 256,
        "qwen2.attention.head_count_kv": 2,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.chat_template": "{{ messages }}",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }
    assert {name: written[name] for name in stated} == stated
    tokens, kinds = written["tokenizer.ggml.tokens"], written["tokenizer.ggml.token_type"]
    assert len(tokens) == len(tokenizer) + 3
    assert tokens[:3] == ["<unk>", "<s>", "</s>"]
    assert kinds[:3] == [3, 3, 3]
    assert (tokens[len(tokenizer) - 1], kinds[len(tokenizer) - 1]) == ("wholeword", 4)
    assert (tokens[-1], kinds[-1]) == (f"[PAD{len(tokenizer) + 2}]", 5)


def test_a_llava_comes_back_from_both_files(tmp_path: Path) -> None:
    """The language model by transformers, tower and projector by gguf's names; the projector was trained."""
    base = write_tiny_llava(tmp_path / "base", width=64)
    adapter = adapter_on(base, tmp_path / "adapter")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    exported = export_gguf(read_adapter(adapter), base, tmp_path / "to", tokenizer, kind="f16")
    assert list(exported.files) == [MODEL_FILE, VISION_FILE]
    folder = folder_of_gguf(tmp_path / "to", base, tmp_path / "again")
    expected, written = (logits(*args) for args in ((base, adapter), (folder, None)))
    assert float((written - expected).abs().max()) < 3e-3 * float(expected.abs().max())
    assert float((logits(base) - expected).abs().max()) > 0.05 * float(expected.abs().max())


def test_of_a_llava_that_llama_cpp_has_no_tower_of_the_language_model_goes_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_tiny_llava(tmp_path / "base", width=64)
    adapter = adapter_on(base, tmp_path / "adapter")
    changed(base, vision_feature_select_strategy="full")
    words = ["export", "--gguf", "f32", "--any-base", "--adapter", str(adapter), "--to", str(tmp_path / "to")]
    for more in ([], ["--text-only", "--check"]):
        with pytest.raises(SystemExit) as refused:
            main([*words, *more])
        assert refused.value.code == 2
        assert not (tmp_path / "to").exists()
    main([*words, "--text-only"])
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == [MODEL_FILE]
    model = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    load_adapter(model, adapter)
    ids = torch.arange(4, 11).unsqueeze(0)
    with torch.no_grad():
        expected, written = model(input_ids=ids).logits, read_back(tmp_path / "to")(ids).logits
    torch.testing.assert_close(written, expected, rtol=1e-4, atol=1e-4)


def changed(base: Path, **settings: Any) -> Path:
    config = json.loads((base / "config.json").read_text())
    for name, value in settings.items():
        part = config[name] if isinstance(value, dict) else config
        part.update(value if isinstance(value, dict) else {name: value})
    (base / "config.json").write_text(json.dumps(config))
    return base


def granite(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    tiny_language("granite", vocab_size=len(tokenizer)).save_pretrained(folder)
    return folder


def llama(folder: Path, tokenizer: PreTrainedTokenizerFast, name: str = "llama", **settings: Any) -> Path:
    return changed(language(folder, name, tokenizer), **settings)


def llava(folder: Path, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> Path:
    return changed(write_tiny_llava(folder, width=64), **settings)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
BEYOND_LLAMA_CPP: dict[str, Callable[[Path, PreTrainedTokenizerFast], Path]] = {
    "another language model": granite,
    "another vision-language model": lambda folder, _: write_tiny("smolvlm", folder),
    "rotary positions": lambda *to: llama(*to, rope_parameters=YARN),
    "activation": lambda *to: llama(*to, hidden_act="relu"),
    "attention's scale": lambda *to: llama(*to, "gemma2", query_pre_attn_scalar=100),
    "selected tokens": lambda *to: llava(*to, vision_feature_select_strategy="full"),
    "a tower's activation": lambda *to: llava(*to, vision_config={"hidden_act": "relu"}),
}


@pytest.mark.parametrize("name", BEYOND_LLAMA_CPP)
def test_what_llama_cpp_does_not_have_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    base = BEYOND_LLAMA_CPP[name](tmp_path / "base", byte_tokenizer())
    with pytest.raises(UserError):
        export_gguf(empty(), base, tmp_path / "to", byte_tokenizer(), kind="f16")
    assert not (tmp_path / "to").exists()


def test_a_tokenizer_that_splits_otherwise_is_refused(tmp_path: Path) -> None:
    other = byte_level(pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False))
    base = language(tmp_path / "base", "llama", other)
    refuse_gguf_base(base)
    with pytest.raises(UserError):
        export_gguf(empty(), base, tmp_path / "to", other, kind="f16")
    assert not (tmp_path / "to").exists()


def test_a_sliding_window_that_is_not_kept_is_told(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    base = changed(language(tmp_path / "base", "mistral", tokenizer), sliding_window=64)
    exported = export_gguf(empty(), base, tmp_path / "to", tokenizer, kind="f16")
    assert len(exported.warnings) == 1
    assert fields(tmp_path / "to" / MODEL_FILE)["llama.context_length"] == 64


def test_only_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    base = language(tmp_path / "base", "llama", tokenizer)
    export_gguf(empty(), base, tmp_path / "to", tokenizer, kind="f16")
    small = (tmp_path / "to" / MODEL_FILE).stat().st_size
    export_gguf(empty(), base, tmp_path / "to", tokenizer, kind="f32")
    assert (tmp_path / "to" / MODEL_FILE).stat().st_size > small
    (tmp_path / "to" / "notes.txt").write_text("mine")
    with pytest.raises(UserError):
        export_gguf(empty(), base, tmp_path / "to", tokenizer, kind="f16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "to"]
