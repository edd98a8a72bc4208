"""Tiny bases, and adapters written the way each tool writes them, with each tool's own forward pass written out."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

WIDTH, RANK, HEADS, KEY_HEADS = 16, 3, 4, 2
Q = "model.layers.0.self_attn.q_proj"
K = "model.layers.1.self_attn.k_proj"
DOWN = "model.layers.1.mlp.down_proj"


def tiny_llama(**settings: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=WIDTH,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=32,
        **settings,
    )
    return LlamaForCausalLM(config).eval()


def saved(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def factors(weight: Tensor, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and m of one layer where nothing is neutral."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = weight.shape
    a = torch.randn(RANK, columns, generator=generator) * 0.3
    b = torch.randn(rows, RANK, generator=generator) * 0.3
    m = weight.detach().norm(dim=1) * torch.linspace(0.5, 1.6, rows)
    return a, b, m


def dora(weight: Tensor, a: Tensor, b: Tensor, m: Tensor | None, scale: float) -> Tensor:
    """The effective weight of one output row's magnitude, dense."""
    direction = weight + scale * b @ a
    return direction if m is None else direction * (m / direction.norm(dim=1)).unsqueeze(1)
