"""What is written runs in llama.cpp as in transformers: next tokens' probabilities, text as tokens, pictures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast, SiglipVisionConfig
from transformers.models.llava.configuration_llava import LlavaConfig

from dora_vl.adapters.adapter import read_adapter
from dora_vl.adapters.folder import load_adapter
from dora_vl.adapters.gguf import export_gguf
from dora_vl.backbones.towers import ImagePreparation
from tests.adapters.gguf_models import TEXTS, TOKENIZERS, dora_on, language
from tests.adapters.test_hub_names import adapter_on
from tests.evaluation.test_ask_any_model import spread
from tests.training.tiny_run import write_tiny_llava

pytest.importorskip("xllamacpp", reason="llama.cpp as a wheel: pip install xllamacpp")

ROPE = {"rope_theta": 10_000.0, "factor": 8.0}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "gpt-2", {}),
    "llama 3": ("llama, tied", "llama-bpe", {"rope_parameters": {**ROPE, **LLAMA3, "rope_type": "llama3"}}),
    "linear positions": ("llama of one key head", "smollm", {"rope_parameters": {**ROPE, "rope_type": "linear"}}),
    "biases": ("llama", "spm", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", "spm", {}),
    "qwen2": ("qwen2", "qwen2", {}),
    "qwen3": ("qwen3", "qwen2", {}),
    "gemma2": ("gemma2", "gemma", {}),
    "gemma3": ("gemma3_text", "gemma", {}),
}
"""Name -> model, tokenizer, and what its configuration has beside."""


def run(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    command = [sys.executable, str(Path(__file__).with_name("llama_cpp_run.py"))]
    done = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def likeliest(logits: torch.Tensor, count: int = 5) -> dict[int, float]:
    values, ids = logits.log_softmax(-1).topk(count)
    return dict(zip(ids.tolist(), values.tolist(), strict=True))


def difference(answer: dict[str, float], expected: dict[int, float]) -> float:
    """Largest, of log probabilities; the tokens must be the same."""
    assert {int(name) for name in answer} == set(expected)
    return max(abs(answer[str(name)] - value) for name, value in expected.items())


@torch.no_grad()
def up_to_a_word(model: Any, tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[int]:
    """As much of a prompt as a whole word follows, since llama.cpp gives no probabilities with half a character."""
    chosen = model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
    special = {*tokenizer.all_special_ids, *range(len(tokenizer), model.config.vocab_size)}
    texts = {position: tokenizer.decode([token]) for position, token in enumerate(chosen) if token not in special}
    return ids[: max(position for position, text in texts.items() if text and text.isascii()) + 1]


@torch.no_grad()
def test_language_models_run_alike(tmp_path: Path) -> None:
    cases, expected, splits = [], {}, {}
    for name, (model_name, tokenizer_name, changes) in CASES.items():
        tokenizer = TOKENIZERS[tokenizer_name]()
        folder = tmp_path / name.replace(" ", "-")
        base = language(folder / "base", model_name, tokenizer, **changes)
        adapter, model = dora_on(base, folder / "adapter")
        export_gguf(adapter, base, folder / "to", tokenizer, kind="f32")
        ids = up_to_a_word(model, tokenizer, tokenizer("".join(TEXTS[1:]), add_special_tokens=False).input_ids)
        cases.append({"folder": str(folder / "to"), "prompt": ids, "texts": TEXTS})
        expected[name] = likeliest(model(torch.tensor([ids])).logits[0, -1])
        splits[name] = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    for name, answer in zip(CASES, run(cases), strict=True):
        limit = 2e-3 if name.startswith("gemma") else 1e-5  # llama.cpp's gelu reads a table of half precision
        assert difference(answer["next"], expected[name]) < limit, name
        assert answer["tokens"] == splits[name], name


def with_siglip(base: Path) -> Path:
    """The same language model behind a SigLIP tower, whose last block's output is not taken."""
    tower = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        hidden_act="gelu_pytorch_tanh",
    )
    content = json.loads((base / "config.json").read_text())
    content |= {"vision_config": tower.to_dict(), "vision_feature_select_strategy": "full"}
    torch.manual_seed(1)
    LlavaForConditionalGeneration(LlavaConfig.from_dict(content)).save_pretrained(base)
    return base


@torch.no_grad()
def test_a_llava_sees_alike(tmp_path: Path) -> None:
    """With SigLIP: a CLIP tower's class token llama.cpp puts in the wrong place (its issue 25814)."""
    base = spread(with_siglip(write_tiny_llava(tmp_path / "base", width=64)))
    adapter = adapter_on(base, tmp_path / "adapter")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    export_gguf(read_adapter(adapter), base, tmp_path / "to", tokenizer, kind="f32")
    pixels = np.random.default_rng(3).integers(0, 255, (8, 8, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    before, after = "USER: ", "\nWhat colour is it? ASSISTANT:"
    case = {
        "folder": str(tmp_path / "to"),
        "prompt": f"{before}<image>{after}",
        "picture": str(tmp_path / "picture.png"),
    }
    model = LlavaForConditionalGeneration.from_pretrained(base).eval()
    load_adapter(model, adapter)
    words = [tokenizer(text, add_special_tokens=False).input_ids for text in (before, after)]
    ids = torch.tensor([[*words[0], *[model.config.image_token_id] * 4, *words[1]]])
    shown = ImagePreparation.from_folder(str(base), aspect="pad").prepare(Image.fromarray(pixels)).unsqueeze(0)
    seen, other = (
        likeliest(model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=image).logits[0, -1])
        for image in (shown, -shown)
    )
    assert max(abs(seen[name] - other.get(name, -9.0)) for name in seen) > 0.1  # it looks at the picture
    (answer,) = run([{**case, "texts": []}])
    assert difference(answer["next"], seen) < 5e-3
