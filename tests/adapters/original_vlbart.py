"""Dictionaries as NVlabs' DoRA and VL-Adapter's LoRA save a VL-BART: names and shapes written out, none asked of ours.

`torch.save(model.state_dict())` of the original: five names of the token embedding, a buffer, and beside each adapted
weight its factors. What an original run leaves frozen has the values of the BART that it began from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

WIDTH, LAYERS, FEEDFORWARD, POSITIONS, RANK = 16, 1, 32, 258, 3
LORA_ALPHA = 2.0
TOKEN_NAMES = (
    "model.shared.weight",
    "model.encoder.embed_tokens.weight",
    "model.decoder.embed_tokens.weight",
    "model.encoder.visual_embedding.obj_order_embedding.weight",
    "lm_head.weight",
)
ATTENTIONS = {"encoder": ("self_attn",), "decoder": ("self_attn", "encoder_attn")}


@dataclass(frozen=True)
class Original:
    """A dictionary, and the plain weights that it means."""

    file: dict[str, Tensor]
    whole: dict[str, Tensor]


def plain_shapes(*, vocabulary: int, features: int) -> dict[str, tuple[int, ...]]:
    """The base's tensors but the token embedding's names."""
    vision = "model.encoder.visual_embedding"
    shapes: dict[str, tuple[int, ...]] = {"final_logits_bias": (1, vocabulary)}
    shapes |= linear(f"{vision}.feat_embedding.0", WIDTH, features) | norm(f"{vision}.feat_embedding.1")
    shapes |= linear(f"{vision}.absolute_vis_pos_embedding.0", WIDTH, 5)
    shapes |= norm(f"{vision}.absolute_vis_pos_embedding.1")
    shapes[f"{vision}.img_order_embedding.weight"] = (2, WIDTH)
    for side, attentions in ATTENTIONS.items():
        shapes[f"model.{side}.embed_positions.weight"] = (POSITIONS, WIDTH)
        shapes |= norm(f"model.{side}.layernorm_embedding")
        for number in range(LAYERS):
            layer = f"model.{side}.layers.{number}"
            for attention in attentions:
                for projection in ("q", "k", "v", "out"):
                    shapes |= linear(f"{layer}.{attention}.{projection}_proj", WIDTH, WIDTH)
                shapes |= norm(f"{layer}.{attention}_layer_norm")
            shapes |= linear(f"{layer}.fc1", FEEDFORWARD, WIDTH) | linear(f"{layer}.fc2", WIDTH, FEEDFORWARD)
            shapes |= norm(f"{layer}.final_layer_norm")
    return shapes


def linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}


def adapted_linears() -> list[str]:
    return [
        f"model.{side}.layers.{number}.{attention}.{projection}_proj"
        for side, attentions in ATTENTIONS.items()
        for number in range(LAYERS)
        for attention in attentions
        for projection in ("q", "v")
    ]


def trains(name: str, *, norms: bool) -> bool:
    """Whether an original run trains a plain tensor: biases, the visual embedding, and norm weights where asked."""
    is_norm = "layer_norm" in name or "layernorm" in name
    return name.endswith(".bias") or ".visual_embedding." in name or (norms and is_norm)


def original(
    base: Mapping[str, Tensor], *, tasks: tuple[str, ...] = (), norms: bool = False, prefix: str = "", seed: int = 5
) -> Original:
    """What a run on this base has saved: NVlabs' DoRA, or with `tasks` VL-Adapter's single LoRA.

    The last 200 rows of the token embedding are another draw than the base's.
    """
    generator = torch.Generator().manual_seed(seed)

    def moved(value: Tensor) -> Tensor:
        return value + 0.2 * torch.randn(value.shape, generator=generator)

    tokens = base["model.shared.weight"].clone()
    tokens[-200:] = torch.randn(200, WIDTH, generator=generator) * 0.3
    features = base["model.encoder.visual_embedding.feat_embedding.0.weight"].shape[1]
    plain = {}
    for name, shape in plain_shapes(vocabulary=len(tokens), features=features).items():
        assert base[name].shape == shape, name
        plain[name] = moved(base[name]) if trains(name, norms=norms) else base[name].clone()
    file, whole = {**plain, **dict.fromkeys(TOKEN_NAMES, tokens)}, {**plain, **dict.fromkeys(TOKEN_NAMES, tokens)}
    for name in adapted_linears():
        weight = file.pop(f"{name}.weight")
        a = torch.randn(RANK, WIDTH, generator=generator) * 0.3
        b = torch.randn(WIDTH, RANK, generator=generator) * 0.2
        if tasks:
            file |= {f"{name}.weight": weight, **{f"{name}.lora_As.{task}": a for task in tasks}}
            file |= {f"{name}.lora_Bs.{task}": b for task in tasks}
            whole[f"{name}.weight"] = weight + LORA_ALPHA / RANK * b @ a
            continue
        direction = weight + b @ a
        length = direction.norm(dim=1, keepdim=True)
        m = weight.norm(dim=1, keepdim=True) * torch.linspace(0.7, 1.4, WIDTH).unsqueeze(1)
        file |= {f"{name}.weight_v": weight, f"{name}.weight_m": m, f"{name}.lora_A": a, f"{name}.lora_B": b}
        whole[f"{name}.weight"] = m * direction / length
    return Original({f"{prefix}{name}": tensor for name, tensor in file.items()}, whole)
