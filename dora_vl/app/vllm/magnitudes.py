"""The magnitudes of an adapter's file: taken out of its tensors, each held against the A and B that it belongs to.

Names are those of the file, PEFT's; vLLM's own names of the layers come later.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping

import torch
from jaxtyping import Float
from torch import Tensor

from dora_vl.errors import shown_names

LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
_MAGNITUDE = re.compile(r"\.lora_magnitude_vector(\.weight)?$")
EXPORT = "dora-vl export --for vllm writes one that can be served"


class UnservableAdapter(ValueError):
    """An adapter that vLLM's slots cannot hold with its magnitudes; the message says why and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(f"DoRA: {message}")


def as_factor(name: str) -> str:
    """A magnitude's name as that of the B beside it, which vLLM knows to read; other names as they are."""
    return _MAGNITUDE.sub(LORA_B, name)


def take_magnitudes(tensors: MutableMapping[str, Tensor], *, use_dora: bool) -> dict[str, Float[Tensor, " out"]]:
    """Takes an adapter's magnitudes out of its tensors, by the names of their layers in the file.

    Args:
        use_dora: what the adapter's `adapter_config.json` says.

    Raises:
        UnservableAdapter: magnitudes and factors do not belong together. Nothing was taken then.
    """
    magnitudes = {_MAGNITUDE.sub("", name): name for name in tensors if _MAGNITUDE.search(name)}
    if use_dora != bool(magnitudes):
        raise UnservableAdapter(
            f"adapter_config.json says use_dora: {use_dora}, and the adapter holds {len(magnitudes)} magnitudes; "
            "one of the two is not this adapter's"
        )
    if not magnitudes:
        return {}
    _refuse_other_kinds(tensors)
    _refuse_unpaired(tensors, magnitudes)
    _refuse_sizes(tensors, magnitudes)
    return {layer: tensors.pop(name).flatten().float() for layer, name in magnitudes.items()}


def _refuse_other_kinds(tensors: Mapping[str, Tensor]) -> None:
    embedded = [name for name in tensors if ".lora_embedding_" in name]
    if embedded:
        raise UnservableAdapter(f"{embedded[0]} is an embedding's, whose magnitude is not served; {EXPORT}")


def _refuse_unpaired(tensors: Mapping[str, Tensor], magnitudes: Mapping[str, str]) -> None:
    factors = {name.removesuffix(end) for name in tensors for end in (LORA_A, LORA_B) if name.endswith(end)}
    alone = sorted(layer for layer in magnitudes if not {layer + LORA_A, layer + LORA_B} <= tensors.keys())
    if alone:
        raise UnservableAdapter(f"{len(alone)} magnitudes without A and B: {shown_names(alone)}; {EXPORT}")
    without = sorted(factors - magnitudes.keys())
    if without:
        raise UnservableAdapter(
            f"{len(without)} layers without a magnitude: {shown_names(without)}; the file is not whole"
        )


def _refuse_sizes(tensors: Mapping[str, Tensor], magnitudes: Mapping[str, str]) -> None:
    for layer, name in magnitudes.items():
        a, b, magnitude = tensors[layer + LORA_A], tensors[layer + LORA_B], tensors[name]
        if a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1]:
            raise UnservableAdapter(f"{layer}: A {tuple(a.shape)} and B {tuple(b.shape)} are no linear layer's factors")
        if magnitude.numel() != len(b):
            raise UnservableAdapter(f"{layer}: {magnitude.numel()} magnitudes for {len(b)} outputs")
        if not bool(torch.isfinite(magnitude).all()):
            raise UnservableAdapter(f"{layer}: magnitudes that are not numbers")
