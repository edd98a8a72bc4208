"""A LLaMA-like tokenizer and a tiny random LLaVA, made on the spot: nothing here comes from a hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast
from transformers.models.llava.configuration_llava import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

from dora_vl.backbones.model import DecoderBackbone
from dora_vl.backbones.templates import VICUNA_SYSTEM
from tests.backbones.tiny_image_text import write_tiny

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LESSONS = [
    VICUNA_SYSTEM,
    "USER: What is in the picture? ASSISTANT: A red circle on a blue square",
    "USER: Is it red? ASSISTANT: Yes, it is. No, it is not. ASSISTANT USER",
    "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ .,:;?!'-<>/|_",
] * 4


def llama_tokenizer(legacy: bool) -> PreTrainedTokenizerFast:
    """BPE with a space mark, byte fallback and a begin token, as LLaMA's tokenizer.json has it.

    `legacy` puts the space mark before every stretch of text (also after `</s>`), the newer scheme only before the
    first one; digits and newlines are in no merge, so they fall back to bytes.
    """
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(LESSONS, trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL + BYTES))
    learned = trained.get_vocab()
    merges = [tuple(merge) for merge in __import__("json").loads(trained.to_str())["model"]["merges"]]
    tokenizer = Tokenizer(models.BPE(learned, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    chatml = [AddedToken(token, normalized=False, special=True) for token in ("<image>", "<|im_start|>", "<|im_end|>")]
    fast.add_tokens(chatml, special_tokens=True)
    return fast


@pytest.fixture(scope="session", params=["legacy", "first"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """Both ways in which LLaMA tokenizers put the space mark."""
    return llama_tokenizer(legacy=request.param == "legacy")


@pytest.fixture(scope="session")
def new_tokenizer() -> PreTrainedTokenizerFast:
    """The space mark before the first stretch only."""
    return llama_tokenizer(legacy=False)


def tiny_llava_config(image_token_id: int = 60, vocabulary: int = 64) -> LlavaConfig:
    """CLIP with 2x2 patches and two LLaMA layers whose key/value heads are fewer than its heads."""
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        ),
        text_config=LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        image_token_index=image_token_id,
        image_seq_length=4,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


@pytest.fixture
def backbone() -> DecoderBackbone:
    """A tiny random LLaVA in float32, its weights large enough for attention to matter."""
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(tiny_llava_config())
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(8)
    return DecoderBackbone(model.eval())


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Tiny families' folders, each written when it is first asked for."""
    root = tmp_path_factory.mktemp("families")

    class Written(dict[str, Path]):
        def __missing__(self, family: str) -> Path:
            self[family] = write_tiny(family, root / family)
            return self[family]

    return Written()
