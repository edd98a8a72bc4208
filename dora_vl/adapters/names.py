"""Names of tensors in an adapter file: PEFT's, and ours behind them."""

from __future__ import annotations

from torch import nn

from dora_vl.core.layer import AdaptedLayer

PEFT_PREFIX = "base_model.model."
FILE_TO_LEAF = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "vera_lambda_d": "lambda_d",
    "vera_lambda_b": "lambda_b",
}
"""Every spelling of an adapter's tensor that a file may have -> the layer's own name of it."""
LEAVES = frozenset(FILE_TO_LEAF.values())


def own_name(key: str) -> str:
    """The model's own name of a tensor in an adapter file."""
    name = key.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
    for spelling, leaf in FILE_TO_LEAF.items():
        if name.endswith(f".{spelling}"):
            return f"{name.removesuffix(spelling)}{leaf}"
    return name


def file_name(model: nn.Module, name: str) -> str:
    """The name under which a tensor of the model is saved."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(module, AdaptedLayer):
        leaf = module.FILE_LEAVES.get(leaf, leaf)
    return f"{PEFT_PREFIX}{owner}.{leaf}" if owner else f"{PEFT_PREFIX}{leaf}"
