"""A LLaMA-like tokenizer and a tiny random LLaVA, made on the spot: nothing here comes from a hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerBase
from transformers.models.llava.configuration_llava import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

from dora_vl.backbones.loading import add_image_token, load_tokenizer
from dora_vl.backbones.model import DecoderBackbone
from tests.backbones.tiny_families.table import LANGUAGE_MODELS
from tests.backbones.tiny_image_text import VIDEO, write_tiny, write_tiny_language, write_tiny_video
from tests.backbones.tiny_language import SIZES, write_tokenizer_model


def llama_tokenizer(folder: Path, *, legacy: bool) -> PreTrainedTokenizerBase:
    """Vicuna's kind, with ChatML's special tokens and the picture's.

    `legacy` puts the space mark before every stretch of text (also after `</s>`), the newer scheme only before the
    first one; digits and newlines are in no merge, so they fall back to bytes.
    """
    tokenizer = load_tokenizer(str(write_tokenizer_model(folder, legacy=legacy)))
    marks = [AddedToken(token, normalized=False, special=True) for token in ("<|im_start|>", "<|im_end|>")]
    tokenizer.add_tokens(marks, special_tokens=True)
    add_image_token(tokenizer)
    return tokenizer


@pytest.fixture(scope="session", params=["legacy", "first"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return llama_tokenizer(tmp_path_factory.mktemp("tokenizer"), legacy=request.param == "legacy")


@pytest.fixture(scope="session")
def new_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return llama_tokenizer(tmp_path_factory.mktemp("tokenizer"), legacy=False)


VISION: dict[str, Any] = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2},
    **{"image_size": 8, "patch_size": 4},
}
"""A tiny CLIP's sizes."""


def small_clip(seed: int) -> CLIPModel:
    """A CLIP of a few thousand weights, the same for the same seed; four by four patches of 8 pixels."""
    torch.manual_seed(seed)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config={**small, "image_size": 32, "patch_size": 8},
        text_config={**small, "vocab_size": 30},
        projection_dim=6,
    )
    return CLIPModel(config).eval()


@pytest.fixture
def backbone() -> DecoderBackbone:
    """A LLaVA of CLIP with 2x2 patches and two LLaMA layers whose key/value heads are fewer than its heads."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**{**SIZES, "vocab_size": 64, "max_position_embeddings": 256}),
        image_token_index=60,
        image_seq_length=4,
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(8)
    return DecoderBackbone(model.eval())


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Folders of tiny families, those with videos too and language models, each written when it is first asked for."""
    root = tmp_path_factory.mktemp("families")

    class Written(dict[str, Path]):
        def __missing__(self, family: str) -> Path:
            write = write_tiny_language if family in LANGUAGE_MODELS else write_tiny
            self[family] = (write_tiny_video if family.endswith(VIDEO) else write)(family, root / family)
            return self[family]

    return Written()
