"""Tiny random language models: of several families, and Vicuna v1.5 as published, with `tokenizer.model` alone."""

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
from transformers.models.granite.configuration_granite import GraniteConfig

from dora_vl.backbones.families.formats import VICUNA_SYSTEM

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, Any] = {
    "llama": (LlamaConfig, {}),
    "gemma2": (Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 2.0}),  # changes its logits
    "granite": (GraniteConfig, {"logits_scaling": 3.0}),
}


def tiny_language(family: str = "llama", *, vocab_size: int = 300, seed: int = 0, **sizes: int) -> Any:
    """A random model in eval mode whose weights are large enough to make logits differ; `sizes` replace `SIZES`."""
    kind, extra = FAMILIES[family]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(kind(**{**SIZES, **sizes}, vocab_size=vocab_size, **extra))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(6)
    return model.eval()


def byte_tokenizer(*, begin: bool = True) -> PreTrainedTokenizerFast:
    """Splits like SmolLM2's, almost into bytes; puts `<s>` in front as LLaMA's does, if asked."""
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.train_from_iterator(
        ["the correct answer is answer1 ### Response: ### Instruction: Below is an instruction"] * 3,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<unk>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    if begin:
        words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def write_tiny_language(folder: Path, **sizes: int) -> Path:
    """A LLaMA folder with that tokenizer."""
    tokenizer = byte_tokenizer()
    tiny_language(vocab_size=len(tokenizer), **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


LESSONS = [
    VICUNA_SYSTEM,
    "/USER: What is in the picture? ASSISTANT: A red circle on a blue square",
    "/USER: Is it red? ASSISTANT: Yes, it is. No, it is not. ASSISTANT",
    "[INST] What is it? [/INST] <<SYS>> <</SYS>> ### Human: ### Assistant: system user assistant",
    "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ .,:;?!'-<>/|_[]#",
    "a  b   c",
    "/USER:/USER:/USER:",  # as in LLaMA's, "USER" is a piece and "▁USER" is two
]
CONTROL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def sentencepiece_model() -> bytes:
    """BPE with LLaMA's own settings: byte fallback, a space mark in front, spaces kept as they are."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LESSONS * 4),
        model_writer=written,
        model_type="bpe",
        vocab_size=480,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        character_coverage=1.0,
        minloglevel=2,
    )
    return written.getvalue()


def write_tokenizer_model(folder: Path, *, legacy: bool | None = False) -> Path:
    """`tokenizer.model`, and the `tokenizer_config.json` of Vicuna v1.5; `legacy` None leaves that entry out."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    token = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "pad_token": None,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        **{name: {**token, "content": content} for name, content in CONTROL.items()},
    }
    if legacy is not None:
        settings["legacy"] = legacy
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def write_tiny_vicuna(folder: Path) -> Path:
    """The tokenizer's folder with a random LLaMA of two layers, its vocabulary full as Vicuna's is."""
    write_tokenizer_model(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 4, "max_position_embeddings": 4096}
    config = LlamaConfig(**{**SIZES, **sizes}, vocab_size=480)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
